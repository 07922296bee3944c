"""Values, intervals and noise floors: how figures of several folds become one, and how sure it is.

A figure over requests is a ratio of sums: numerators and denominators are added up over requests and folds, then
divided. Its interval comes from 1,000 bootstrap draws of requests (of blocks, where blocks are used), with one weight
per request across folds. A figure over steps is bootstrapped over steps. Two rows of a run always share the draws, so
that their difference is paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.arrays import FloatArray, Int64Array

__all__ = ["MeasuredValue", "block_weights", "change", "figure_of_ratio", "noise_floor", "significantly_below"]


@dataclass(frozen=True, repr=False)
class MeasuredValue:
    """One figure of one row of a comparison, with its bootstrap draws.

    Attributes:
        value: the figure; None when it cannot be known.
        draws: float64 [draws], its bootstrap draws; None where there is nothing to draw.
        folds: its value in each fold.
        unit: what was drawn: requests, blocks or steps.
        extra: more values to print beside it (a noise floor, a smallest possible value).
    """

    value: float | None
    draws: FloatArray | None = None
    folds: tuple[float, ...] = ()
    unit: str = ""
    extra: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        if self.value is None:
            return "MeasuredValue(unknown)"
        low, high = self.interval() or (None, None)
        spread = "" if low is None else f", 95 % {low:.4g} to {high:.4g} over {self.unit}"
        return f"MeasuredValue({self.value:.4g}{spread})"

    def interval(self) -> list[float] | None:
        """The 95 % interval [low, high]."""
        return None if self.draws is None else _interval(self.draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out: dict[str, Any] = {"value": self.value, "ci95": self.interval()}
        if len(self.folds) > 1:
            out["sd_folds"] = float(np.std(self.folds, ddof=1))
        if self.draws is not None:
            out["bootstrap"] = self.unit
        return out | dict(self.extra)


def _interval(draws: FloatArray) -> list[float] | None:
    finite = draws[np.isfinite(draws)]
    return [float(q) for q in np.quantile(finite, (0.025, 0.975))] if len(finite) else None


def block_weights(block: Int64Array, draws: int, rng: np.random.Generator) -> FloatArray:
    """float64 [draws, n]: how often each request is drawn, whole blocks at a time."""
    count = int(block.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=draws)
    return drawn[:, block].astype(np.float64)


def figure_of_ratio(
    top: FloatArray, bottom: FloatArray, weights: FloatArray, unit: str, scale: float = 1.0
) -> MeasuredValue:
    """Sum over sum, times `scale`.

    Args:
        top, bottom: float64 [F, n], per fold and request (0 where the request is not held out in the fold) or step.
        weights: float64 [draws, n].
    """
    if bottom.sum() <= 0:
        return MeasuredValue(None)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = scale * (weights @ top.sum(axis=0)) / (weights @ bottom.sum(axis=0))
        folds = scale * top.sum(axis=1) / bottom.sum(axis=1)
    return MeasuredValue(float(scale * top.sum() / bottom.sum()), draws, tuple(float(v) for v in folds), unit)


def change(figure: MeasuredValue, baseline: MeasuredValue) -> dict[str, Any] | None:
    """The paired relative change against the baseline: value and interval."""
    if figure.value is None or not baseline.value:
        return None
    out: dict[str, Any] = {"value": figure.value / baseline.value - 1.0, "ci95": None}
    if figure.draws is not None and baseline.draws is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            out["ci95"] = _interval(figure.draws / baseline.draws - 1.0)
    return out


def significantly_below(figure: MeasuredValue, other: MeasuredValue) -> bool:
    """Whether `figure` is smaller beyond noise: the interval of the paired difference lies below 0."""
    if figure.draws is None or other.draws is None or figure is other:
        return False
    interval = _interval(figure.draws - other.draws)
    return interval is not None and interval[1] < 0.0


def noise_floor(picks: float, bins: int, rng: np.random.Generator, draws: int = 2000) -> float:
    """Mean max / mean of `picks` independent picks on `bins` perfectly even GPUs or nodes."""
    count = max(round(picks), 1)
    drawn = rng.multinomial(count, np.full(bins, 1.0 / bins), size=draws)
    return float(drawn.max(axis=1).mean() * bins / count)
