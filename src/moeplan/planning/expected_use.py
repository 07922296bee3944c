"""Predicts from a request's signature which experts its decode will use.

A signature is a short, noisy sample of the use. The forecast trusts it in part and learns the rest from the fit
requests by ridge regression, which shrinks what a signature cannot tell to the mean. Trust and ridge strength are those
with the least leave-one-out error, as in `moeplan.planning.forecast`, which predicts group scores in the same way.
"""

from __future__ import annotations

import numpy as np

from moeplan.arrays import Float32Array, FloatArray, NumberArray
from moeplan.errors import PlanError
from moeplan.planning.forecast import STRENGTHS

__all__ = ["UseForecast", "shares"]

#: Fit requests at most: the set-up costs their cube.
MOST_REQUESTS = 2000


def shares(counts: NumberArray) -> Float32Array:
    """float32 [n, L, E]: counts as shares of each layer's picks; a layer without picks is even."""
    counts = np.asarray(counts, np.float32)
    total = counts.sum(axis=2, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1e-9), np.float32(1 / counts.shape[2]))


class UseForecast:
    """Ridge regression from signatures to the use of experts.

    Args:
        signature, use: [n, L, E], picks of each fit request before and during its decode.
        seed: which requests are kept where there are more than some thousands.

    Raises:
        PlanError: fewer than two requests.
    """

    def __init__(self, signature: NumberArray, use: NumberArray, seed: int = 0) -> None:
        n = len(signature)
        if n < 2:
            raise PlanError(f"a forecast needs at least 2 requests to be fitted on, there are {n}")
        kept = np.sort(np.random.default_rng(seed).permutation(n)[:MOST_REQUESTS])
        points, target = (shares(a[kept]).reshape(len(kept), -1) for a in (signature, use))
        self._centre, self._mean = points.mean(axis=0), target.mean(axis=0)
        self._points = points - self._centre
        rest = target - self._mean
        gram = (self._points @ self._points.T).astype(np.float64)
        scale = max(float(np.trace(gram)) / len(gram), 1e-12)
        value, vector = np.linalg.eigh(gram / scale)
        value = np.maximum(value, 0.0)
        self.trust, strength = self._least_error(rest, value, vector)
        solved = vector @ ((vector.T @ (rest - self.trust * self._points)) / (value + strength * len(gram))[:, None])
        self._dual = np.asarray(solved / scale, np.float32)

    def _least_error(self, rest: Float32Array, value: FloatArray, vector: FloatArray) -> tuple[float, float]:
        """(trust, strength) with the least leave-one-out error; the error of a strength is a parabola in the trust."""
        n, best = len(value), (np.inf, 0.0, float(STRENGTHS[-1]))
        both = [(part, vector.T @ part) for part in (rest, self._points)]
        for strength in STRENGTHS:
            shrunk = value / (value + strength * n)
            others = np.maximum(1.0 - (vector**2) @ shrunk - 1.0 / n, 1e-6)[:, None]
            a, b = ((part - vector @ (shrunk[:, None] * projected)) / others for part, projected in both)
            aa, ab, bb = float((a * a).sum()), float((a * b).sum()), float((b * b).sum())
            trust = float(np.clip(ab / max(bb, 1e-30), 0.0, 1.0))
            best = min(best, (aa - 2 * trust * ab + trust**2 * bb, trust, float(strength)))
        return best[1], best[2]

    def expected_use(self, signature: NumberArray) -> Float32Array:
        """float32 [m, L, E]: each layer sums to 1."""
        layers, experts = signature.shape[1:]
        points = shares(signature).reshape(len(signature), -1) - self._centre
        flat = self._mean + self.trust * points + (points @ self._points.T) @ self._dual
        return shares(np.maximum(flat, 0.0).reshape(-1, layers, experts))
