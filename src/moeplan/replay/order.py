"""`order`: the queue of a batch job, arranged so that requests which use the same experts decode together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.arrays import FloatArray, Int64Array
from moeplan.errors import UsageError
from moeplan.planning.order import overlap, sharing_order, split_order
from moeplan.planning.plan import Plan
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.prompt_points import (
    Basis,
    PredictedPoints,
    PromptPoints,
    RecordedPoints,
    WordPoints,
    answers,
    features,
    together,
    unit_points,
)
from moeplan.progress import Progress, silent
from moeplan.replay.queue import queue_experts, random_queue_experts
from moeplan.trace import Trace
from moeplan.trace.prompts import PromptFeatures

__all__ = ["Order", "arrange", "measured_saving", "order", "points_from"]

#: Below this share of expected reads, an order is not worth the trouble.
WORTH = 0.01
#: Requests of a trace that the saving is measured on: fewer say nothing, more take long.
_LEAST, _MOST = 16, 2000
_BASIS = {
    "recorded": "the experts that earlier answers to these prompts used",
    "predicted": "the experts that are predicted from the prompts",
    "words": "the words that prompts share (nothing recorded was given)",
}


@dataclass(frozen=True, eq=False, repr=False)
class Order:
    """An order of prompts.

    Attributes:
        instances: for each instance, int64 numbers of the prompts that it is given, in order.
        basis: what the order rests on: recorded, predicted or words.
        batch: requests that decode together, as given.
        expected: distinct experts of a layer that a decode step reads in random order and in order, measured on
            requests of the trace; None without a trace, or with too small a one.
        measured_on: how many requests those are: larger queues save more.
    """

    instances: tuple[Int64Array, ...]
    basis: Basis
    batch: int
    expected: tuple[float, float] | None = None
    measured_on: int = 0

    @property
    def sequence(self) -> Int64Array:
        """int64 [n]: the numbers of all prompts, one instance after the other."""
        return np.concatenate(self.instances)

    @property
    def change(self) -> float | None:
        """Expected relative change of `experts_per_step`; None where nothing was recorded."""
        return None if self.expected is None else self.expected[1] / self.expected[0] - 1.0

    @property
    def worth_it(self) -> bool | None:
        """Whether at least 1 % fewer expert reads are expected; None where nothing was recorded."""
        return None if self.change is None else self.change <= -WORTH

    def __repr__(self) -> str:
        count = len(self.sequence)
        over = f" over {len(self.instances)} instances" if len(self.instances) > 1 else ""
        lines = [f"{count} prompts{over}, ordered by {_BASIS[self.basis]}"]
        if self.expected is not None and self.change is not None:
            lines.append(
                f"expected: {100 * self.change:+.1f} % experts read by a decode step of {self.batch} requests "
                f"({self.expected[1]:.2f} of a layer, {self.expected[0]:.2f} in random order; measured on "
                f"{self.measured_on} requests of the trace, longer queues save more)"
            )
            if not self.worth_it:
                lines.append("not worth it: requests of this kind use the same experts in any order")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `instances` are lists of prompt numbers from 0."""
        return {
            "prompts": len(self.sequence),
            "basis": self.basis,
            "batch": self.batch,
            "experts_per_step": None
            if self.expected is None
            else {"random": self.expected[0], "ordered": self.expected[1], "change": self.change},
            "measured_on": self.measured_on,
            "worth_it": self.worth_it,
            "instances": [part.tolist() for part in self.instances],
        }


def order(
    prompts: PromptFeatures | Sequence[str] | Sequence[npt.ArrayLike],
    trace: Trace | None = None,
    *,
    plan: Plan | None = None,
    recorded: bool = False,
    instances: int = 1,
    batch: int = 8,
    tokens: FloatArray | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Order:
    """Order the prompts of a batch job so that neighbours use the same experts.

    Engines serve a queue first come first served; requests that decode together then read fewer distinct experts.
    Samples of one prompt stay together, and so do prompts with a long common beginning.

    Args:
        prompts: texts, lists of token ids, or features. Texts are split into words, which only match a trace whose
            prompts were kept as words: tokenize texts with the model's tokenizer if a trace or plan is given.
        trace: with prompts (`--keep-prompt-tokens`), to predict which experts a prompt's answer uses.
        plan: made from such a trace, in its place.
        recorded: `trace` is a recording of these very prompts in this order: what their answers used counts.
        instances: independent servers that the queue is split over, by equal expected tokens.
        batch: requests that decode together on one instance.
        tokens: float64 [n], expected tokens of each request; by default the prompt's and the mean answer.

    Raises:
        UsageError: no prompt; fewer prompts than instances; a trace without prompts, or with other features.

    Examples:
        >>> import moeplan
        >>> found = moeplan.order(["add 2 and 3", "a poem on rain", "add 4 and 1", "a poem on snow"], batch=2)
        >>> sorted(found.sequence.tolist())
        [0, 1, 2, 3]
    """
    given = features(prompts)
    if not len(given):
        raise UsageError("no prompt to order")
    if not 1 <= instances <= len(given):
        raise UsageError(f"{instances} instances for {len(given)} prompts", hint="use at least one prompt an instance")
    if batch < 2:
        raise UsageError(f"a batch of {batch} decodes nothing together", hint="use the requests that run at a time")
    source = points_from(trace, plan, recorded, seed)
    sequence = arrange(given, source, batch, seed=seed, progress=progress)
    if tokens is None:
        tokens = np.diff(given.offsets) + (float(source.tokens.mean()) if len(source.tokens) else 0.0)
    parts = split_order(sequence, np.maximum(np.asarray(tokens, np.float64), 1.0), instances)
    saving = None if trace is None else measured_saving(trace, batch, sequence if recorded else None, seed)
    return Order(tuple(parts), source.basis, batch, *(saving or (None, 0)))


def points_from(trace: Trace | None, plan: Plan | None, recorded: bool = False, seed: int = 0) -> PromptPoints:
    """What prompts are compared by: see `order`.

    Raises:
        UsageError: see `order`.
    """
    if trace is not None and plan is not None:
        raise UsageError("a trace and a plan are given", hint="give one of the two")
    if plan is not None:
        prediction = plan.prediction
        if prediction is None:
            raise UsageError("the plan does not predict from prompts", hint="plan from a trace with prompt tokens")
        return PredictedPoints(prediction.predictor, plan.model.top_k)
    if trace is None:
        return WordPoints()
    return RecordedPoints(trace) if recorded else PredictedPoints.fit(trace, seed)


def arrange(
    prompts: PromptFeatures, source: PromptPoints, batch: int, *, seed: int = 0, progress: Progress = silent
) -> Int64Array:
    """int64 [n]: the prompts in order, those that belong together side by side."""
    unit = together(prompts, batch)
    points = unit_points(source.points(prompts, batch), unit)
    arranged = sharing_order(points, overlap(batch, source.tokens, seed), seed=seed, progress=progress)
    place = np.empty(len(arranged), np.int64)
    place[arranged] = np.arange(len(arranged))
    return np.argsort(place[unit], kind="stable")


def measured_saving(
    trace: Trace, batch: int, sequence: Int64Array | None = None, seed: int = 0
) -> tuple[tuple[float, float], int] | None:
    """Experts of a step in random order and in order, and how many requests they were measured on.

    Half of the trace's requests are ordered by a prediction that was fitted on the other half, and replayed with their
    recorded routing.

    Args:
        sequence: int64, the order of all requests of the trace, where they are the very prompts that were ordered.

    Returns:
        None for a trace with too few requests.
    """
    known = answers(trace)
    prompts, experts = trace.prompts, trace.load().experts
    rng = np.random.default_rng([seed, 0x5A])
    if sequence is None:
        if prompts is None or len(known.index) < 2 * _LEAST:
            return None
        chosen = rng.permutation(len(known.index))[: 2 * _MOST]
        fit, test = np.array_split(chosen, 2)
        predictor = PromptPredictor.fit(prompts.take(known.index[fit]), known.use[fit], seed=seed)
        source = PredictedPoints(predictor, trace.shape.top_k, known.tokens[fit])
        test = test[arrange(prompts.take(known.index[test]), source, batch, seed=seed)]
    else:
        position = np.full(len(trace.requests), -1)
        position[known.index] = np.arange(len(known.index))
        test = position[sequence]
        test = test[test >= 0]
    if len(test) < _LEAST:
        return None
    requests = trace.requests
    stop = requests.offsets[1:][known.index[test]]
    span = np.stack((stop - known.tokens[test], stop), axis=1)
    how = experts, span, batch, trace.shape.num_experts
    return (random_queue_experts(*how, seed=seed), queue_experts(*how)), len(test)
