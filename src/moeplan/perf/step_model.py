"""Time of decode and prefill steps of one set-up: model, accelerators, parallel layout, dtypes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from moeplan.errors import UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.constants import load_constants
from moeplan.perf.context import StepContext, StepOptions, build_context
from moeplan.perf.hardware import Hardware
from moeplan.perf.layers import Batch
from moeplan.perf.memory import ParallelLayout, Precision, kv_bytes
from moeplan.perf.operators import Device, Number, elementwise
from moeplan.perf.routing import Routing
from moeplan.perf.step import Operator, Step
from moeplan.perf.step_time import step_time

__all__ = ["StepModel", "StepOptions", "Workload"]

#: Tokens of a cache block (vLLM's default): what a beam copies when it branches.
BLOCK = 16


@dataclass(frozen=True)
class Workload:
    """What a request asks for.

    Attributes:
        prompt, output: tokens. beams: sequences kept per request.
        drafts: tokens drafted per step; accepted: mean acceptance length: tokens per step, 1 to drafts + 1, the
            verified one included.
        module: the model's MTP (NextN) layers make the drafts, and take time; else drafts cost nothing.
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
        """Whether the model's MTP layers take memory and time."""
        return self.drafts > 0 and self.module


@dataclass(frozen=True)
class StepModel:
    """Step time of a model on accelerators under a parallel layout, in seconds.

    Attributes:
        spec: the model. hardware: one accelerator and its links. parallel: ranks of each kind of parallelism.
        precision: dtypes of weights, experts and KV cache. options: dispatch mode, overlap, load and constants.

    Examples:
        >>> from moeplan.model.catalogue import load_model
        >>> from moeplan.perf.hardware import load_hardware
        >>> from moeplan.perf.memory import ParallelLayout, Precision
        >>> layout, dtypes = ParallelLayout(tp=8), Precision("fp8")
        >>> llama = StepModel(load_model("Llama-3.1-70B"), load_hardware("H100"), layout, dtypes)
        >>> step = llama.decode(batch=16, context=2000)
        >>> max(step.operators, key=lambda operator: operator.exposed).name
        'dense ffn'
    """

    spec: CompleteSpec
    hardware: Hardware
    parallel: ParallelLayout
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
        found = {"hardware": self.hardware.name, "gpus": self.parallel.gpus, "nodes": self.nodes}
        return found | asdict(self.parallel) | {"overlap": self.options.overlap}

    @cached_property
    def _decoding(self) -> StepContext:
        return build_context(self, prefill=False)

    @cached_property
    def _prefilling(self) -> StepContext:
        return build_context(self, prefill=True)

    @property
    def device(self) -> Device:
        """The accelerator, with constants as given."""
        return Device(self.hardware, self.options.constants or load_constants())

    def decode(
        self, batch: float, context: float, workload: Workload | None = None, routing: Routing | None = None
    ) -> Step:
        """A decode step of `batch` requests of a data-parallel rank, each with `context` tokens.

        Args:
            workload: speculation and beams; None: neither.
            routing: counted routing of the whole batch (messages, picks, distinct experts); None: uniform.

        Raises:
            PlanError: a layout that is impossible. UsageError: a dtype or dispatch mode that this set-up cannot have;
                drafts of a model that makes none; routing of another number of layers.
        """
        work = workload or Workload(1, 1)
        sequences, tokens = batch * work.beams, work.drafts + 1
        prefix = min(work.prompt, context)
        rows = Batch(sequences, tokens, context, sequences * tokens, sharing=work.beams, prefix=prefix)
        step = step_time(self._decoding, rows, routing)
        if work.mtp:
            step = self._drafted(step, rows, work.drafts)
        return step if work.beams == 1 else self._reordered(step, sequences)

    def prefill(
        self,
        batch: float,
        tokens: float,
        context: float = 0.0,
        *,
        decoding: tuple[float, float] = (0, 0),
        routing: Routing | None = None,
    ) -> Step:
        """A prefill step of `tokens` tokens of each of `batch` prompts, after `context` earlier ones.

        Args:
            decoding: (sequences, context of each) that decode one token in the same step: a mixed step.

        Other arguments and errors as in `decode`.
        """
        sequences, held = decoding
        beside = Batch(sequences, 1, held, sequences) if sequences else None
        rows = Batch(batch, tokens, context, batch + sequences, decoding=beside)
        return step_time(self._prefilling, rows, routing)

    def _drafted(self, step: Step, rows: Batch, drafts: int) -> Step:
        """With the draft tokens of the MTP layers, one after the other."""
        if not self.spec.mtp_layers:
            raise UsageError(f"{self.spec.name} has no MTP (NextN) layers", hint="leave drafts out")
        module = self._decoding.draft_module()
        one = step_time(module, replace(rows, tokens=1, logits=rows.sequences), engine=False)
        parts: dict[str, Number] = {}
        for operator in one.operators:
            parts[operator.bound] = parts.get(operator.bound, 0.0) + drafts * operator.exposed
        draft = Operator("drafts", drafts * one.seconds, 0.0, parts)
        return replace(step, operators=(*step.operators, draft), waiting=step.waiting + drafts * one.waiting)

    def _reordered(self, step: Step, sequences: float) -> Step:
        """With the copy of each beam's last block, read and written."""
        block = kv_bytes(self.spec, BLOCK, self.precision.kv, self.parallel.tp)
        time = elementwise(self.device, 2 * sequences * block)
        return replace(step, operators=(*step.operators, Operator("beam reorder", time.seconds, 0.0, time.parts)))
