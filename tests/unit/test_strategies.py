"""Strategies: invariants of a placement for all of them, golden cases, and the published cluster-to-group rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from helpers.problems import problem
from moeplan.cluster import Cluster, Deployment, check_slots
from moeplan.errors import PlanError, UsageError
from moeplan.planning import PlanningProblem, Strategy, solve
from moeplan.planning.assignment import equal_groups
from moeplan.planning.balance import rebalance_experts
from moeplan.planning.initial_placement import place_by_use
from moeplan.planning.problem import TokenRows
from moeplan.planning.strategies import available
from moeplan.planning.strategies.paper import PaperStrategy, map_clusters
from moeplan.types import ModelShape


@st.composite
def problems(draw: st.DrawFn) -> PlanningProblem:
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = draw(st.integers(3, 20))
    gpus = nodes * per_node
    redundant = -experts % gpus + gpus * draw(st.integers(0, 2))
    redundant = min(redundant, -experts % gpus + gpus * (experts - -(-experts // gpus)))
    home = draw(st.sampled_from(list(Deployment)))
    return problem(
        draw(st.integers(0, 999)), n=draw(st.integers(gpus, gpus + 20)), layers=draw(st.integers(1, 3)),
        experts=experts, k=draw(st.integers(1, 3)), nodes=nodes, per_node=per_node, redundant=redundant, home=home,
        rows=4,
    )  # fmt: skip


def with_clusters() -> list[Strategy]:
    """Every strategy, and `paper` with clusters given."""
    return [*available().values(), *(PaperStrategy(k, equal) for k in (1, 2, 5) for equal in (True, False))]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(with_clusters()), st.integers(0, 99))
def test_every_strategy_keeps_the_invariants(task: PlanningProblem, strategy: Strategy, seed: int) -> None:
    if strategy.name == "eplb-hierarchical" and task.shape.routing_groups % task.cluster.nodes:
        with pytest.raises(PlanError, match="expert groups"):
            solve(task, strategy, seed)
        return
    if isinstance(strategy, PaperStrategy) and (strategy.clusters or 0) > len(task.use):
        with pytest.raises(PlanError, match="clusters"):
            solve(task, strategy, seed)
        return
    result = solve(task, strategy, seed)
    slots = result.placement.slots
    # Placement itself refuses a missing expert, an id out of range, slots that do not divide.
    assert slots.shape == (task.shape.num_layers, task.num_slots)
    if not strategy.name.startswith("eplb"):  # the original may put two copies on one GPU; ours never do
        held = np.sort(slots.reshape(*slots.shape[:1], task.cluster.num_gpus, -1), axis=2)
        assert (np.diff(held, axis=2) != 0).all()
    again = solve(task, strategy, seed)
    assert (again.placement.slots == slots).all()
    scores = result.router.scores(task.signature)
    assert scores.shape == (len(task.use), task.cluster.num_groups)
    sizes = np.bincount(equal_groups(scores), minlength=task.cluster.num_groups)
    assert sizes.max() - sizes.min() <= 1


def test_eplb_reprints_its_readme() -> None:
    """deepseek-ai/EPLB d52c72d5, README: 2 layers, 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    assert rebalance_experts(weight, 16, 4, 2, 8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_policies() -> None:
    task = problem(experts=16, expert_groups=4, redundant=4, nodes=2, per_node=2)
    hierarchical, both = solve(task, "eplb-hierarchical").placement, solve(task, "eplb").placement
    assert (hierarchical.slots == both.slots).all()
    # each routing group of 4 consecutive experts stays on one node
    for layer in hierarchical.slots.reshape(2, 2, -1):
        assert not {e // 4 for e in layer[0].tolist()} & {e // 4 for e in layer[1].tolist()}
    assert "global" in solve(task, "eplb-global").provenance.notes[0]


def test_cluster_to_group_cases() -> None:
    heavy = np.diag([1.0, 5.0, 3.0])
    one_to_one = map_clusters(heavy, 3, 0)
    assert (one_to_one == np.eye(3, dtype=bool)).all()
    more_groups = map_clusters(heavy, 5, 0)  # groups 3, 4 go to the heaviest: cluster 1, then 2
    assert more_groups[:, 3].tolist() == [False, True, False] and more_groups[:, 4].tolist() == [False, False, True]
    wrapped = map_clusters(heavy, 7, 0)  # 1, 2, 0, then 1 again
    assert wrapped.sum(axis=1).tolist() == [2, 3, 2]
    alike = np.repeat(np.eye(2), 3, axis=0) + 0.01 * np.arange(6)[:, None]
    fewer_groups = map_clusters(alike, 2, 0)
    assert fewer_groups[:3, 0].all() != fewer_groups[:3, 1].all() and (fewer_groups.sum(axis=1) == 1).all()
    same = map_clusters(np.ones((4, 3)), 3, 0)  # all clusters alike: still every group has one
    assert same.any(axis=0).all() and (same.sum(axis=1) == 1).all()


def test_placement_phases_by_hand() -> None:
    use = np.array([[[9.0, 8.0, 1.0, 0.0], [7.0, 2.0, 3.0, 4.0]]])  # expert by group: 0 0 1 1
    assert place_by_use(use, 2).tolist() == [[[0, 1], [2, 3]]]
    # two extra slots a group: what it uses most among those it lacks
    assert place_by_use(use, 3).tolist() == [[[0, 1, 2], [0, 2, 3]]]
    # no room left where it is used most: the next group takes it
    crowded = np.array([[[9.0, 8.0, 7.0, 6.0], [0.0, 0.0, 0.0, 1.0]]])
    assert place_by_use(crowded, 2).tolist() == [[[0, 1], [2, 3]]]


def test_unbalanced_groups_that_share_a_cluster_have_the_same_experts_in_mind() -> None:
    result = solve(problem(nodes=4, per_node=1, n=40), PaperStrategy(2, equal=False))
    assert not result.equal_groups and "K = 2" in result.provenance.notes[0]


def best_total(score: np.ndarray) -> float:
    """The square matrix: floor(n / D) seats a group that must be taken, one more each of which n mod D are."""
    n, groups = score.shape
    floor, extra = divmod(n, groups)
    seats = [d for d in range(groups) for _ in range(floor)] + list(range(groups))
    square = np.zeros((n + groups - extra, len(seats)))
    square[:n] = score[:, seats]
    square[n:, : floor * groups] = -1e6
    row, column = linear_sum_assignment(square, maximize=True)
    return float(square[row, column].sum())


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 10_000), st.sampled_from(["normal", "ties", "skewed"]))
def test_equal_groups_are_exact(groups: int, more: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    n = groups + more
    score = rng.normal(size=(n, groups))
    if kind == "ties":
        score = rng.integers(0, 3, (n, groups)).astype(float)
    elif kind == "skewed":
        score = score * 0.1 + rng.normal(size=groups) * 3
    group = equal_groups(score)
    sizes = np.bincount(group, minlength=groups)
    assert sizes.max() - sizes.min() <= 1
    assert score[np.arange(n), group].sum() == pytest.approx(best_total(score), abs=1e-6)


def test_more_groups_than_requests_is_refused() -> None:
    with pytest.raises(PlanError, match="9 groups for 8"):
        equal_groups(np.zeros((8, 9)))
    with pytest.raises(PlanError, match="groups for"):
        problem(n=3, nodes=4, per_node=1)


def test_unknown_strategy_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"affinity, eplb, .*paper"):
        solve(problem(), "best")


def test_affinity_gathers_what_is_called_together() -> None:
    experts = np.array([[[0, 2]], [[1, 3]]] * 30, np.uint8)
    use = np.ones((4, 1, 4), np.uint32)
    task = PlanningProblem(
        ModelShape("test", 1, 4, 2), Cluster(2, 1), 0, use, use, TokenRows(experts, np.array([0]), np.array([60]))
    )  # fmt: skip
    first = set(solve(task, "affinity").placement.slots[0, :2].tolist())
    assert first in ({0, 2}, {1, 3})
    stream = TokenRows(experts[:, :, :1], np.array([0]), np.array([60]))
    top1 = PlanningProblem(ModelShape("test", 1, 4, 1), Cluster(2, 1), 0, use, use, stream)
    assert "no pairs" in solve(top1, "affinity").provenance.notes[0]


def test_odd_sizes() -> None:
    with pytest.raises(PlanError):
        problem(experts=96, nodes=7, per_node=1)
    for name in available():
        if name != "eplb-hierarchical":
            assert solve(problem(experts=96, nodes=7, per_node=1, redundant=2), name).placement.slots_per_gpu == 14
    assert check_slots(384, 48, Cluster(9, 8)) == 6
