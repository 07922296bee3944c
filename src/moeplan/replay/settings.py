"""How figures are sampled; the plan, or the task, says what of."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.errors import UsageError
from moeplan.replay.timing import Timing

__all__ = ["EvaluationSettings"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How plans are evaluated.

    Attributes:
        fit_share: share of the requests that plans may see. folds: repeated splits into fit and held-out requests.
        block: neighbouring requests that a split keeps together.
        steps: decode steps sampled in each fold. bootstrap_draws: bootstrap draws behind the intervals.
        seed: random seed. hidden: width of a token's hidden state, where the trace does not say or is to be overridden.
        timing: how to model step times; None: they are not given.

    Raises:
        UsageError: a value out of range.

    Examples:
        >>> import moeplan
        >>> moeplan.EvaluationSettings(folds=1, steps=100).fit_share
        0.5
    """

    fit_share: float = 0.5
    folds: int = 4
    block: int = 1
    steps: int = 500
    bootstrap_draws: int = 1000
    seed: int = 0
    hidden: int | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        for label, value, top in (("--folds", self.folds, 100), ("--steps", self.steps, 100_000)):
            if not 1 <= value <= top:
                raise UsageError(f"{label} {value} is outside 1..{top}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative")
        if self.hidden is not None and self.hidden < 1:
            raise UsageError(f"--hidden {self.hidden} is not positive")
