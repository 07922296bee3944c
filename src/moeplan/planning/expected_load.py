"""Who serves what in a placement, and what its load costs, by the expectation of the replica rule.

Messages are `moeplan.cluster`'s; here are only shares and loads of counts, for whole layers at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster

__all__ = ["ExpectedLoad", "Prices"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
#: Of uneven nodes and of uneven GPUs, in shares of all picks.
Prices = tuple[float, float]


class ExpectedLoad:
    """Who serves what in a placement, by the expectation of the replica rule.

    Attributes:
        on: float64 [L, P, E], 1 where a GPU holds an expert; kept: [N, L, E], share of a node's picks served there.
    """

    def __init__(self, cluster: Cluster, slots: Int64Array, experts: int, nearest: bool) -> None:
        layers, gpus = len(slots), cluster.num_gpus
        self.cluster = cluster
        self.on = np.zeros((layers, gpus, experts))
        gpu = np.repeat(np.arange(gpus), slots.shape[1] // gpus)
        self.on[np.arange(layers)[:, None], gpu[None], slots] = 1.0
        at = self.on.reshape(layers, cluster.nodes, -1, experts).sum(axis=2)
        self.copies = at.sum(axis=1)
        self.near = (at > 0) & nearest  # [L, N, E], a node whose own copy serves all it asks for
        self.kept = np.where(self.near, 1.0, at / self.copies[:, None]).transpose(1, 0, 2)

    def by_copy(self, use: FloatArray) -> FloatArray:
        """[L, N, E], what a copy on each node serves, or would, of use [L, N, E]."""
        shared = (use * ~self.near).sum(axis=1) / self.copies
        return np.asarray(np.where(self.near, use, 0.0) + shared[:, None])

    def loads(self, use: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[L, N] and [L, P], the picks that nodes and GPUs serve of use [L, N, E]."""
        by_gpu = (self.on * self.by_copy(use).repeat(self.cluster.gpus_per_node, axis=1)).sum(axis=2)
        return by_gpu.reshape(*use.shape[:2], -1).sum(axis=2), by_gpu

    def uneven(self, use: FloatArray) -> list[float]:
        """Unevenness of nodes and of GPUs, mean over layers."""
        return [float(_norm(load).mean()) for load in self.loads(use)]

    def slope(self, use: FloatArray, prices: Prices) -> FloatArray:
        """[N, L, E]: what one more pick of an expert, asked at a node, adds to the price of load, in messages."""
        by_node, by_gpu = self.loads(use)
        steep = prices[1] * _steep(by_gpu) + prices[0] * _steep(by_node).repeat(self.cluster.gpus_per_node, axis=1)
        paid = self.on * steep[:, :, None]
        own = paid.reshape(*use.shape[:2], -1, use.shape[2]).sum(axis=2)
        anyone = (paid.sum(axis=1) / self.copies)[:, None]
        return np.asarray(np.where(self.near, own, anyone).transpose(1, 0, 2))


def _norm(load: FloatArray) -> FloatArray:
    """The 16-norm of load / mean over the last axis, as `placing` has it."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio**16).mean(axis=-1) ** (1 / 16))


def _steep(load: FloatArray) -> FloatArray:
    """Its slope, times the picks of the layer."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio / np.maximum(_norm(load), 1e-12)[..., None]) ** 15)
