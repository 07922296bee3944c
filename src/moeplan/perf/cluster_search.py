"""The smallest cluster of one piece of hardware that keeps the time limits of a use, and what stops a smaller one.

The question is that of *Demystifying Platform Requirements for Diverse LLM Inference Use Cases* (GenZ, arXiv
2406.01698, section 7). Prefill and decode share the accelerators (`moeplan.perf.serving.aggregated`): workers of their
own for each need at least as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from moeplan.errors import PlanError, UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.hardware import Hardware
from moeplan.perf.layouts import node_parts, step_models
from moeplan.perf.memory import USABLE, Memory, ParallelLayout, Precision, weight_bytes
from moeplan.perf.sensitivity import elasticities, improvements
from moeplan.perf.serving import CHUNK, ServingFigures, aggregated, cost, holds, used
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.perf.use_cases import UseCase

__all__ = ["CLOSE", "SizingResult", "SizingSettings", "cluster_sizes", "smallest_cluster"]

#: Of clusters that all miss, a larger one is nearer where it misses by this much less.
WORTH = 0.98
#: The search ends at this many times the nearest miss: from there on, more accelerators add latency alone.
BEYOND = 8
#: A limit kept or missed by less than this factor is about within the model's error (docs/results/accuracy.md).
CLOSE = 1.15


@dataclass(frozen=True)
class SizingSettings:
    """What a cluster must serve, and how large it may be.

    Attributes:
        requests: that it must serve at a time. max_gpus: accelerators at most.
        gpus_per_node: accelerators that the fast network joins; None: the hardware's.
        weights, experts, kv: dtypes of matrices, routed experts and KV cache; None: the checkpoint's.
        sensitivity: results include how their times respond to each part of the hardware.

    Raises:
        UsageError: fewer than one request, accelerator, or accelerator of a node.
    """

    requests: int = 1
    max_gpus: int = 8192
    gpus_per_node: int | None = None
    weights: str | None = None
    experts: str | None = None
    kv: str = "bf16"
    sensitivity: bool = False

    def __post_init__(self) -> None:
        if self.requests < 1 or self.max_gpus < 1:
            raise UsageError("requests and max_gpus must be at least 1")


@dataclass(frozen=True, repr=False)
class SizingResult:
    """The smallest cluster of one piece of hardware for one use case.

    Attributes:
        meets: within the limits. If not, `step_model` is the nearest miss, or None where the model fits nowhere.
        tried: accelerators of the largest cluster tried.
        step_model: how the cluster is used. batch: requests of a data-parallel rank that were asked for.
        serving: at that load. miss: how far over the limits that is, as a factor.
        full, max_batch: at the most requests of a rank that memory and limits allow, and that many; None and 0 where
            the limits are missed. limited_by: what keeps `max_batch` from being more: TTFT, TPOT or memory.
        usd, kwh: per million output tokens, at `full`.
        smaller: accelerators of the next smaller cluster (0: there is none). why, smaller_miss: what stops it, and by
            what factor (infinity: memory).
        memory_ratio: how much of a GPU's usable memory the model would take at best, where it fits nowhere; else 1.
    """

    hardware: Hardware
    case: UseCase
    meets: bool
    tried: int
    step_model: StepModel | None = None
    batch: int = 1
    serving: ServingFigures | None = None
    miss: float = math.inf
    full: ServingFigures | None = None
    max_batch: int = 0
    limited_by: str = ""
    usd: float = 0.0
    kwh: float = 0.0
    smaller: int = 0
    why: str = ""
    smaller_miss: float = math.inf
    memory_ratio: float = 1.0

    def __repr__(self) -> str:
        where = f"{self.case.name} on {self.hardware.name}"
        if self.step_model is None or self.serving is None:
            return f"{where}: does not fit {self.tried:,} GPUs ({self.why})"
        found = f"{self.gpus:,} GPUs ({self.layout})"
        times = f"TTFT {1e3 * self.serving.ttft_s:,.0f} ms, TPOT {1e3 * self.serving.tpot_s:.1f} ms"
        return f"{where}: {found}, {times}" if self.meets else f"{where}: missed; nearest {found}, {times}"

    @property
    def gpus(self) -> int:
        """Accelerators of the cluster, or of the nearest miss; 0 where there is none."""
        return self.step_model.parallel.gpus if self.step_model else 0

    @property
    def layout(self) -> str:
        """How they are used, in words."""
        return self.step_model.layout if self.step_model else ""

    @property
    def max_requests(self) -> int:
        """Requests at a time that the whole cluster can serve within memory and limits; 0 where they are missed."""
        return self.max_batch * self.step_model.parallel.dp if self.step_model else 0

    @property
    def close(self) -> bool:
        """Whether the model's own error could change the answer."""
        if self.meets:
            return self.miss > 1 / CLOSE or self.smaller_miss < CLOSE
        return self.miss < CLOSE

    @cached_property
    def bounds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of the decode step and of the prefill at `serving`, share of time by what bounds it."""
        if self.step_model is None or self.serving is None:
            return {}, {}
        prefill = self.step_model.prefill(1, min(self.case.prompt, CHUNK))
        return self.serving.decode.bound_shares(), prefill.bound_shares()

    @cached_property
    def would_need(self) -> dict[str, float | None]:
        """Where the limits are missed, by how much each part of the hardware would have to be better; else empty.

        See `moeplan.perf.sensitivity.improvements`.
        """
        if self.meets or self.step_model is None:
            return {}
        return improvements(self.step_model, self.case.workload, self.batch, lambda found: self.case.miss(found) <= 1)

    @cached_property
    def elasticities(self) -> dict[str, dict[str, float]]:
        """How TTFT and TPOT respond to each part of the hardware; empty where the model fits nowhere.

        See `moeplan.perf.sensitivity.elasticities`.
        """
        return {} if self.step_model is None else elasticities(self.step_model, self.case.workload, self.batch)

    def to_dict(self, sensitivity: bool = False) -> dict[str, Any]:
        """Plain values for JSON."""
        out: dict[str, Any] = {"meets": self.meets, "within_model_error": self.close, "largest_tried": self.tried}
        if self.step_model is None or self.serving is None:
            return out | {"nearest": None, "why": self.why, "memory_needed_over_usable": self.memory_ratio}
        out |= {
            "cluster" if self.meets else "nearest": self.step_model.to_dict(),
            "ttft_ms": 1e3 * self.serving.ttft_s,
            "tpot_ms": 1e3 * self.serving.tpot_s,
            "requests": self.batch * self.step_model.parallel.dp,
            "bound_ttft": self.bounds[1],
            "bound_tpot": self.bounds[0],
        }
        if self.full is not None:
            out |= {
                "most_requests": self.max_requests,
                "most_requests_limited_by": self.limited_by,
                "tokens_per_s_per_gpu": self.full.output_per_s,
                "usd_per_million_tokens": self.usd,
                "kwh_per_million_tokens": self.kwh,
                "smaller": {"gpus": self.smaller, "why": self.why} if self.smaller else None,
            }
        if not self.meets:
            out["would_need"] = self.would_need
        if sensitivity:
            out["elasticities"] = self.elasticities
        return out


def cluster_sizes(per_node: int, most: int) -> list[int]:
    """Counts of accelerators to try: parts of a node, then nodes by 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24 ..."""
    nodes = {n << i for n in (1, 3, 9) for i in range(40)}
    return [n for n in sorted({*node_parts(per_node), *(n * per_node for n in nodes)}) if n <= most]


def smallest_cluster(
    spec: CompleteSpec,
    hardware: Hardware,
    case: UseCase,
    precision: Precision,
    settings: SizingSettings = SizingSettings(),
    report: Callable[[int], None] = lambda gpus: None,
) -> SizingResult:
    """The smallest cluster that serves the requests within the limits; of its layouts, the one that can then serve
    most tokens.

    Args:
        report: called with each size that is tried.

    Raises:
        UsageError: a dtype that no kernel is modelled for.
    """
    per_node = hardware.scale_up_size if settings.gpus_per_node is None else settings.gpus_per_node
    options = StepOptions(overlap=True, gpus_per_node=per_node)
    search = _Search(spec, hardware, case, precision, settings.requests, options)
    before, nearest, memory_ratio = _Tried(0), _NOTHING, math.inf
    weights = float(weight_bytes(spec, ParallelLayout(), precision, mtp=case.drafts > 0).sum())
    for gpus in cluster_sizes(per_node, settings.max_gpus):
        if nearest.model and gpus > BEYOND * nearest.model.parallel.gpus:
            break
        report(gpus)
        usable = hardware.memory_bytes * USABLE
        if weights > gpus * usable:  # however they are spread
            before = _Tried(gpus, why=_memory_text(weights / gpus, usable), memory_ratio=weights / gpus / usable)
            memory_ratio = min(memory_ratio, before.memory_ratio)
            continue
        tried = search.attempt(gpus, max(nearest.miss, 1.0))
        if tried.met:
            if before.gpus and not before.why:  # all its layouts were worse than a smaller cluster's
                before = search.attempt(before.gpus)
            return search.answer(tried, before)
        if tried.nearest.miss < WORTH * nearest.miss:
            nearest = tried.nearest
        memory_ratio, before = min(memory_ratio, tried.memory_ratio), tried
    if nearest.model is None:
        return SizingResult(hardware, case, False, before.gpus, memory_ratio=memory_ratio, why=before.why)
    return SizingResult(hardware, case, False, before.gpus, *nearest)


# ---------------------------------------------------------------------------------------------------------------------
# One size of cluster


class _Candidate(NamedTuple):
    """A layout, requests of a rank, what they get, and how far that is over the limits; by default there is none."""

    model: StepModel | None = None
    batch: int = 1
    serving: ServingFigures | None = None
    miss: float = math.inf


_NOTHING = _Candidate()


@dataclass(frozen=True)
class _Tried:
    """All layouts of one size: those within the limits, the nearest, what stops it; memory_ratio: as in the result."""

    gpus: int
    met: tuple[_Candidate, ...] = ()
    nearest: _Candidate = _NOTHING
    why: str = ""
    memory_ratio: float = math.inf


@dataclass(frozen=True)
class _Search:
    """What stays the same from one size of cluster to the next."""

    spec: CompleteSpec
    hardware: Hardware
    case: UseCase
    precision: Precision
    requests: int
    options: StepOptions

    def attempt(self, gpus: int, bound: float = math.inf) -> _Tried:
        """All layouts of one size; those whose TPOT misses by more than `bound` are passed over."""
        case, workload = self.case, self.case.workload
        met: list[_Candidate] = []
        nearest, least, passed = _NOTHING, None, False
        for model in self._layouts(gpus):
            batch = -(-self.requests // model.parallel.dp)
            if batch > holds(model, workload):
                need = used(model, workload, batch)
                least = need if least is None or need.used < least.used else least
                continue
            if model.options.overlap and batch * case.beams * (case.drafts + 1) < 2 * model.parallel.pp:
                continue  # a micro-batch of a single token cannot be halved
            step = float(model.decode(batch, workload.context, workload).seconds)
            if step / case.accepted / case.tpot_s > min(bound, max(1.0, nearest.miss)):  # prefill only adds to it
                passed = True
                continue
            serving = aggregated(model, workload, batch)
            found = _Candidate(model, batch, serving, case.miss(serving))
            nearest = min(nearest, found, key=lambda candidate: candidate.miss)
            if found.miss <= 1:
                met.append(found)
        memory_ratio = least.used / least.usable if least else math.inf
        why = "" if passed and nearest.model is None else _why(case, nearest.serving, least)
        return _Tried(gpus, tuple(met), nearest, why, memory_ratio)

    def _layouts(self, gpus: int) -> list[StepModel]:
        """Layouts worth trying. More data-parallel ranks than requests serve only experts; in a dense model, nobody."""
        try:
            possible = step_models(self.spec, self.hardware, gpus, self.precision, options=self.options)
        except PlanError:
            return []
        return [model for model in possible if self.spec.moe or model.parallel.dp <= self.requests]

    def answer(self, tried: _Tried, before: _Tried) -> SizingResult:
        """Of the layouts within the limits, the one that gives most when it is full."""
        met = (_filled(SizingResult(self.hardware, self.case, True, tried.gpus, *good)) for good in tried.met)
        best = max(met, key=lambda found: found.full.output_per_s if found.full else 0.0)
        return replace(best, smaller=before.gpus, why=before.why, smaller_miss=before.nearest.miss)


def _why(case: UseCase, serving: ServingFigures | None, least: Memory | None) -> str:
    """What stops a size: the limits that its nearest layout misses, or memory."""
    if serving is None:
        if least is None:
            return "no way to spread the model so far"
        return _memory_text(least.used, least.usable)
    limits = (("TTFT", serving.ttft_s, case.ttft_s, 0), ("TPOT", serving.tpot_s, case.tpot_s, 1))
    return ", ".join(f"{name} {1e3 * value:,.{digits}f} ms" for name, value, most, digits in limits if value > most)


def _memory_text(used: float, usable: float) -> str:
    return f"memory: {used / 1e9:,.0f} of {usable / 1e9:,.0f} GB a GPU"


def _filled(found: SizingResult) -> SizingResult:
    """With the most requests of a rank that memory and limits allow, and what that gives."""
    model, case, best = found.step_model, found.case, found.serving
    assert model is not None and best is not None
    most, over = found.batch, holds(model, case.workload) + 1
    reason = "memory"
    while over - most > 1:
        middle = min(2 * most, (most + over) // 2)
        serving = aggregated(model, case.workload, middle)
        if case.miss(serving) <= 1:
            most, best = middle, serving
        else:
            over, reason = middle, "TTFT" if serving.ttft_s > case.ttft_s else "TPOT"
    usd, kwh = cost(model.hardware, best.output_per_s)
    return replace(found, full=best, max_batch=most, limited_by=reason, usd=usd, kwh=kwh)
