"""K-means of requests by the experts that they used."""

from __future__ import annotations

import numpy as np

from moeplan.arrays import Float32Array, Int64Array

__all__ = ["in_span", "kmeans"]

#: Starts of K-means, of which the best is taken.
STARTS = 4


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
