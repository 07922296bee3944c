"""The `moeplan` strategy: its loops against plain references, an exact optimum, and what it promises."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import moeplan
from moeplan._kernels.holding import improve
from moeplan.cluster import Cluster
from moeplan.plan import Options, read_requests, solve
from moeplan.plan.foresight import STRENGTHS, Foresight
from moeplan.plan.router import LinearRouter, by_layer
from moeplan.plan.store import load_plan, save_plan
from moeplan.plan.strategies.moeplan import soft_groups
from moeplan.plan.strategies.paper import place_by_use
from moeplan.replay import Setup, compare
from moeplan.replay.comparison import fit_problem
from moeplan.trace import Trace
from test_strategies import problem

FloatArray = np.ndarray


def value(use: FloatArray, held: FloatArray, weight: float) -> float:
    """What `improve` raises, written plainly: one layer, use and held [N, E]."""
    copies, away = held.sum(axis=0), (use * ~held).sum(axis=0)
    load = (held * (use + away / copies)).sum(axis=1)
    uneven = ((load / load.mean()) ** 8).mean() ** 0.125
    return float((use * held).sum() - weight * use.sum() * (uneven - 1.0))


def start(use: FloatArray, room: int) -> FloatArray:
    held = np.zeros(use.shape, np.bool_)
    np.put_along_axis(held, place_by_use(use, room), True, axis=2)
    return held


@st.composite
def layers(draw: st.DrawFn) -> tuple[FloatArray, int, float]:
    nodes, room = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    experts = draw(st.integers(room + 1, nodes * room))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    return rng.gamma(0.5, size=(1, nodes, experts)), room, draw(st.sampled_from([0.0, 0.05, 1.0]))


@settings(max_examples=80, deadline=None)
@given(layers())
def test_improving_keeps_the_invariants_and_stops_at_a_local_optimum(task: tuple[FloatArray, int, float]) -> None:
    use, room, weight = task
    held = start(use, room)
    before = value(use[0], held[0], weight)
    improve(use, held, weight, 100)
    assert (held.sum(axis=2) == room).all() and held.any(axis=1).all()
    after = value(use[0], held[0], weight)
    assert after >= before - 1e-9
    nodes, experts = use.shape[1:]
    slack = 1e-6 * use.sum()
    for here, a, b in itertools.product(range(nodes), range(experts), range(experts)):
        if not held[0, here, a] or held[0, here, b]:
            continue
        for there in range(nodes):
            moved = held[0].copy()
            moved[here, a], moved[here, b] = False, True
            if there != here:
                if not held[0, there, b] or held[0, there, a]:
                    continue
                moved[there, b], moved[there, a] = False, True
            if moved.any(axis=0).all():
                assert value(use[0], moved, weight) <= after + slack


@pytest.mark.parametrize("redundant", [0, 8, 16])
def test_locality_is_near_the_exact_optimum(redundant: int) -> None:
    """Without a price on load, the best placement is a linear programme with whole solutions."""
    rng = np.random.default_rng(redundant)
    nodes, experts = 8, 32
    use = rng.gamma(0.4, size=(6, nodes, experts)) * rng.gamma(1.0, size=(6, 1, experts))
    room = (experts + redundant) // nodes
    held = start(use, room)
    improve(use, held, 0.0, 100)
    best = 0.0
    for layer in use:
        result = linprog(
            -layer.ravel(), A_eq=np.kron(np.eye(nodes), np.ones(experts)), b_eq=np.full(nodes, room),
            A_ub=-np.tile(np.eye(experts), nodes), b_ub=-np.ones(experts), bounds=(0, 1),
        )  # fmt: skip
        best -= result.fun
    # Swaps and replacements end in a local optimum, on such random counts up to 2.5 % short of the best.
    assert 0.97 * best <= (use * held).sum() <= best * (1 + 1e-9)


def test_leave_one_out_is_what_leaving_out_gives() -> None:
    """The closed form against refitting without each request, at the strength that was chosen."""
    rng = np.random.default_rng(0)
    signature = rng.poisson(2.0, (12, 2, 6))
    target, home = rng.random((12, 3)), (rng.random((3, 12)) < 0.4).astype(np.float32)
    router, foretold = Foresight(signature, 0).fit(target, home)
    points = by_layer(signature).astype(np.float64)
    assert np.isfinite(foretold).all() and router.weights.shape == (3, 12)
    # Ridge with the mean taken out: refit on the others, with the centre and scale of all, as the closed form has it.
    centred = points - points.mean(axis=0)
    scale = (centred**2).sum() / 12
    matches = []
    for strength in STRENGTHS:
        left = []
        for what in (target, points @ home.T):
            out = np.zeros_like(what)
            for i in range(12):
                keep = np.arange(12) != i
                design = np.column_stack([np.ones(11), centred[keep]])
                penalty = np.diag([0.0] + [strength * 12 * scale] * 12)
                solution = np.linalg.solve(design.T @ design + penalty, design.T @ what[keep])
                out[i] = what[i] - np.concatenate([[1.0], centred[i]]) @ solution
            left.append(out)
        # foretold = target - (miss of target - trust x miss of own): some trust explains all of it
        missed, spared = target - foretold, left[1]
        trust = ((left[0] - missed) * spared).sum() / (spared**2).sum()
        matches.append((np.abs(left[0] - trust * spared - missed).max(), trust))
    gap, trust = min(matches)
    assert gap < 1e-5 and -1e-9 <= trust <= 1 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(8, 40), st.integers(1, 6))
def test_soft_groups_are_equal_in_size(seed: int, n: int, groups: int) -> None:
    score = np.random.default_rng(seed).normal(size=(n, groups))
    member = soft_groups(score, 0.3)
    np.testing.assert_allclose(member.sum(axis=1), 1.0)
    np.testing.assert_allclose(member.sum(axis=0), n / groups, rtol=0.05)
    assert np.allclose(soft_groups(np.zeros((n, groups)), 0.3), 1 / groups)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return moeplan.open_trace("embedded")


def test_beats_the_others_on_unseen_requests_and_keeps_the_guard(trace: Trace) -> None:
    requests = read_requests(trace)
    for redundant in (0, 16):
        setup = Setup(Cluster(8, 2), ("eplb", "paper", "moeplan"), redundant=redundant, folds=2, steps=60)
        table = compare(requests, setup)
        share = {name: table.row(name).figures["remote_share"].value for name in ("linear", "eplb", "paper", "moeplan")}
        assert table.row("moeplan").guarded
        assert share["moeplan"] < 0.97 * min(share["linear"], share["eplb"])
        if table.row("paper").guarded:
            assert share["moeplan"] < share["paper"]


def test_same_seed_same_plan_and_a_plan_is_read_back_as_it_was(trace: Trace, tmp_path: Path) -> None:
    requests = read_requests(trace)
    problem = fit_problem(requests, Setup(Cluster(4, 2), ()), np.arange(0, len(requests), 2))
    first, again = solve(problem, "moeplan", 3), solve(problem, "moeplan", 3)
    np.testing.assert_array_equal(first.placement.slots, again.placement.slots)
    assert isinstance(first.router, LinearRouter)
    save_plan(
        tmp_path / "p", first, problem, trace_checksum="", synthetic=False, expected=None, stands_in=None
    )  # fmt: skip
    back = load_plan(tmp_path / "p").result
    signature = requests.signature[1::2]
    np.testing.assert_array_equal(back.router.scores(signature), first.router.scores(signature))
    weights = tmp_path / "p" / "weights.npy"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(moeplan.MoeplanError, match=r"weights\.npy"):
        load_plan(tmp_path / "p")


@pytest.mark.parametrize("redundant", [0, 4, 12])
@pytest.mark.parametrize("nodes", [1, 2])
def test_requests_all_alike_and_experts_that_nobody_uses(nodes: int, redundant: int) -> None:
    use = np.zeros((10, 2, 12), np.uint32)
    use[:, :, :3] = 5
    task = dataclasses.replace(
        problem(n=10, nodes=nodes, per_node=2, redundant=redundant), use=use, signature=use, options=Options()
    )
    result = solve(task, "moeplan")
    assert result.placement.replica_count.min() >= 1
    by_gpu = result.placement.slots.reshape(2, 2 * nodes, -1)
    assert all(len(set(gpu.tolist())) == gpu.size for layer in by_gpu for gpu in layer)
    assert np.isfinite(result.router.scores(use)).all()


@pytest.mark.parametrize(("experts", "nodes", "per_node", "redundant"), [(96, 1, 7, 2), (384, 9, 8, 48), (12, 3, 2, 0)])
def test_odd_sizes(experts: int, nodes: int, per_node: int, redundant: int) -> None:
    task = problem(experts=experts, nodes=nodes, per_node=per_node, redundant=redundant, n=20, k=4)
    assert solve(task, "moeplan").placement.replica_count.min() >= 1
