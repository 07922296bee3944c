"""Expected load of a placement, from counts of picks: which replica serves how much, and the penalty for imbalance.

Counting messages, and the replica rules themselves, are in `moeplan.cluster`; here are loads of whole layers at once.

Names: n requests, L layers, N nodes, P GPUs, S slots, E experts; use [L, N, E] is the picks of each expert asked for at
each node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan._kernels.loads import load_norm, load_norm_slope
from moeplan.arrays import BoolArray, CountArray, Float32Array, FloatArray, Int64Array, NumberArray
from moeplan.cluster import Cluster, Routes
from moeplan.planning.pricing import Pricing

__all__ = ["ExpectedLoad", "load_by_request", "load_per_replica", "load_ratio", "remote_share", "shared_gpu_load"]


def load_ratio(load: NumberArray) -> FloatArray:
    """[..], the busiest unit's load over the mean of all units, from load [.., units]; 1 where there is no load."""
    mean = load.mean(axis=-1)
    return np.asarray(np.where(mean > 0, load.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0))


def load_by_request(routes: Routes, counts: CountArray, groups: Int64Array) -> Float32Array:
    """float32 [n, L, P]: the expected picks that each GPU serves of each request.

    Args:
        counts: uint32 [n, L, E], picks of each request. groups: int64 [n].
    """
    cluster, place = routes.cluster, routes.placement
    if place.redundant == 0:  # every expert has one slot: its picks go there, whoever asks
        by_slot = np.take_along_axis(counts, place.slots[None].astype(np.intp), axis=2)
        by_gpu = by_slot.reshape(len(counts), place.num_layers, cluster.num_gpus, -1)
        return np.asarray(by_gpu.sum(axis=3, dtype=np.float32))
    load = np.zeros((len(counts), place.num_layers, cluster.num_gpus), np.float32)
    members = [np.flatnonzero(groups == d) for d in range(cluster.num_groups)]
    for layer in range(place.num_layers):
        share = routes.share(layer).astype(np.float32)
        for d, of_group in enumerate(members):
            load[of_group, layer] = counts[of_group, layer].astype(np.float32) @ share[d]
    return load


def remote_share(routes: Routes, use: NumberArray, groups: Int64Array) -> float:
    """Expected share of the requests' picks that another node than their group's serves.

    Args:
        use: [n, L, E], picks of each request. groups: int64 [n].
    """
    by_group = np.zeros((routes.cluster.num_groups, *use.shape[1:]))
    np.add.at(by_group, groups, use)
    return float(1 - (by_group * routes.local_share).sum() / max(float(by_group.sum()), 1.0))


def load_per_replica(use: FloatArray, replicas: FloatArray, local: BoolArray) -> FloatArray:
    """float64 [L, N, E], the picks that one replica on each node serves, or would serve.

    Args:
        use: float64 [L, N, E]. replicas: [L, N, E], how many each node holds.
        local: [L, N, E], whether a node's own replica serves all that the node asks for. What the other nodes ask for
            is shared by all replicas of the expert.
    """
    shared = (use * ~local).sum(axis=1) / replicas.sum(axis=1)
    return np.asarray(np.where(local, use, 0.0) + shared[:, None])


def shared_gpu_load(slots: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus: int) -> FloatArray:
    """float64 [L, P], the picks that GPUs serve where all replicas of an expert share its load [L, E] alike."""
    layers, experts = load.shape
    count = np.zeros((layers, experts))
    np.add.at(count, (np.arange(layers)[:, None], slots), 1.0)
    each = np.asarray(load, np.float64) / np.maximum(count, 1.0)
    by_slot = np.take_along_axis(each, slots.astype(np.int64), axis=1)
    return np.asarray(by_slot.reshape(layers, gpus, -1).sum(axis=2))


class ExpectedLoad:
    """Loads of a placement, by the expectation of the replica rule.

    Args:
        slots: int64 [L, S]. experts: E.
        nearest: a replica on its own node serves a pick; if not, all replicas share all picks (`hash`).

    Attributes:
        on_gpu: float64 [L, P, E], 1 where a GPU holds an expert.
        local_share: float64 [N, L, E], the share of a node's picks that is served there.
        local: bool [L, N, E], whether a node's own replica serves all its picks.
    """

    def __init__(self, cluster: Cluster, slots: Int64Array, experts: int, nearest: bool) -> None:
        layers, gpus = len(slots), cluster.num_gpus
        self.cluster = cluster
        self.on_gpu = np.zeros((layers, gpus, experts))
        gpu = np.repeat(np.arange(gpus), slots.shape[1] // gpus)
        self.on_gpu[np.arange(layers)[:, None], gpu[None], slots] = 1.0
        self.replicas = self.on_gpu.reshape(layers, cluster.nodes, -1, experts).sum(axis=2)  # [L, N, E]
        self.total = self.replicas.sum(axis=1)  # [L, E]
        self.local = (self.replicas > 0) & nearest
        self.local_share = np.where(self.local, 1.0, self.replicas / self.total[:, None]).transpose(1, 0, 2)

    def per_replica(self, use: FloatArray) -> FloatArray:
        """`load_per_replica` of this placement."""
        return load_per_replica(use, self.replicas, self.local)

    def loads(self, use: FloatArray) -> tuple[FloatArray, FloatArray]:
        """float64 [L, N] and [L, P], the picks that nodes and GPUs serve."""
        by_gpu = (self.on_gpu * self.per_replica(use).repeat(self.cluster.gpus_per_node, axis=1)).sum(axis=2)
        return by_gpu.reshape(*use.shape[:2], -1).sum(axis=2), by_gpu

    def imbalance(self, use: FloatArray) -> list[float]:
        """Load imbalance (the load norm) of nodes and of GPUs, mean over layers."""
        return [float(load_norm(load).mean()) for load in self.loads(use)]

    def penalty_slope(self, use: FloatArray, pricing: Pricing) -> FloatArray:
        """float64 [N, L, E], what one more pick of an expert, asked for at a node, adds to the load penalty."""
        by_node, by_gpu = self.loads(use)
        node_slope = pricing.node_penalty * load_norm_slope(by_node)
        slope = pricing.gpu_penalty * load_norm_slope(by_gpu) + node_slope.repeat(self.cluster.gpus_per_node, axis=1)
        on_gpu = self.on_gpu * slope[:, :, None]
        own = on_gpu.reshape(*use.shape[:2], -1, use.shape[2]).sum(axis=2)
        anyone = (on_gpu.sum(axis=1) / self.total)[:, None]
        return np.asarray(np.where(self.local, own, anyone).transpose(1, 0, 2))
