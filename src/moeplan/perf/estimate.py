"""One step of one set-up: time by operator, memory, throughput and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.frames import data_frame
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec, ModelSpec
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.memory import Memory, MemoryModel, ParallelLayout, Precision, check_parallel
from moeplan.perf.pictures import breakdown_bars, breakdown_height, draw_breakdown
from moeplan.perf.routing import Routing
from moeplan.perf.serving import Cost, cost
from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel, StepOptions, Workload

if TYPE_CHECKING:
    import pandas

__all__ = ["Estimate", "EstimateSettings", "MeasuredRouting", "estimate", "estimate_step"]

#: More tokens, or requests, than any set-up holds.
MOST_TOKENS = 100_000_000


@dataclass(frozen=True)
class EstimateSettings:
    """How a model is spread over accelerators, and how its steps run.

    Attributes:
        phase: which step.
        tp, pp: tensor-parallel ranks of attention, and pipeline stages. dp: data-parallel ranks; None: as many as use
            all accelerators. ep: ranks that share the experts; None: all of a stage.
        weights, experts, kv: dtypes of attention, dense and shared-expert weights, of routed experts, and of the KV
            cache; None: the checkpoint's.
        dispatch: how tokens reach their experts; None: the usual way of the phase.
        overlap: two-batch overlap. balanced: every GPU gets the same load. skew: load of the busiest GPU over the mean.
        drafts: draft tokens per step, from the MTP (NextN) layers. accepted: mean acceptance length (tokens per step,
            the verified one included); None: 1 + 0.8 x drafts.

    Raises:
        UsageError: values that exclude each other, or are out of range.
    """

    phase: Literal["decode", "prefill"] = "decode"
    tp: int = 1
    pp: int = 1
    dp: int | None = None
    ep: int | None = None
    weights: str | None = None
    experts: str | None = None
    kv: str = "bf16"
    dispatch: Dispatch | None = None
    overlap: bool = False
    balanced: bool = False
    skew: float = 1.0
    drafts: int = 0
    accepted: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", self.dispatch and Dispatch(self.dispatch))
        if self.phase not in ("decode", "prefill"):
            raise UsageError(f'phase "{str(self.phase)[:60]}" is unknown', hint="use decode or prefill")
        if not self.skew >= 1:
            raise UsageError(f"skew {self.skew:g} is below 1", hint="it is the busiest GPU's load over the mean")
        if self.skew > 1 and self.balanced:
            raise UsageError("skew and balanced exclude each other", hint="leave one out")
        if self.drafts < 0 or (self.drafts and self.phase == "prefill"):
            raise UsageError("draft tokens are of decode, and at least 0", hint="leave them out")

    def parallel(self, spec: CompleteSpec, gpus: int, redundant: int = 0) -> ParallelLayout:
        """The layout on `gpus` accelerators, all of which are used; experts over all ranks of a stage.

        Raises:
            PlanError: a layout that is impossible. UsageError: a count below 1, or a product other than `gpus`.
        """
        tp, pp, dp, ep = self.tp, self.pp, self.dp, self.ep
        if min(tp, pp, dp or 1, ep or 1) < 1:
            raise UsageError("tp, pp, dp and ep must be at least 1")
        if dp is None:
            if gpus % (tp * pp):
                raise UsageError(f"tp {tp} x pp {pp} does not divide the {gpus} GPUs", hint="choose tp and pp that do")
            dp = gpus // (tp * pp)
        if tp * dp * pp != gpus:
            what = f"tp {tp} x dp {dp} x pp {pp} = {tp * dp * pp} GPUs, but there are {gpus}"
            raise UsageError(what, hint=f"make their product {gpus}, or leave dp out")
        parallel = ParallelLayout(tp=tp, dp=dp, pp=pp, ep=ep or (tp * dp if spec.moe else 1), redundant=redundant)
        check_parallel(spec, parallel)
        return parallel

    def workload(self, context: int) -> Workload:
        """What a request of `context` tokens asks for."""
        accepted = 1 + 0.8 * self.drafts if self.accepted is None else self.accepted
        return Workload(context, 1, drafts=self.drafts, accepted=accepted)

    def step_model(
        self, spec: CompleteSpec, hardware: Hardware, parallel: ParallelLayout, gpus_per_node: int | None = None
    ) -> StepModel:
        """The step model of a layout.

        Raises:
            UsageError: more skew than GPUs that share the experts.
        """
        if self.skew > 1 and self.skew > parallel.ep:
            raise UsageError(f"skew {self.skew:g} is more than the {parallel.ep} GPUs that share the experts")
        options = StepOptions(self.dispatch, self.overlap, gpus_per_node, self.balanced, self.skew)
        precision = Precision.of_checkpoint(spec, self.weights, self.experts, self.kv)
        return StepModel(spec, hardware, parallel, precision, options)


@dataclass(frozen=True)
class MeasuredRouting:
    """What counted steps of a trace under a plan did, beside uniform routing.

    Attributes:
        trace, plan, strategy: what was counted. fitted_on_this_trace: the plan has seen these requests.
        steps: how many were counted. local_share: picks served on the token's own node.
        experts_per_gpu: distinct experts that a GPU reads in a layer. load_ratio: busiest GPU over the mean.
        step_ms_p5, step_ms_p95: 9 in 10 steps lie between.
        uniform: {step_ms, load_ratio, local_share, experts_per_gpu} with uniform routing.
        notes: what a reader must know, one line each.
    """

    trace: str
    plan: str
    strategy: str
    fitted_on_this_trace: bool
    steps: int
    local_share: float
    experts_per_gpu: float
    load_ratio: float
    step_ms_p5: float
    step_ms_p95: float
    uniform: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Estimate:
    """The time of one step, what bounds it, and what it costs.

    Attributes:
        step_model: model, hardware, layout, dtypes. workload: speculation.
        phase: `decode` or `prefill`. batch: requests of each data-parallel rank. context: tokens of each.
        step: its operators; of counted steps, their means. memory: of one accelerator.
        largest_batch: the most requests of a rank that the memory holds.
        routing: of counted steps; None: uniform. measured: what those steps did; None: uniform.
    """

    step_model: StepModel
    workload: Workload
    phase: Literal["decode", "prefill"]
    batch: int
    context: int
    step: Step
    memory: Memory
    largest_batch: int
    routing: Routing | None = None
    measured: MeasuredRouting | None = None

    def __repr__(self) -> str:
        model, kind = self.step_model, "TPOT" if self.phase == "decode" else "TTFT"
        most = sorted(self.step.operators, key=lambda o: -float(o.exposed))[:3]
        lines = [
            f"{model.spec.name}, {self.phase} on {model.parallel.gpus} x {model.hardware.name} ({model.layout}), "
            f"{self.batch:,} requests a rank of {self.context:,} tokens",
            f"  {kind} {self.tpot_ms or self.ttft_ms:.2f} ms, {self.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
            f"{self.cost.usd:.3f} USD per million tokens",
            "  most: " + ", ".join(f"{o.name} {1e3 * float(o.exposed):.2f} ms ({o.bound})" for o in most),
            f"  memory of a GPU: {self.memory.used / 1e9:.1f} of {self.memory.usable / 1e9:.1f} GB",
        ]
        return "\n".join(lines) + ("" if self.memory.fits else ": DOES NOT FIT")

    @property
    def step_ms(self) -> float:
        """Milliseconds of the step."""
        return 1e3 * float(self.step.seconds)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step yields for a request: accepted ones, or a prompt."""
        return self.context if self.phase == "prefill" else self.workload.accepted

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per output token; None of a prefill."""
        return None if self.phase == "prefill" else 1e3 * float(self.step.seconds) / self.workload.accepted

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds to the first token, without queueing; None of a decode step."""
        return 1e3 * float(self.step.seconds) if self.phase == "prefill" else None

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens per second and accelerator."""
        parallel = self.step_model.parallel
        return self.batch * parallel.dp * self.tokens_per_step / float(self.step.seconds) / parallel.gpus

    @property
    def cost(self) -> Cost:
        """Of a million tokens."""
        return cost(self.step_model.hardware, self.tokens_per_s_per_gpu)

    def operators(self) -> list[dict[str, Any]]:
        """One row per operator; the exposed milliseconds add up to the step."""
        return [
            {
                "name": op.name,
                "ms": 1e3 * float(op.seconds),
                "hidden_ms": 1e3 * float(op.hidden),
                "exposed_ms": 1e3 * float(op.exposed),
                "bound": op.bound,
            }
            for op in self.step.operators
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        model, step, used = self.step_model, self.step, self.memory
        p = model.parallel
        out = {
            "model": model.spec.name,
            "hardware": model.hardware.name,
            "phase": self.phase,
            "parallel": {"tp": p.tp, "dp": p.dp, "ep": p.ep, "pp": p.pp, "gpus": p.gpus, "redundant": p.redundant},
            "precision": {name: getattr(model.precision, name) for name in ("weights", "experts", "kv")},
            "dispatch": step.dispatch.value if step.dispatch else None,
            "overlap": model.options.overlap,
            "routing": step.routing if self.measured is None else "real",
            "load_ratio": step.load_ratio,
            "batch": self.batch,
            "context": self.context,
            "step_ms": self.step_ms,
            "idle_share": float(step.idle_share),
            "operators": self.operators(),
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "tpot_ms": self.tpot_ms,
            "ttft_ms": self.ttft_ms,
            "usd_per_million_tokens": self.cost.usd,
            "kwh_per_million_tokens": self.cost.kwh,
            "usd_per_gpu_hour": model.hardware.usd_per_hour,
            "memory": {
                "weights_gb": sum(used.weights.values()) / 1e9,
                "kv_gb": used.kv / 1e9,
                "activations_gb": used.activations / 1e9,
                "usable_gb": used.usable / 1e9,
                "fits": used.fits,
                "largest_batch": self.largest_batch,
            },
        }
        if self.measured is not None:
            out["real"] = asdict(self.measured) | {"notes": list(self.measured.notes)}
        return out

    def to_pandas(self) -> pandas.DataFrame:
        """One line per operator.

        Raises:
            MoeplanError: pandas is not installed.
        """
        return data_frame(self.operators())

    def plot(self) -> Any:
        """Bars of the operators by what bounds them, as a `matplotlib.figure.Figure`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, breakdown_height(breakdown_bars(self.step))), layout="constrained")
        axes = figure.subplots()
        draw_breakdown(axes, self.step)
        axes.legend()
        return figure


def estimate(
    model: str | Path | ModelSpec,
    hardware: str | Hardware,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    redundant: int = 0,
    batch: int = 128,
    context: int = 4096,
    settings: EstimateSettings = EstimateSettings(),
) -> Estimate:
    """Estimate one step of a model on a cluster, with uniform routing.

    Args:
        model: a name of the catalogue, the path of a config.json, or a description.
        hardware: a name of the catalogue, or a description.
        nodes: of one worker. gpus_per_node: that the fast network joins; None: the hardware's.
        redundant: extra expert slots per layer.
        batch: requests of each data-parallel rank. context: tokens that each holds, or that a prefill reads.
        settings: layout, dtypes, dispatch, speculation.

    Raises:
        UsageError: an unknown name, a value out of range. PlanError: a layout that is impossible.
        FormatError: a file that does not describe a model.

    Examples:
        >>> import moeplan
        >>> step = moeplan.estimate("deepseek-v3", "H100", nodes=9, gpus_per_node=8, redundant=32)
        >>> f"{step.tpot_ms:.1f} ms, {step.tokens_per_s_per_gpu:.0f} tokens/s a GPU"
        '71.7 ms, 1785 tokens/s a GPU'
    """
    spec, machine = load_model(model), load_hardware(hardware)
    per_node = gpus_per_node if gpus_per_node is not None else machine.scale_up_size
    if nodes < 1 or per_node < 1:
        raise UsageError("nodes and gpus_per_node must be at least 1")
    if gpus_per_node is not None or nodes > 1:
        gpus = nodes * per_node
    elif settings.dp is None and spec.moe is not None:
        gpus = per_node
    else:
        gpus = settings.tp * settings.pp * (settings.dp or 1)
    parallel = settings.parallel(spec, gpus, redundant)
    return estimate_step(settings.step_model(spec, machine, parallel, per_node), batch, context, settings)


def estimate_step(
    model: StepModel, batch: int, context: int, settings: EstimateSettings, routing: Routing | None = None
) -> Estimate:
    """Estimate one step of a step model; of several counted steps, their mean.

    Args:
        routing: of counted steps; None: uniform.
    """
    if context < 1 or batch < 1:
        raise UsageError("batch and context must be at least 1")
    if max(context, batch) > MOST_TOKENS:
        raise UsageError(f"batch and context must be at most {MOST_TOKENS:,}")
    prefill, workload = settings.phase == "prefill", settings.workload(context)
    step = model.prefill(batch, context) if prefill else model.decode(batch, context, workload, routing)
    rows = batch * context if prefill else batch * (workload.drafts + 1)
    memory = MemoryModel(model.spec, model.hardware, model.parallel, model.precision, mtp=workload.drafts > 0)
    used, most = memory.need(batch, context, rows), memory.largest_batch(context, rows if prefill else 0)
    return Estimate(model, workload, settings.phase, batch, context, step.mean(), used, most, routing)
