"""Speed of replay: tokens x layers a second, and its ratio to a naive loop over `token_messages` in the same run.

Also the equal-groups transport beside SciPy's square assignment on the same scores.
"""

from __future__ import annotations

import time

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplan.cluster import Cluster, Dispatch, ReplicaRule, request_messages, routes, step_messages, token_messages
from moeplan.planning.assignment import equal_groups
from moeplan.synthetic.generator import WorkloadSettings, generate_rows
from moeplan.types import Placement


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs."""
    shape, _, rows = generate_rows(
        "deepseek-v3", WorkloadSettings(requests=64, prefill=1, decode=128, layers=8, seed=0)
    )
    cluster = Cluster(8, 8)
    slots = np.tile(np.arange(320) % 256, (shape.num_layers, 1)).astype(np.int32)
    place = Placement(slots, 256, 8, 8)
    who = routes(place, cluster, ReplicaRule.NEAREST_STATIC)
    experts = rows.experts
    rng = np.random.default_rng(0)
    live = rng.integers(0, len(experts), 1024)
    sources = np.concatenate([cluster.source_gpus(d, 128) for d in range(8)])
    indices = np.tile(np.arange(128), 8)
    start, stop = rows.phase_ranges("decode")
    group, count = np.arange(len(start)) % 8, int((stop - start).sum()) * 8
    lines = []
    for mode in (Dispatch.PICK, Dispatch.NODE):
        step_messages(who, mode, experts, live, sources, indices)
        fast = _rate(lambda mode=mode: step_messages(who, mode, experts, live, sources, indices), 1024 * 8, 0.5)
        slow = _rate(lambda mode=mode: _naive(who, mode, experts, live[:64], sources[:64]), 64 * 8, 0.5)
        lines.append((f"replay of steps, dispatch {mode.value}", f"{_text(fast, slow)}"))
        request_messages(who, mode, experts, start, stop, group)
        fast = _rate(lambda mode=mode: request_messages(who, mode, experts, start, stop, group), count, 0.5)
        slow_source = _rate(lambda mode=mode: _naive_home(who, mode, experts, live[:8]), 8 * 8, 0.5)
        lines.append((f"replay of requests, dispatch {mode.value}", _text(fast, slow_source)))
    score = rng.normal(size=(2000, 8))
    equal_groups(score)
    start_time = time.perf_counter()
    equal_groups(score)
    ours = time.perf_counter() - start_time
    start_time = time.perf_counter()
    linear_sum_assignment(np.repeat(score, 250, axis=1), maximize=True)
    square = time.perf_counter() - start_time
    lines.append(
        ("equal groups, 2,000 requests in 8", f"{ours * 1e3:.1f} ms, {square / ours:.0f} x SciPy's square matrix")
    )
    return lines


def _rate(work, units: int, seconds: float) -> float:  # type: ignore[no-untyped-def]
    """Units a second, over at least `seconds`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        done += units
    return done / (time.perf_counter() - start)


def _text(fast: float, slow: float) -> str:
    return f"{fast / 1e6:.1f} million tokens x layers a second on one core, {fast / slow:,.0f} x the naive loop"


def _naive(who, mode, experts, live, sources) -> None:  # type: ignore[no-untyped-def]
    for layer in range(experts.shape[1]):
        for row, source in zip(live, sources, strict=True):
            serving = [int(who.gpu[layer, source, e]) for e in experts[row, layer]]
            token_messages(mode, who.cluster, int(source), serving)


def _naive_home(who, mode, experts, live) -> None:  # type: ignore[no-untyped-def]
    """The expectation over the eight source GPUs of a home."""
    for source in range(8):
        _naive(who, mode, experts, live, [source] * len(live))


if __name__ == "__main__":
    for name, text in bench():
        print(f"{name:58s} {text}", flush=True)
