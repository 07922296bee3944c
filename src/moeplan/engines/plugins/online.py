"""Online planning: improve the plan while the engine serves, for the expert load that the engine counts.

An engine reports how often each expert was picked, not by which requests. The plan holds that information: it places
experts on the nodes whose requests pick them. So half of an expert's picks are assumed to come from the nodes that hold
it in the plan, and half from all nodes equally. Then the planner's local search (`moeplan._kernels.local_search`)
improves each imbalanced layer in one sweep, the most imbalanced first, until the time limit. Experts seldom leave their
node, so locality is kept; a balancer that knows only totals loses it.

Names: L MoE layers, E experts, S slots, P GPUs on N nodes.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from moeplan.arrays import BoolArray, FloatArray, Int32Array, NumberArray
from moeplan.types import Placement, has_duplicate_experts

__all__ = ["LOCAL_SHARE", "MAX_RATIO", "TIME_LIMIT", "find_duplicate", "rebalance", "warm_up"]


#: Share of an expert's picks that are assumed to come from the nodes that hold it in the plan.
LOCAL_SHARE = 0.5
#: Layers with a load ratio (busiest GPU over mean) up to this are not changed.
MAX_RATIO = 1.05
#: Wall time of one call, in seconds; layers that are not reached stay unchanged.
TIME_LIMIT = 2.0
#: Layers between checks of the time: the search handles two in parallel.
BATCH = 4


def rebalance(
    plan: Placement,
    load: NumberArray,
    old: Int32Array | None = None,
    *,
    nearest: bool,
    seconds: float = TIME_LIMIT,
) -> Int32Array:
    """A map for the current load, with few changes to the current map.

    Args:
        plan: without an expert twice on a GPU (`find_duplicate`).
        load: [L, E], picks of each expert, in any unit.
        old: int32 [L, S], the current map; a layer that is invalid, or still as engines start (experts in order),
            starts from the plan.
        nearest: the engine prefers a replica on its own node (SGLang); else it uses all equally (vLLM).
        seconds: wall time limit. One process computes the map for all (`Ranks.broadcast`), so it may depend on time.

    Returns:
        int32 [L, S].
    """
    end = time.monotonic() + seconds
    from moeplan._kernels.local_search import improve
    from moeplan.planning.expected_load import load_ratio, shared_gpu_load
    from moeplan.planning.pricing import BOTH

    nearest = nearest and not has_duplicate_experts(plan.slots, plan.nodes).any()
    slots = plan.slots.astype(np.int64)
    if old is not None and old.shape == slots.shape:
        kept = _usable_layers(old, plan, nearest)
        slots[kept] = old[kept]
    counted = np.asarray(load, np.float64)
    ratio = load_ratio(shared_gpu_load(slots, counted, plan.num_gpus))
    order = np.argsort(-ratio, kind="stable")
    order = order[ratio[order] > MAX_RATIO]
    for first in range(0, len(order), BATCH):
        if time.monotonic() > end:
            break
        layers = order[first : first + BATCH]
        part = slots[layers]
        use = _use_by_node(plan, layers, counted[layers])
        improve(use, part, plan.gpus_per_node, BOTH.objective(nearest), 1)
        slots[layers] = part
    return slots.astype(np.int32)


def _use_by_node(plan: Placement, layers: npt.NDArray[np.intp], load: FloatArray) -> FloatArray:
    """float64 [layers, N, E]: the load split by the node that picks are assumed to come from."""
    held = np.zeros((len(layers), plan.nodes, plan.num_experts))
    by_node = plan.slots[layers].reshape(len(layers), plan.nodes, -1)
    held[np.arange(len(layers))[:, None, None], np.arange(plan.nodes)[None, :, None], by_node] = 1.0
    share = (1.0 - LOCAL_SHARE) / plan.nodes + LOCAL_SHARE * held / held.sum(axis=1, keepdims=True)
    return np.ascontiguousarray(share * load[:, None, :])


def find_duplicate(plan: Placement) -> str:
    """The first GPU that holds an expert twice, as text; empty if none. The search does not support such placements."""
    found = np.argwhere(has_duplicate_experts(plan.slots, plan.num_gpus))
    return f"GPU {found[0, 1]} holds an expert twice in layer row {found[0, 0]}" if len(found) else ""


def _usable_layers(old: Int32Array, plan: Placement, nearest: bool) -> BoolArray:
    """bool [L]: layers in which `old` is valid for the search and not the engine's initial map."""
    inside = ((old >= 0) & (old < plan.num_experts)).all(axis=1)
    present = np.zeros((len(old), plan.num_experts), bool)
    rows = np.flatnonzero(inside)
    present[rows[:, None], old[rows]] = True
    duplicate = has_duplicate_experts(old, plan.nodes if nearest else plan.num_gpus).any(axis=1)
    initial = (old == np.arange(old.shape[1]) % plan.num_experts).all(axis=1)
    return np.asarray(inside & present.all(axis=1) & ~duplicate & ~initial)


def warm_up() -> None:
    """Load the search, and compile it the first time, so that no serving step waits for it."""
    slots = np.array([[0, 1, 2, 3, 0, 3]], np.int32)
    for nearest in (True, False):
        rebalance(Placement(slots, 4, 2, 1), np.array([[9.0, 1.0, 1.0, 1.0]]), nearest=nearest)
