"""The figures of one run of one policy."""

from __future__ import annotations

import numpy as np

from moeplan.arrays import FloatArray
from moeplan.simulation.engine import Events
from moeplan.simulation.loop import WARM_UP
from moeplan.simulation.settings import SimulationSettings
from moeplan.simulation.stream import Stream

__all__ = ["KEYS", "TIMES", "run_figures"]

#: Figures of times, in the order of the table; the others are counts.
TIMES = (
    "tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "step_ms", "output_per_s",
    "goodput_per_s",
)  # fmt: skip
KEYS = ("experts_per_step", "live", *TIMES, "live_ratio", "token_ratio", "waited_share", "preempted", "remote_share")
#: Seconds over which balance is measured; steps of such a unit, where no hardware is named.
BALANCE_WINDOW = 10.0


def run_figures(stream: Stream, events: Events, settings: SimulationSettings, timed: bool) -> dict[str, float]:
    """All figures but `remote_share`, of the requests that came after the warm-up; NaN where there is none.

    Args:
        timed: times are seconds; else only counts are given.
    """
    measured = np.arange(len(stream)) >= int(WARM_UP * len(stream))
    steps, tokens, distinct, busy, _, live = events.sums.sum(axis=0)
    out = dict.fromkeys(KEYS, float("nan"))
    out["experts_per_step"] = distinct / tokens if distinct else float("nan")
    out["live"] = live / tokens
    ttft, tpot, whole = _times(stream, events)
    if timed:
        for name, values in (("tpot", tpot), ("ttft", ttft), ("e2e", whole)):
            out[f"{name}_p50_ms"], out[f"{name}_p99_ms"] = 1e3 * np.quantile(values[measured], (0.5, 0.99))
        out["step_ms"] = 1e3 * busy / steps
        out["output_per_s"] = tokens / max(events.seconds, 1e-9)
        within = measured.copy()
        for limit, values in ((settings.ttft_ms, ttft), (settings.tpot_ms, tpot)):
            if limit is not None:
                within &= 1e3 * values <= limit
        if settings.ttft_ms is not None or settings.tpot_ms is not None:
            out["goodput_per_s"] = within.sum() / measured.sum() * measured.sum() / _span(events, measured)
    window = BALANCE_WINDOW if timed else 1000 * BALANCE_WINDOW / 10
    out["live_ratio"], out["token_ratio"] = _balance(stream, events, window)
    out["waited_share"] = float((events.joined - events.arrived > _STEP * busy / steps)[measured].mean())
    out["preempted"] = float(events.preempted[measured].mean())
    return {key: float(value) for key, value in out.items()}


#: A request that starts within this many mean steps did not wait for a slot.
_STEP = 2.0


def _times(stream: Stream, events: Events) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(TTFT, TPOT, end to end), float64 [n] seconds each."""
    tpot = (events.end - events.first) / np.maximum(stream.answer - 1, 1)
    return events.first - events.arrived, tpot, events.end - events.arrived


def _span(events: Events, measured: np.ndarray) -> float:
    """Seconds from the first measured arrival to the last."""
    came = events.arrived[measured]
    return max(float(came.max() - came.min()), 1e-9)


def _balance(stream: Stream, events: Events, window: float) -> tuple[float, float]:
    """Live requests and cached tokens of the fullest group over the mean, each over windows; the 99th percentile of
    the windows between the warm-up and the last arrival. NaN where the run is shorter than three windows."""
    start, stop = events.arrived[int(WARM_UP * len(stream))], events.arrived[-1]
    count = int((stop - start) / window)
    if count < 3:
        return float("nan"), float("nan")
    edges = start + window * np.arange(count + 1)
    groups = len(events.sums)
    held = np.zeros((2, groups, count))
    middle = stream.prompt + stream.answer / 2
    for group in range(groups):
        mine = events.group == group
        begin, end = events.joined[mine], events.end[mine]
        # Seconds that each request is live within each window: the difference of a running sum at the edges.
        live = np.maximum(np.minimum(end[:, None], edges[1:]) - np.maximum(begin[:, None], edges[:-1]), 0.0)
        held[0, group], held[1, group] = live.sum(axis=0), (live * middle[mine, None]).sum(axis=0)
    ratio = held.max(axis=1) / np.maximum(held.mean(axis=1), 1e-12)
    live_ratio, token_ratio = np.quantile(ratio, 0.99, axis=1)
    return float(live_ratio), float(token_ratio)
