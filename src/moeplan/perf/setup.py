"""What a step is of: a set-up, checked, and the operators that make up its time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.errors import PlanError, UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.constants import Constants, constants, for_generation
from moeplan.perf.hardware import Hardware
from moeplan.perf.layers import Call, KernelDtypes, kinds
from moeplan.perf.memory import Parallel, Precision, check_parallel
from moeplan.perf.operators import Number

__all__ = ["Operator", "Setup", "check_mode", "default_mode", "merged", "setup_of"]


@dataclass(frozen=True)
class Operator:
    """One line of a breakdown.

    Attributes:
        name: what it is. seconds: of all its calls in the step. hidden: how much of that runs behind other operators.
        parts: {what bounds it: seconds that this would take alone}.
    """

    name: str
    seconds: Number
    hidden: Number
    parts: dict[str, Number]

    @property
    def exposed(self) -> Number:
        return self.seconds - self.hidden

    @property
    def bound(self) -> str:
        """What would take longest alone (mean over steps, where there are several)."""
        return max(self.parts, key=lambda name: float(np.mean(self.parts[name])))


@dataclass(frozen=True)
class Setup:
    """Attributes as in `moeplan.perf.step.decode_step`; `mode` None where tokens do not travel."""

    spec: CompleteSpec
    hardware: Hardware
    parallel: Parallel
    kinds: KernelDtypes
    mode: Dispatch | None
    gpus_per_node: int
    overlap: bool
    balanced: bool
    skew: float
    c: Constants

    @property
    def moe_layers(self) -> int:
        return len(self.spec.moe.layers) if self.spec.moe else 0

    @property
    def nodes(self) -> int:
        """Nodes that one pipeline stage fills."""
        return -(-self.parallel.tp * self.parallel.dp // self.gpus_per_node)


def default_mode(spec: CompleteSpec, parallel: Parallel, *, prefill: bool) -> Dispatch | None:
    """None where tokens need not travel: a dense model, or one data-parallel rank. Else DeepEP's low-latency kernel in
    decode and its normal one in prefill; all-gather where experts are split over ranks."""
    if spec.moe is None or parallel.dp == 1:
        return None
    if parallel.moe_tp > 1:
        return Dispatch.ALLGATHER
    return Dispatch.NODE if prefill else Dispatch.PICK


def check_mode(spec: CompleteSpec, parallel: Parallel, mode: Dispatch | None, *, prefill: bool) -> Dispatch | None:
    """`mode` as far as it applies, or the default.

    Raises:
        UsageError: a mode that sends tokens to single experts, where experts are split over ranks.
    """
    usual = default_mode(spec, parallel, prefill=prefill)
    if mode is None or usual is None:
        return usual
    if parallel.moe_tp > 1 and mode is not Dispatch.ALLGATHER:
        raise UsageError(
            f"dispatch {mode.value} needs whole experts, but ep {parallel.ep} is less than tp x dp = "
            f"{parallel.tp * parallel.dp}",
            hint=f"use ep {parallel.tp * parallel.dp}, or allgather",
        )
    return mode


def setup_of(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, precision: Precision, mode: Dispatch | None,
    gpus_per_node: int | None, overlap: bool, balanced: bool, skew: float, c: Constants | None, prefill: bool,
) -> Setup:  # fmt: skip
    _checked(spec, parallel)
    used, per_node = check_mode(spec, parallel, mode, prefill=prefill), gpus_per_node or hardware.scale_up_size
    stage = parallel.tp * parallel.dp
    if stage > per_node and stage % per_node:
        raise PlanError(f"tp x dp = {stage} GPUs do not fill nodes of {per_node}", hint=f"use a multiple of {per_node}")
    if overlap and used in (None, Dispatch.ALLGATHER):
        raise UsageError("two-batch overlap hides dispatch and combine, and here is neither", hint="leave it out")
    used_kinds = kinds(spec, hardware, precision)
    if per_node != hardware.scale_up_size:
        hardware = replace(hardware, scale_up_size=per_node)
    fitted = for_generation(c or constants(), "fp4" in hardware.flops)
    return Setup(spec, hardware, parallel, used_kinds, used, per_node, overlap, balanced, skew, fitted)


@functools.lru_cache(maxsize=1024)
def _checked(spec: CompleteSpec, parallel: Parallel) -> None:
    check_parallel(spec, parallel)


def merged(calls: list[Call], times: int) -> list[Operator]:
    """Calls of one name as one operator, in order of appearance."""
    seconds: dict[str, Number] = {}
    parts: dict[str, dict[str, Number]] = {}
    for call in calls:
        n = call.count * times
        seconds[call.name] = seconds.get(call.name, 0.0) + call.time.seconds * n
        mine = parts.setdefault(call.name, {})
        for name, part in call.time.parts.items():
            mine[name] = mine.get(name, 0.0) + part * n
    return [Operator(name, value, 0.0, parts[name]) for name, value in seconds.items()]
