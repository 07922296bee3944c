"""Packing experts into equal bins by load, and dealing a node's experts to its GPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.types import Int32Array

__all__ = ["pack", "replicate", "slots_from_nodes"]

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


def replicate(load: npt.NDArray[np.float64], slots: int, most: int | None = None) -> tuple[Int64Array, Int64Array]:
    """Give each spare slot to the expert whose copies carry most (the rule of DeepSeek's EPLB).

    Args:
        load: float64 [rows, E]; slots: how many copies in all; most: most copies of one expert, None for no limit.

    Returns:
        int64 [rows, slots], the expert of each copy; int64 [rows, E], copies of each expert.
    """
    rows, experts = load.shape
    at = np.arange(rows)
    copy = np.tile(np.arange(slots, dtype=np.int64) % experts, (rows, 1))
    count = np.ones((rows, experts), np.int64)
    for slot in range(experts, slots):
        each = load / count
        busiest = (each if most is None else np.where(count < most, each, -1.0)).argmax(axis=1)
        copy[:, slot] = busiest
        count[at, busiest] += 1
    return copy, count


def slots_from_nodes(
    experts: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus_per_node: int
) -> Int32Array:
    """Deal each node's experts to its GPUs, equally many to each and as even in load as greedy packing gets.

    No GPU gets two copies of an expert: where a node holds several, they go first, each expert's to the GPUs with most
    room (which keeps the rooms even, so that the last expert finds as many GPUs as it has copies).

    Args:
        experts: integers [L, N, M], the experts that each node holds, each at most `gpus_per_node` times.
        load: floats [L, N, M], the expected picks that each of these copies serves.
        gpus_per_node: G, dividing M.

    Returns:
        int32 [L, N * M], the expert of each slot.
    """
    layers, nodes, held = experts.shape
    flat, weight = experts.reshape(layers * nodes, held), load.reshape(layers * nodes, held)
    if (np.diff(np.sort(flat, axis=1), axis=1) == 0).any():
        rows = [_deal_copies(flat[i], weight[i], gpus_per_node) for i in range(len(flat))]
        return np.array(rows, np.int32).reshape(layers, nodes * held)
    gpu, rank = pack(weight, gpus_per_node)
    slots = np.zeros((layers * nodes, held), np.int32)
    np.put_along_axis(slots, gpu * (held // gpus_per_node) + rank, flat.astype(np.int32), axis=1)
    return slots.reshape(layers, nodes * held)


def _deal_copies(experts: npt.NDArray[np.integer], load: npt.NDArray[np.floating], gpus: int) -> list[int]:
    """One node that holds some experts more than once: the experts of its slots, GPU by GPU."""
    room = np.full(gpus, len(experts) // gpus)
    weight = np.zeros(gpus)
    hands: list[list[int]] = [[] for _ in range(gpus)]
    kinds, first, count = np.unique(experts, return_index=True, return_counts=True)
    for i in np.lexsort((-load[first], -count)):
        if count[i] > 1:
            taken = np.lexsort((weight, -room))[: count[i]]
        else:
            taken = np.array([np.where(room > 0, weight, np.inf).argmin()])
        for gpu in taken:
            hands[gpu].append(int(kinds[i]))
        room[taken] -= 1
        weight[taken] += load[first[i]]
    return [expert for hand in hands for expert in hand]
