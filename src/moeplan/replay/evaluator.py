"""Plans measured on the held-out part of one fold; every plan meets the same requests, steps and chance.

Names: n held-out requests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moeplan.arrays import Float32Array, Int64Array, NumberArray
from moeplan.planning.assignment import equal_groups, random_groups
from moeplan.planning.plan import Plan
from moeplan.planning.requests import RequestSet
from moeplan.planning.router import ClusterRouter, LocalityRouter
from moeplan.replay.measure import RequestFigures, measure_requests
from moeplan.replay.split import Draws, draw_steps
from moeplan.replay.steps import DecodeSteps, StepFigures, sample_steps
from moeplan.replay.timing import StepTimes, Timing

__all__ = ["FoldEvaluator", "Grouping", "Measured", "fold_rng", "time_steps"]


class Grouping(NamedTuple):
    """group: int64 [n], of each request. equal: whether all groups are of one size."""

    group: Int64Array
    equal: bool


@dataclass(frozen=True)
class Measured:
    """What one row gave in one fold. test: int64 [n] into the request set; steps: None where groups are unequal."""

    test: Int64Array
    requests: RequestFigures
    steps: StepFigures | None
    seconds: float
    equal_groups: bool


def fold_rng(seed: int, fold: int, purpose: int) -> np.random.Generator:
    """One stream of chance per fold and purpose, the same for every plan: 0 splits, 1 random groups, 2 steps."""
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
        requests: all of them. fit, test: int64 positions among them, of those that plans may see, and of the others.
        live: B, requests of each group that are live in a step. steps: how many steps are sampled.
        seed, fold: what chance is drawn from. timing: how steps are timed; None: they are not.
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
        """What chance decides about the steps."""
        return draw_steps(self.requests.measured_span[self.test], self.steps, fold_rng(self.seed, self.fold, 2))

    def group(self, plan: Plan, signature: str) -> Grouping:
        """The groups of the held-out requests, by a kind of signature; equal in size unless the strategy's are not.

        Args:
            signature: `none` (at random), `domain`, `prefill` (or what stands in for it) or `oracle`.
        """
        requests, test = self.requests, self.test
        if signature == "none":
            rng = fold_rng(self.seed, self.fold, 1)
            return Grouping(random_groups(len(test), plan.cluster.num_groups, rng), True)
        known: NumberArray
        if signature == "prefill":
            known = requests.signature[test]
        elif signature == "oracle":  # nothing to predict: what the placement holds of the decode itself
            scores = LocalityRouter.of(plan.routes).scores(requests.measured[test])
            return Grouping(equal_groups(scores), plan.equal_groups)
        else:
            known = self._domain_signature()
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
