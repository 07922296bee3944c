"""Packing experts into equal bins by load, and dealing a node's experts to its GPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.types import Int32Array

__all__ = ["pack", "slots_from_nodes"]

Int64Array = npt.NDArray[np.int64]


def pack(weights: npt.NDArray[np.floating], bins: int) -> tuple[Int64Array, Int64Array]:
    """Greedy packing into bins of equal count: heaviest first, each to the lightest bin with room.

    The same rule as DeepSeek's EPLB uses for groups and for GPUs (ties: the lower item, the lower bin).

    Args:
        weights: [rows, items]; items divide by bins.

    Returns:
        int64 [rows, items] twice: the bin of each item, and its rank within the bin.
    """
    rows, items = weights.shape
    room = items // bins
    at = np.arange(rows)
    chosen, rank = np.zeros((rows, items), np.int64), np.zeros((rows, items), np.int64)
    if room == 1:
        chosen[:] = np.arange(items)
        return chosen, rank
    order = np.argsort(-weights, axis=1, kind="stable")
    filled, load = np.zeros((rows, bins), np.int64), np.zeros((rows, bins))
    for i in range(items):
        item = order[:, i]
        best = np.where(filled < room, load, np.inf).argmin(axis=1)
        chosen[at, item], rank[at, item] = best, filled[at, best]
        load[at, best] += weights[at, item]
        filled[at, best] += 1
    return chosen, rank


def slots_from_nodes(
    experts: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus_per_node: int
) -> Int32Array:
    """Deal each node's experts to its GPUs, equally many to each and as even in load as greedy packing gets.

    A node holds an expert at most once, so no GPU gets two copies.

    Args:
        experts: integers [L, N, M], the experts that each node holds.
        load: floats [L, N, M], the expected picks that each of these copies serves.
        gpus_per_node: G, dividing M.

    Returns:
        int32 [L, N * M], the expert of each slot.
    """
    layers, nodes, held = experts.shape
    per_gpu = held // gpus_per_node
    gpu, rank = pack(load.reshape(layers * nodes, held), gpus_per_node)
    slots = np.zeros((layers * nodes, held), np.int32)
    np.put_along_axis(slots, gpu * per_gpu + rank, experts.reshape(layers * nodes, held).astype(np.int32), axis=1)
    return slots.reshape(layers, nodes * held)
