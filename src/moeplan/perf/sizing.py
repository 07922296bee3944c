"""What hardware a use needs: the smallest cluster that keeps its time limits, and what stops a smaller one.

The question is that of *Demystifying Platform Requirements for Diverse LLM Inference Use Cases* (GenZ, arXiv
2406.01698, section 7). Prefill and decode share the accelerators (`moeplan.perf.serving.aggregated`): workers of their
own for each need at least as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moeplan.errors import PlanError, UsageError
from moeplan.model.spec import ModelSpec
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import USABLE, Memory, Parallel, Precision, weight_bytes
from moeplan.perf.serving import CHUNK, Layout, Load, Serving, aggregated, cost, holds, used
from moeplan.perf.sweep import bound_shares, layouts, node_parts

__all__ = ["CLOSE", "USE_CASES", "SizingResult", "UseCase", "cluster_sizes", "size"]

#: Of clusters that all miss, a larger one is nearer where it misses by this much less.
WORTH = 0.98
#: The search ends at this many times the nearest miss: from there on, more accelerators add latency alone.
BEYOND = 8
#: A limit kept or missed by less than this factor is about within the model's error (docs/accuracy.md).
CLOSE = 1.15


@dataclass(frozen=True)
class UseCase:
    """Lengths in tokens, beams, and limits in seconds; source: where the limits are from.

    drafts, accepted: speculation by the model's own module, as in `moeplan.perf.serving.Load`.
    """

    name: str
    prompt: int
    output: int
    beams: int
    ttft_s: float
    tpot_s: float
    source: str
    drafts: int = 0
    accepted: float = 1.0

    @property
    def load(self) -> Load:
        return Load(self.prompt, self.output, self.beams, self.drafts, self.accepted)

    def miss(self, serving: Serving) -> float:
        """How far over its limits, as a factor; 1 or less: within."""
        return max(serving.ttft_s / self.ttft_s, serving.tpot_s / self.tpot_s)


_GENZ = "limits as in GenZ's repository, Paper charts/variables.py, commit 12bd09fd"
#: Lengths and beams: the paper's use cases. Limits: those that the charts of its section 7 were drawn with, in its
#: repository (abhibambhaniya/GenZ-LLM-Analyzer); chat has other lengths there (3000 / 1000), with the same limits.
USE_CASES = {
    case.name: case
    for case in (
        UseCase("qa", 1000, 200, 4, 0.2, 0.010, _GENZ),
        UseCase("summarise", 15000, 1000, 4, 2.0, 0.020, _GENZ),
        UseCase("chat", 2048, 128, 2, 0.2, 0.010, _GENZ),
        UseCase("code", 20000, 50, 4, 5.0, 0.020, _GENZ),
    )
}


@dataclass(frozen=True)
class SizingResult:
    """The answer for one piece of hardware.

    Attributes:
        meets: within the limits. If not, `layout` is the nearest miss, or None where the model fits nowhere.
        tried: accelerators of the largest cluster tried.
        layout: how the cluster is used. each: requests of a data-parallel rank that were asked for.
        serving: at that load. miss: how far over the limits that is, as a factor.
        full, most: at the most requests of a rank that memory and limits allow, and that many; None and 0 where the
            limits are missed. limited: what keeps `most` from being more: TTFT, TPOT or memory.
        usd, kwh: per million output tokens, at `full`.
        smaller: accelerators of the next smaller cluster (0: there is none). why, smaller_miss: what stops it, and by
            what factor (infinity: memory).
        bounds: of the decode step and of the prefill at `serving`, share of time by what bounds it.
        short: how much of a GPU's usable memory the model would take at best, where it fits nowhere; else 1.
    """

    hardware: Hardware
    case: UseCase
    meets: bool
    tried: int
    layout: Layout | None = None
    each: int = 1
    serving: Serving | None = None
    miss: float = math.inf
    full: Serving | None = None
    most: int = 0
    limited: str = ""
    usd: float = 0.0
    kwh: float = 0.0
    smaller: int = 0
    why: str = ""
    smaller_miss: float = math.inf
    bounds: tuple[dict[str, float], dict[str, float]] = ({}, {})
    short: float = 1.0

    @property
    def close(self) -> bool:
        """Whether the model's own error could change the answer."""
        if self.meets:
            return self.miss > 1 / CLOSE or self.smaller_miss < CLOSE
        return self.miss < CLOSE


def cluster_sizes(per_node: int, most: int) -> list[int]:
    """Counts of accelerators to try: parts of a node, then nodes by 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24 ..."""
    nodes = {n << i for n in (1, 3, 9) for i in range(40)}
    return [n for n in sorted({*node_parts(per_node), *(n * per_node for n in nodes)}) if n <= most]


def size(
    spec: ModelSpec, hardware: Hardware, case: UseCase, precision: Precision, *, requests: int = 1, most: int = 8192,
    gpus_per_node: int | None = None, usd_per_hour: float | None = None, watts: float | None = None,
    report: Callable[[int], None] = lambda gpus: None,
) -> SizingResult:  # fmt: skip
    """The smallest cluster that serves `requests` at a time within the limits; of its layouts, the one that can then
    serve most tokens.

    Args:
        most: accelerators at most. gpus_per_node: that the fast network joins (default: the hardware's).
        usd_per_hour, watts: of one accelerator, instead of the catalogue's.
        report: called with each size that is tried.

    Raises:
        UsageError: fewer than one request or accelerator; a dtype that no kernel is modelled for.
    """
    if requests < 1 or most < 1:
        raise UsageError("requests and accelerators must be at least 1")
    per_node = gpus_per_node or hardware.scale_up_size
    before, nearest, short = _Tried(0), _NOTHING, math.inf
    weights = float(weight_bytes(spec, Parallel(), precision, mtp=case.drafts > 0).sum())
    for gpus in cluster_sizes(per_node, most):
        if nearest.layout and gpus > BEYOND * nearest.layout.parallel.gpus:
            break
        report(gpus)
        usable = hardware.memory_bytes * USABLE
        if weights > gpus * usable:  # however they are spread
            before = _Tried(gpus, why=_memory_text(weights / gpus, usable), short=weights / gpus / usable)
            short = min(short, before.short)
            continue
        tried = _try(spec, hardware, gpus, per_node, precision, case, requests, max(nearest.miss, 1.0))
        if tried.met:
            if before.gpus and not before.why:  # all its layouts were worse than a smaller cluster's
                before = _try(spec, hardware, before.gpus, per_node, precision, case, requests)
            answer = _answer(case, tried, usd_per_hour, watts)
            return replace(answer, smaller=before.gpus, why=before.why, smaller_miss=before.nearest.miss)
        if tried.nearest.miss < WORTH * nearest.miss:
            nearest = tried.nearest
        short, before = min(short, tried.short), tried
    if nearest.layout is None or nearest.serving is None:
        return SizingResult(hardware, case, False, before.gpus, short=short, why=before.why)
    return SizingResult(
        hardware, case, False, before.gpus, nearest.layout, nearest.each, nearest.serving, nearest.miss,
        bounds=_bounds(nearest.layout, nearest.serving, case),
    )  # fmt: skip


def _answer(case: UseCase, tried: _Tried, usd_per_hour: float | None, watts: float | None) -> SizingResult:
    """Of the layouts within the limits, the one that gives most when it is full."""
    filled = ((good, *_fill(case, good)) for good in tried.met)
    good, full, most, limited = max(filled, key=lambda item: item[1].output_per_s)
    layout, serving = good.layout, good.serving
    assert layout is not None and serving is not None
    usd, kwh = cost(layout.hardware, full.output_per_s, usd_per_hour=usd_per_hour, watts=watts)
    return SizingResult(
        layout.hardware, case, True, tried.gpus, layout, good.each, serving, good.miss, full, most, limited, usd, kwh,
        bounds=_bounds(layout, serving, case),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One size of cluster


@dataclass(frozen=True)
class _Candidate:
    """A layout, requests of a rank, what they get, and how far that is over the limits."""

    miss: float
    layout: Layout | None = None
    each: int = 1
    serving: Serving | None = None


_NOTHING = _Candidate(math.inf)


@dataclass(frozen=True)
class _Tried:
    """All layouts of one size: those within the limits, the nearest, what stops it; short: as in `SizingResult`."""

    gpus: int
    met: tuple[_Candidate, ...] = ()
    nearest: _Candidate = _NOTHING
    why: str = ""
    short: float = math.inf


def _try(
    spec: ModelSpec, hardware: Hardware, gpus: int, per_node: int, precision: Precision, case: UseCase, requests: int,
    bound: float = math.inf,
) -> _Tried:  # fmt: skip
    """Layouts whose TPOT misses by more than `bound` are passed over."""
    met: list[_Candidate] = []
    nearest, least, passed = _NOTHING, None, False
    for layout in _layouts(spec, hardware, gpus, per_node, precision, requests):
        each = -(-requests // layout.parallel.dp)
        if each > holds(layout, case.load):
            need = used(layout, case.load, each)
            least = need if least is None or need.used < least.used else least
            continue
        if layout.overlap and not _halves(layout, case, each):
            continue
        step = float(layout.decode(each, case.load.context, case.load).seconds)
        if step / case.accepted / case.tpot_s > min(bound, max(1.0, nearest.miss)):  # prefill only adds to it
            passed = True
            continue
        serving = aggregated(layout, case.load, each)
        found = _Candidate(case.miss(serving), layout, each, serving)
        nearest = min(nearest, found, key=lambda candidate: candidate.miss)
        if found.miss <= 1:
            met.append(found)
    short = least.used / least.usable if least else math.inf
    why = "" if passed and nearest is _NOTHING else _why(case, nearest.serving, least)
    return _Tried(gpus, tuple(met), nearest, why, short)


def _layouts(
    spec: ModelSpec, hardware: Hardware, gpus: int, per_node: int, precision: Precision, requests: int
) -> list[Layout]:
    """Layouts worth trying. More data-parallel ranks than requests serve only experts; in a dense model, nobody."""
    try:
        possible = layouts(spec, hardware, gpus, precision, gpus_per_node=per_node, overlap=True)
    except PlanError:
        return []
    return [layout for layout in possible if spec.moe or layout.parallel.dp <= requests]


def _why(case: UseCase, serving: Serving | None, least: Memory | None) -> str:
    """What stops a size: the limits that its nearest layout misses, or memory."""
    if serving is None:
        if least is None:
            return "no way to spread the model so far"
        return _memory_text(least.used, least.usable)
    limits = (("TTFT", serving.ttft_s, case.ttft_s, 0), ("TPOT", serving.tpot_s, case.tpot_s, 1))
    return ", ".join(f"{name} {1e3 * value:,.{digits}f} ms" for name, value, most, digits in limits if value > most)


def _memory_text(used: float, usable: float) -> str:
    return f"memory: {used / 1e9:,.0f} of {usable / 1e9:,.0f} GB a GPU"


def _bounds(layout: Layout, serving: Serving, case: UseCase) -> tuple[dict[str, float], dict[str, float]]:
    return bound_shares(serving.decode), bound_shares(layout.prefill(1, min(case.prompt, CHUNK)))


def _fill(case: UseCase, good: _Candidate) -> tuple[Serving, int, str]:
    """(what the layout gives with the most requests of a rank, that many, what keeps it from more)."""
    layout, best = good.layout, good.serving
    assert layout is not None and best is not None
    room = holds(layout, case.load)
    most, over = good.each, room + 1
    reason = "memory"
    while over - most > 1:
        middle = min(2 * most, (most + over) // 2)
        serving = aggregated(layout, case.load, middle)
        if case.miss(serving) <= 1:
            most, best = middle, serving
        else:
            over, reason = middle, "TTFT" if serving.ttft_s > case.ttft_s else "TPOT"
    return best, most, reason


def _halves(layout: Layout, case: UseCase, running: int) -> bool:
    """Whether each micro-batch of a pipeline has two tokens to halve."""
    return running * case.beams * (case.drafts + 1) >= 2 * layout.parallel.pp
