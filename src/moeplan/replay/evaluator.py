"""Plans measured on the held-out requests of each fold; all plans use the same requests, steps and random draws.

Names: n held-out requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moeplan.arrays import Float32Array, Int64Array, NumberArray
from moeplan.errors import PlanError, UsageError, expect
from moeplan.planning.assignment import equal_groups, random_groups
from moeplan.planning.plan import Plan, PlanningTask
from moeplan.planning.prediction import PREDICTED, Prediction
from moeplan.planning.prompt_router import prompt_router
from moeplan.planning.requests import RequestSet, blocks, shape_of, split
from moeplan.planning.router import ClusterRouter, LocalityRouter
from moeplan.replay.measure import DecodeSteps, RequestFigures, StepFigures, measure_requests, sample_steps
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import Draws, draw_steps, live_requests
from moeplan.replay.timing import StepTimes, Timing
from moeplan.trace import Trace
from moeplan.trace.format import layer_spans
from moeplan.types import ModelShape

__all__ = [
    "EvaluationRun",
    "FoldEvaluator",
    "Grouping",
    "Measured",
    "Row",
    "check_inputs",
    "check_shape",
    "fold_rng",
    "time_steps",
]


@dataclass(frozen=True)
class Row:
    """One row of a table: a plan, and the signature that held-out requests are grouped by.

    Attributes:
        name: the strategy, with `/signature` where it is not the strategy's own way.
        signature: none (random equal groups), domain, prefill (or what stands in for it), prompt-tokens, previous-turn,
            or oracle.
    """

    name: str
    strategy: str
    signature: str


class Grouping(NamedTuple):
    """group: int64 [n], of each request. equal: whether all groups are of one size."""

    group: Int64Array
    equal: bool


@dataclass(frozen=True)
class Measured:
    """Result of one plan and grouping in one fold.

    Attributes:
        test: int64 [n], the held-out requests in the request set. steps: None where groups are unequal.
    """

    test: Int64Array
    requests: RequestFigures
    steps: StepFigures | None
    seconds: float
    equal_groups: bool


def fold_rng(seed: int, fold: int, purpose: int) -> np.random.Generator:
    """A random generator per fold and purpose, the same for every plan: 0 splits, 1 random groups, 2 steps."""
    return np.random.default_rng([seed, fold, purpose])


def time_steps(timing: Timing, steps: DecodeSteps) -> StepTimes:
    """Modelled milliseconds and idle shares of the first steps, as many as `timing` says."""
    cluster, dispatch = steps.routes.cluster, steps.dispatch
    batch = steps.rows.shape[1] / cluster.num_groups
    parts = [timing.times(cluster, dispatch, counts, batch) for counts in steps.counts(timing.steps)]
    return StepTimes(*(np.concatenate(values) for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class FoldEvaluator:
    """One fold, ready to measure plans.

    Attributes:
        requests: all of them. fit, test: int64 positions of the fit and of the held-out requests among them.
        live: B, requests of each group that are live in a step. steps: how many steps are sampled.
        seed, fold: of the random draws. timing: how steps are timed; None: they are not.
    """

    requests: RequestSet
    fit: Int64Array
    test: Int64Array
    live: int
    steps: int
    seed: int
    fold: int = 0
    timing: Timing | None = None

    @cached_property
    def draws(self) -> Draws:
        """The random draws of the steps."""
        span = self.requests.spans.measured[:, self.test]
        return draw_steps(span, self.steps, fold_rng(self.seed, self.fold, 2))

    @cached_property
    def prediction(self) -> Prediction:
        """Fitted on the fit requests."""
        return Prediction.fit(self.requests, self.fit, self.seed)

    def group(self, plan: Plan, signature: str) -> Grouping:
        """The groups of the held-out requests, by a kind of signature; equal in size unless the strategy's are not.

        Args:
            signature: `none` (at random), `domain`, `prefill` (or what stands in for it), `prompt-tokens`,
                `previous-turn` or `oracle`.
        """
        requests, test = self.requests, self.test
        if signature == "none":
            rng = fold_rng(self.seed, self.fold, 1)
            return Grouping(random_groups(len(test), plan.cluster.num_groups, rng), True)
        if signature in PREDICTED:  # by the plan's own prediction; one of the fit requests where it has none
            predicted = (plan.prediction or self.prediction).expected_use(requests, test, signature)
            router = prompt_router(plan.router, plan.routes.local_share)
            return Grouping(equal_groups(router.scores(predicted)), plan.equal_groups)
        if signature == "oracle":  # nothing to predict: what the placement holds of the decode itself
            scores = LocalityRouter.of(plan.routes).scores(requests.measured[test])
            return Grouping(equal_groups(scores), plan.equal_groups)
        known: NumberArray = requests.signature[test] if signature == "prefill" else self._domain_signature()
        if not plan.equal_groups and isinstance(plan.router, ClusterRouter):
            return Grouping(plan.router.nearest_groups(known), False)
        return Grouping(equal_groups(plan.router.scores(known)), plan.equal_groups)

    def _domain_signature(self) -> Float32Array:
        """float32 [n, L, E]: the mean use of the fit requests of the same domain (of all, where it has none)."""
        requests, fit, test = self.requests, self.fit, self.test
        use = requests.use[fit].astype(np.float32)
        use /= np.maximum(use.sum(axis=(1, 2), keepdims=True), 1.0)
        out = np.repeat(use.mean(axis=0)[None], len(test), axis=0)
        for domain in np.intersect1d(requests.domain[fit], requests.domain[test]):
            out[requests.domain[test] == domain] = use[requests.domain[fit] == domain].mean(axis=0)
        return out * np.float32(1e4)  # scores divide by the sum; keep it well above 1

    def sample(self, plan: Plan, grouping: Grouping) -> DecodeSteps:
        """The fold's decode steps under a plan."""
        return sample_steps(self.requests, self.draws, grouping.group, self.live, plan)

    def measure(self, plan: Plan, grouping: Grouping) -> Measured:
        """Per request, and (where groups are equal) per step."""
        figures = measure_requests(self.requests, self.test, grouping.group, plan)
        steps = None
        if grouping.equal:
            sampled = self.sample(plan, grouping)
            steps = sampled.figures()
            if self.timing is not None:
                ms, idle_share = time_steps(self.timing, sampled)
                steps = dataclasses.replace(steps, step_ms=ms, idle_share=idle_share)
        return Measured(self.test, figures, steps, plan.provenance.fit_seconds, grouping.equal)


@dataclass(frozen=True)
class EvaluationRun:
    """What all rows of a table share.

    Attributes:
        requests, task, settings: as given.
        block: int64 [n], the block of each request. live: B, requests of each group that are live in a step.
        parts: (fit, held-out) positions of each fold.
    """

    requests: RequestSet
    task: PlanningTask
    settings: EvaluationSettings
    block: Int64Array
    live: int
    parts: tuple[tuple[Int64Array, Int64Array], ...]

    @classmethod
    def split(
        cls, requests: RequestSet, task: PlanningTask, settings: EvaluationSettings, few: str, hint: str
    ) -> EvaluationRun:
        """Repeated splits into fit and held-out requests.

        Args:
            few: what too few fit requests are, with {} for their number. hint: what to do about too few of either.

        Raises:
            PlanError: too few requests for the groups. UsageError: a model to time that is not the trace's.
        """
        block = _checked(requests, task, settings)
        parts = []
        for fold in range(settings.folds):
            fit = split(requests.domain, block, settings.fit_share, fold_rng(settings.seed, fold, 0))
            parts.append((np.flatnonzero(fit), np.flatnonzero(~fit)))
        least = min(len(fit) for fit, _ in parts)
        if least < task.cluster.num_groups:
            raise PlanError(few.format(least), hint=hint)
        live = live_requests([len(test) for _, test in parts], task.cluster, hint)
        return cls(requests, task, settings, block, live, tuple(parts))

    @classmethod
    def whole(cls, requests: RequestSet, task: PlanningTask, settings: EvaluationSettings) -> EvaluationRun:
        """One fold that measures on all requests.

        Raises:
            PlanError: too few requests for the groups. UsageError: a model to time that is not the trace's.
        """
        block, everyone = _checked(requests, task, settings), np.arange(len(requests))
        live = live_requests([len(requests)], task.cluster)
        return cls(requests, task, settings, block, live, ((everyone, everyone),))

    def folds(self) -> Iterator[FoldEvaluator]:
        """Each fold in turn."""
        steps, seed, timing = self.settings.steps, self.settings.seed, self.settings.timing
        for fold, (fit, test) in enumerate(self.parts):
            yield FoldEvaluator(self.requests, fit, test, self.live, steps, seed, fold, timing)


def _checked(requests: RequestSet, task: PlanningTask, settings: EvaluationSettings) -> Int64Array:
    """The block of each request, once the task fits the requests."""
    task.check(requests.shape.num_experts)
    if settings.timing is not None:
        settings.timing.check(requests.shape, task.cluster, task.dispatch)
    return blocks(requests.index, settings.block)


def check_inputs(plan: Plan, requests: Trace | RequestSet) -> None:
    """Refuse what is no plan or no requests, and requests of another model.

    Raises:
        UsageError: with what to give instead.
    """
    expect(plan, Plan, 'moeplan.load_plan("PATH")')
    check_shape(shape_of(requests), plan.model, "plan")


def check_shape(trace: ModelShape, plan: ModelShape, where: str) -> None:
    """A plan fits traces of its own model only.

    Args:
        where: what an error names, the plan.

    Raises:
        UsageError: experts, picks per token or layers differ.
    """
    for label, ours, theirs in (
        ("experts", trace.num_experts, plan.num_experts),
        ("picks per token", trace.top_k, plan.top_k),
        ("layers", trace.num_layers, plan.num_layers),
        ("layer ids", trace.layer_ids, plan.layer_ids),
    ):
        if ours != theirs:
            shown = [layer_spans(value) if isinstance(value, tuple) else value for value in (ours, theirs)]
            raise UsageError(
                f"the trace and the plan differ in {label}: {shown[0]} and {shown[1]}",
                where=where,
                hint="use traffic of the same model, and --without-layers as in the plan",
            )
