"""Time of decode and prefill steps of one set-up: model, accelerators, parallel layout, dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.constants import Constants
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import Parallel, Precision, kv_bytes
from moeplan.perf.operators import elementwise
from moeplan.perf.routing import Routing
from moeplan.perf.setup import Operator
from moeplan.perf.step import Step, decode_step, prefill_step

__all__ = ["StepModel", "StepOptions", "Workload"]

#: Tokens of a cache block (vLLM's default): what a beam copies when it branches.
BLOCK = 16


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


@dataclass(frozen=True)
class Workload:
    """What a request asks for.

    Attributes:
        prompt, output: tokens. beams: sequences kept per request.
        drafts: tokens drafted per step; accepted: tokens that a step yields, 1 to drafts + 1 (the acceptance length).
        module: the model's own multi-token module makes the drafts, and takes its time; else they cost nothing.
    """

    prompt: int
    output: int
    beams: int = 1
    drafts: int = 0
    accepted: float = 1.0
    module: bool = True

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1 or self.beams < 1 or self.drafts < 0:
            raise UsageError("prompt, output and beams must be at least 1, drafts at least 0", hint="correct them")
        if not 1 <= self.accepted <= self.drafts + 1:
            raise UsageError(
                f"a step with {self.drafts} drafts cannot yield {self.accepted:g} tokens",
                hint=f"give an acceptance length of 1 to {self.drafts + 1}",
            )

    @property
    def context(self) -> float:
        """Tokens of a request, mean over its decode."""
        return self.prompt + self.output / 2

    @property
    def mtp(self) -> bool:
        """Whether the model's multi-token module takes memory and time."""
        return self.drafts > 0 and self.module


@dataclass(frozen=True)
class StepModel:
    """The time of a step: model, accelerators, how the one is spread over the other, dtypes, and how steps run.

    Example:
        >>> from moeplan.model.spec import model
        >>> from moeplan.perf.hardware import hardware
        >>> from moeplan.perf.memory import Parallel, Precision
        >>> llama = StepModel(load_model("Llama-3.1-70B"), hardware("H100"), Parallel(tp=8), Precision("fp8"))
        >>> step = llama.decode(batch=16, context=2000)
        >>> max(step.operators, key=lambda operator: operator.exposed).name
        'dense ffn'
    """

    spec: CompleteSpec
    hardware: Hardware
    parallel: Parallel
    precision: Precision
    options: StepOptions = StepOptions()

    @property
    def gpus_per_node(self) -> int:
        """GPUs that the fast network joins."""
        return self.options.gpus_per_node or self.hardware.scale_up_size

    @property
    def nodes(self) -> int:
        """Nodes of one worker."""
        return -(-self.parallel.gpus // self.gpus_per_node)

    @property
    def layout(self) -> str:
        """How the model is spread, in words: "dp 72 ep 72 overlap"."""
        p = self.parallel
        text = " ".join(f"{name} {getattr(p, name)}" for name in ("tp", "dp", "ep", "pp") if getattr(p, name) > 1)
        return (text or "one GPU") + (" overlap" if self.options.overlap else "")

    def to_dict(self) -> dict[str, Any]:
        """Accelerators, and how the model is spread over them."""
        p = self.parallel
        return {
            "hardware": self.hardware.name,
            "gpus": p.gpus,
            "nodes": self.nodes,
            "tp": p.tp,
            "dp": p.dp,
            "ep": p.ep,
            "pp": p.pp,
            "redundant": p.redundant,
            "overlap": self.options.overlap,
        }

    def decode(
        self, batch: float, context: float, workload: Workload | None = None, routing: Routing | None = None
    ) -> Step:
        """A decode step of `batch` requests of a data-parallel rank, each with `context` tokens.

        Args:
            workload: speculation and beams; None: neither.
            routing: what the step's routing did, of the whole batch; None: uniform.

        Raises:
            PlanError: a layout that is impossible. UsageError: a dtype or dispatch mode that this set-up cannot have.
        """
        o, load = self.options, workload or Workload(1, 1)
        step = decode_step(
            self.spec, self.hardware, self.parallel, self.precision, batch * load.beams, context, routing=routing,
            mode=o.dispatch, overlap=o.overlap, tokens=load.drafts + 1, drafts=load.drafts if load.module else 0,
            beams=load.beams, prefix=min(load.prompt, context), gpus_per_node=o.gpus_per_node,
            balanced=o.balanced, skew=o.skew, c=o.constants,
        )  # fmt: skip
        return step if load.beams == 1 else self._reordered(step, batch * load.beams)

    def prefill(
        self, batch: float, tokens: float, context: float = 0.0, *, decoding: tuple[float, float] = (0, 0),
        routing: Routing | None = None,
    ) -> Step:  # fmt: skip
        """A prefill step of `tokens` tokens of each of `batch` prompts, after `context` earlier ones.

        Args:
            decoding: (sequences, context of each) that decode one token in the same step: a mixed step.

        Other arguments and errors as in `decode`.
        """
        o = self.options
        return prefill_step(
            self.spec, self.hardware, self.parallel, self.precision, batch, tokens, context=context, routing=routing,
            mode=o.dispatch if o.dispatch is not Dispatch.PICK else None, overlap=o.overlap,
            gpus_per_node=o.gpus_per_node, balanced=o.balanced, skew=o.skew, decoding=decoding, c=o.constants,
        )  # fmt: skip

    def _reordered(self, step: Step, sequences: float) -> Step:
        """With the copy of each beam's last block, read and written."""
        block = kv_bytes(self.spec, BLOCK, self.precision.kv, self.parallel.tp)
        time = elementwise(self.hardware, 2 * sequences * block, 1, self.options.constants)
        return replace(step, operators=(*step.operators, Operator("beam reorder", time.seconds, 0.0, time.parts)))
