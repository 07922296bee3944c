"""How long each simulated step takes: `perf`'s step model, tabulated once so that a million steps take a second.

A step's time is its experts' and the rest's. The rest depends on how many requests decode, their context, and the
prompt tokens beside them; it is read off `StepModel.decode` and `StepModel.prefill` on a grid. The experts' time is
`expert_gemm` at the picks and distinct experts of the step's own tokens. Without a model and hardware each step takes
one unit of time, and only counts mean anything.

Nobody has held these times to a GPU: they are labelled so wherever they are printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan._kernels.serving import Clock
from moeplan.arrays import FloatArray, Int64Array
from moeplan.errors import PlanError
from moeplan.perf.operators import expert_gemm
from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel

__all__ = ["NOT_VALIDATED", "step_clock", "unit_clock"]

NOT_VALIDATED = "modelled, not validated on a GPU"

#: Entries of the grids: decoding requests, their context, tokens before a chunk.
BATCHES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXTS = (0, 1024, 4096, 16384, 65536)
CHUNKS = (16, 64, 256, 1024, 4096, 16384, 65536)
BEFORE = (0, 4096, 32768)
#: Picks up to which the experts' time is tabulated one by one.
EXACT_PICKS = 256


@dataclass(frozen=True)
class Span:
    """How far tables must reach: requests that decode at once, cached tokens of one, tokens of a step."""

    batch: int
    context: int
    budget: int


def unit_clock(num_experts: int, top_k: int) -> Clock:
    """Every step takes one unit of time."""
    two = np.array([0.0, 1.0])
    return Clock(
        two, two, two, two, np.ones((2, 2)), np.ones((2, 2, 2, 2)), two, np.zeros((2, num_experts + 1)),
        np.zeros(num_experts, np.int64), top_k, 0.0,
    )  # fmt: skip


def step_clock(model: StepModel, span: Span, layers: int = 0) -> Clock:
    """A step model's times as tables.

    Args:
        model: of one instance; with one data-parallel rank where the routing of each step is to count.
        layers: MoE layers whose routing is known; their mean stands for the model's others. 0: routing is uniform.

    Raises:
        PlanError, UsageError: a set-up that is impossible; layers given though tokens travel between ranks.
    """
    batch, context = _grid(BATCHES, span.batch), _grid(CONTEXTS, span.context)
    chunks, before = _grid(CHUNKS, span.budget), _grid(BEFORE, span.context)
    decode = np.empty((len(batch), len(context)))
    mixed = np.empty((len(batch), len(context), len(chunks), len(before)))
    for b, c in np.ndindex(decode.shape):
        decode[b, c] = _seconds(model.decode(float(batch[b]), float(context[c])), layers) if batch[b] else 0.0
    for b, c, t, p in np.ndindex(mixed.shape):
        beside = (float(batch[b]), float(context[c])) if batch[b] else (0.0, 0.0)
        step = model.prefill(1, float(chunks[t]), float(before[p]), decoding=beside)
        mixed[b, c, t, p] = _seconds(step, layers)
    moe = model.spec.moe
    if not layers or moe is None:
        plain = unit_clock(moe.experts if moe else 1, moe.top_k if moe else 1)
        return plain._replace(batch=batch, context=context, tokens=chunks, before=before, decode=decode, mixed=mixed)
    if model.parallel.dp > 1:
        raise PlanError("the routing of each step is timed on instances with one data-parallel rank", hint="use tp")
    picks, experts = _expert_table(model, span)
    return Clock(
        batch, context, chunks, before, decode, mixed, picks, experts, _owners(moe.experts, model.parallel.ep),
        moe.top_k, len(moe.layers) / layers,
    )  # fmt: skip


def _expert_table(model: StepModel, span: Span) -> tuple[FloatArray, FloatArray]:
    """(picks [n], seconds [n, held + 1]) of one layer's experts on one GPU."""
    moe, parallel = model.spec.moe, model.parallel
    assert moe is not None
    most = (span.batch + span.budget) * moe.top_k
    exact = np.arange(min(EXACT_PICKS, most) + 1, dtype=np.float64)
    picks = np.unique(np.concatenate([exact, np.geomspace(max(exact[-1], 1), max(most, 2), 64).round()]))
    distinct = np.arange(-(-moe.experts // parallel.ep) + 1, dtype=np.float64)
    context = model._decoding
    time = expert_gemm(
        context.device, picks[:, None], distinct[None], model.spec.hidden, moe.width / parallel.moe_tp,
        context.dtypes.experts,
    )  # fmt: skip
    return picks, np.asarray(time.seconds, np.float64) + context.device.constants.engine.expert_layer_s


def _owners(experts: int, gpus: int) -> Int64Array:
    """int64 [E]: the GPU of each expert, in order, as engines place them at first."""
    return np.arange(experts) * gpus // experts


def _seconds(step: Step, layers: int) -> float:
    rest = step.seconds - (step.exposed("experts") if layers else 0.0)
    return float(np.mean(rest))


def _grid(entries: tuple[int, ...], most: int) -> FloatArray:
    """The entries up to the first that reaches `most`, at least two."""
    reached = [value for value in entries if value < most]
    return (
        np.array([*reached, *entries[len(reached) : len(reached) + 1]][: len(entries)], np.float64)
        if reached
        else (np.array(entries[:2], np.float64))
    )
