"""Packing experts into equal bins by load, replicating those of high load, assigning a node's experts to its GPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.arrays import FloatArray, Int32Array, Int64Array

__all__ = ["pack", "replicate", "slots_from_nodes"]


def pack(weights: npt.NDArray[np.floating], bins: int) -> tuple[Int64Array, Int64Array]:
    """Greedy packing into bins of equal count: heaviest first, each to the lightest bin that is not full.

    The same rule as DeepSeek's EPLB uses for groups and for GPUs (ties: the lower item, the lower bin).

    Args:
        weights: [rows, items]; items divide by bins.

    Returns:
        int64 [rows, items] twice: the bin of each item, and its rank within the bin.
    """
    rows, items = weights.shape
    bin_size = items // bins
    row = np.arange(rows)
    chosen, rank = np.zeros((rows, items), np.int64), np.zeros((rows, items), np.int64)
    if bin_size == 1:
        chosen[:] = np.arange(items)
        return chosen, rank
    order = np.argsort(-weights, axis=1, kind="stable")
    filled, load = np.zeros((rows, bins), np.int64), np.zeros((rows, bins))
    for i in range(items):
        item = order[:, i]
        best = np.where(filled < bin_size, load, np.inf).argmin(axis=1)
        chosen[row, item], rank[row, item] = best, filled[row, best]
        load[row, best] += weights[row, item]
        filled[row, best] += 1
    return chosen, rank


def replicate(load: FloatArray, slots: int, max_replicas: int | None = None) -> tuple[Int64Array, Int64Array]:
    """Give each redundant slot to the expert whose replicas carry most (the rule of DeepSeek's EPLB).

    Args:
        load: float64 [rows, E]. slots: how many replicas in all.
        max_replicas: the most replicas of one expert; None: no limit.

    Returns:
        int64 [rows, slots], the expert of each replica; int64 [rows, E], replicas of each expert.
    """
    rows, experts = load.shape
    row = np.arange(rows)
    expert = np.tile(np.arange(slots, dtype=np.int64) % experts, (rows, 1))
    count = np.ones((rows, experts), np.int64)
    for slot in range(experts, slots):
        each = load / count
        busiest = (each if max_replicas is None else np.where(count < max_replicas, each, -1.0)).argmax(axis=1)
        expert[:, slot] = busiest
        count[row, busiest] += 1
    return expert, count


def slots_from_nodes(
    experts: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus_per_node: int
) -> Int32Array:
    """Deal each node's experts to its GPUs, equally many to each and as even in load as greedy packing gets.

    No GPU gets two replicas of an expert: where a node holds several, they go first, each expert's to the GPUs with
    most free slots (which keeps free slots even, so that the last expert finds as many GPUs as it has replicas).

    Args:
        experts: integers [L, N, M], the experts that each node holds, each at most `gpus_per_node` times.
        load: floats [L, N, M], the expected picks that each of these replicas serves.
        gpus_per_node: G, dividing M.

    Returns:
        int32 [L, N * M], the expert of each slot.
    """
    layers, nodes, held = experts.shape
    flat, weight = experts.reshape(layers * nodes, held), load.reshape(layers * nodes, held)
    if (np.diff(np.sort(flat, axis=1), axis=1) == 0).any():
        rows = [_deal_replicas(flat[i], weight[i], gpus_per_node) for i in range(len(flat))]
        return np.array(rows, np.int32).reshape(layers, nodes * held)
    gpu, rank = pack(weight, gpus_per_node)
    slots = np.zeros((layers * nodes, held), np.int32)
    np.put_along_axis(slots, gpu * (held // gpus_per_node) + rank, flat.astype(np.int32), axis=1)
    return slots.reshape(layers, nodes * held)


def _deal_replicas(experts: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus: int) -> list[int]:
    """One node that holds some experts more than once: the experts of its slots, GPU by GPU."""
    free = np.full(gpus, len(experts) // gpus)
    weight = np.zeros(gpus)
    held: list[list[int]] = [[] for _ in range(gpus)]
    distinct, first, count = np.unique(experts, return_index=True, return_counts=True)
    for i in np.lexsort((-load[first], -count)):
        if count[i] > 1:
            chosen = np.lexsort((weight, -free))[: count[i]]
        else:
            chosen = np.array([np.where(free > 0, weight, np.inf).argmin()])
        for gpu in chosen:
            held[gpu].append(int(distinct[i]))
        free[chosen] -= 1
        weight[chosen] += load[first[i]]
    return [expert for gpu in held for expert in gpu]
