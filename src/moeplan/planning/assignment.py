"""Groups of requests: the exact equal assignment, random ones, soft memberships, and K-means by the experts used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan._kernels.transport import transport
from moeplan.arrays import Float32Array, FloatArray, Int64Array
from moeplan.errors import PlanError

__all__ = ["equal_groups", "in_span", "kmeans", "random_groups", "soft_groups"]

#: Scores are rounded to this many steps between the smallest and the largest of one call.
_STEPS = 2**40 - 1
#: Starts of K-means, of which the best is taken.
STARTS = 4


def equal_groups(score: npt.NDArray[np.floating]) -> Int64Array:
    """Groups of floor(n / D) or ceil(n / D) requests with the largest sum of scores.

    Exact for scores rounded to 2**40 steps of their range: the total is within n x 2**-40 of the range of the best.

    Args:
        score: floats [n, D], finite; how well each group suits each request.

    Returns:
        int64 [n], the group of each request.

    Raises:
        PlanError: more groups than requests.
    """
    n, groups = score.shape
    if groups > n:
        raise PlanError(f"{groups} groups for {n} requests", hint="use fewer nodes, or a trace with more requests")
    score = np.asarray(score, np.float64)
    score = score - score.max(axis=1, keepdims=True)  # a request's own level changes nothing
    span = -score.min()
    if span <= 0:
        return np.asarray(np.arange(n) % groups, np.int64)
    cost = np.rint(score * (-_STEPS / span)).astype(np.int64)
    return np.asarray(transport(cost, 60), np.int64)


def random_groups(n: int, groups: int, rng: np.random.Generator) -> Int64Array:
    """Equal groups at random: int64 [n]."""
    if groups > n:
        raise PlanError(f"{groups} groups for {n} requests", hint="use fewer nodes, or a trace with more requests")
    return np.asarray(rng.permutation(np.arange(n) % groups), np.int64)


def soft_groups(score: FloatArray, softness: float) -> FloatArray:
    """Memberships float64 [n, D] that fade with the score: each row sums to 1, each column to n / D (Sinkhorn).

    A new request will be like a group's members, not one of them. Partial membership keeps a placement from fitting
    the few requests that happened to be in each group.

    Args:
        score: float64 [n, D]. softness: the width of the fade, in standard deviations of the score.
    """
    n, groups = score.shape
    centred = score - score.mean(axis=1, keepdims=True)
    spread = float(centred.std())
    if spread <= 1e-12:
        return np.full((n, groups), 1.0 / groups)
    centred /= spread * softness
    member = np.exp(np.maximum(centred - centred.max(axis=1, keepdims=True), -60.0))
    for _ in range(50):
        member *= (n / groups) / member.sum(axis=0)
        member /= member.sum(axis=1, keepdims=True)
    return np.asarray(member)


def kmeans(points: Float32Array, clusters: int, seed: int) -> Int64Array:
    """int64 [n], labels 0, 1, .. without gaps, of points [n, f]; the same for the same seed."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = in_span(points)
    with threadpool_limits(limits=1, user_api="openmp"), warnings.catch_warnings():  # one thread: one order of sums
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters is handled below
        label = KMeans(clusters, n_init=STARTS, random_state=seed).fit(points).labels_
    return np.asarray(np.unique(label, return_inverse=True)[1], np.int64)


def in_span(points: Float32Array) -> Float32Array:
    """The points [n, f] in coordinates of their own span, [n, at most n]: the same distances, far fewer numbers."""
    if len(points) >= points.shape[1]:
        return points
    value, vector = np.linalg.eigh((points @ points.T).astype(np.float64))
    spanned = value > value[-1] * 1e-9
    return np.asarray(vector[:, spanned] * np.sqrt(value[spanned]), np.float32)
