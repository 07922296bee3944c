"""Groups of requests that share experts, for independent instances: each decode step then reads fewer distinct experts.

A step of B requests reads an expert unless none of them picks it. With p the mean probability that a request of the
group picks it, that is 1 - (1 - p) ** B. To second order around the mean over all requests, the sum over experts falls
with the inner products of the requests' deviations from the mean, each expert weighted by (1 - mean) ** (B - 2). So
requests become points, and what two requests save where they decode together is the product of their points. Groups and
orders of a queue (`moeplan.planning.order`) both raise the sum of such products.

Names: n requests, D groups, L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from moeplan._kernels.swaps import swap_partition
from moeplan.arrays import Float32Array, FloatArray, Int64Array, NumberArray
from moeplan.errors import PlanError
from moeplan.planning.assignment import equal_groups, kmeans, random_groups

__all__ = ["expected_distinct", "pick_probability", "sharing_groups", "sharing_points"]

#: Up to so many requests, all pairs are compared.
MOST_PAIRED = 2048
_STARTS, _SWEEPS, _ROUNDS = 10, 50, 10


def pick_probability(expected_use: NumberArray, top_k: int) -> Float32Array:
    """float32 [n, L, E]: the chance that a token of a request picks an expert, from shares that sum to 1 in a layer."""
    return np.asarray(np.minimum(np.asarray(expected_use, np.float32) * np.float32(top_k), np.float32(1.0)))


def sharing_points(expected_use: NumberArray, top_k: int, live: int) -> Float32Array:
    """float32 [n, L * E], points whose products say how many reads two requests save where they decode together.

    Args:
        expected_use: [n, L, E], the expected share of each expert in its layer's picks.
        top_k: picks of a token in a layer. live: B, requests that decode together.
    """
    chance = pick_probability(expected_use, top_k).reshape(len(expected_use), -1)
    mean = chance.mean(axis=0)
    return np.asarray((chance - mean) * np.sqrt(unread(mean, live)), np.float32)


def unread(mean: Float32Array, live: int) -> Float32Array:
    """How much a pair's shared picks of an expert save: the chance that none of the other B - 2 requests picks it."""
    return np.asarray((1.0 - mean) ** max(live - 2, 0), np.float32)


def expected_distinct(chance: NumberArray) -> float:
    """Distinct experts of a layer that a step is expected to read, mean over layers.

    Args:
        chance: [B, L, E], `pick_probability` of the requests that decode together.

    Examples:
        >>> expected_distinct(np.array([[[1.0, 0.5, 0.0]], [[1.0, 0.5, 0.0]]]))
        1.75
    """
    return float((1.0 - np.prod(1.0 - np.asarray(chance, np.float64), axis=0)).sum(axis=1).mean())


def sharing_groups(points: Float32Array, groups: int, seed: int = 0) -> Int64Array:
    """int64 [n]: groups of floor(n / D) or ceil(n / D) requests that share experts.

    Up to some thousand requests: random groups and those of k-means are improved by swaps of pairs, and the best are
    taken. Beyond, k-means with an exact equal assignment.

    Args:
        points: [n, f], from `sharing_points`.

    Raises:
        PlanError: more groups than requests.

    Examples:
        >>> found = sharing_groups(np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32), 2)
        >>> bool(found[0] == found[2] != found[1] == found[3])
        True
    """
    n = len(points)
    if groups > n:
        raise PlanError(f"{groups} groups for {n} requests", hint="use fewer instances, or more requests")
    if groups == 1:
        return np.zeros(n, np.int64)
    label = kmeans(points, groups, seed)
    start = equal_groups(points @ _centroids(points, label, groups).T)
    if n > MOST_PAIRED:
        for _ in range(_ROUNDS):
            before, start = start, equal_groups(points @ _centroids(points, start, groups).T)
            if np.array_equal(before, start):
                break
        return start
    gram = (points @ points.T).astype(np.float64)
    np.fill_diagonal(gram, 0.0)
    rng = np.random.default_rng([seed, 0x15])
    starts = [start, *(random_groups(n, groups, rng) for _ in range(_STARTS))]
    best, most = start, -np.inf
    for part in starts:
        swap_partition(gram, part, groups, _SWEEPS)
        inside = float(gram[part[:, None] == part].sum())
        if inside > most:
            best, most = part, inside
    return best


def _centroids(points: Float32Array, label: Int64Array, groups: int) -> FloatArray:
    """float64 [D, f]; an empty group has its centroid at 0, the mean of all."""
    member = np.zeros((groups, len(points)))
    member[label, np.arange(len(points))] = 1.0
    return np.asarray(member @ points / np.maximum(member.sum(axis=1, keepdims=True), 1.0))
