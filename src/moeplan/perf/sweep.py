"""Many set-ups at once: which ways of spreading a model are possible, and which of them no other one beats.

A set-up is a layout (accelerators, tp, dp, ep, pp, overlap), a batch and a context; its figures are those of one decode
step. Prefill is left out, as it is where prefill has workers of its own; `moeplan.perf.sizing` counts both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.errors import PlanError, UsageError
from moeplan.frames import data_frame
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec, ModelSpec
from moeplan.perf.hardware import Hardware, hardware_list
from moeplan.perf.layouts import LayoutChoice, node_parts, step_models
from moeplan.perf.memory import MemoryModel, Precision
from moeplan.perf.pictures import draw_pareto
from moeplan.perf.serving import cost
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.progress import Progress

if TYPE_CHECKING:
    import pandas

__all__ = ["Point", "Sweep", "SweepSettings", "best_within", "fronts_by_hardware", "pareto", "sweep", "thinned"]

#: Sweeps larger than this are a mistake more often than a wish.
MOST_SETUPS = 200_000


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep varies.

    Attributes:
        nodes: numbers of nodes; 1 stands for parts of a node, too. gpus: numbers of accelerators instead; None: nodes.
        gpus_per_node: accelerators that the fast network joins; None: the hardware's.
        layouts: tensor- and pipeline-parallel ranks and expert ranks to try.
        batches: requests of each data-parallel rank. contexts: tokens that each holds.
        overlap: also each set-up with two-batch overlap, where that is possible.
        tpot_ms: the limit for the best set-up.
        weights, experts, kv: dtypes of matrices, routed experts and KV cache; None: the checkpoint's.

    Raises:
        UsageError: a list without numbers, or with one below 1; a limit that is not above 0.
    """

    nodes: tuple[int, ...] = (1,)
    gpus: tuple[int, ...] | None = None
    gpus_per_node: int | None = None
    layouts: LayoutChoice = LayoutChoice()
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    contexts: tuple[int, ...] = (4096,)
    overlap: bool = False
    tpot_ms: float = 50.0
    weights: str | None = None
    experts: str | None = None
    kv: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "batches", "contexts"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise UsageError(f"{name} must be numbers of at least 1")
        if not self.tpot_ms > 0:
            raise UsageError(f"tpot {self.tpot_ms:g} is not above 0", hint="give milliseconds")

    def counts(self, hardware: Hardware) -> tuple[int, ...]:
        """Numbers of accelerators to try of this hardware."""
        if self.gpus is not None:
            return self.gpus
        per_node = self.gpus_per_node or hardware.scale_up_size
        parts = node_parts(per_node) if 1 in self.nodes else []
        return tuple(sorted({*parts, *(n * per_node for n in self.nodes)}))


@dataclass(frozen=True)
class Point:
    """One set-up and its decode step.

    Attributes:
        batch: requests of a data-parallel rank. context: tokens that each holds.
        tpot_s: seconds per output token. per_gpu_s: output tokens per second and accelerator.
        bound: what most of the step waits for. usd, kwh: per million output tokens.
    """

    step_model: StepModel
    batch: int
    context: int
    tpot_s: float
    per_gpu_s: float
    bound: str
    usd: float
    kwh: float

    def __str__(self) -> str:
        """In words: "72 x H100-SXM (dp 72 ep 72, 128 requests a rank)"."""
        held = f"{self.batch:,} request{'s' * (self.batch > 1)} a rank"
        return f"{self.gpus} x {self.hardware.name} ({self.layout}, {held})"

    @property
    def hardware(self) -> Hardware:
        return self.step_model.hardware

    @property
    def gpus(self) -> int:
        return self.step_model.parallel.gpus

    @property
    def layout(self) -> str:
        return self.step_model.layout

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.step_model.to_dict(),
            "batch": self.batch,
            "context": self.context,
            "tpot_ms": 1e3 * self.tpot_s,
            "tokens_per_s_per_gpu": self.per_gpu_s,
            "bound": self.bound,
            "usd_per_million_tokens": self.usd,
            "kwh_per_million_tokens": self.kwh,
        }


@dataclass(frozen=True, repr=False)
class Sweep:
    """All set-ups of a model that fit the memory.

    Attributes:
        spec, settings, precision: what was swept.
        points: in the order tried. unfit: how many set-ups did not fit.
    """

    spec: CompleteSpec
    settings: SweepSettings
    precision: Precision
    points: tuple[Point, ...]
    unfit: int

    def __repr__(self) -> str:
        lines = [f"Sweep of {self.spec.name}: {len(self.points):,} set-ups, {self.unfit:,} more do not fit"]
        for context in self.settings.contexts:
            best = self.best(context)
            found = f"{best.per_gpu_s:,.0f} tokens/s a GPU on {best}" if best else "none"
            lines.append(f"  {context:,} tokens of context, within {self.settings.tpot_ms:g} ms: {found}")
        return "\n".join(lines)

    def at(self, context: int) -> list[Point]:
        """The set-ups of one context."""
        return [point for point in self.points if point.context == context]

    def best(self, context: int) -> Point | None:
        """Of one context, the set-up of most tokens per accelerator within the limit; None: there is none."""
        return best_within(self.at(context), self.settings.tpot_ms / 1e3)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        contexts = self.settings.contexts
        fronts = {id(p) for context in contexts for p in pareto(self.at(context))}
        best = {context: self.best(context) for context in contexts}
        return {
            "model": self.spec.name,
            "phase": "decode",
            "routing": "uniform" if self.spec.moe else None,
            "set_ups": len(self.points),
            "do_not_fit": self.unfit,
            "tpot_limit_ms": self.settings.tpot_ms,
            "best": {str(context): p.to_dict() | {"pareto": True} if p else None for context, p in best.items()},
            "points": [p.to_dict() | {"pareto": id(p) in fronts} for p in self.points],
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One line per set-up.

        Raises:
            MoeplanError: pandas is not installed.
        """
        return data_frame(self.to_dict()["points"])

    def plot(self, context: int | None = None) -> Any:
        """Throughput against TPOT with the front of each hardware, as a `matplotlib.figure.Figure`.

        Args:
            context: tokens of context; None: the first that was swept.
        """
        from matplotlib.figure import Figure

        held = self.settings.contexts[0] if context is None else context
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        draw_pareto(axes, fronts_by_hardware(self.at(held)), self.best(held), self.settings.tpot_ms)
        axes.legend()
        return figure


def sweep(
    model: str | Path | ModelSpec,
    hardware: str | Hardware | Sequence[str | Hardware],
    settings: SweepSettings = SweepSettings(),
    progress: Progress | None = None,
) -> Sweep:
    """Estimate every set-up: hardware, number of accelerators, layout, context and batch.

    Args:
        model: a name of the catalogue, the path of a config.json, or a description.
        hardware: names of the catalogue ("H100,H200", or "all"), or descriptions.
        progress: called with each layout that is done.

    Raises:
        PlanError: no count that a layout fits. UsageError: an unknown name; nothing fits the memory; too many set-ups.
        FormatError: a file that does not describe a model.

    Examples:
        >>> import moeplan
        >>> moeplan.sweep("gpt-oss-20b", "H100", moeplan.SweepSettings(gpus=(1, 2), batches=(1, 64)))
        Sweep of gpt-oss-20b: 10 set-ups, 0 more do not fit
          4,096 tokens of context, within 50 ms: 7,112 tokens/s a GPU on 2 x H100-SXM (dp 2 ep 2, 64 requests a rank)
    """
    spec = load_model(model)
    precision = Precision.of_checkpoint(spec, settings.weights, settings.experts, settings.kv)
    options = StepOptions(overlap=settings.overlap, gpus_per_node=settings.gpus_per_node)
    tried: list[StepModel] = []
    refused = None
    for each in hardware_list(hardware):
        for gpus in settings.counts(each):
            try:
                tried += step_models(spec, each, gpus, precision, settings.layouts, options)
            except PlanError as error:
                refused = error
    if not tried and refused:
        raise refused
    total = len(tried) * len(settings.contexts) * len(settings.batches)
    if total > MOST_SETUPS:
        raise UsageError(f"{total:,} set-ups are more than {MOST_SETUPS:,}", hint="ask for fewer counts or batches")
    points, unfit = [], 0
    for done, step_model in enumerate(tried):
        for context in settings.contexts:
            most = MemoryModel(spec, step_model.hardware, step_model.parallel, precision).largest_batch(context)
            fits = [batch for batch in settings.batches if batch <= most]
            unfit += len(settings.batches) - len(fits)
            least = 2 * step_model.parallel.pp if step_model.options.overlap else 1  # micro-batches are halved
            points += [_point(step_model, batch, context) for batch in fits if batch >= least]
        if progress:
            progress(done + 1, len(tried), step_model.hardware.name)
    if not points:
        raise UsageError(f"{spec.name} fits none of the {unfit} set-ups", hint="use more GPUs, or smaller dtypes")
    return Sweep(spec, settings, precision, tuple(points), unfit)


def _point(model: StepModel, batch: int, context: int) -> Point:
    step = model.decode(batch, context)
    seconds = float(step.seconds)
    each = batch * model.parallel.dp / seconds / model.parallel.gpus
    bound = next(iter(step.bound_shares()))
    return Point(model, batch, context, seconds, each, bound, *cost(model.hardware, each))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats on both TPOT and tokens per second and accelerator, by rising TPOT.

    Of equal points the first stays. Contexts are not told apart: give points of one.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.tpot_s, -p.per_gpu_s)):
        if not front or point.per_gpu_s > front[-1].per_gpu_s:
            front.append(point)
    return front


def fronts_by_hardware(points: Sequence[Point]) -> dict[str, tuple[list[Point], list[Point]]]:
    """{hardware: (its set-ups, those that no other one beats)}."""
    names = dict.fromkeys(point.hardware.name for point in points)
    own = {name: [point for point in points if point.hardware.name == name] for name in names}
    return {name: (mine, pareto(mine)) for name, mine in own.items()}


def thinned(front: Sequence[Point], most: int) -> list[Point]:
    """At most that many of a front (two or more), ends included, even along it."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]


def best_within(points: Sequence[Point], tpot_s: float) -> Point | None:
    """The one of most tokens per accelerator within a TPOT."""
    return max((p for p in points if p.tpot_s <= tpot_s), key=lambda p: p.per_gpu_s, default=None)
