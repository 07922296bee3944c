"""Which ways of spreading a model over accelerators are possible."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeplan.cluster import Dispatch
from moeplan.errors import PlanError
from moeplan.model.spec import CompleteSpec
from moeplan.perf.context import StepOptions, default_dispatch
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import ParallelLayout, Precision, check_parallel, divisors
from moeplan.perf.step_model import StepModel

__all__ = ["LayoutChoice", "can_overlap", "node_parts", "parallels", "step_models"]

#: Columns of the narrowest part of an expert that a grouped product is worth calling for.
TILE = 64


@dataclass(frozen=True)
class LayoutChoice:
    """Which ways to spread a model to try; None: all that are possible."""

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None


def parallels(
    spec: CompleteSpec, gpus: int, per_node: int, choice: LayoutChoice = LayoutChoice()
) -> list[ParallelLayout]:
    """All layouts of a model on `gpus` accelerators in nodes of `per_node`.

    Neither stages nor tensor-parallel groups straddle nodes or leave one half filled. Experts are spread over all ranks
    of a stage, with as few redundant slots as make them divide, or, with one data-parallel rank, each split over all
    ranks (ep 1); where a stage has more than twice as many ranks as experts, each expert is split over several. No part
    of an expert is narrower than a kernel's tile.

    Raises:
        PlanError: nothing is possible; the message is that of the first layout refused.
    """
    found: list[ParallelLayout] = []
    refused: list[PlanError] = []
    for pp in choice.pp or divisors(gpus):
        if gpus % pp or pp > spec.layers:
            refused.append(PlanError(f"pp {pp} does not divide {gpus} GPUs, or is more than {spec.layers} layers"))
            continue
        stage = gpus // pp
        if not _fills(stage, per_node, gpus):
            continue
        for tp in choice.tp or divisors(stage):
            if stage % tp or not _fills(tp, per_node, stage):
                refused.append(PlanError(f"tp {tp} x pp {pp} does not divide {gpus} GPUs in nodes of {per_node}"))
                continue
            for ep in choice.ep or _expert_ranks(spec, stage, tp):
                slots = spec.moe.experts if spec.moe else 0
                parallel = ParallelLayout(tp, stage // tp, ep, pp, -slots % ep)
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


def _fills(stage: int, per_node: int, gpus: int) -> bool:
    """Whether groups of `stage` accelerators, `gpus` in all, neither straddle nodes nor leave one half filled."""
    return stage % per_node == 0 if stage > per_node else gpus <= per_node or per_node % stage == 0


def _expert_ranks(spec: CompleteSpec, stage: int, tp: int) -> list[int]:
    """Ranks that may share the experts of a stage."""
    if spec.moe is None:
        return [1]
    whole = stage if stage <= 2 * spec.moe.experts else max(d for d in divisors(stage) if d <= spec.moe.experts)
    return [whole, 1] if stage == tp and whole > 1 else [whole]


def can_overlap(model: StepModel) -> bool:
    """Whether two-batch overlap has messages to hide."""
    return default_dispatch(model.spec, model.parallel, prefill=False) is Dispatch.PICK


def step_models(
    spec: CompleteSpec,
    hardware: Hardware,
    gpus: int,
    precision: Precision,
    choice: LayoutChoice = LayoutChoice(),
    options: StepOptions = StepOptions(),
) -> list[StepModel]:
    """`parallels` as step models; with `overlap`, each also with two-batch overlap, where that is possible."""
    per_node, found = options.gpus_per_node or hardware.scale_up_size, []
    plain = replace(options, gpus_per_node=per_node, overlap=False)
    for parallel in parallels(spec, gpus, per_node, choice):
        model = StepModel(spec, hardware, parallel, precision, plain)
        found.append(model)
        if options.overlap and can_overlap(model):
            found.append(replace(model, options=replace(plain, overlap=True)))
    return found
