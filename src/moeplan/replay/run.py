"""What all rows of a table of figures share: the requests, the task, how they are sampled, and the folds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import PlanError, UsageError
from moeplan.planning.plan import PlanningTask
from moeplan.planning.requests import RequestSet
from moeplan.replay.evaluator import FoldEvaluator, fold_rng
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import blocks, live_requests, split
from moeplan.trace.format import layer_spans
from moeplan.types import ModelShape

__all__ = ["EvaluationRun", "Row", "check_shape"]


@dataclass(frozen=True)
class Row:
    """One row of a table: a plan, and the signature that held-out requests are grouped by.

    Attributes:
        name: the strategy, with `/signature` where it is not the strategy's own way.
        signature: none (random equal groups), domain, prefill (or what stands in for it), or oracle.
    """

    name: str
    strategy: str
    signature: str


@dataclass(frozen=True)
class EvaluationRun:
    """The common ground of a table.

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
        chosen = [
            split(requests.domain, block, settings.fit, fold_rng(settings.seed, fold, 0))
            for fold in range(settings.folds)
        ]
        parts = tuple((np.flatnonzero(fit), np.flatnonzero(~fit)) for fit in chosen)
        least = min(len(fit) for fit, _ in parts)
        if least < task.cluster.num_groups:
            raise PlanError(few.format(least), hint=hint)
        live = live_requests([len(test) for _, test in parts], task.cluster, hint)
        return cls(requests, task, settings, block, live, parts)

    @classmethod
    def whole(cls, requests: RequestSet, task: PlanningTask, settings: EvaluationSettings) -> EvaluationRun:
        """One fold that measures on all requests.

        Raises:
            PlanError: too few requests for the groups. UsageError: a model to time that is not the trace's.
        """
        block = _checked(requests, task, settings)
        everyone = np.arange(len(requests))
        live = live_requests([len(requests)], task.cluster)
        return cls(requests, task, settings, block, live, ((everyone, everyone),))

    def folds(self) -> Iterator[FoldEvaluator]:
        """Each fold in turn."""
        settings = self.settings
        for fold, (fit, test) in enumerate(self.parts):
            yield FoldEvaluator(
                self.requests, fit, test, self.live, settings.steps, settings.seed, fold, settings.timing
            )


def _checked(requests: RequestSet, task: PlanningTask, settings: EvaluationSettings) -> Int64Array:
    """The block of each request, once the task fits the requests."""
    task.check(requests.shape.num_experts)
    if settings.timing is not None:
        settings.timing.check(requests.shape, task.cluster, task.dispatch)
    return blocks(requests.index, settings.block)


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
            said = [layer_spans(value) if isinstance(value, tuple) else value for value in (ours, theirs)]
            raise UsageError(
                f"the trace and the plan differ in {label}: {said[0]} and {said[1]}",
                where=where,
                hint="use traffic of the same model, and --without-layers as in the plan",
            )
