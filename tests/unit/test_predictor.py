"""Prediction from prompts: terms, regression, predictor, text that is appended, calibration, sessions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from moeplan._kernels.terms import add_terms, add_terms_reference, index_terms
from moeplan.errors import FormatError, UsageError
from moeplan.planning import ridge
from moeplan.planning.assignment import equal_groups
from moeplan.planning.predictor import MAX_BYTES, PromptPredictor
from moeplan.planning.prompt_router import Calibration, prompt_router
from moeplan.planning.prompt_text import GroupScores, PromptText
from moeplan.planning.ridge import fit_ridge
from moeplan.planning.router import ClusterRouter, LinearRouter
from moeplan.planning.sessions import EarlierAnswers, earlier_use
from moeplan.planning.terms import IDS_SECRET, TermWeights
from moeplan.trace.prompts import PromptFeatures

LAYERS, EXPERTS, TOPICS = 3, 16, 4
REAL = Path(__file__).parents[3] / "shared" / "traces" / "gpt-oss-20b.npz"


def topics(n: int, seed: int = 0) -> tuple[PromptFeatures, np.ndarray, np.ndarray]:
    """Prompts of `TOPICS` topics, each with words of its own among common ones; what they used; their topics."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, TOPICS, n)
    prompts = [
        np.concatenate((rng.integers(0, 30, 20), 100 + 40 * t + rng.integers(0, 40, rng.integers(2, 9)))) for t in topic
    ]
    share = np.random.default_rng(99).dirichlet(np.full(EXPERTS, 0.3), (TOPICS, LAYERS))
    use = np.stack([[rng.multinomial(200, share[t, layer]) for layer in range(LAYERS)] for t in topic])
    return PromptFeatures.of_ids([rng.permutation(prompt) for prompt in prompts]), use.astype(np.uint32), topic


def shares(use: np.ndarray) -> np.ndarray:
    return use / use.sum(axis=2, keepdims=True)


def explained(predicted: np.ndarray, use: np.ndarray, mean: np.ndarray) -> float:
    true = shares(use)
    return float(1 - ((true - predicted) ** 2).sum() / ((true - mean) ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.dictionaries(st.integers(0, 40), st.integers(1, 9), max_size=12), max_size=4),
    known=st.sets(st.integers(0, 40), max_size=30),
)
def test_sums_of_terms_equal_the_reference(parts: list[dict[int, int]], known: set[int]) -> None:
    terms = np.array(sorted(known), np.uint32) * np.uint32(97_000_011)
    rng = np.random.default_rng(1)
    rarity, rows = rng.random(len(terms)).astype(np.float32), rng.random((len(terms), 3)).astype(np.float32)
    seen, counts, sums = np.zeros(128, np.uint32), np.zeros(128, np.int32), np.zeros(5)
    total: dict[int, int] = {}
    fresh = 0
    for part in parts:
        hashes = (np.array(list(part), np.uint64) * 97_000_011).astype(np.uint32)
        many = np.array(list(part.values()), np.int32)
        fresh += add_terms(hashes, many, seen, counts, terms, index_terms(terms), rarity, 2.5, rows, sums)
        for term, count in zip(hashes.tolist(), part.values(), strict=True):
            total[term] = total.get(term, 0) + count
    assert fresh == len(total)
    np.testing.assert_allclose(sums, add_terms_reference(total, terms, rarity, 2.5, rows), rtol=1e-9, atol=1e-9)


def test_points_have_length_one_with_unknown_terms_counted() -> None:
    hashed = PromptFeatures.of_ids([[1, 2, 1], [2], []]).hashed(IDS_SECRET)
    weights = TermWeights.fit(hashed, 1000)
    points = weights.points(hashed)
    np.testing.assert_allclose(np.sqrt(points.multiply(points).sum(axis=1)), [1, 1, 0])
    other = weights.points(PromptFeatures.of_ids([[2, 77], [78]]).hashed(IDS_SECRET)).toarray()
    assert 0 < np.linalg.norm(other[0]) < 1
    assert not other[1].any()
    fewer = TermWeights.fit(hashed, 2)
    assert len(fewer.terms) == 2
    assert set(fewer.terms) <= set(weights.terms)


def test_leave_one_out_equals_leaving_out() -> None:
    rng = np.random.default_rng(2)
    points = sparse.csr_array(rng.random((25, 40)) * (rng.random((25, 40)) < 0.4))
    target = np.asarray(points @ rng.normal(size=(40, 3))) + 0.1 * rng.normal(size=(25, 3))
    fitted = fit_ridge(points, target, np.arange(25))
    length = points.multiply(points).sum() / 25
    dense = points.toarray()
    for left in (0, 7, 24):
        rest = np.delete(np.arange(25), left)
        centre, level = dense[rest].mean(axis=0), target[rest].mean(axis=0)
        a, b = dense[rest] - centre, target[rest] - level
        weights = np.linalg.solve(a.T @ a + fitted.strength * length * np.eye(40), a.T @ b)
        expected = (dense[left] - centre) @ weights + level
        centred = expected - target.mean(axis=0)
        np.testing.assert_allclose(fitted.left_out[left], fitted.scale * centred, atol=1e-6)


def test_conjugate_gradients_come_to_the_exact_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, use, _ = topics(300)
    exact = PromptPredictor.fit(prompts, use)
    monkeypatch.setattr("moeplan.planning.predictor.MOST_EXACT", 200)
    large = PromptPredictor.fit(prompts, use)
    assert large.left_out is not None
    assert len(large.left_out.index) == 200
    new, used, _ = topics(200, seed=5)
    mean = shares(use).mean(axis=0)
    apart = explained(exact.expected_use(new), used, mean) - explained(large.expected_use(new), used, mean)
    assert abs(apart) < 0.06
    points = sparse.csr_array(np.random.default_rng(0).random((60, 30)))
    target = np.random.default_rng(1).normal(size=(60, 2))
    dense, level = points.toarray(), target - target.mean(axis=0)
    centred = dense - dense.mean(axis=0)
    expected = np.linalg.solve(centred.T @ centred + 5.0 * np.eye(30), centred.T @ level)
    np.testing.assert_allclose(ridge._solve(points, target, 5.0), expected, atol=0.02)


def test_predicts_requests_that_it_has_not_seen() -> None:
    prompts, use, _ = topics(200)
    new, used, _ = topics(100, seed=7)
    predictor = PromptPredictor.fit(prompts, use)
    predicted = predictor.expected_use(new)
    assert predicted.shape == (100, LAYERS, EXPERTS)
    assert predicted.min() >= 0
    np.testing.assert_allclose(predicted.sum(axis=2), 1, atol=1e-5)
    assert explained(predicted, used, shares(use).mean(axis=0)) > 0.7
    assert predictor.left_out is not None
    own = explained(predictor.use_at(predictor.left_out.coordinates), use, shares(use).mean(axis=0))
    assert own == pytest.approx(explained(predicted, used, shares(use).mean(axis=0)), abs=0.1)


def test_prompts_that_say_nothing_are_predicted_as_the_mean() -> None:
    prompts, use, _ = topics(60)
    predictor = PromptPredictor.fit(prompts, use)
    silent = predictor.expected_use(PromptFeatures.of_ids([[], [900_000, 900_001]]))
    np.testing.assert_allclose(silent[0], shares(use).mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(silent[0], silent[1])
    rng = np.random.default_rng(3)  # words that have nothing to do with the use
    noise = PromptFeatures.of_ids([rng.integers(0, 5000, 30) for _ in range(120)])
    random = PromptPredictor.fit(noise, topics(120)[1])
    assert random.left_out is not None
    assert np.abs(random.left_out.coordinates).max() < 0.6


@pytest.mark.parametrize("n", [1, 2, 12])
def test_few_requests_and_requests_that_are_all_alike(n: int) -> None:
    prompts = PromptFeatures.of_ids([[4, 5, 6]] * n)
    use = np.tile(np.random.default_rng(0).integers(1, 9, (1, LAYERS, EXPERTS)), (n, 1, 1))
    predictor = PromptPredictor.fit(prompts, use, np.zeros(n, np.int64))
    np.testing.assert_allclose(predictor.expected_use(prompts), shares(use), atol=1e-5)
    empty = PromptPredictor.fit(PromptFeatures.of_ids([[]] * n), use)
    np.testing.assert_allclose(empty.expected_use(prompts), shares(use), atol=1e-5)


def test_layers_without_picks_are_even() -> None:
    prompts, use, _ = topics(20)
    use[:, 1] = 0
    predicted = PromptPredictor.fit(prompts, use).expected_use(prompts)
    np.testing.assert_allclose(predicted[:, 1], 1 / EXPERTS, atol=1e-3)


def test_the_order_of_requests_changes_nothing() -> None:
    prompts, use, topic = topics(80)
    order = np.random.default_rng(4).permutation(80)
    new = topics(30, seed=8)[0]
    first = PromptPredictor.fit(prompts, use, topic).expected_use(new)
    second = PromptPredictor.fit(prompts.take(order), use[order], topic[order]).expected_use(new)
    np.testing.assert_allclose(first, second, atol=2e-3)


def test_domains_add_what_terms_do_not_tell() -> None:
    prompts, use, topic = topics(200)
    blank = PromptFeatures.of_ids([[]] * 200)
    predictor = PromptPredictor.fit(blank, use, topic)
    _, used, known = topics(100, seed=9)
    silent = PromptFeatures.of_ids([[]] * 100)
    mean = shares(use).mean(axis=0)
    assert explained(predictor.expected_use(silent, known), used, mean) > 0.8
    unknown = np.full(100, TOPICS + 3)
    np.testing.assert_array_equal(predictor.expected_use(silent, unknown), predictor.expected_use(silent))
    shuffled = np.random.default_rng(0).integers(0, 60, 200)  # domains that mean nothing are shrunk away
    assert np.abs(PromptPredictor.fit(prompts, use, shuffled).domain_offset).max() < 0.5


def test_stored_predictor_predicts_the_same() -> None:
    prompts, use, topic = topics(90)
    predictor = PromptPredictor.fit(prompts, use, topic)
    arrays = predictor.arrays()
    assert sum(array.nbytes for array in arrays.values()) < MAX_BYTES
    again = PromptPredictor.from_arrays(arrays, predictor.kind, predictor.key)
    np.testing.assert_array_equal(again.expected_use(prompts, topic), predictor.expected_use(prompts, topic))
    for name, wrong in (
        ("prompt_terms", arrays["prompt_terms"][::-1]),
        ("prompt_mean", arrays["prompt_mean"] * np.nan),
    ):
        with pytest.raises(FormatError, match="do not fit"):
            PromptPredictor.from_arrays(arrays | {name: wrong}, predictor.kind, predictor.key)


def test_a_predictor_of_many_terms_and_experts_fits_into_a_plan() -> None:
    rng = np.random.default_rng(0)
    prompts = PromptFeatures.of_ids([rng.integers(0, 2**31, 3000) for _ in range(60)])
    use = rng.integers(0, 9, (60, 58, 256))
    predictor = PromptPredictor.fit(prompts, use)
    assert sum(array.nbytes for array in predictor.arrays().values()) <= MAX_BYTES


def test_prompts_of_another_kind_or_secret_are_refused() -> None:
    prompts, use, _ = topics(20)
    by_ids = PromptPredictor.fit(prompts, use)
    hashed = prompts.hashed(bytes(range(32)))
    by_hash = PromptPredictor.fit(hashed, use)
    with pytest.raises(UsageError, match="kept as ids"):
        by_ids.expected_use(hashed)
    with pytest.raises(UsageError, match="another secret"):
        by_hash.expected_use(prompts.hashed(bytes(32)))
    with pytest.raises(UsageError, match="token ids"):
        PromptText(by_ids).append_hashed(*(np.zeros(1, np.uint32), np.ones(1, np.int64)))
    with pytest.raises(UsageError, match="hashed prompts"):
        PromptText(by_hash).append_ids([1])
    with pytest.raises(UsageError, match="prompts of 20 requests"):
        PromptPredictor.fit(prompts, use[:3])
    np.testing.assert_allclose(by_hash.expected_use(hashed), by_ids.expected_use(prompts), atol=2e-3)


def test_appended_text_is_as_the_whole() -> None:
    prompts, use, _ = topics(60)
    predictor, long = PromptPredictor.fit(prompts, use), np.random.default_rng(5).integers(0, 300, 3000)
    whole = predictor.coordinates(PromptFeatures.of_ids([long]))[0]
    text = PromptText(predictor)
    for part in np.split(long, [0, 1, 2, 700, 701, 2500]):
        text.append_ids(part)
    np.testing.assert_allclose(text.coordinates, whole, rtol=1e-6, atol=1e-9)
    assert not PromptText(predictor).append_ids([]).coordinates.any()
    hashed = prompts.hashed(bytes(32))
    by_hash = PromptPredictor.fit(hashed, use)
    parts = PromptText(by_hash)
    for r in (3, 4):
        parts.append_hashed(*hashed.of(r))
    joined = {}
    for r in (3, 4):
        for term, count in zip(*(part.tolist() for part in hashed.of(r)), strict=True):
            joined[term] = joined.get(term, 0) + count
    terms = np.array(sorted(joined), np.uint32)
    counts = np.array([joined[term] for term in terms.tolist()], np.uint16)
    both = PromptFeatures("hashed", np.array([0, len(terms)]), terms, counts, hashed.key)
    np.testing.assert_allclose(parts.coordinates, by_hash.coordinates(both)[0], rtol=1e-6)


def test_scores_from_coordinates_are_the_router_s() -> None:
    prompts, use, _ = topics(100)
    predictor = PromptPredictor.fit(prompts, use)
    local = np.random.default_rng(1).random((4, LAYERS, EXPERTS))
    router = prompt_router(LinearRouter(np.zeros((4, LAYERS * EXPERTS), np.float32), np.zeros(4)), local)
    assert isinstance(router, LinearRouter)
    scores = GroupScores.of(predictor, router).scores(predictor.coordinates(prompts))
    expected = router.scores(predictor.expected_use(prompts))
    assert (scores.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.95
    clusters = ClusterRouter(np.ones((2, 4), np.float32), np.ones((2, 4), np.bool_))
    assert prompt_router(clusters, local) is clusters


def test_expected_local_share_is_calibrated_on_new_requests() -> None:
    rng = np.random.default_rng(6)
    prompts, use, _ = topics(800)
    new, used, _ = topics(800, seed=11)
    local = (rng.random((TOPICS, LAYERS, EXPERTS)) < 0.3).astype(np.float64)
    predictor = PromptPredictor.fit(prompts, use)
    assert predictor.left_out is not None
    router = prompt_router(LinearRouter(np.zeros((TOPICS, 1), np.float32), np.zeros(TOPICS)), local)
    calibration = Calibration.fit(router.scores(predictor.use_at(predictor.left_out.coordinates)), local, use)
    scores = router.scores(predictor.expected_use(new))
    group = equal_groups(scores)
    expected = calibration.expected(scores[np.arange(800), group])
    real = np.array([(shares(used)[i] * local[g]).sum() / LAYERS for i, g in enumerate(group)])
    for part in np.array_split(np.argsort(expected), 10):
        assert expected[part].mean() == pytest.approx(real[part].mean(), abs=0.02)
    one = Calibration.fit(np.array([[0.2, 0.1]]), local[:2], use[:1])
    assert one.score.shape == (1,)


def test_earlier_answers_of_a_session() -> None:
    use = np.arange(1, 7)[:, None, None] * np.ones((6, 1, 2))
    session = np.array([5, 5, -1, 5, 5, 8])
    turn = np.array([1, 0, 0, 2, 1, 0])
    earlier = earlier_use(session, turn, use)[:, 0, 0]
    assert earlier.tolist() == [2, 0, 0, 1 + 2 + 5, 2, 0]


def test_the_longer_the_session_the_less_the_prior_weighs() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(EXPERTS), (200, LAYERS))
    use = np.stack([[rng.multinomial(400, layer) for layer in each] for each in share])
    earlier = np.stack([[rng.multinomial(400, layer) for layer in each] for each in share])
    prior = np.full(use.shape, 1 / EXPERTS)
    learned = EarlierAnswers.fit(prior, earlier, use)
    assert learned.strength <= 64  # answers of a session are alike here
    unlike = EarlierAnswers.fit(prior, earlier[::-1], use)
    assert unlike.strength > learned.strength
    combined = learned.combined(prior, earlier)
    np.testing.assert_allclose(combined.sum(axis=2), 1, atol=1e-5)
    nothing = np.zeros_like(earlier)
    np.testing.assert_allclose(learned.combined(prior, nothing), prior, atol=1e-6)
    assert EarlierAnswers.fit(prior, nothing, use) == EarlierAnswers()
