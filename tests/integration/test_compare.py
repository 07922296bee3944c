"""Comparisons: splits, steps, statistics by hand; and the real sets, held to the figures they must show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule, token_messages
from moeplan.errors import PlanError, UsageError
from moeplan.importers.arrays import import_arrays
from moeplan.importers.options import ImportOptions
from moeplan.planning import RequestSet, read_requests, solve
from moeplan.planning.assignment import random_groups
from moeplan.planning.plan import PlanningTask
from moeplan.planning.requests import Spans, blocks, split
from moeplan.planning.router import LocalityRouter
from moeplan.planning.strategies.paper import PaperStrategy
from moeplan.replay.compare import compare
from moeplan.replay.evaluate import evaluate
from moeplan.replay.evaluator import FoldEvaluator
from moeplan.replay.measure import measure_requests, sample_steps
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import Draws, draw_steps, least_requests, live_requests
from moeplan.replay.statistics import MeasuredValue, block_weights, figure_of_ratio, noise_floor, significantly_below
from moeplan.replay.table import Comparison
from moeplan.synthetic.generator import WorkloadSettings, generate
from moeplan.trace import Trace, TraceWriter, open_trace
from moeplan.types import ModelShape

ALL = ("random", "linear", "eplb", "affinity", "paper")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RequestSet:
    return read_requests(
        generate("demo", tmp_path_factory.mktemp("demo") / "t", WorkloadSettings(requests=160, seed=1))
    )


# ---- splits and steps


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 200), st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 0.9), st.integers(0, 999))
def test_splits_keep_shares_and_blocks(n: int, domains: int, size: int, fit: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, domains, n)
    block = blocks(np.arange(n), size)
    chosen = split(domain, block, fit, rng)
    count = int(block.max()) + 1
    of_block = np.array([chosen[block == b] for b in range(count)], dtype=object)
    assert all(np.all(part == part[0]) for part in of_block)
    picked = np.array([bool(part[0]) for part in of_block])
    assert abs(picked.sum() - fit * count) <= 1
    first = np.array([domain[block == b][0] for b in range(count)])
    for d in range(domains):
        assert abs(picked[first == d].sum() - fit * (first == d).sum()) <= 1


def test_blocks_follow_the_trace_s_own_order() -> None:
    assert blocks(np.array([0, 1, 19, 20, 45, 59]), 20).tolist() == [0, 0, 0, 1, 2, 2]


def test_steps_draw_by_length_and_uniformly_in_position() -> None:
    span = np.array([[0, 10], [10, 40]]).T
    draws = draw_steps(span, 20_000, np.random.default_rng(0))
    assert (draws.row >= span[:, 0]).all() and (draws.row < span[:, 1]).all()
    first = draws.key.argmin(axis=1)
    assert (first == 1).mean() == pytest.approx(0.75, abs=0.01)
    assert draws.row[:, 1].mean() == pytest.approx(24.5, abs=0.2)


def test_live_requests() -> None:
    assert live_requests([117, 118], Cluster(8, 8)) == 12
    assert live_requests([5000], Cluster(8, 8)) == 128
    with pytest.raises(PlanError, match="7 a group, but replaying steps needs 8; use a trace with 512 usable requests"):
        live_requests([64 * 7], Cluster(8, 8, Deployment.GPUS))
    assert live_requests([64 * 8], Cluster(8, 8, Deployment.GPUS)) == 6


@pytest.mark.parametrize(
    ("cluster", "fit", "least"),
    [
        (Cluster(8, 8), 0.5, 48),
        (Cluster(8, 8, Deployment.GPUS), 0.5, 1024),
        (Cluster(4, 1), 0.75, 48),
        (Cluster(4, 1), 0.2, 20),
    ],
)
def test_a_comparison_says_how_many_requests_it_takes(cluster: Cluster, fit: float, least: int) -> None:
    def sizes(n: int) -> tuple[int, int]:
        chosen = split(np.zeros(n, np.int64), np.arange(n), fit, np.random.default_rng(0))
        return int(chosen.sum()), int((~chosen).sum())

    assert least_requests(cluster, fit) == least
    assert sizes(least)[0] >= cluster.num_groups and live_requests([sizes(least)[1]], cluster) >= 1
    fewer = sizes(least - cluster.num_groups)
    with pytest.raises(PlanError):
        live_requests([fewer[1] if fewer[0] >= cluster.num_groups else 0], cluster)


@pytest.mark.slow
def test_a_comparison_of_too_few_says_what_to_do(demo: RequestSet) -> None:
    cluster = Cluster(16, 8, Deployment.GPUS)
    redundant = -demo.shape.num_experts % cluster.num_gpus
    with pytest.raises(
        PlanError, match="use fewer nodes, --deployment nodes, another --fit, or a trace with 2048 usable"
    ):
        compare(demo, cluster, ("linear",), redundant=redundant)
    with pytest.raises(PlanError, match="use fewer nodes, another --fit, or a trace with 480 usable requests"):
        compare(demo, Cluster(80, 1), ("linear",), redundant=-demo.shape.num_experts % 80)
    with pytest.raises(PlanError, match="a smaller --block, or a trace with 24 usable"):
        compare(demo, Cluster(4, 1), ("linear",), settings=EvaluationSettings(block=1000))


@pytest.mark.slow
def test_no_grouping_keeps_more_at_home_than_the_oracle_s(demo: RequestSet) -> None:
    everyone = np.arange(len(demo))
    plan = solve(demo.problem(PlanningTask(Cluster(4, 2))), "paper")
    held = LocalityRouter.of(plan.routes).scores(demo.measured)
    fold = FoldEvaluator(demo, everyone, everyone, live=8, steps=1, seed=0)
    kept = {
        kind: held[everyone, fold.group(plan, kind).group].sum() for kind in ("none", "domain", "prefill", "oracle")
    }
    assert kept["oracle"] >= max(kept.values()) - 1e-9 and kept["oracle"] > kept["none"]


# ---- statistics


def test_a_ratio_sums_before_it_divides() -> None:
    top, bottom = np.array([[1.0, 0.0], [0.0, 8.0]]), np.array([[2.0, 0.0], [0.0, 10.0]])
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    found = figure_of_ratio(top, bottom, weights, "requests")
    assert found.value == pytest.approx(9 / 12) and found.folds == pytest.approx((0.5, 0.8))
    assert found.draws == pytest.approx([0.75, 0.5, 0.8])
    assert found.to_dict()["sd_folds"] == pytest.approx(np.std([0.5, 0.8], ddof=1))


def test_block_weights_draw_whole_blocks() -> None:
    weights = block_weights(np.array([0, 0, 1, 2, 2]), 50, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_beating_needs_a_paired_interval() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=1000)
    a, b = MeasuredValue(1.0, 1.0 + shared), MeasuredValue(1.1, 1.1 + shared + 0.01 * rng.normal(size=1000))
    assert significantly_below(a, b) and not significantly_below(b, a)
    assert not significantly_below(MeasuredValue(1.0, 1.0 + rng.normal(size=1000)), b)


def test_noise_floor_by_hand() -> None:
    """Two picks on two bins: together (2) or apart (1), each half of the time."""
    assert noise_floor(2, 2, np.random.default_rng(0), draws=40_000) == pytest.approx(1.5, abs=0.02)


# ---- replay against a loop that knows nothing of arrays


@pytest.mark.parametrize("rule", list(ReplicaRule))
@pytest.mark.parametrize("home", list(Deployment))
@pytest.mark.parametrize("mode", list(Dispatch))
def test_figures_equal_a_naive_loop(demo: RequestSet, rule: ReplicaRule, home: Deployment, mode: Dispatch) -> None:
    cluster = Cluster(2, 4, home)
    plan = solve(demo.problem(PlanningTask(cluster, 8, mode, rule)), "random", 3)
    chosen, place = np.arange(6), plan.placement
    group = random_groups(6, min(cluster.num_groups, 6), np.random.default_rng(0))
    found = measure_requests(demo, chosen, group, plan)
    for i in chosen:
        load = np.zeros((place.num_layers, cluster.num_gpus))
        group_node = int(cluster.group_node(group[i]))
        remote = 0.0
        for row in range(*demo.spans.measured[:, i]):
            for layer in range(place.num_layers):
                for e in demo.experts[row, layer]:
                    share = plan.routes.share(layer)[group[i], e]
                    load[layer] += share
                    remote += share.reshape(cluster.nodes, -1).sum(axis=1)[np.arange(cluster.nodes) != group_node].sum()
        assert found.load[i] == pytest.approx(load, rel=1e-4, abs=1e-4)
        assert found.remote[i] == pytest.approx(remote, rel=1e-4, abs=1e-2)
        assert found.picks[i] == pytest.approx(load.sum(), rel=1e-5)


def test_steps_by_hand() -> None:
    """Two nodes of one GPU, one layer, top-1; each group has one live request."""
    experts = np.array([[[0]], [[1]], [[1]], [[1]]], np.uint8)
    span = np.array([[0, 1], [1, 2]])
    demo = RequestSet(
        ModelShape("hand", 1, 2, 1), experts, Spans(span, span, span), np.arange(2), np.zeros(2, np.int64)
    )
    cluster = Cluster(2, 1)
    plan = solve(demo.problem(PlanningTask(cluster)), "linear")
    draws = Draws(np.zeros((1, 2), np.float32), np.array([[0, 1]]), np.zeros((1, 2), np.float32))
    swapped, straight = np.array([1, 0]), np.array([0, 1])
    local = sample_steps(demo, draws, straight, 1, plan).figures()
    assert (local.messages[0], local.node_padded[0], local.rank_padded[0]) == (0, 0, 0)
    assert (local.gpu_load[0], local.node_load[0], local.experts[0]) == (1, 1, 1)
    away = sample_steps(demo, draws, swapped, 1, plan).figures()
    # each sends one message: 2 messages, padded 2 x 1 x 1, ranks 2 x 1
    assert (away.messages[0], away.node_padded[0], away.rank_padded[0]) == (2, 2, 2)
    assert token_messages(Dispatch.PICK, cluster, 0, [1]) == [(0, 1)]


# ---- compare


def test_compare_is_deterministic_and_whole(demo: RequestSet) -> None:
    settings = EvaluationSettings(folds=2, steps=30, bootstrap_draws=100)
    first, second = (
        compare(demo, Cluster(4, 2), (*ALL, "paper-unbalanced"), redundant=8, settings=settings).to_dict()
        for _ in range(2)
    )
    for data in (first, second):
        for row in data["strategies"].values():
            row.pop("fit_seconds")
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    rows = first["strategies"]
    assert {"linear", "linear/prefill", "eplb/prefill", "paper/none", "paper/domain", "paper/oracle"} <= set(rows)
    for name, row in rows.items():
        unequal = name == "paper-unbalanced"
        assert row["equal_groups"] is not unequal and not (unequal and row["guarded"])
        size = row["group_size_ratio"]
        assert unequal or size["value"] == pytest.approx(size["smallest_possible"])
        if not unequal:
            allowed = 1.05 * rows["linear"]["node_load_ratio"]["value"]
            assert row["guarded"] == (row["node_load_ratio"]["value"] <= allowed)
        low, high = row["remote_share"]["ci95"]
        assert low <= row["remote_share"]["value"] <= high
        assert row["expert_weight_gb_per_gpu"]["value"] == pytest.approx(40 / 8 * 8 * 3 * 2048 * 768 / 1e9)
        lost = 8 / 8 * 8 * 3 * 2048 * 768 * 2 / (8 * 4 * 128 * 2 * 2)
        assert row["kv_tokens_lost"]["value"] == pytest.approx(lost)
    assert rows["linear"]["padded_ratio"]["value"] == pytest.approx(1.0)
    assert rows["paper"]["kv_handover_bytes_per_request"]["break_even_decode_tokens"] > 0
    assert rows["paper/none"]["kv_handover_bytes_per_request"]["value"] is None
    assert "linear" in rows["paper"]["beats"]["remote_share"]


def test_bytes_are_null_without_a_hidden_size_and_never_guessed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path / "t", ModelShape("m", 2, 8, 2), source={}) as writer:
        for _ in range(24):
            writer.add(np.argsort(rng.random((20, 2, 8)), axis=2)[:, :, :2], prefill=8)
    requests = read_requests(open_trace(tmp_path / "t"))
    settings = EvaluationSettings(folds=1, steps=5, bootstrap_draws=20)
    row = compare(requests, Cluster(2, 2), ("linear",), settings=settings).row("linear")
    assert row.figures["inter_node_bytes_per_token"].value is None
    settings = dataclasses.replace(settings, hidden=7168)
    given = compare(requests, Cluster(2, 2), ("linear",), settings=settings).row("linear")
    share = given.figures["remote_share"].value
    assert share is not None
    # pick mode: every remote pick is one message there and back, at 2 layers x 2 picks a token
    assert given.figures["inter_node_bytes_per_token"].value == pytest.approx(share * 4 * (7408 + 14336))


def test_allgather_bytes_do_not_depend_on_the_plan(demo: RequestSet) -> None:
    settings = EvaluationSettings(folds=1, steps=10, bootstrap_draws=20)
    table = compare(demo, Cluster(4, 2), ALL, dispatch=Dispatch.ALLGATHER, settings=settings)
    assert len({row.figures["inter_node_bytes_per_token"].value for row in table.rows}) == 1
    assert all(row.figures["padded_ratio"].value == 1.0 for row in table.rows)
    assert any("no plan changes its bytes" in note for note in table.notes)


def test_replaying_a_plan(demo: RequestSet) -> None:
    plan = solve(demo.problem(PlanningTask(Cluster(4, 2))), "paper")
    found = evaluate(plan, demo, EvaluationSettings(steps=20, bootstrap_draws=50))
    table = found.table
    assert [row.name for row in table.rows] == ["linear", "paper", "paper/none"]
    paper, linear = table.row("paper").figures["remote_share"].value, table.row("linear").figures["remote_share"].value
    assert paper is not None and linear is not None and paper < linear
    assert found.row is table.row("paper") and found.figures is found.row.figures and not found.fitted_on_this_trace
    assert repr(found).startswith("paper on 160 requests of ") and len(repr(found).splitlines()) == 10


# ---- usable requests


def _trace(path: Path, requests: list[tuple[int, int]]) -> Trace:
    rng = np.random.default_rng(0)
    with TraceWriter(path, ModelShape("m", 1, 4, 1), source={}) as writer:
        for rows, prefill in requests:
            writer.add(rng.integers(0, 4, (rows, 1, 1)), prefill=prefill)
    return open_trace(path)


def test_usable_requests_are_counted_and_said(tmp_path: Path) -> None:
    trace = _trace(tmp_path / "t", [(10, 2), (9, 2), (20, 0), (30, -1), (40, 40)])
    requests = read_requests(trace)
    assert requests.index.tolist() == [0] and "1 of 5 requests" in requests.notes[0]
    stand_in = read_requests(trace, signature_tokens=4)
    assert stand_in.index.tolist() == [0, 2] and stand_in.known.stands_in == "first 4 decode tokens"
    assert stand_in.spans.signature[:, 1].tolist() == [19, 23] and stand_in.spans.use[:, 1].tolist() == [23, 39]
    with pytest.raises(UsageError, match="smaller --signature-tokens"):
        read_requests(trace, signature_tokens=400)


def test_prefill_only_and_unknown_phases(tmp_path: Path) -> None:
    prompts = _trace(tmp_path / "p", [(10, 10), (50, 50)])
    with pytest.raises(UsageError, match="no decode rows: give --signature-tokens"):
        read_requests(prompts)
    found = read_requests(prompts, signature_tokens=5)
    assert found.column == "rest of prompt" and len(found) == 2
    with pytest.raises(UsageError, match="--phase prefill needs"):
        read_requests(prompts, signature_tokens=5, phase="prefill")
    unknown = read_requests(_trace(tmp_path / "u", [(10, -1), (50, -1)]), signature_tokens=5)
    assert unknown.column == "rest of rows" and len(unknown) == 2


def test_phases_measured(tmp_path: Path) -> None:
    trace = _trace(tmp_path / "t", [(20, 5), (30, 0)])
    assert read_requests(trace, phase="prefill").spans.measured.tolist() == [[0], [5]]
    assert read_requests(trace, phase="mixed").spans.measured.tolist() == [[0], [20]]
    assert read_requests(trace, phase="mixed").spans.use.tolist() == [[5], [20]]


# ---- the real sets

SETS = {
    "maverick-mmlu": (8, None, 1),
    "gpt-oss-20b": (4, 48, 1),
    "deepseek-v2-lite-chat": (8, 24, 20),
}


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RequestSet]:
    out = {}
    for name, (_, tokens, _) in SETS.items():
        without = (45,) if name == "maverick-mmlu" else ()
        place = tmp_path_factory.mktemp(name) / "t"
        trace = import_arrays(shared / "traces" / f"{name}.npz", place, ImportOptions(without_layers=tuple(without)))
        out[name] = read_requests(trace, signature_tokens=tokens)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_real_sets(real: dict[str, RequestSet], name: str) -> None:
    gpus, _, block = SETS[name]
    settings = EvaluationSettings(block=block, steps=40, bootstrap_draws=200)
    table: Comparison = compare(real[name], Cluster(8, gpus), ALL, settings=settings)
    linear = table.row("linear").figures
    assert linear["remote_share"].value == pytest.approx(0.875, abs=0.01)
    if name == "gpt-oss-20b":
        assert linear["remote_nodes_per_token"].value == pytest.approx(3.14, abs=0.05)
    for row in table.rows:
        size = row.figures["group_size_ratio"]
        assert size.value == pytest.approx(dict(size.extra)["smallest_possible"])
    assert "linear" in table.row("paper").beats["remote_share"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prototype", "within"), [("maverick-mmlu", -25.6, 3.0), ("gpt-oss-20b", -14.6, 5.0)])
def test_the_unbalanced_original_is_as_the_prototype(
    real: dict[str, RequestSet], name: str, prototype: float, within: float
) -> None:
    """K = 8, mean of seeds 0-3 (four folds each): `remote_share` against linear's 0.875."""
    changes = []
    for seed in range(4):
        cluster = Cluster(8, SETS[name][0])
        settings = EvaluationSettings(seed=seed, steps=1, bootstrap_draws=10)
        table = compare(real[name], cluster, (PaperStrategy(8, equal=False),), settings=settings)
        share = table.row("paper-unbalanced").figures["remote_share"].value
        assert share is not None
        changes.append(100 * (share / 0.875 - 1))
    assert np.mean(changes) == pytest.approx(prototype, abs=within)


def test_gpu_counts_that_do_not_divide_are_named(real: dict[str, RequestSet]) -> None:
    with pytest.raises(PlanError, match="--gpus-per-node 4"):
        compare(real["gpt-oss-20b"], Cluster(8, 8), ALL)
