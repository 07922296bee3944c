"""`paper`: request grouping and placement as published (arXiv 2604.23150; reference: docs/concepts/strategies.md).

Past requests are clustered by the experts that their decode used; clusters are mapped to the D groups; each expert goes
to the group that uses it most. `paper` keeps the groups equal in size by an exact balanced assignment;
`paper-unbalanced` is the original, whose groups are whatever the clusters are, and is always shown marked.

The paper leaves open, and is chosen here: K (`clusters`, else picked on the fit requests, see `pick_clusters`); the
second K-means of K > D works on L2-normalised u_k, as the first does on a_i; a new request's nearest centroid is the
one at the smallest angle; experts are assigned to the GPUs of a node by load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.arrays import BoolArray, CountArray, Float32Array, FloatArray, Int32Array, Int64Array
from moeplan.errors import PlanError, UsageError
from moeplan.planning.assignment import equal_groups, in_span, kmeans
from moeplan.planning.expected_load import load_per_replica, remote_share
from moeplan.planning.initial_placement import place_by_use
from moeplan.planning.packing import slots_from_nodes
from moeplan.planning.problem import PlanningProblem, Solution, Strategy
from moeplan.planning.router import ClusterRouter, normalised

__all__ = ["PaperStrategy", "map_clusters", "pick_clusters"]


@dataclass(frozen=True)
class PaperStrategy(Strategy):
    """The published method.

    Attributes:
        clusters: K; None picks it on the fit requests.
        equal: groups of equal size; False, as published: groups as large as their clusters.
    """

    clusters: int | None = None
    equal: bool = True
    routed = True

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters {self.clusters} is not positive")

    @property
    def name(self) -> str:
        return "paper" if self.equal else "paper-unbalanced"

    @property
    def equal_groups(self) -> bool:
        return self.equal

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        """Cluster, map, place."""
        groups = problem.cluster.num_groups
        clusters, how = self.clusters, "given"
        if clusters is None:
            clusters, how = pick_clusters(problem, seed), "picked on the fit requests"
        router, label = group_requests(problem.use, clusters, groups, seed)
        group = fit_groups(router, problem.use, label, self.equal)
        slots = place(problem, use_by_group(problem.use, group))
        return Solution(slots, router, (f"paper: K = {len(router.centroids)} clusters for {groups} groups ({how})",))


STRATEGIES = (PaperStrategy(), PaperStrategy(equal=False))


# ---- request groups


def group_requests(
    use: CountArray, clusters: int, groups: int, seed: int, points: Float32Array | None = None
) -> tuple[ClusterRouter, Int64Array]:
    """K-means of the L2-normalised decode counts, and the map from clusters to groups.

    Args:
        use: uint32 [n, L, E]. clusters: K, at most n. groups: D.
        points: `in_span(normalised(use))`, if it is known.

    Returns:
        The router, and int64 [n], the cluster of each fit request.
    """
    if clusters > len(use):
        raise PlanError(f"{clusters} clusters for {len(use)} fit requests", hint=f"use --clusters {len(use)} or less")
    flat = normalised(use)
    label = kmeans(flat if points is None else points, clusters, seed)
    clusters = int(label.max()) + 1  # fewer where requests are alike
    member = np.zeros((clusters, len(use)), np.float32)
    member[label, np.arange(len(use))] = 1.0
    centroids = normalised(member @ flat)
    activations = member.astype(np.float64) @ use.reshape(len(use), -1)  # u_k, raw counts
    return ClusterRouter(centroids, map_clusters(activations, groups, seed)), label


def map_clusters(activations: FloatArray, groups: int, seed: int) -> BoolArray:
    """Which clusters each group serves: bool [K, D], every cluster in a group and every group with a cluster.

    K = D: one to one. D > K: every cluster gets one group, the other groups go round robin to the clusters with the
    largest sum of ||a_i||_1. K > D: a second K-means, with D clusters, on u_k.

    Args:
        activations: float64 [K, L * E], u_k = sum of a_i over cluster k.
    """
    clusters = len(activations)
    serves = np.zeros((clusters, groups), np.bool_)
    if clusters <= groups:
        heaviest = np.argsort(-activations.sum(axis=1), kind="stable")
        serves[np.arange(clusters), np.arange(clusters)] = True
        for turn, group in enumerate(range(clusters, groups)):
            serves[heaviest[turn % clusters], group] = True
        return serves
    label = kmeans(normalised(activations), groups, seed)
    for group in range(int(label.max()) + 1, groups):  # similar clusters: K-means found fewer; split the fullest
        fullest = np.bincount(label).argmax()
        label[np.flatnonzero(label == fullest)[-1]] = group
    serves[np.arange(clusters), label] = True
    return serves


def fit_groups(router: ClusterRouter, use: CountArray, label: Int64Array, equal: bool) -> BoolArray:
    """bool [n, D]: the groups whose use each fit request is part of.

    Unequal (as published): all groups of its cluster, so groups that share a cluster have the same use. Equal: one.
    """
    if equal:
        group = equal_groups(router.scores(use))
        return np.asarray(group[:, None] == np.arange(router.serves.shape[1]))
    return np.asarray(router.serves[label])


def use_by_group(use: CountArray, group: BoolArray) -> FloatArray:
    """U: float64 [L, D, E], use of each expert by the requests mapped to each group."""
    total = group.T.astype(np.float64) @ use.reshape(len(use), -1)
    return np.ascontiguousarray(total.reshape(group.shape[1], *use.shape[1:]).transpose(1, 0, 2))


def pick_clusters(problem: PlanningProblem, seed: int) -> int:
    """K by a stated rule, on the fit requests only.

    A seeded three quarters of them fit, the rest judge: among K = D/2, D, 2D and 4D (those with at least four fit
    requests a cluster) the one with the least `remote_share` on equal groups routed by signature; ties to the least K.
    Where the fit part is too small for two candidates, K = D.
    """
    n, groups = len(problem.use), problem.cluster.num_groups
    order = np.random.default_rng([seed, 0xC1]).permutation(n)
    fit, judge = order[: n * 3 // 4], order[n * 3 // 4 :]
    candidates = [k for k in (groups // 2, groups, 2 * groups, 4 * groups) if 2 <= k <= len(fit) // 4]
    if len(fit) < groups or len(judge) < groups or len(candidates) < 2:
        return min(groups, n)
    points = in_span(normalised(problem.use[fit]))
    best, least = groups, np.inf
    for clusters in candidates:
        router, label = group_requests(problem.use[fit], clusters, groups, seed, points)
        slots = place(problem, use_by_group(problem.use[fit], fit_groups(router, problem.use[fit], label, True)))
        group = equal_groups(router.scores(problem.signature[judge]))
        remote = remote_share(problem.routes(slots, seed), problem.use[judge], group)
        if remote < least - 1e-12:
            best, least = clusters, remote
    return best


# ---- placement


def place(problem: PlanningProblem, use: FloatArray) -> Int32Array:
    """Both phases of `place_by_use`, then GPUs by load: int32 [L, S] from U [L, D, E]."""
    cluster, groups = problem.cluster, use.shape[1]
    held = place_by_use(use, problem.num_slots // groups, cluster.gpus_per_group)
    replicas = np.zeros(use.shape)
    np.add.at(replicas, (np.arange(len(held))[:, None, None], np.arange(groups)[None, :, None], held), 1.0)
    load = load_per_replica(use / np.maximum(replicas, 1.0), replicas, replicas > 0)
    return slots_from_nodes(held, np.take_along_axis(load, held, axis=2), cluster.gpus_per_group)
