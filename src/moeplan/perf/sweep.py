"""Many set-ups at once: which ways of spreading a model are possible, and which of them no other one beats.

A set-up is a layout (accelerators, tp, dp, ep, pp, overlap), a batch and a context; its figures are those of one decode
step. Prefill is left out, as it is where prefill has workers of its own; `moeplan.perf.sizing` counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moeplan.cluster import Dispatch
from moeplan.errors import PlanError, UsageError
from moeplan.model.spec import ModelSpec
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import Parallel, Precision, check_parallel, largest_batch
from moeplan.perf.serving import Layout, cost
from moeplan.perf.setup import default_mode
from moeplan.perf.step import Step

__all__ = [
    "Choice", "Point", "Sweep", "best_within", "bound_shares", "layouts", "node_parts", "parallels", "pareto",
    "precision_of", "sweep", "thinned", "ways", "where", "with_overlap",
]  # fmt: skip

#: Columns of the narrowest part of an expert that a grouped product is worth calling for.
TILE = 64
#: Sweeps larger than this are a mistake more often than a wish.
MOST_SETUPS = 200_000


@dataclass(frozen=True)
class Choice:
    """What the user fixed of the ways to spread a model; None: all that are possible."""

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Point:
    """One set-up and its decode step.

    Attributes:
        batch: requests of a data-parallel rank. context: tokens that each holds.
        tpot_s: seconds per output token. per_gpu_s: output tokens per second and accelerator.
        bound: what most of the step waits for. usd, kwh: per million output tokens.
    """

    layout: Layout
    batch: int
    context: int
    tpot_s: float
    per_gpu_s: float
    bound: str
    usd: float
    kwh: float


@dataclass(frozen=True)
class Sweep:
    """All set-ups that fit the memory, in the order tried; unfit: how many did not fit."""

    points: tuple[Point, ...]
    unfit: int


def precision_of(spec: ModelSpec, weights: str | None, experts: str | None, kv: str) -> Precision:
    """The dtypes asked for, else the checkpoint's.

    Raises:
        UsageError: an unknown dtype, or none given for a model whose checkpoint is not known.
    """
    if weights is not None:
        return Precision(weights=weights, experts=experts, kv=kv)
    known = Precision.of_checkpoint(spec)
    return Precision(weights=known.weights, experts=experts or known.experts, kv=kv)


def parallels(spec: ModelSpec, gpus: int, per_node: int, choice: Choice = Choice()) -> list[Parallel]:
    """All layouts of a model on `gpus` accelerators in nodes of `per_node`.

    Neither stages nor tensor-parallel groups straddle nodes or leave one half filled. Experts are spread over all ranks
    of a stage, with as few redundant slots as make them divide, or, with one data-parallel rank, each split over all
    ranks (ep 1); where a stage has more than twice as many ranks as experts, each expert is split over several. No part
    of an expert is narrower than a kernel's tile.

    Raises:
        PlanError: nothing is possible; the message is that of the first layout refused.
    """
    found: list[Parallel] = []
    refused: list[PlanError] = []
    for pp in choice.pp or _divisors(gpus):
        if gpus % pp or pp > spec.layers:
            refused.append(PlanError(f"pp {pp} does not divide {gpus} GPUs, or is more than {spec.layers} layers"))
            continue
        stage = gpus // pp
        if not _fills(stage, per_node, gpus):
            continue
        for tp in choice.tp or _divisors(stage):
            if stage % tp or not _fills(tp, per_node, stage):
                refused.append(PlanError(f"tp {tp} x pp {pp} does not divide {gpus} GPUs in nodes of {per_node}"))
                continue
            for ep in choice.ep or _expert_ranks(spec, stage, tp):
                slots = spec.moe.experts if spec.moe else 0
                parallel = Parallel(tp, stage // tp, ep, pp, -slots % ep)
                try:
                    check_parallel(spec, parallel)
                except PlanError as error:
                    refused.append(error)
                    continue
                if spec.moe and spec.moe.width / parallel.moe_tp < TILE:
                    refused.append(PlanError(f"tp {tp} with ep {ep} cuts experts of width {spec.moe.width} too thin"))
                    continue
                found.append(parallel)
    if not found:
        none = PlanError(f"{gpus} GPUs do not fill nodes of {per_node}", hint=f"use a multiple of {per_node}")
        raise next(iter(refused), none)
    return found


def node_parts(per_node: int) -> list[int]:
    """Accelerators of a part of one node: powers of two, and all of it."""
    return [*(1 << i for i in range((per_node - 1).bit_length())), per_node]


@lru_cache(maxsize=512)
def _divisors(count: int) -> tuple[int, ...]:
    low = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return tuple(sorted({*low, *(count // d for d in low)}))


def _fills(stage: int, per_node: int, gpus: int) -> bool:
    """Whether groups of `stage` accelerators, `gpus` in all, neither straddle nodes nor leave one half filled."""
    return stage % per_node == 0 if stage > per_node else gpus <= per_node or per_node % stage == 0


def _expert_ranks(spec: ModelSpec, stage: int, tp: int) -> list[int]:
    """Ranks that may share the experts of a stage."""
    if spec.moe is None:
        return [1]
    whole = stage if stage <= 2 * spec.moe.experts else max(d for d in _divisors(stage) if d <= spec.moe.experts)
    return [whole, 1] if stage == tp and whole > 1 else [whole]


def with_overlap(layout: Layout) -> bool:
    """Whether two-batch overlap has messages to hide."""
    return default_mode(layout.spec, layout.parallel, prefill=False) is Dispatch.PICK


def sweep(
    spec: ModelSpec, machines: Sequence[tuple[Hardware, Sequence[int]]], precision: Precision, *,
    batches: Sequence[int], contexts: Sequence[int], choice: Choice = Choice(), gpus_per_node: int | None = None,
    overlap: bool = False, usd_per_hour: float | None = None, watts: float | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Sweep:  # fmt: skip
    """Every set-up of every machine, count of accelerators, layout, context and batch.

    Args:
        machines: hardware, and how many accelerators of it to try.
        batches: requests of a data-parallel rank. contexts: tokens that each of them holds.
        overlap: also each set-up with two-batch overlap, where that is possible.
        gpus_per_node: accelerators that the fast network joins (default: the hardware's).
        usd_per_hour, watts: of one accelerator, instead of the catalogue's.

    Raises:
        PlanError: not one count that a layout fits. UsageError: more set-ups than `MOST_SETUPS`.
    """
    tried: list[Layout] = []
    refused = None
    for hardware, counts in machines:
        for gpus in counts:
            try:
                tried += layouts(
                    spec, hardware, gpus, precision, choice, gpus_per_node=gpus_per_node, overlap=overlap
                )  # fmt: skip
            except PlanError as error:
                refused = error
    if not tried and refused:
        raise refused
    total = len(tried) * len(contexts) * len(batches)
    if total > MOST_SETUPS:
        raise UsageError(f"{total:,} set-ups are more than {MOST_SETUPS:,}", hint="ask for fewer counts or batches")
    points, unfit = [], 0
    for done, layout in enumerate(tried):
        for context in contexts:
            most = largest_batch(spec, layout.hardware, layout.parallel, precision, context=context)
            fits = [batch for batch in batches if batch <= most]
            unfit += len(batches) - len(fits)
            least = 2 * layout.parallel.pp if layout.overlap else 1  # each of a stage's micro-batches is halved
            points += [_point(layout, batch, context, usd_per_hour, watts) for batch in fits if batch >= least]
        report(done + 1, len(tried), layout.hardware.name)
    return Sweep(tuple(points), unfit)


def layouts(
    spec: ModelSpec, hardware: Hardware, gpus: int, precision: Precision, choice: Choice = Choice(), *,
    gpus_per_node: int | None = None, overlap: bool = False,
) -> list[Layout]:  # fmt: skip
    """`parallels` as layouts; with `overlap`, each also with two-batch overlap, where that is possible."""
    per_node, found = gpus_per_node or hardware.scale_up_size, []
    for parallel in parallels(spec, gpus, per_node, choice):
        layout = Layout(spec, hardware, parallel, precision, gpus_per_node=per_node)
        found += [layout, replace(layout, overlap=True)] if overlap and with_overlap(layout) else [layout]
    return found


def _point(layout: Layout, batch: int, context: int, usd_per_hour: float | None, watts: float | None) -> Point:
    step = layout.decode(batch, context)
    seconds = float(step.seconds)
    each = batch * layout.parallel.dp / seconds / layout.parallel.gpus
    usd, kwh = cost(layout.hardware, each, usd_per_hour=usd_per_hour, watts=watts)
    return Point(layout, batch, context, seconds, each, next(iter(bound_shares(step))), usd, kwh)


def bound_shares(step: Step) -> dict[str, float]:
    """Share of the step by what bounds its operators, largest first."""
    seconds: dict[str, float] = {}
    for operator in step.operators:
        seconds[operator.bound] = seconds.get(operator.bound, 0.0) + float(operator.exposed)
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats on both TPOT and tokens per second and accelerator, by rising TPOT.

    Of equal points the first stays. Contexts are not told apart: give points of one.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.tpot_s, -p.per_gpu_s)):
        if not front or point.per_gpu_s > front[-1].per_gpu_s:
            front.append(point)
    return front


def thinned(front: Sequence[Point], most: int) -> list[Point]:
    """At most that many of a front (two or more), ends included, even along it."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]


def best_within(points: Sequence[Point], tpot_s: float) -> Point | None:
    """The one of most tokens per accelerator within a TPOT."""
    return max((p for p in points if p.tpot_s <= tpot_s), key=lambda p: p.per_gpu_s, default=None)


def ways(layout: Layout) -> str:
    """How a layout spreads a model, in words: "dp 72 ep 72 overlap"."""
    p = layout.parallel
    text = " ".join(f"{name} {getattr(p, name)}" for name in ("tp", "dp", "ep", "pp") if getattr(p, name) > 1)
    return (text or "one GPU") + (" overlap" if layout.overlap else "")


def where(p: Point) -> str:
    """A set-up in words: "72 x H100-SXM (dp 72 ep 72, 128 requests a rank)"."""
    held = f"{p.batch:,} request{'s' * (p.batch > 1)} a rank"
    return f"{p.layout.parallel.gpus} x {p.layout.hardware.name} ({ways(p.layout)}, {held})"
