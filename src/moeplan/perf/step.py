"""Time of one step, decode or prefill: operators of the slowest rank, communication, what hides behind what, and waits.

    step = sum over operators of (seconds - hidden)

holds exactly. In each MoE layer all ranks wait for the slowest: dispatch for the busiest link, experts for the busiest
GPU, combine for the busiest link again.

Two-batch overlap runs two halves of the batch one after the other, so that messages of one half travel while the other
computes. Which messages hide behind which stage is SGLang's order (`batch_overlap/operations_strategy.py`, commit
0e02cef9, after DeepSeek's profile-data):

| | dispatch hides behind | combine hides behind |
|---|---|---|
| decode | shared experts, the other half's projections | the other half's attention |
| prefill, first half | attention and shared experts of the other | experts of the other, shared experts |
| prefill, second half | experts of the other | attention of the other, both halves' shared experts |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.perf.operators import Number

__all__ = ["Operator", "Step", "exposed_seconds"]


@dataclass(frozen=True)
class Operator:
    """One line of a breakdown.

    Attributes:
        name: what it is. seconds: of all its calls in the step. hidden: how much of that runs behind other operators.
        parts: {what bounds it: seconds that this would take alone}.
    """

    name: str
    seconds: Number
    hidden: Number
    parts: dict[str, Number]

    @property
    def exposed(self) -> Number:
        """Seconds by which it lengthens the step."""
        return self.seconds - self.hidden

    @property
    def bound(self) -> str:
        """What would take longest alone (mean over steps, where there are several)."""
        return max(self.parts, key=lambda name: float(np.mean(self.parts[name])))

    def mean(self) -> Operator:
        """Its mean over steps."""
        parts: dict[str, Number] = {name: float(np.mean(part)) for name, part in self.parts.items()}
        return Operator(self.name, float(np.mean(self.seconds)), float(np.mean(self.hidden)), parts)


def exposed_seconds(operators: Iterable[Operator]) -> Number:
    """By how much they lengthen the step together."""
    return sum((operator.exposed for operator in operators), start=0.0)


@dataclass(frozen=True)
class Step:
    """A step of all data-parallel ranks. Numbers, or arrays [...] where the routing is of several steps.

    Attributes:
        operators: their exposed seconds add up to `seconds`.
        waiting: seconds that a GPU waits, on average, for the network or for the slowest rank's experts.
        tokens: that a data-parallel rank works on. dispatch: how tokens reach their experts; None: they do not travel.
        routing: where the loads are from: replay, uniform, balanced; None in a dense model.
        load_ratio: picks of the busiest GPU over the mean.
    """

    operators: tuple[Operator, ...]
    waiting: Number
    tokens: float
    dispatch: Dispatch | None
    routing: str | None
    load_ratio: float

    @property
    def seconds(self) -> Number:
        """Seconds of the step."""
        return exposed_seconds(self.operators)

    @property
    def idle_share(self) -> Number:
        """Share of the step in which a GPU waits for the slowest rank or for the network."""
        return self.waiting / self.seconds

    def mean(self) -> Step:
        """One step of mean times, where the routing is of several; its operators still add up."""
        operators = tuple(operator.mean() for operator in self.operators)
        return replace(self, operators=operators, waiting=float(np.mean(self.waiting)))

    def exposed(self, name: str) -> Number:
        """Exposed seconds of one operator; 0 where there is none."""
        return next((operator.exposed for operator in self.operators if operator.name == name), 0.0)

    def bound_shares(self) -> dict[str, float]:
        """Share of the step by what bounds its operators, largest first."""
        seconds: dict[str, float] = {}
        for operator in self.operators:
            seconds[operator.bound] = seconds.get(operator.bound, 0.0) + float(operator.exposed)
        total = sum(seconds.values())
        return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
