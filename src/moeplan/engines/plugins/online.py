"""Planning anew while an engine serves: from the plan, by the load that the engine counts.

An engine tells a balancer how often each expert was picked, not by whom. The plan knows that: it put experts on the
nodes whose requests ask for them. So half of an expert's picks are taken to come from the nodes that hold it in the
plan, and half from anywhere; then each layer whose GPUs are uneven is improved by the planner's own search
(`moeplan._kernels.local_search`), one sweep, the most uneven layers first, until the time is up. The groups stay
right, since experts seldom leave their node; a balancer of totals scatters them.

Names: L MoE layers, E experts, S slots, P GPUs on N nodes.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from moeplan.types import Int32Array, Placement, has_duplicate_experts

__all__ = ["EVEN", "SECONDS", "TIED", "rebalance", "twins", "warm_up"]

Float64Array = npt.NDArray[np.float64]

#: Share of an expert's picks that are taken to come from the nodes that hold it in the plan.
TIED = 0.5
#: A layer whose busiest GPU has no more than this over the mean is left alone.
EVEN = 1.05
#: Wall time for one re-plan; layers that are not reached stay as they are.
SECONDS = 2.0
#: Layers between looks at the clock: the search takes two at a time.
BATCH = 4


def rebalance(
    plan: Placement,
    load: npt.NDArray[np.number],
    old: Int32Array | None = None,
    *,
    nearest: bool,
    seconds: float = SECONDS,
) -> Int32Array:
    """A map for the load as it is now, not far from the map in place.

    Args:
        plan: no expert twice on a GPU (`twins`).
        load: [L, E], picks of each expert, of any unit.
        old: int32 [L, S], what is in place; a layer in which it is what engines begin with (experts in order), or no
            map of these experts, starts from the plan.
        nearest: the engine takes a copy on the own node first (SGLang); else all copies alike (vLLM).
        seconds: wall time; one process decides for all (`ranks`), so the clock may.

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
        kept = _sound(old, plan, nearest)
        slots[kept] = old[kept]
    counted = np.asarray(load, np.float64)
    ratio = load_ratio(shared_gpu_load(slots, counted, plan.num_gpus))
    order = np.argsort(-ratio, kind="stable")
    order = order[ratio[order] > EVEN]
    for first in range(0, len(order), BATCH):
        if time.monotonic() > end:
            break
        layers = order[first : first + BATCH]
        part = slots[layers]
        use = _use_by_node(plan, layers, counted[layers])
        improve(use, part, plan.gpus_per_node, BOTH.node_penalty, BOTH.gpu_penalty, 1, nearest=nearest)
        slots[layers] = part
    return slots.astype(np.int32)


def _use_by_node(plan: Placement, layers: npt.NDArray[np.intp], load: Float64Array) -> Float64Array:
    """float64 [layers, N, E]: whose picks the load is taken to be."""
    held = np.zeros((len(layers), plan.nodes, plan.num_experts))
    by_node = plan.slots[layers].reshape(len(layers), plan.nodes, -1)
    held[np.arange(len(layers))[:, None, None], np.arange(plan.nodes)[None, :, None], by_node] = 1.0
    share = (1.0 - TIED) / plan.nodes + TIED * held / held.sum(axis=1, keepdims=True)
    return np.ascontiguousarray(share * load[:, None, :])


def twins(plan: Placement) -> str:
    """Where a GPU holds an expert twice, in words; empty when none does. The search knows no such placements."""
    found = np.argwhere(has_duplicate_experts(plan.slots, plan.num_gpus))
    return f"GPU {found[0, 1]} holds an expert twice in layer row {found[0, 0]}" if len(found) else ""


def _sound(old: Int32Array, plan: Placement, nearest: bool) -> npt.NDArray[np.bool_]:
    """bool [L]: layers in which `old` is a map that the search can start from, and not the engine's first."""
    inside = ((old >= 0) & (old < plan.num_experts)).all(axis=1)
    there = np.zeros((len(old), plan.num_experts), bool)
    rows = np.flatnonzero(inside)
    there[rows[:, None], old[rows]] = True
    twice = has_duplicate_experts(old, plan.nodes if nearest else plan.num_gpus).any(axis=1)
    first = (old == np.arange(old.shape[1]) % plan.num_experts).all(axis=1)
    return np.asarray(inside & there.all(axis=1) & ~twice & ~first)


def warm_up() -> None:
    """Load, and the first time compile, the search: so that no serving step waits for it."""
    slots = np.array([[0, 1, 2, 3, 0, 3]], np.int32)
    for nearest in (True, False):
        rebalance(Placement(slots, 4, 2, 1), np.array([[9.0, 1.0, 1.0, 1.0]]), nearest=nearest)
