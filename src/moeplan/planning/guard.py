"""The load that a plan puts on nodes step by step, foretold on the fit requests.

What counts is `node_load_ratio` on unseen requests, at most 1.05 x linear's (docs/metrics.md). A plan may see only its
fit requests, so it replays steps of those.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Dispatch, Routes, step_messages
from moeplan.planning.assignment import random_groups
from moeplan.planning.problem import Problem, StepCost
from moeplan.trace.steps import draw_rows, live_members
from moeplan.types import Int32Array

__all__ = ["StepSampler"]

Int64Array = npt.NDArray[np.int64]

STEPS, MOST_LIVE = 48, 128
COSTED = 12  # steps that are costed, of the same
Counted = tuple[Int32Array, Int32Array, Int32Array]


class StepSampler:
    """The same seeded steps for every plan that is weighed: requests by key, and a row of each.

    Drawn as in replay (`moeplan.trace.steps`).
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        n, groups = len(problem.use), problem.cluster.num_groups
        rng = np.random.default_rng([seed, 0x57E9])
        self._live = int(np.clip(n // groups, 1, MOST_LIVE))
        starts, stops = problem.stream.starts, problem.stream.stops
        span = np.stack([starts, np.maximum(stops, starts + 1)], axis=1)
        self._key, self._row = draw_rows(span, STEPS, rng, np.float64)
        self.random_groups = random_groups(n, groups, rng)

    def node_load_ratio(self, who: Routes, group: Int64Array) -> float:
        """Busiest node over the mean of picks served, mean over steps and layers."""
        nodes = self._problem.cluster.nodes
        total = 0.0
        for _, picks, _ in self._replay(who, group, Dispatch.PICK, STEPS):
            by_node = picks.reshape(len(picks), nodes, -1).sum(axis=2)
            total += float((by_node.max(axis=1) / by_node.mean(axis=1)).mean())
        return total / STEPS

    def mean_cost(self, who: Routes, group: Int64Array, cost: StepCost) -> float:
        """What a step costs, by the dispatch mode of the problem, mean over a few steps."""
        steps = self._replay(who, group, self._problem.dispatch, COSTED)
        return float(np.mean([cost(*counted) for counted in steps]))

    def _replay(self, who: Routes, group: Int64Array, mode: Dispatch, steps: int) -> Iterator[Counted]:
        """Messages [L, P, P], picks and distinct experts [L, P] of each step; the arrays are reused."""
        cluster = self._problem.cluster
        members = [np.flatnonzero(group == d) for d in range(cluster.num_groups)]
        live = min(self._live, *(len(of) for of in members))
        sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
        indices = np.tile(np.arange(live), cluster.num_groups)
        decoding = np.hstack([live_members(self._key[:steps], of, live) for of in members])
        buffer = None
        for who_decodes, row in zip(decoding, self._row[:steps], strict=True):
            rows = row[who_decodes]
            buffer = step_messages(who, mode, self._problem.stream.experts, rows, sources, indices, buffer)
            yield buffer
