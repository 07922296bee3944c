"""What would help a layout: how its times answer to each part of the hardware, and how much better it would have to be.

Times are homogeneous: with operation rates, bandwidths and latencies all of half the duration, and launches too, a step
takes half as long; so the elasticities of TTFT and TPOT add up to -1, latencies and overheads counted against the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial

from moeplan.perf.constants import Constants, load_constants
from moeplan.perf.serving import ServingFigures, aggregated, used
from moeplan.perf.step_model import StepModel, Workload

__all__ = ["KNOBS", "MOST", "changed", "elasticities", "improvements", "needs"]

#: The largest factor by which an improvement is sought.
MOST = 1000.0

#: What can change, and how it reads; a larger latency or overhead is worse.
KNOBS = {
    "flops": "FLOPs",
    "memory_bandwidth": "memory bandwidth",
    "capacity": "memory capacity",
    "scale_up_bandwidth": "scale-up bandwidth",
    "scale_out_bandwidth": "scale-out bandwidth",
    "scale_up_latency": "scale-up latency",
    "scale_out_latency": "scale-out latency",
    "overhead": "launch and engine overhead",
}
_WORSE = ("scale_up_latency", "scale_out_latency", "overhead")


def changed(model: StepModel, knob: str, factor: float) -> StepModel:
    """The layout on hardware (or, for `overhead`, with kernels and an engine) of which one thing is `factor` x what it
    was."""
    h = model.hardware
    if knob == "overhead":
        constants = _slower(model.options.constants or load_constants(), factor)
        return replace(model, options=replace(model.options, constants=constants))
    if knob == "flops":
        h = replace(h, flops={dtype: rate * factor for dtype, rate in h.flops.items()})
    elif knob == "memory_bandwidth":
        h = replace(h, memory_bytes_per_s=h.memory_bytes_per_s * factor)
    elif knob == "capacity":
        h = replace(h, memory_bytes=h.memory_bytes * factor)
    else:
        level, what = ("scale_up" if "up" in knob else "scale_out"), "latency_s" if "lat" in knob else "bytes_per_s"
        link = getattr(h, level)
        h = replace(h, **{level: replace(link, **{what: getattr(link, what) * factor})})
    return replace(model, hardware=h)


def _slower(constants: Constants, factor: float) -> Constants:
    """All times among the constants, and the rate at which units copy messages."""
    ratios = {"s": factor, "bytes/s": 1 / factor}
    found = [f for kind in Constants.groups().values() for f in fields(kind)]
    return constants.scaled({f.name: ratios[f.metadata["unit"]] for f in found if f.metadata["unit"] in ratios})


def elasticities(model: StepModel, workload: Workload, each: int, step: float = 0.05) -> dict[str, dict[str, float]]:
    """{knob: {ttft, tpot, requests: per cent of change for one per cent more of the knob}}.

    Of the times, central differences of the logarithms over +-`step`. `requests`: how many the memory holds. Capacity
    changes no time of requests that fit, and nothing else changes how many fit.
    """
    out = {knob: {"ttft": 0.0, "tpot": 0.0, "requests": 0.0} for knob in KNOBS}
    alone = used(model, workload, 0)  # weights and one prefill step
    out["capacity"]["requests"] = alone.usable / (alone.usable - alone.used)
    for knob in (knob for knob in KNOBS if knob != "capacity"):
        more, less = (aggregated(changed(model, knob, by), workload, each) for by in (1 + step, 1 / (1 + step)))
        width = 2 * math.log(1 + step)
        out[knob]["ttft"] = math.log(more.ttft_s / less.ttft_s) / width
        out[knob]["tpot"] = math.log(more.tpot_s / less.tpot_s) / width
    return out


def improvements(
    model: StepModel, workload: Workload, each: int, within: Callable[[ServingFigures], bool]
) -> dict[str, float | None]:
    """{knob: by how much it alone would have to be better for this layout to be `within`; None: not by MOST}.

    Better is more, but less of a latency or an overhead. `hardware`: everything but `overhead` at once; `all`:
    everything.
    """
    physical = tuple(knob for knob in KNOBS if knob not in ("overhead", "capacity"))
    groups = {knob: (knob,) for knob in (*physical, "overhead")} | {"hardware": physical}
    groups["all"] = (*physical, "overhead")

    def meets(knobs: tuple[str, ...], factor: float) -> bool:
        better = model
        for knob in knobs:
            better = changed(better, knob, 1 / factor if knob in _WORSE else factor)
        return within(aggregated(better, workload, each))

    return {name: _least(partial(meets, knobs)) for name, knobs in groups.items()}


def _least(meets: Callable[[float], bool]) -> float | None:
    """The smallest factor, to 1 %, that meets; None: not even MOST."""
    if not meets(MOST):
        return None
    low, high = 1.0, MOST
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def needs(found: Mapping[str, float | None]) -> tuple[str, str, str]:
    """`improvements` in words: what is enough alone, by how much all of the hardware, by how much everything."""
    known = ((knob, factor) for knob, factor in found.items() if knob in KNOBS and factor)
    alone = [f"{KNOBS[knob]} {factor:.2f}x {'lower' if knob in _WORSE else 'higher'}" for knob, factor in known]

    def by(key: str) -> str:
        factor = found.get(key)
        return f"{factor:.2f}x faster" if factor else f"not even {MOST:,.0f}x faster"

    return " or ".join(alone) or "none of them alone", by("hardware"), by("all")
