"""Ridge regression from sparse features to several targets, with predictions of points that were left out.

Up to `MOST_EXACT` points in closed form, with the leave-one-out error of every strength (Golub, Heath and Wahba 1979).
Beyond, the strength is chosen on a sample of so many points, and the system is solved by conjugate gradients.

Names: n points, V features, r targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from moeplan.arrays import FloatArray, Int64Array

__all__ = ["MOST_EXACT", "Ridge", "fit_ridge"]

MOST_EXACT = 2000
#: Strengths that are tried, in multiples of the mean squared length of a point.
STRENGTHS = 10.0 ** np.arange(-2.0, 2.51, 0.375)
#: Conjugate gradients end when every residual is below this share of its target, or after so many steps: what further
#: steps would change is far below the noise, and the factor on predictions is fitted after them.
_TOLERANCE, _MOST_STEPS = 1e-2, 30


@dataclass(frozen=True)
class Ridge:
    """A fitted regression: predictions are features @ weights + intercept.

    Attributes:
        weights: float64 [V, r]. intercept: float64 [r].
        sample: int64 [m], the points that were also predicted by a regression without them.
        left_out: float64 [m, r], those predictions, on the scale of `weights`.
        strength: chosen, in multiples of the mean squared length. scale: factor with the least error of `left_out`.
    """

    weights: FloatArray
    intercept: FloatArray
    sample: Int64Array
    left_out: FloatArray
    strength: float
    scale: float


def fit_ridge(points: sparse.csr_array, target: FloatArray, sample: Int64Array) -> Ridge:
    """Fit targets float64 [n, r], centred, to points [n, V].

    Ridge shrinks; where most points are far from all others it shrinks too much at every strength. So the predictions
    are multiplied by one factor, chosen together with the strength by the error of points that were left out.

    Args:
        sample: int64 [m], the points that the strength is chosen on and that are predicted by a regression without
            them; all n, where n is at most `MOST_EXACT`.
    """
    length = max(float(points.multiply(points).sum()) / max(len(target), 1), 1e-12)
    strength, left_out, dual = _leave_one_out(points[sample], target[sample], length)
    if len(sample) == len(target):
        weights = np.asarray(points.T @ dual)
    else:
        others = np.setdiff1d(np.arange(len(target)), sample)
        rest = _solve(points[others], target[others], strength * length)
        left_out = points[sample] @ rest - points[others].mean(axis=0) @ rest
        weights = _solve(points, target, strength * length)
    scale = _scale(left_out, target[sample])
    weights = weights * scale
    return Ridge(weights, -(points.mean(axis=0) @ weights), sample, left_out * scale, strength, scale)


def _scale(predicted: FloatArray, target: FloatArray) -> float:
    """The factor on predictions with the least squared error; never negative."""
    return max(float((predicted * target).sum()) / max(float((predicted**2).sum()), 1e-300), 0.0)


def _leave_one_out(points: sparse.csr_array, target: FloatArray, length: float) -> tuple[float, FloatArray, FloatArray]:
    """(strength, predictions with each point left out, dual coefficients) with the least error after scaling."""
    gram = (points @ points.T).toarray() / length
    gram -= gram.mean(axis=0)
    gram -= gram.mean(axis=1)[:, None]
    value, vector = np.linalg.eigh(gram)
    value = np.maximum(value, 0.0)
    target = target - target.mean(axis=0)
    projected = vector.T @ target
    least, best = np.inf, (float(STRENGTHS[-1]), np.zeros_like(target), np.zeros_like(target))
    for strength in STRENGTHS:
        kept = value / (value + strength)
        leverage = np.minimum((vector**2) @ kept + 1.0 / len(target), 1.0 - 1e-6)
        predicted = target - (target - vector @ (kept[:, None] * projected)) / (1.0 - leverage)[:, None]
        error = float(((target - _scale(predicted, target) * predicted) ** 2).sum())
        if error < least:
            least = error
            dual = vector @ (projected / (value + strength)[:, None]) / length
            best = float(strength), predicted, dual
    return best


def _solve(points: sparse.csr_array, target: FloatArray, strength: float) -> FloatArray:
    """Weights [V, r] by conjugate gradients on (points points' + strength) dual = target, each target by itself.

    Points and targets are centred.
    """
    points = points.astype(np.float32)
    across = points.T.tocsr()
    target = (target - target.mean(axis=0)).astype(np.float32)
    dual = np.zeros_like(target)
    rest, way = target.copy(), target.copy()
    size = (rest**2).sum(axis=0)
    enough = _TOLERANCE**2 * size
    for _ in range(_MOST_STEPS):
        if (size <= enough).all():
            break
        image = points @ (across @ way)
        image += np.float32(strength) * way - image.mean(axis=0)
        step = size / np.maximum((way * image).sum(axis=0), 1e-30)
        dual += step * way
        rest -= step * image
        before, size = size, (rest**2).sum(axis=0)
        way = rest + (size / np.maximum(before, 1e-30)) * way
    return np.asarray(across @ dual, np.float64)
