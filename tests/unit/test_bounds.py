"""Bounds: optima known by hand and by brute force, and no strategy beats them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_bounds import best_joint, best_nodes, best_placement, best_under_cap, nodes_holding, use_by_node
from helpers.problems import problem
from moeplan.cluster import Dispatch, request_messages
from moeplan.errors import PlanError
from moeplan.planning import solve
from moeplan.planning.assignment import equal_groups
from moeplan.planning.strategies import available
from moeplan.types import Placement

pytestmark = pytest.mark.slow
CLOSE = 1e-6


def placements(nodes: int, experts: int, room: int) -> Iterator[np.ndarray]:
    """Every bool [N, E] with `room` experts on each node and every expert somewhere."""
    for chosen in itertools.product(itertools.combinations(range(experts), room), repeat=nodes):
        held = np.zeros((nodes, experts), np.bool_)
        for node, those in enumerate(chosen):
            held[node, list(those)] = True
        if held.any(axis=0).all():
            yield held


def groupings(n: int, nodes: int) -> Iterator[np.ndarray]:
    for group in itertools.product(range(nodes), repeat=n):
        sizes = np.bincount(group, minlength=nodes)
        if sizes.max() - sizes.min() <= 1:
            yield np.array(group)


def load_ratio(use: np.ndarray, held: np.ndarray) -> float:
    """Busiest node over the mean of one layer, [N, E] each, the picks without a copy at home shared evenly."""
    away = (use * ~held).sum(axis=0)
    load = (held * (use + away / held.sum(axis=0))).sum(axis=1)
    return float(load.max() / load.mean())


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(use [L, N, E], room) that can be enumerated."""
    nodes, room = draw(st.sampled_from([(2, 2), (2, 3), (3, 2)]))
    experts = draw(st.integers(max(room, 3), nodes * room))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    return rng.integers(0, 20, (draw(st.integers(1, 2)), nodes, experts)).astype(float) + 0.5, room


# ---- placement


def test_the_best_placement_by_hand() -> None:
    use = np.array([[9.0, 8.0, 0.0, 1.0], [7.0, 1.0, 2.0, 3.0]])
    best = best_placement(use, 2)
    assert best.proved and best.value == best.found == 22.0
    assert best.held is not None and best.held[0].tolist() == [[True, True, False, False], [False, False, True, True]]
    assert best_placement(use, 3).value == 30.0  # a second copy of expert 0 on node 1, and 3 on node 0
    assert best_placement(use, 4).value == use.sum()
    with pytest.raises(PlanError):
        best_placement(use, 1)
    with pytest.raises(PlanError):
        best_placement(use, 5)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_the_best_placement_by_brute_force(task: tuple[np.ndarray, int]) -> None:
    use, room = task
    best = best_placement(use[0], room)
    assert best.proved and best.gap == 0.0
    assert best.value == pytest.approx(max(float(use[0][held].sum()) for held in placements(*use[0].shape, room)))
    assert best.held is not None and (best.held.sum(axis=2) == room).all() and best.held.any(axis=1).all()


# ---- under a cap on load


def test_a_cap_costs_locality_by_hand() -> None:
    # Node 0 asks for all of 0 and 1, the hot ones: both at home are 20 of 24 picks on one node.
    use = np.array([[[10.0, 10.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]])
    assert best_under_cap(use, 2, 2.0).value == 24.0
    capped = best_under_cap(use, 2, 1.0)
    assert capped.proved and capped.value == 12.0
    with pytest.raises(PlanError, match="limits"):
        best_under_cap(np.array([[[9.0, 1.0], [0.0, 0.0]]]), 1, 1.5)
    # With a copy of 0 and 1 everywhere there is room for both.
    assert best_under_cap(use, 4, 2.0).value == 24.0


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from([1.05, 1.2, 1.6, 9.0]))
def test_the_cap_by_brute_force(task: tuple[np.ndarray, int], cap: float) -> None:
    use, room = task
    spare = room * use.shape[1] > use.shape[2]
    best = -np.inf
    for plan in itertools.product(*[list(placements(*layer.shape, room)) for layer in use]):
        if np.mean([load_ratio(layer, held) for layer, held in zip(use, plan, strict=True)]) <= cap:
            best = max(best, float(use[np.stack(plan)].sum()))
    try:
        bound = best_under_cap(use, room, cap)
    except PlanError:
        assert best == -np.inf
        return
    relaxed = best_under_cap(use, room, cap, whole=False)
    assert relaxed.found is None and not relaxed.proved and relaxed.value >= bound.value - CLOSE
    if spare:
        assert not bound.proved and bound.value >= best - CLOSE
    else:
        assert bound.proved and bound.value == pytest.approx(best)
    if cap == 9.0:  # no cap at all
        assert bound.value == pytest.approx(sum(best_placement(layer, room).value for layer in use))


# ---- groups and placement together


def test_joint_by_hand() -> None:
    use = np.zeros((4, 2, 4), int)
    use[0::2, :, :2], use[1::2, :, 2:] = 5, 5  # two kinds of requests, in turn
    best = best_joint(use, 2, 2)
    assert best.proved and best.value == use.sum()
    assert best.group is not None and best.group.tolist() == [0, 1, 0, 1]
    use[:, 1] = use[0, 1]  # in the second layer all are alike: half of it must cross
    assert best_joint(use, 2, 2).value == use.sum() - use[:, 1].sum() / 2
    assert best_joint(use, 2, 4).value == use.sum()
    assert best_joint(use, 1, 4).value == use.sum()
    with pytest.raises(PlanError):
        best_joint(use, 5, 2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(5, 1, 4, 2, 2), (6, 2, 4, 2, 3), (4, 1, 5, 3, 2)]))
def test_joint_by_brute_force(seed: int, size: tuple[int, int, int, int, int]) -> None:
    n, depth, experts, nodes, room = size
    use = np.random.default_rng(seed).integers(0, 6, (n, depth, experts))
    options = list(placements(nodes, experts, room))
    most = max(
        sum(max(float(layer[held].sum()) for held in options) for layer in use_by_node(use, group, nodes))
        for group in groupings(n, nodes)
    )
    best = best_joint(use, nodes, room)
    assert best.proved and best.value == best.found == pytest.approx(most)
    assert best.group is not None and best.held is not None
    assert use_by_node(use, best.group, nodes)[best.held].sum() == pytest.approx(most)
    sizes = np.bincount(best.group, minlength=nodes)
    assert sizes.max() - sizes.min() <= 1


def test_what_is_left_when_time_is_up_is_still_a_bound() -> None:
    rng = np.random.default_rng(3)
    use = rng.poisson(rng.gamma(0.4, 5.0, (12, 1, 12)))
    best = best_joint(use, 3, 4, time_limit=60.0)
    short = best_joint(use, 3, 4, time_limit=0.05)
    assert best.proved and short.value >= best.value - CLOSE
    assert short.found is None or short.found <= best.value + CLOSE
    assert short.proved or short.gap > 0


# ---- node mode


def test_nodes_by_hand() -> None:
    rows, home = np.array([[0, 1], [0, 1], [2, 3], [0, 2]]), np.array([0, 0, 1, 1])
    best = best_nodes(rows, home, 2, 4)
    assert best.proved and best.value == best.found == 1.0  # the last token needs expert 0, which stays with node 0
    assert best_nodes(rows, 0 * home, 1, 4).value == 0.0
    with pytest.raises(PlanError, match="divide"):
        best_nodes(rows, home, 3, 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(2, 6, 2), (2, 6, 4), (3, 6, 3)]))
def test_nodes_by_brute_force(seed: int, size: tuple[int, int, int]) -> None:
    nodes, experts, k = size
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(experts)[:k] for _ in range(12)])
    home = rng.integers(0, nodes, 12)
    least = min(
        sum(len(set(held.argmax(axis=0)[row]) - {at}) for row, at in zip(rows, home, strict=True))
        for held in placements(nodes, experts, experts // nodes)
    )
    best = best_nodes(rows, home, nodes, experts)
    assert best.proved and best.value == best.found == least
    short = best_nodes(rows, home, nodes, experts, time_limit=0.01)
    assert short.value <= least


# ---- no strategy is better


def test_a_placement_as_nodes_hold_it() -> None:
    placement = Placement(np.array([[0, 1, 2, 0, 3, 3]], np.int32), 4, 2, 1)
    assert nodes_holding(placement).astype(int).tolist() == [[[1, 1, 1, 0], [1, 0, 0, 1]]]


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("name", sorted(name for name in available() if name != "eplb-hierarchical"))
def test_no_strategy_beats_a_bound(name: str, redundant: int) -> None:
    task = problem(5, n=10, layers=1, experts=12, k=3, nodes=2, per_node=2, redundant=redundant)
    result = solve(dataclasses.replace(task, signature=task.use), name)
    group = equal_groups(result.router.scores(task.use))
    room = task.num_slots // 2
    served = np.einsum("nle,nle->", task.use, result.routes.local_share[group])  # by the replica rule itself
    use = use_by_node(task.use, group, 2)
    held = nodes_holding(result.placement)
    assert served == pytest.approx(use[held].sum())
    if name.startswith("eplb") and redundant:
        assert held.sum() <= task.num_slots  # it may put two copies on a node: fewer experts there than slots
    placed = best_placement(use[0], room)
    assert served <= placed.value + CLOSE
    assert served <= best_under_cap(use, room, load_ratio(use[0], held[0]) + CLOSE).value + CLOSE
    joint = best_joint(task.use, 2, room)
    assert joint.proved and placed.value <= joint.value + CLOSE
    if redundant == 0:
        stream = task.rows
        reached = request_messages(
            result.routes, Dispatch.NODE, stream.experts, stream.starts, stream.stops, group
        )  # fmt: skip
        home = np.repeat(group, stream.stops - stream.starts)
        assert reached[:, 2].sum() >= best_nodes(stream.experts[:, 0], home, 2, 12).value - CLOSE
