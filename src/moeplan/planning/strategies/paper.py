"""`paper`: micro-batch grouping and placement as published (arXiv 2604.23150; reference: docs/strategies.md).

Past requests are clustered by the experts that their decode used; clusters are mapped to the D groups; each expert goes
to the group that uses it most. `paper` keeps the groups equal in size by an exact balanced assignment;
`paper-unbalanced` is the original, whose groups are whatever the clusters are, and is always shown marked.

Left open by the paper and chosen here: K (`--clusters`, else picked on the fit requests, see `pick_clusters`); the
second K-means of K > D works on L2-normalised u_k, as the first does on a_i; a new request's nearest centroid is the
one at the smallest angle; GPUs inside a node are dealt by load.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from moeplan.cluster import routes
from moeplan.errors import PlanError
from moeplan.planning.assignment import equal_groups
from moeplan.planning.packing import replicate, slots_from_nodes
from moeplan.planning.problem import Decision, Problem, Strategy
from moeplan.planning.router import ClusterRouter, normalised
from moeplan.types import Int32Array, Placement

STARTS = 4  # of K-means, the best of which counts

__all__ = ["map_clusters", "pick_clusters", "place_by_use"]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def paper(problem: Problem, seed: int, equal: bool = True) -> Decision:
    """Cluster, map, place."""
    groups = problem.cluster.num_groups
    clusters, how = problem.options.clusters, "given"
    if clusters is None:
        clusters, how = pick_clusters(problem, seed), "picked on the fit requests"
    router, label = group_requests(problem.use, clusters, groups, seed)
    group = fit_groups(router, problem.use, label, equal)
    slots = place(problem, use_by_group(problem.use, group))
    return Decision(slots, router, (f"paper: K = {len(router.centroids)} clusters for {groups} groups ({how})",))


# ---- micro-batch grouping


def group_requests(
    use: npt.NDArray[np.uint32],
    clusters: int,
    groups: int,
    seed: int,
    points: npt.NDArray[np.float32] | None = None,
) -> tuple[ClusterRouter, npt.NDArray[np.int64]]:
    """K-means of the L2-normalised decode counts, and the map from clusters to groups.

    Args:
        use: uint32 [n, L, E]; clusters: K, at most n; groups: D; points: `in_span(normalised(use))`, if it is there.

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
    for spare in range(int(label.max()) + 1, groups):  # alike clusters: K-means found fewer; split the fullest
        fullest = np.bincount(label).argmax()
        label[np.flatnonzero(label == fullest)[-1]] = spare
    serves[np.arange(clusters), label] = True
    return serves


def fit_groups(
    router: ClusterRouter, use: npt.NDArray[np.uint32], label: npt.NDArray[np.int64], equal: bool
) -> BoolArray:
    """bool [n, D]: the groups that each fit request counts for.

    Unequal (as published): all groups of its cluster, so groups that share a cluster have the same use. Equal: one.
    """
    if equal:
        group = equal_groups(router.scores(use))
        return np.asarray(group[:, None] == np.arange(router.serves.shape[1]))
    return np.asarray(router.serves[label])


def use_by_group(use: npt.NDArray[np.uint32], group: BoolArray) -> FloatArray:
    """U: float64 [L, D, E], use of each expert by the requests mapped to each group."""
    total = group.T.astype(np.float64) @ use.reshape(len(use), -1)
    return np.ascontiguousarray(total.reshape(group.shape[1], *use.shape[1:]).transpose(1, 0, 2))


def kmeans(points: npt.NDArray[np.float32], clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """int64 [n] labels 0, 1, .. without gaps, the best of a few starts; the same for the same seed."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = in_span(points)
    with threadpool_limits(limits=1, user_api="openmp"), warnings.catch_warnings():  # one thread: one order of sums
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters is met below
        label = KMeans(clusters, n_init=STARTS, random_state=seed).fit(points).labels_
    return np.asarray(np.unique(label, return_inverse=True)[1], np.int64)


def in_span(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The points [n, f] in coordinates of their own span, [n, at most n]: the same distances, far fewer numbers."""
    if len(points) >= points.shape[1]:
        return points
    value, vector = np.linalg.eigh((points @ points.T).astype(np.float64))
    kept = value > value[-1] * 1e-9
    return np.asarray(vector[:, kept] * np.sqrt(value[kept]), np.float32)


def pick_clusters(problem: Problem, seed: int) -> int:
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
        cluster = problem.cluster
        placement = Placement(slots, problem.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
        local = routes(placement, cluster, problem.rule, seed).local_share
        use = problem.use[judge]
        kept = sum(float((use[i] * local[d]).sum()) for i, d in enumerate(group))
        remote = 1.0 - kept / max(float(use.sum()), 1.0)
        if remote < least - 1e-12:
            best, least = clusters, remote
    return best


# ---- placement


def place(problem: Problem, use: FloatArray) -> Int32Array:
    """Both phases, then GPUs: int32 [L, S] from U [L, D, E]."""
    cluster = problem.cluster
    groups = use.shape[1]
    held = place_by_use(use, problem.num_slots // groups, cluster.gpus_per_group)
    inside = np.zeros(use.shape)  # copies of each expert in each group
    np.add.at(inside, (np.arange(len(held))[:, None, None], np.arange(groups)[None, :, None], held), 1.0)
    # A copy serves its own group first; what groups without a copy need is shared by all copies.
    own = np.take_along_axis(use / np.maximum(inside, 1.0), held, axis=2)
    need = (use * (inside == 0)).sum(axis=1) / inside.sum(axis=1)
    others = np.take_along_axis(need[:, None, :].repeat(groups, 1), held, axis=2)
    return slots_from_nodes(held, own + others, cluster.gpus_per_group)


def place_by_use(use: FloatArray, room: int, most: int = 1) -> npt.NDArray[np.int64]:
    """The published placement of one layer after another: int64 [L, D, M], the experts of each group.

    Phase 1: experts in descending max_d U; each goes to the group that uses it most and has room, at most ceil(E / D).
    Phase 2: every group is filled to M slots with the experts it uses most among those it lacks. Ties: lower index.
    A group with more slots than there are experts (one node, say) lacks none, and spends the rest where a copy carries
    most.

    Args:
        use: float64 [L, D, E]; room: M = (E + R) / D; most: most copies of an expert in a group (its GPUs).
    """
    layers, groups, experts = use.shape
    if room > experts:
        copy, _ = replicate(use.reshape(layers * groups, experts), room, most)
        return copy.reshape(layers, groups, room)
    at = np.arange(layers)
    has = np.zeros(use.shape, np.bool_)
    size = np.zeros((layers, groups), np.int64)
    order = np.argsort(-use.max(axis=1), axis=1, kind="stable")
    most = -(-experts // groups)
    for i in range(experts):
        expert = order[:, i]
        wanted = np.where(size < most, use[at, :, expert], -1.0)
        group = wanted.argmax(axis=1)
        has[at, group, expert] = True
        size[at, group] += 1
    lacking = np.where(has, -1.0, use)
    rank = np.argsort(np.argsort(-lacking, axis=2, kind="stable"), axis=2, kind="stable")
    has |= rank < (room - size)[:, :, None]
    if (has.sum(axis=2) != room).any() or not has.any(axis=1).all():
        raise PlanError(f"{experts} experts do not fit {groups} groups of {room} slots")  # invariants of the paper
    return np.nonzero(has)[2].reshape(layers, groups, room)


STRATEGIES = {
    "paper": Strategy(paper, routed=True),
    "paper-unbalanced": Strategy(partial(paper, equal=False), routed=True, equal=False),
}
