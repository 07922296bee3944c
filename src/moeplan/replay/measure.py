"""Exact accounting of one plan on one set of requests: per request, and per step.

Counting is `moeplan.cluster`'s alone; here it is only summed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan._kernels.messages import STEP_VALUES, summarise_step
from moeplan.cluster import Dispatch, Routes, request_messages, step_messages
from moeplan.planning.requests import RequestSet
from moeplan.replay.split import Draws
from moeplan.replay.timing import Timing
from moeplan.trace.steps import live_members
from moeplan.types import Int32Array

__all__ = ["RequestFigures", "StepFigures", "measure_requests", "measure_steps"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Counted = tuple[Int32Array, Int32Array, Int32Array]
WORKERS = 2
#: Messages between GPUs that are kept at once to be timed: 32 MB.
KEPT = 1 << 23


@dataclass(frozen=True)
class RequestFigures:
    """Sums over each test request's rows and layers.

    Attributes:
        rows, picks, remote, inter, intra, nodes: float64 [n]: token rows; picks; picks served on another node than the
            home; expected dispatch messages between nodes and inside nodes; distinct other nodes reached.
        load: float32 [n, L, P], picks that each GPU serves.
        group: int64 [n].
    """

    rows: FloatArray
    picks: FloatArray
    remote: FloatArray
    inter: FloatArray
    intra: FloatArray
    nodes: FloatArray
    load: npt.NDArray[np.float32]
    group: Int64Array


def measure_requests(
    requests: RequestSet, chosen: Int64Array, group: Int64Array, who: Routes, mode: Dispatch
) -> RequestFigures:
    """Expected figures of the chosen requests in their groups."""
    counts = requests.measured[chosen]
    layers = who.placement.num_layers
    load = _load(counts, group, who)
    node_load = load.reshape(len(chosen), layers, who.cluster.nodes, -1).sum(axis=(1, 3), dtype=np.float64)
    picks = counts.sum(axis=(1, 2), dtype=np.float64)
    local = node_load[np.arange(len(chosen)), who.cluster.group_node(group)]
    span = requests.measured_span[chosen]
    messages = np.zeros((len(chosen), 3))

    def work(part: Int64Array) -> None:
        starts, stops = np.ascontiguousarray(span[part, 0]), np.ascontiguousarray(span[part, 1])
        messages[part] = request_messages(who, mode, requests.experts, starts, stops, group[part])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, np.array_split(np.arange(len(chosen)), WORKERS)))
    rows = (span[:, 1] - span[:, 0]).astype(np.float64)
    remote = np.maximum(picks - local, 0.0)
    return RequestFigures(rows, picks, remote, messages[:, 0], messages[:, 1], messages[:, 2], load, group)


def _load(counts: npt.NDArray[np.uint32], group: Int64Array, who: Routes) -> npt.NDArray[np.float32]:
    """float32 [n, L, P]: the expected picks that each GPU serves, from counts [n, L, E]."""
    gpus, place = who.cluster.num_gpus, who.placement
    if place.redundant == 0:  # every expert has one slot: its picks go there, whoever asks
        by_slot = np.take_along_axis(counts, place.slots[None].astype(np.intp), axis=2)
        return np.asarray(by_slot.reshape(len(counts), place.num_layers, gpus, -1).sum(axis=3, dtype=np.float32))
    load = np.zeros((len(counts), place.num_layers, gpus), np.float32)
    members = [np.flatnonzero(group == d) for d in range(who.cluster.num_groups)]
    for layer in range(place.num_layers):
        share = who.share(layer).astype(np.float32)
        for d, of_group in enumerate(members):
            load[of_group, layer] = counts[of_group, layer].astype(np.float32) @ share[d]
    return load


@dataclass(frozen=True)
class StepFigures:
    """One value per step: float64 [S] each.

    Attributes:
        node_padded: sum over layers of N(N - 1) x the largest ordered node pair's messages.
        rank_padded: sum over layers of P x the busiest rank's messages (the larger of those it sends and receives).
        messages: sum over layers of all messages between nodes (unpadded).
        gpu_load, node_load: max / mean of picks served, mean over layers.
        experts: distinct experts that a GPU touches, mean over GPUs and layers.
        step_ms, idle_share: [T], of the first T steps: modelled milliseconds, and the share of them in which a GPU
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


def measure_steps(
    requests: RequestSet, draws: Draws, group: Int64Array, live: int, who: Routes, mode: Dispatch,
    timing: Timing | None = None,
) -> StepFigures:  # fmt: skip
    """Replay steps by the replica rule itself; each group's first `live` requests by key take part, in random order.

    Args:
        draws: keys and rows of the same n requests that `group` [n] is for.
        timing: how to time the first steps; None: they are not timed.
    """
    cluster = who.cluster
    steps = len(draws.key)
    by_group = np.empty((steps, cluster.num_groups, live), np.int64)
    for d in range(cluster.num_groups):
        first = live_members(draws.key, np.flatnonzero(group == d), live)
        shuffled = np.argsort(np.take_along_axis(draws.order, first, axis=1), axis=1, kind="stable")
        first = np.take_along_axis(first, shuffled, axis=1)
        by_group[:, d] = np.take_along_axis(draws.row, first, axis=1)
    rows = by_group.reshape(steps, -1)
    sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
    indices = np.tile(np.arange(live), cluster.num_groups)
    out = np.zeros((steps, STEP_VALUES))

    def count(s: int, buffer: Counted | None) -> Counted:
        return step_messages(who, mode, requests.experts, rows[s], sources, indices, buffer)

    def work(part: Int64Array) -> None:
        buffer = None
        for s in part:
            buffer = count(s, buffer)
            summarise_step(*buffer, cluster.gpus_per_node, out[s])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, np.array_split(np.arange(steps), WORKERS)))
    times = () if timing is None else _times(timing, min(timing.steps, steps), count, who, mode)
    return StepFigures(*(np.ascontiguousarray(column) for column in out.T), *times)


def _times(
    timing: Timing, steps: int, count: Callable[[int, Counted | None], Counted], who: Routes, mode: Dispatch
) -> tuple[FloatArray, FloatArray]:
    """Milliseconds and idle shares of the first steps, as many at once as `KEPT` allows."""
    layers, gpus = who.placement.num_layers, who.cluster.num_gpus
    parts = np.array_split(np.arange(steps), -(-steps // max(1, KEPT // (layers * gpus * gpus))))
    times = []
    for part in parts:
        links = np.empty((len(part), layers, gpus, gpus), np.int32)
        picks, touched = np.empty((2, len(part), layers, gpus), np.int32)
        for i, s in enumerate(part):
            count(s, (links[i], picks[i], touched[i]))
        times.append(timing.times(who.cluster, mode, links, picks, touched))
    return np.concatenate([t.ms for t in times]), np.concatenate([t.idle_share for t in times])
