"""The measures of `profile`: known cases by hand, their null baselines, and traces that lack something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.errors import UsageError
from moeplan.profile import Profile, Skipped, profile_trace
from moeplan.profile.coactivation import quasi_independence
from moeplan.profile.common import pearson, plain
from moeplan.profile.counts import DECODE, OTHER, PREFILL, count
from moeplan.profile.imbalance import imbalance, imbalance_factor
from moeplan.profile.phases import derangement, phases
from moeplan.profile.similarity import similarity
from moeplan.trace import UNKNOWN, Requests, Trace, TraceWriter, open_trace
from moeplan.trace.stages import Stages
from moeplan.types import ModelShape

LAYERS, EXPERTS = 3, 16


def write(
    path: Path,
    requests: list[tuple[np.ndarray, int, str]],
    *,
    experts: int = EXPERTS,
    part_picks: int = 1 << 24,
    synthetic: bool = True,
) -> Trace:
    """A trace of (rows [T, L, k], prefill length, domain)."""
    layers, k = requests[0][0].shape[1:]
    shape = ModelShape("toy", layers, experts, k)
    with TraceWriter(path, shape, source={}, synthetic=synthetic, part_picks=part_picks) as writer:
        for rows, prefill, domain in requests:
            writer.add(rows, prefill=prefill, domain=domain)
    return open_trace(path)


def draw(rng: np.random.Generator, weights: np.ndarray, rows: int, k: int = 2) -> np.ndarray:
    """Rows [rows, L, k] of k distinct experts by Gumbel noise on log weights [L, E]."""
    score = np.log(weights)[None] + rng.gumbel(size=(rows, *weights.shape))
    return np.argsort(-score, axis=2)[:, :, :k]


def two_domains(
    rng: np.random.Generator,
    *,
    per_domain: int = 20,
    apart: bool = True,
    prefill: int = 12,
    decode: int = 24,
    k: int = 2,
) -> list[tuple[np.ndarray, int, str]]:
    weights = [rng.gamma(0.6, size=(LAYERS, EXPERTS)) + 0.02 for _ in range(2)]
    requests = []
    for i in range(2 * per_domain):
        own = weights[i % 2 if apart else 0]
        requests.append((draw(rng, own, prefill + decode, k), prefill, "ab"[i % 2]))
    return requests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    rng = np.random.default_rng(0)
    return profile_trace(write(tmp_path_factory.mktemp("two") / "trace", two_domains(rng)))


@pytest.mark.slow
def test_the_whole_is_plain_json_and_the_same_for_the_same_seed(found: Profile):
    text = json.dumps(found.to_dict(), allow_nan=False)
    again = profile_trace(found.trace)
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    assert found.to_dict()["trace"]["rows_by_stage"] == {"prefill": 480, "decode": 960, "other": 0}


def test_streaming_in_parts_equals_the_whole(found: Profile, tmp_path: Path):
    requests = two_domains(np.random.default_rng(0))
    parted = write(tmp_path / "trace", requests, part_picks=1000)
    assert len(list(parted.parts())) > 5
    one, many = found.counts, count(parted)
    assert (one.totals == many.totals).all()
    assert (one.by_request == many.by_request).all()
    assert (one.reservoir.experts == many.reservoir.experts).all()


def test_counts_are_those_of_the_rows(tmp_path: Path):
    rng = np.random.default_rng(1)
    requests = [(rng.integers(0, EXPERTS, (30, LAYERS, 2)), p, d) for p, d in [(10, "a"), (UNKNOWN, "b"), (0, "a")]]
    counts = count(write(tmp_path / "t", requests))
    by = counts.by_domain_stage
    assert [by[:, s, 0].sum() for s in (PREFILL, DECODE, OTHER)] == [20, 40 + 60, 60]
    want = np.bincount(requests[0][0][:10, 1].ravel(), minlength=EXPERTS)
    assert (by[0, PREFILL, 1] == want).all() and (counts.by_request[PREFILL][0, 1] == want).all()
    assert counts.stages.usable.tolist() == [True, False, False]
    assert counts.totals[1].sum() == 30 * LAYERS * 2


def test_the_sample_is_bounded_stratified_and_said(tmp_path: Path):
    rng = np.random.default_rng(2)
    requests = [(rng.integers(0, EXPERTS, (12, 1, 1)), 4, "ab"[i % 10 == 0]) for i in range(100)]
    trace = write(tmp_path / "t", requests)
    counts = count(trace, max_sample=20, reservoir_rows=50)
    assert np.bincount(counts.domain[counts.sample]).tolist() == [2, 18]
    assert counts.sample_text == "on 20 of 100 requests"
    assert len(counts.reservoir.experts) <= 50
    assert counts.totals.sum() == 1200
    whole = trace.load()
    stage = counts.reservoir.stage
    assert set(stage.tolist()) == {PREFILL, DECODE}
    rows = {tuple(row) for row in whole.experts[:, :, 0].tolist()}
    assert {tuple(row) for row in counts.reservoir.experts[:, :, 0].tolist()} <= rows


def test_many_labels_are_folded_then_lumped(tmp_path: Path):
    row = np.zeros((9, 1, 1), np.int64)
    folded = count(write(tmp_path / "a", [(row, 1, f"{i % 3}/{i}") for i in range(80)]))
    assert folded.domains == ("0", "1", "2") and folded.lumped == 0
    lumped = count(write(tmp_path / "b", [(row, 1, f"d{i % 70}") for i in range(75)]))
    assert len(lumped.domains) == 64 and lumped.domains[-1] == "(other)" and lumped.lumped == 7
    assert np.bincount(lumped.domain)[-1] == 7  # the rarest, one request each
    assert lumped.is_lump.sum() == 1


def test_imbalance_by_hand(tmp_path: Path):
    assert imbalance_factor(np.array([[4, 2, 1, 1], [0, 0, 0, 0]]))[0] == 2.0
    assert np.isnan(imbalance_factor(np.zeros((1, 4)))[0])
    rows = np.zeros((16, 2, 1), np.int64)
    rows[:, 1, 0] = np.arange(16) % 4  # layer 0: all to one expert; layer 1: even
    load = imbalance(count(write(tmp_path / "t", [(rows, 4, "a")], experts=4)))
    assert load.overall.tolist() == [4.0, 1.0]
    assert load.flagged.tolist() == [True, False] and load.mean(load.overall) == 1.0
    assert load.by_stage[PREFILL].tolist() == [4.0, 1.0]


def test_a_flagged_layer_is_reported(tmp_path: Path):
    rng = np.random.default_rng(3)
    requests = two_domains(rng, per_domain=6, k=1)
    for rows, _, _ in requests:
        rows[:, 1] = 5
    result = profile_trace(write(tmp_path / "t", requests))
    assert any("Layer 1: expert 5 takes 100.0%" in notice for notice in result.notices)
    assert result.to_dict()["imbalance"]["flagged_layers"] == [1]
    assert isinstance(result.coactivation, Skipped) and "top-1" in result.coactivation.reason


def test_similarity_by_hand_and_against_noise(found: Profile, tmp_path: Path):
    item = found.similarity["decode"]
    assert not isinstance(item, Skipped)
    counts = found.counts.by_domain_stage[:, DECODE]
    want = np.mean([np.corrcoef(counts[0, layer], counts[1, layer])[0, 1] for layer in range(LAYERS)])
    assert item.matrix[0, 1] == pytest.approx(want)
    assert item.matrix[0, 0] == pytest.approx(1)
    assert item.pairs[0]["differs"] and item.pairs[0]["disattenuated"] < 0.9


def test_two_samples_of_one_domain_do_not_differ(tmp_path: Path):
    wrong = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        counts = count(write(tmp_path / f"t{seed}", two_domains(rng, apart=False, per_domain=12)))
        item = similarity(counts, DECODE, np.arange(LAYERS), seed=seed)
        assert not isinstance(item, Skipped)
        assert item.disattenuated[0, 1] == pytest.approx(1, abs=0.12)
        wrong += item.pairs[0]["differs"]
    assert wrong <= 1


def test_predictability_beats_its_nulls_only_where_requests_differ(tmp_path: Path):
    rng = np.random.default_rng(4)
    popular = rng.gamma(0.6, size=(LAYERS, EXPERTS)) + 0.02
    own, alike = [], []
    for i in range(30):
        personal = rng.gamma(0.4, size=(LAYERS, EXPERTS)) + 0.02
        own.append((draw(rng, personal, 60), 20, "ab"[i % 2]))
        alike.append((draw(rng, popular, 60), 20, "ab"[i % 2]))
    kept = np.arange(LAYERS)
    differ = phases(count(write(tmp_path / "own", own)), kept)
    same = phases(count(write(tmp_path / "same", alike)), kept)
    assert not isinstance(differ, Skipped) and not isinstance(same, Skipped)
    assert (differ.advantage_ci[:, 0] > 0.2).all()
    assert same.mean_pooled > 0.95 and same.advantage[1] < 0  # popularity foretells better than one short prefill
    assert abs(same.advantage[0]) < 0.05


def test_predictability_equals_a_plain_loop(found: Profile):
    item, counts = found.phases, found.counts
    assert not isinstance(item, Skipped)
    prefill, decode = (counts.by_request[stage][:, 1].astype(float) for stage in (PREFILL, DECODE))
    own = np.mean([np.corrcoef(p, d)[0, 1] for p, d in zip(prefill, decode, strict=True)])
    assert item.own[1] == pytest.approx(own)
    others = decode.sum(axis=0) - decode
    assert item.nulls[1, 1] == pytest.approx(
        np.mean([np.corrcoef(o, d)[0, 1] for o, d in zip(others, decode, strict=True)])
    )
    domain = counts.domain[counts.sample]
    peers = np.stack([decode[domain == domain[i]].sum(axis=0) - decode[i] for i in range(len(decode))])
    assert item.nulls[2, 1] == pytest.approx(
        np.mean([np.corrcoef(o, d)[0, 1] for o, d in zip(peers, decode, strict=True)])
    )


def test_a_derangement_leaves_nothing_in_its_place():
    for n in (2, 3, 17):
        swap = derangement(n, np.random.default_rng(n))
        assert sorted(swap) == list(range(n)) and (swap != np.arange(n)).all()


def test_request_types_are_told_apart_and_shuffled_labels_are_not(found: Profile, tmp_path: Path):
    leak = found.leakage
    assert not isinstance(leak, Skipped)
    assert leak.accuracy.mean() > 0.9 and abs(leak.control.mean() - 0.5) < 0.15
    assert leak.meaning.startswith("Leak found") and leak.chance == 0.5
    alike = profile_trace(write(tmp_path / "t", two_domains(np.random.default_rng(5), apart=False, per_domain=30)))
    assert not isinstance(alike.leakage, Skipped)
    assert alike.leakage.meaning.startswith("No leak found")


def test_quasi_independence_keeps_margins_and_finds_a_true_product():
    rng = np.random.default_rng(6)
    x = rng.gamma(1.0, size=12) * 10
    table = np.outer(x, x)
    np.fill_diagonal(table, 0)
    assert quasi_independence(table) == pytest.approx(table, rel=1e-4, abs=1e-6)
    pairs = rng.poisson(20, (12, 12)).astype(float)
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    fitted = quasi_independence(pairs)
    assert fitted.sum(axis=1) == pytest.approx(pairs.sum(axis=1), rel=1e-5)
    assert (np.diagonal(fitted) == 0).all()
    assert quasi_independence(np.zeros((3, 3))).sum() == 0


def test_coactivation_is_noise_for_independent_picks_and_not_for_couples(tmp_path: Path):
    rng = np.random.default_rng(7)
    even = [(draw(rng, np.ones((2, EXPERTS)), 2000), 100, "a") for _ in range(4)]
    couples = [(np.stack([first := rng.integers(0, 8, (1200, 2)) * 2, first + 1], axis=2), 100, "a") for _ in range(4)]
    independent = profile_trace(write(tmp_path / "even", even)).coactivation
    coupled = profile_trace(write(tmp_path / "couples", couples)).coactivation
    assert not isinstance(independent, Skipped) and not isinstance(coupled, Skipped)
    assert independent.distance == pytest.approx(independent.floor, abs=0.02)
    assert (coupled.distance > 0.8).all()
    _, a, b, observed, expected, lift = coupled.strongest[0]
    assert b == a + 1 and lift > 10 and observed > expected


def test_distinct_experts_by_hand(found: Profile, tmp_path: Path):
    item = found.distinct
    assert item.mixed[0] == pytest.approx(2) and item.uniform[0] == pytest.approx(2)
    assert (np.diff(item.mixed) >= 0).all() and item.mixed[-1] <= EXPERTS
    assert item.single[4] < item.mixed[4]
    alone = profile_trace(write(tmp_path / "t", [(np.full((40, 1, 1), 3), 8, "a")])).distinct
    assert (alone.mixed == 1).all() and np.isnan(alone.single).all()
    assert alone.uniform[1] == pytest.approx(EXPERTS * (1 - (1 - 1 / EXPERTS) ** 2))


def requests_of(rows: list[int], prefill: list[int]) -> Requests:
    n = len(rows)
    return Requests(
        np.array(rows), np.array(prefill), np.zeros(n, np.int64), ("a",), np.full(n, np.nan), np.full(n, -1)
    )


def test_stand_ins_come_from_the_decode_else_the_prompt():
    # the trace has decode rows: only they stand in
    stages = Stages.from_requests(requests_of([30, 20, 20, 9], [10, 20, UNKNOWN, 1]), 5)
    assert stages.first.tolist() == [10, 20, 20, 9] and stages.middle.tolist() == [15, 20, 20, 9]
    assert stages.usable.tolist() == [True, False, False, False]
    assert stages.lengths(OTHER).tolist() == [10, 20, 20, 9]
    unknown = Stages.from_requests(requests_of([30, 9], [UNKNOWN, UNKNOWN]), 5)
    assert unknown.usable.tolist() == [True, False] and unknown.prefill == "first 5 recorded tokens"
    assert Stages.from_requests(requests_of([30], [30]), 5).decode == "rest of prompt"
    assert Stages.from_requests(requests_of([30], [0]), 5).prefill == "first 5 decode tokens"
    with pytest.raises(UsageError, match="needs requests of 40 decode tokens, the longest has 30"):
        Stages.from_requests(requests_of([30], [0]), 20)
    with pytest.raises(UsageError):
        Stages.from_requests(requests_of([30], [0]), 0)


@pytest.mark.parametrize("kind", ["prefill only", "unknown phases", "one request", "one row", "one domain"])
def test_traces_that_lack_something_say_so(tmp_path: Path, kind: str):
    rng = np.random.default_rng(8)
    requests: list[Any] = two_domains(rng, per_domain=8)
    if kind == "prefill only":
        requests = [(rows, len(rows), domain) for rows, _, domain in requests]
    elif kind == "unknown phases":
        requests = [(rows, UNKNOWN, domain) for rows, _, domain in requests]
    elif kind == "one request":
        requests = requests[:1]
    elif kind == "one row":
        requests = [(requests[0][0][:1], 1, "a")]
    else:
        requests = [(rows, prefill, "a") for rows, prefill, _ in requests]
    trace = write(tmp_path / "t", requests)
    result = profile_trace(trace)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    if kind == "one domain":
        assert isinstance(result.similarity["decode"], Skipped) and isinstance(result.leakage, Skipped)
        assert not isinstance(result.phases, Skipped)
    else:
        assert "needs 2 requests" in data["predictability"]["skipped"]
    if kind == "unknown phases":
        assert any("16 of 16 requests have unknown phases" in notice for notice in result.notices)
        assert data["distinct_experts"]["stage"] == "unknown phase"
    if kind in ("prefill only", "unknown phases"):
        stand_in = profile_trace(trace, signature_tokens=8)
        assert not isinstance(stand_in.phases, Skipped)
        assert any("stand in for the prefill" in notice for notice in stand_in.notices)


def test_pearson_of_a_constant_is_not_a_number_and_json_has_null():
    assert np.isnan(pearson(np.ones(4), np.arange(4.0)))
    assert plain({"a": np.array([1.0, np.nan]), "b": np.int64(3)}) == {"a": [1.0, None], "b": 3}


def test_maverick_as_published(shared: Path, tmp_path: Path):
    """Pooled correlation: published mean .82; .78 with layer 45 on this set (shared/traces)."""
    data = np.load(shared / "traces" / "maverick-mmlu.npz")
    experts, offsets = data["experts"], data["request_offsets"]
    shape = ModelShape("maverick", experts.shape[1], 128, 1, tuple(int(i) for i in data["layer_ids"]))
    with TraceWriter(tmp_path / "t", shape, source={}) as writer:
        for r, prefill in enumerate(data["prefill_lengths"].tolist()):
            writer.add(experts[offsets[r] : offsets[r + 1]], prefill=prefill, domain=str(data["domain"][r]))
    counts = count(open_trace(tmp_path / "t"))
    load = imbalance(counts)
    assert np.flatnonzero(load.flagged).tolist() == [shape.layer_ids.index(45)]
    everywhere = phases(counts, np.arange(24))
    assert not isinstance(everywhere, Skipped)
    assert everywhere.mean_pooled == pytest.approx(0.78, abs=0.01)
    kept = phases(counts, load.kept)
    assert not isinstance(kept, Skipped)
    assert kept.advantage[2] < 0 < kept.advantage[0]  # short prefixes: the domain's popularity knows more
