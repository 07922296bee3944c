"""What requests do under a plan, row by row, and what their decode steps do: expected picks, messages and loads.

Counting is `moeplan.cluster`'s alone; here it is only summed.

Names: n requests, S steps, D groups, B live requests of a group, L MoE layers, P GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan._kernels.messages import STEP_VALUES, summarise_step
from moeplan.arrays import ExpertArray, Float32Array, FloatArray, Int64Array
from moeplan.cluster import Dispatch, Routes, StepCounts, request_messages, step_messages
from moeplan.planning.expected_load import load_by_request
from moeplan.planning.plan import Plan
from moeplan.planning.requests import RequestSet
from moeplan.replay.split import Draws
from moeplan.trace.steps import live_members

__all__ = ["DecodeSteps", "RequestFigures", "StepFigures", "measure_requests", "sample_steps"]

WORKERS = 2
#: Messages between GPUs that are kept at once: 32 MB.
KEPT = 1 << 23


@dataclass(frozen=True)
class RequestFigures:
    """Sums over each request's rows and layers.

    Attributes:
        rows, picks, remote, inter, intra, nodes: float64 [n]: token rows; picks; picks served on another node than the
            group's; expected dispatch messages between nodes and inside nodes; distinct other nodes reached.
        load: float32 [n, L, P], picks that each GPU serves.
        group: int64 [n].
    """

    rows: FloatArray
    picks: FloatArray
    remote: FloatArray
    inter: FloatArray
    intra: FloatArray
    nodes: FloatArray
    load: Float32Array
    group: Int64Array


def measure_requests(requests: RequestSet, chosen: Int64Array, group: Int64Array, plan: Plan) -> RequestFigures:
    """Expected figures of the chosen requests, int64 [n], in their groups, int64 [n]."""
    counts, cluster = requests.measured[chosen], plan.cluster
    load = load_by_request(plan.routes, counts, group)
    by_node = load.reshape(len(chosen), load.shape[1], cluster.nodes, -1).sum(axis=(1, 3), dtype=np.float64)
    picks = counts.sum(axis=(1, 2), dtype=np.float64)
    local = by_node[np.arange(len(chosen)), cluster.group_node(group)]
    span = requests.spans.measured.take(chosen, axis=1)
    messages = np.zeros((len(chosen), 3))

    def work(part: Int64Array) -> None:
        starts, stops = span.take(part, axis=1)
        messages[part] = request_messages(plan.routes, plan.dispatch, requests.experts, starts, stops, group[part])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, np.array_split(np.arange(len(chosen)), WORKERS)))
    rows, remote = (span[1] - span[0]).astype(np.float64), np.maximum(picks - local, 0.0)
    return RequestFigures(rows, picks, remote, messages[:, 0], messages[:, 1], messages[:, 2], load, group)


@dataclass(frozen=True)
class StepFigures:
    """One value per step: float64 [S] each.

    Attributes:
        node_padded: sum over layers of N(N - 1) x the largest ordered node pair's messages.
        rank_padded: sum over layers of P x the busiest rank's messages (the larger of those it sends and receives).
        messages: sum over layers of all messages between nodes (unpadded).
        gpu_load, node_load: max / mean of picks served, mean over layers.
        experts: distinct experts that a GPU touches, mean over GPUs and layers.
        step_ms, idle_share: of the first steps only: modelled milliseconds, and the share of them in which a GPU
            waits; None where steps were not timed.
    """

    node_padded: FloatArray
    rank_padded: FloatArray
    messages: FloatArray
    gpu_load: FloatArray
    node_load: FloatArray
    experts: FloatArray
    step_ms: FloatArray | None = None
    idle_share: FloatArray | None = None


@dataclass(frozen=True)
class DecodeSteps:
    """Sampled decode steps, ready to be counted.

    Attributes:
        routes, dispatch: of the plan. experts: unsigned [T, L, k], all rows.
        rows: int64 [S, D * B], the rows that are live in each step, group after group.
    """

    routes: Routes
    dispatch: Dispatch
    experts: ExpertArray
    rows: Int64Array

    def __len__(self) -> int:
        return len(self.rows)

    def figures(self) -> StepFigures:
        """Every step, counted and summed up."""
        out = np.zeros((len(self), STEP_VALUES))

        def work(part: Int64Array) -> None:
            buffer = None
            for step in part:
                buffer = self._count(step, buffer)
                summarise_step(*buffer, self.routes.cluster.gpus_per_node, out[step])

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(work, np.array_split(np.arange(len(self)), WORKERS)))
        return StepFigures(*(np.ascontiguousarray(column) for column in out.T))

    def counts(self, steps: int) -> Iterator[StepCounts]:
        """The first steps, counted: arrays [S', L, P, P] and [S', L, P] of as many steps as `KEPT` allows at once."""
        steps = min(steps, len(self))
        layers, gpus = self.routes.placement.num_layers, self.routes.cluster.num_gpus
        for part in np.array_split(np.arange(steps), -(-steps // max(1, KEPT // (layers * gpus * gpus)))):
            found = StepCounts.empty(len(part), layers, gpus)
            for i, step in enumerate(part):
                self._count(step, StepCounts(*(array[i] for array in found)))
            yield found

    @cached_property
    def _places(self) -> tuple[Int64Array, Int64Array]:
        """Source GPU of each live row, and its index within its group's micro-batch."""
        cluster = self.routes.cluster
        live = self.rows.shape[1] // cluster.num_groups
        sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
        return sources, np.tile(np.arange(live), cluster.num_groups)

    def _count(self, step: int, out: StepCounts | None) -> StepCounts:
        return step_messages(self.routes, self.dispatch, self.experts, self.rows[step], *self._places, out)


def sample_steps(requests: RequestSet, draws: Draws, group: Int64Array, live: int, plan: Plan) -> DecodeSteps:
    """The steps of a grouping: each group's first `live` requests by key take part, in random order.

    Args:
        draws: keys and rows of the same n requests that `group` [n] is for.
    """
    by_group = np.empty((len(draws.key), plan.cluster.num_groups, live), np.int64)
    for d in range(plan.cluster.num_groups):
        first = live_members(draws.key, np.flatnonzero(group == d), live)
        shuffled = np.argsort(np.take_along_axis(draws.order, first, axis=1), axis=1, kind="stable")
        first = np.take_along_axis(first, shuffled, axis=1)
        by_group[:, d] = np.take_along_axis(draws.row, first, axis=1)
    return DecodeSteps(plan.routes, plan.dispatch, requests.experts, by_group.reshape(len(draws.key), -1))
