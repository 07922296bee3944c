"""What stays the same over all steps of one phase: the model on its device, its kernels, and how tokens travel."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from moeplan.cluster import Dispatch
from moeplan.errors import PlanError, UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.constants import Constants, for_generation
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import ParallelLayout, Precision, check_parallel
from moeplan.perf.operators import Device

if TYPE_CHECKING:
    from moeplan.perf.step_model import StepModel

__all__ = ["KernelDtypes", "StepContext", "StepOptions", "build_context", "default_dispatch"]


@dataclass(frozen=True)
class StepOptions:
    """How steps run.

    Attributes:
        dispatch: how tokens reach their experts; None: the usual way of the phase. A prefill never uses `pick`.
        overlap: two-batch overlap.
        gpus_per_node: GPUs that the fast network joins; None: the hardware's.
        balanced: uniform routing without the chance that loads one GPU more than another.
        skew: load of the busiest GPU over the mean, where uniform routing gives less.
        constants: fitted efficiencies; None: those that moeplan comes with.
    """

    dispatch: Dispatch | None = None
    overlap: bool = False
    gpus_per_node: int | None = None
    balanced: bool = False
    skew: float = 1.0
    constants: Constants | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", self.dispatch and Dispatch(self.dispatch))
        if self.gpus_per_node is not None and self.gpus_per_node < 1:
            raise UsageError("gpus_per_node must be at least 1")


class KernelDtypes(NamedTuple):
    """Kernels that dtypes lead to on a piece of hardware: of matrices, of experts, of cached keys and values."""

    weights: str
    experts: str
    kv: str

    @classmethod
    def choose(cls, spec: CompleteSpec, hardware: Hardware, precision: Precision) -> KernelDtypes:
        """Which kernels run.

        fp8 weights have block scales where the checkpoint has (DeepSeek-V3's recipe), else one scale per row. Weights
        of a dtype that the hardware cannot multiply in are converted to bf16 on the way (weight-only).

        Raises:
            UsageError: keys and values in a dtype that no attention kernel here reads.
        """
        block = spec.checkpoint is not None and "fp8" in spec.checkpoint
        if precision.kv not in ("bf16", "fp8"):
            raise UsageError(
                f"no attention kernel is modelled for {precision.kv} keys and values", hint="use bf16 or fp8"
            )
        weights = _kernel_dtype(precision.weights, hardware, block)
        return cls(weights, _kernel_dtype(precision.experts or precision.weights, hardware, True), precision.kv)


def _kernel_dtype(dtype: str, hardware: Hardware, block: bool) -> str:
    if dtype == "fp8":
        if "fp8" not in hardware.flops:
            return "w8"
        return "fp8_block" if block else "fp8"
    if dtype in ("fp4", "mxfp4"):
        return "fp4" if "fp4" in hardware.flops else "int4"
    if dtype == "int8" and "int8" not in hardware.flops:
        return "w8"
    return {"fp32": "bf16"}.get(dtype, dtype)


@dataclass(frozen=True)
class StepContext:
    """One phase of a step model.

    Attributes:
        spec, parallel, options: as in the step model. device: its nodes are those of the options, its constants those
            of its generation. dtypes: of kernels. dispatch: None where tokens do not travel. prefill: which phase.
    """

    spec: CompleteSpec
    device: Device
    parallel: ParallelLayout
    dtypes: KernelDtypes
    dispatch: Dispatch | None
    options: StepOptions
    prefill: bool

    @property
    def gpus_per_node(self) -> int:
        return self.device.hardware.scale_up_size

    @property
    def nodes(self) -> int:
        """Nodes that one pipeline stage fills."""
        return -(-self.parallel.tp * self.parallel.dp // self.gpus_per_node)

    @property
    def moe_layers(self) -> int:
        return len(self.spec.moe.layers) if self.spec.moe else 0

    @property
    def halves(self) -> int:
        """Parts of a batch that run one behind the other."""
        return 2 if self.options.overlap else 1

    def draft_module(self) -> StepContext:
        """Of an MTP layer: one layer like the last, with a head, on the last stage."""
        return replace(
            self,
            spec=_draft_module(self.spec),
            parallel=replace(self.parallel, pp=1),
            options=replace(self.options, overlap=False),
        )


@functools.lru_cache(maxsize=64)
def _draft_module(spec: CompleteSpec) -> CompleteSpec:
    moe = replace(spec.moe, layers=(0,)) if spec.moe else None
    return replace(spec, layers=1, full_layers=(0,), moe=moe, mtp_layers=0)


def build_context(model: StepModel, *, prefill: bool) -> StepContext:
    """Check a set-up, and fill in what its options leave open.

    Raises:
        PlanError: a layout that is impossible. UsageError: a dtype or dispatch mode that this set-up cannot have.
    """
    spec, hardware, parallel, options = model.spec, model.hardware, model.parallel, model.options
    check_parallel(spec, parallel)
    dispatch = _check_dispatch(spec, parallel, options.dispatch, prefill)
    per_node, stage = model.gpus_per_node, parallel.tp * parallel.dp
    if stage > per_node and stage % per_node:
        raise PlanError(f"tp x dp = {stage} GPUs do not fill nodes of {per_node}", hint=f"use a multiple of {per_node}")
    if options.overlap and dispatch in (None, Dispatch.ALLGATHER):
        raise UsageError("two-batch overlap hides dispatch and combine, and here is neither", hint="leave it out")
    dtypes = KernelDtypes.choose(spec, hardware, model.precision)
    if per_node != hardware.scale_up_size:
        hardware = replace(hardware, scale_up_size=per_node)
    constants = for_generation(model.device.constants, "fp4" in hardware.flops)
    return StepContext(spec, Device(hardware, constants), parallel, dtypes, dispatch, options, prefill)


def default_dispatch(spec: CompleteSpec, parallel: ParallelLayout, *, prefill: bool) -> Dispatch | None:
    """None where tokens need not travel: a dense model, or one data-parallel rank. Else DeepEP's low-latency kernel in
    decode and its normal one in prefill; all-gather where experts are split over ranks."""
    if spec.moe is None or parallel.dp == 1:
        return None
    if parallel.moe_tp > 1:
        return Dispatch.ALLGATHER
    return Dispatch.NODE if prefill else Dispatch.PICK


def _check_dispatch(
    spec: CompleteSpec, parallel: ParallelLayout, asked: Dispatch | None, prefill: bool
) -> Dispatch | None:
    """The mode asked for as far as it applies, or the default.

    Raises:
        UsageError: a mode that sends tokens to single experts, where experts are split over ranks.
    """
    usual = default_dispatch(spec, parallel, prefill=prefill)
    if asked is None or usual is None or (prefill and asked is Dispatch.PICK):
        return usual
    if parallel.moe_tp > 1 and asked is not Dispatch.ALLGATHER:
        ranks = parallel.tp * parallel.dp
        raise UsageError(
            f"dispatch {asked.value} needs whole experts, but ep {parallel.ep} is less than tp x dp = {ranks}",
            hint=f"use ep {ranks}, or allgather",
        )
    return asked
