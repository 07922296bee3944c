"""Holding a plan to the load guard, on steps replayed from the fit requests.

The guard is on `node_load_ratio` of held-out requests, at most 1.05 x linear's
(docs/reference/metrics.md). A plan may see only
its fit requests, so it replays steps of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int32Array, Int64Array
from moeplan.cluster import Dispatch, Routes, step_messages
from moeplan.errors import UsageError
from moeplan.planning.assignment import random_groups
from moeplan.planning.balance import linear_slots
from moeplan.planning.expected_load import load_ratio
from moeplan.planning.planner import Planner, State
from moeplan.planning.pricing import Pricing
from moeplan.planning.problem import PlanningProblem, StepCost
from moeplan.trace.steps import draw_rows, live_members

__all__ = ["GuardSettings", "StepSampler", "keep_guard"]


STEPS, MAX_LIVE = 48, 128
COSTED_STEPS = 12  # of the same steps: a step's cost takes longer than its load
Counted = tuple[Int32Array, Int32Array, Int32Array]


class StepSampler:
    """The same seeded steps for every plan that is compared: which requests take part, and a row of each.

    Drawn as in replay (`moeplan.trace.steps`).
    """

    def __init__(self, problem: PlanningProblem, seed: int) -> None:
        self._problem = problem
        n, groups = len(problem.use), problem.cluster.num_groups
        rng = np.random.default_rng([seed, 0x57E9])
        self._live = int(np.clip(n // groups, 1, MAX_LIVE))
        starts, stops = problem.rows.starts, problem.rows.stops
        span = np.stack((starts, np.maximum(stops, starts + 1)))
        self._key, self._row = draw_rows(span, STEPS, rng, np.float64)
        self.random_groups = random_groups(n, groups, rng)

    def node_load_ratio(self, slots: npt.NDArray[np.integer], group: Int64Array) -> float:
        """Busiest node over the mean of picks served, mean over steps and layers; slots [L, S], groups [n]."""
        nodes = self._problem.cluster.nodes
        total = 0.0
        for _, picks, _ in self._replay(self._problem.routes(slots), group, Dispatch.PICK, STEPS):
            total += float(load_ratio(picks.reshape(len(picks), nodes, -1).sum(axis=2)).mean())
        return total / STEPS

    def mean_cost(self, slots: npt.NDArray[np.integer], group: Int64Array, cost: StepCost) -> float:
        """What a step costs, by the dispatch mode of the problem, mean over a few steps."""
        steps = self._replay(self._problem.routes(slots), group, self._problem.dispatch, COSTED_STEPS)
        return float(np.mean([cost(*counted) for counted in steps]))

    def _replay(self, routes: Routes, group: Int64Array, dispatch: Dispatch, steps: int) -> Iterator[Counted]:
        """Messages [L, P, P], picks and distinct experts [L, P] of each step; the arrays are reused."""
        cluster = self._problem.cluster
        members = [np.flatnonzero(group == d) for d in range(cluster.num_groups)]
        live = min(self._live, *(len(member) for member in members))
        sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
        indices = np.tile(np.arange(live), cluster.num_groups)
        decoding = np.hstack([live_members(self._key[:steps], member, live) for member in members])
        buffer = None
        for requests, row in zip(decoding, self._row[:steps], strict=True):
            experts = self._problem.rows.experts
            buffer = step_messages(routes, dispatch, experts, row[requests], sources, indices, buffer)
            yield buffer


@dataclass(frozen=True)
class GuardSettings:
    """How a plan is held to the load guard.

    Attributes:
        margin: the share of the guard that plans may use on the fit requests, because held-out requests load nodes up
            to a few percent less evenly.
        factor, raises: the node penalty is raised by this factor, at most so many times, until the guard is kept.
        bisections: then so many bisections look for a lower penalty that keeps it.
    """

    margin: float = 0.98
    factor: float = 2.0
    raises: int = 8
    bisections: int = 3

    def __post_init__(self) -> None:
        if not (self.margin > 0 and self.factor > 1 and self.raises >= 0 and self.bisections >= 0):
            raise UsageError(f"{self} is out of range", hint="margin above 0, factor above 1, the others 0 or more")


class _Search:
    """States at several prices, and whether each keeps the guard."""

    def __init__(self, planner: Planner, guard: float, settings: GuardSettings) -> None:
        problem = planner.problem
        self.planner, self.settings = planner, settings
        self.steps = StepSampler(problem, planner.seed)
        linear = linear_slots(problem.shape.num_layers, problem.shape.num_experts, problem.num_slots)
        self.allowed = settings.margin * guard
        self.allowed *= self.steps.node_load_ratio(linear, self.steps.random_groups)

    def load(self, state: State) -> float:
        return self.steps.node_load_ratio(state.slots, state.group)

    def keeps(self, state: State) -> bool:
        return self.load(state) <= self.allowed

    def raise_penalty(self, state: State, pricing: Pricing) -> tuple[State, Pricing, bool]:
        """Raise the node penalty until the guard is kept, then bisect; if it never is, the most even state, False."""
        tried = [(self.load(state), pricing, state)]
        while tried[-1][0] > self.allowed and len(tried) <= self.settings.raises:
            pricing = replace(pricing, node_penalty=self.settings.factor * pricing.node_penalty)
            state = self.planner.alternate(state, pricing, 2)
            tried.append((self.load(state), pricing, state))
        if tried[-1][0] > self.allowed:
            _, pricing, state = min(tried, key=lambda each: each[0])
            return state, pricing, False
        if len(tried) > 1:
            _, low, loose = tried[-2]
            for _ in range(self.settings.bisections):
                middle = replace(pricing, node_penalty=float(np.sqrt(low.node_penalty * pricing.node_penalty)))
                between = self.planner.alternate(loose, middle, 2)
                if self.keeps(between):
                    state, pricing = between, middle
                else:
                    loose, low = between, middle
        return state, pricing, True

    def reduce_sharing_credit(self, state: State, pricing: Pricing) -> tuple[State, Pricing] | None:
        """The most credit for shared messages at which the guard is kept; None where none does.

        Even nodes are not enough where picks of a token that share a node come in bunches: they load the nodes of a
        step unevenly, whatever the totals.
        """
        best, low, high = None, 0.0, 1.0
        for _ in range(self.settings.bisections + 1 if pricing.rows is not None else 0):
            tried = replace(pricing, sharing_credit=(low + high) / 2)
            reduced = self.planner.alternate(state, tried, 2)
            if self.keeps(reduced):
                best, low = (reduced, tried), tried.sharing_credit
            else:
                high = tried.sharing_credit
        return best


def keep_guard(
    planner: Planner, state: State, pricing: Pricing, guard: float, settings: GuardSettings
) -> tuple[State, str]:
    """The plan at the lowest load penalty found that keeps node load within the guard, and a note on it.

    Args:
        state: the plan at the first `pricing`. guard: the most node load, in multiples of linear's.
    """
    search = _Search(planner, guard, settings)
    state, pricing, kept = search.raise_penalty(state, pricing)
    note = f"node-load penalty {pricing.node_penalty:.3g}"
    if kept:
        return state, f"{note} kept node load within the guard ({guard:.4g} x linear)"
    reduced = search.reduce_sharing_credit(state, pricing)
    if reduced is None:
        return state, f"the guard on node load could not be kept with a margin; {note}"
    return reduced[0], f"{note}, credit for sharing a node {reduced[1].sharing_credit:.3g}"
