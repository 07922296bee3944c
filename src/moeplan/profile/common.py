"""Helpers of the measures: correlation, intervals, plain JSON values, and the reason for a skipped measure."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "Skipped", "evenly_spaced", "interval", "mean_without_nan", "pearson", "plain", "wilson"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Skipped:
    """A measure that cannot be computed on this trace, and the reason in one line."""

    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"skipped": self.reason}


def pearson(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> FloatArray:
    """Pearson correlation along the last axis, broadcast over the others; NaN where either side is constant."""
    x, y = standardised(a), standardised(b)
    return np.asarray(np.sum(x * y, axis=-1), np.float64)


def standardised(a: npt.NDArray[Any]) -> FloatArray:
    """Centred along the last axis and scaled to length 1, so that a dot product is a correlation; NaN if constant."""
    centred = np.asarray(a, np.float64) - np.mean(a, axis=-1, dtype=np.float64, keepdims=True)
    length = np.sqrt(np.sum(centred * centred, axis=-1, keepdims=True))
    return np.asarray(np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 1e-12))


def mean_without_nan(a: npt.NDArray[Any], axis: int | tuple[int, ...] | None = None) -> Any:
    """Mean of the values that are not NaN; NaN, without a warning, where there is none."""
    valid = ~np.isnan(a)
    count = valid.sum(axis=axis)
    total = np.where(valid, a, 0.0).sum(axis=axis)
    mean = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return float(mean) if mean.ndim == 0 else mean


def interval(draws: npt.NDArray[Any], axis: int = 0) -> FloatArray:
    """The middle 95 % of bootstrap draws: [2] + the other axes, (low, high); NaN where a draw is NaN."""
    return np.asarray(np.percentile(draws, [2.5, 97.5], axis=axis), np.float64)


def wilson(share: float, n: int) -> FloatArray:
    """95 % interval of a share of n trials: (low, high), within 0 .. 1.

    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    z = 1.96
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.array([centre - half, centre + half]) / (1 + z * z / n)


def evenly_spaced(items: npt.NDArray[np.intp], limit: int) -> npt.NDArray[np.intp]:
    """At most `limit` of `items`, evenly spaced, including the first and the last."""
    if len(items) <= limit:
        return items
    return items[np.unique(np.linspace(0, len(items) - 1, limit).round().astype(np.intp))]


def plain(value: Any) -> Any:
    """Plain JSON values: lists, numbers to six significant digits, null for NaN and infinity; a measure as its dict."""
    if is_dataclass(value):
        value = value.to_dict() if hasattr(value, "to_dict") else vars(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
