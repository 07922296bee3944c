"""Orders of a queue: the loops against their references, and what an order must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan
from moeplan._kernels.queue import count_steps, queue_reference, queue_steps
from moeplan._kernels.sequence import anneal_sequence, sequence_value
from moeplan.planning import order as ordering
from moeplan.planning.instances import expected_distinct, sharing_groups, sharing_points
from moeplan.planning.order import overlap, sharing_order, split_order
from moeplan.planning.prompt_points import RecordedPoints, WordPoints, features, together, word_ids
from moeplan.replay.queue import queue_experts, queue_rows, random_queue_experts
from moeplan.trace.prompts import PromptFeatures


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_queue_and_reference_agree(tokens: list[int], slots: int) -> None:
    length = np.array(tokens)
    place, token = np.empty((2, count_steps(length, slots), slots), np.int64)
    queue_steps(length, slots, place, token)
    expected = queue_reference(length, slots)
    assert len(place) == len(expected)
    for step, live in enumerate(expected):
        on = place[step] >= 0
        assert sorted(zip(place[step][on].tolist(), token[step][on].tolist(), strict=True)) == sorted(live)


def test_annealing_gains_what_it_says() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(40, 3)).astype(np.float32)
    gram, weight, order = points @ points.T, overlap(4), np.arange(40)
    before = sequence_value(gram, weight, order)
    fixed = order[:3].copy(), order[37:].copy()
    gain = anneal_sequence(gram, weight, order, 3, 37, 20_000, 5.0, 0.05, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(40))
    assert np.array_equal(order[:3], fixed[0]) and np.array_equal(order[37:], fixed[1])
    assert gain > 0 and sequence_value(gram, weight, order) == pytest.approx(before + gain, rel=1e-4)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50, 300])
def test_an_order_is_a_permutation_and_repeats(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "WHOLE", 100)
    monkeypatch.setattr(ordering, "_BLOCK", 64)
    points = np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)
    first, second = (sharing_order(points, overlap(8)) for _ in range(2))
    assert sorted(first.tolist()) == list(range(n)) and np.array_equal(first, second)


def test_blocks_are_nearly_as_good_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    points = (rng.normal(size=(8, 6))[rng.integers(8, size=600)] + 0.3 * rng.normal(size=(600, 6))).astype(np.float32)
    weight, gram = overlap(8), points @ points.T
    whole = sequence_value(gram, weight, sharing_order(points, weight))
    monkeypatch.setattr(ordering, "WHOLE", 100)
    monkeypatch.setattr(ordering, "_BLOCK", 64)
    assert sequence_value(gram, weight, sharing_order(points, weight)) > 0.9 * whole


def test_identical_points_keep_every_request() -> None:
    assert sorted(sharing_order(np.zeros((5, 2), np.float32), overlap(2)).tolist()) == [0, 1, 2, 3, 4]


def test_stretches_are_of_equal_tokens() -> None:
    rng = np.random.default_rng(0)
    order, tokens = rng.permutation(500), rng.integers(1, 100, 500).astype(float)
    parts = split_order(order, tokens, 4)
    assert np.array_equal(np.concatenate(parts), order)
    sums = [tokens[part].sum() for part in parts]
    assert max(sums) - min(sums) <= 2 * tokens.max()


def test_groups_are_equal_and_find_kinds() -> None:
    rng = np.random.default_rng(5)
    kind = rng.permutation(np.arange(64) % 4)
    use = np.full((64, 2, 8), 0.02)
    for request, k in enumerate(kind):
        use[request, :, 2 * k : 2 * k + 2] = 0.44
    group = sharing_groups(sharing_points(use, 2, 8), 4)
    assert np.bincount(group).tolist() == [16] * 4
    assert all(len(set(kind[group == g].tolist())) == 1 for g in range(4))
    assert np.bincount(sharing_groups(sharing_points(use, 2, 8), 5)).tolist() == [13, 13, 13, 13, 12]
    with pytest.raises(moeplan.MoeplanError, match="groups for"):
        sharing_groups(sharing_points(use[:2], 2, 8), 3)


def test_expected_distinct_is_the_mean_of_steps() -> None:
    rng = np.random.default_rng(0)
    chance = rng.random((3, 1, 5))
    drawn = (rng.random((20_000, 3, 1, 5)) < chance).any(axis=1).sum(axis=(1, 2)).mean()
    assert expected_distinct(chance) == pytest.approx(drawn, rel=0.02)


def test_samples_and_prefixes_stay_together() -> None:
    prefix = list(range(300))
    prompts = PromptFeatures.of_ids([[1, 2], [*prefix, 7], [3, 4], [1, 2], [*prefix, 9], [5]])
    unit = together(prompts, 8)
    assert unit[0] == unit[3] and unit[1] == unit[4] and len(set(unit.tolist())) == 4
    found = moeplan.order(prompts, batch=2).sequence.tolist()
    assert abs(found.index(0) - found.index(3)) == 1 and abs(found.index(1) - found.index(4)) == 1
    many = PromptFeatures.of_ids([[*prefix, number] for number in range(40)])
    assert len(np.unique(together(many, 2))) == 40  # a prefix of everybody stays in the cache in any order


def test_words_bring_similar_prompts_together() -> None:
    kinds = ["integral of the sine function", "recipe with rice and beans"]
    texts = [f"{kinds[number % 2]} {number}" for number in range(40)]
    found = moeplan.order(texts, batch=4)
    assert found.basis == "words" and found.change is None and found.worth_it is None
    assert (np.diff(found.sequence % 2) != 0).sum() <= 3


def test_a_recorded_order_reads_fewer_experts() -> None:
    trace = moeplan.open_trace("embedded")
    prompts = PromptFeatures.of_ids([[number] for number in range(len(trace.requests))])
    found = moeplan.order(prompts, trace, recorded=True, batch=8)
    assert found.basis == "recorded" and found.worth_it and found.change is not None and found.change < -0.1
    assert sorted(found.sequence.tolist()) == list(range(len(prompts)))
    with pytest.raises(moeplan.MoeplanError, match="but the trace has"):
        RecordedPoints(trace).points(prompts.take(np.arange(3)), 8)


def test_queue_replay_counts_the_recorded_routing() -> None:
    experts = np.array([[[0]], [[1]], [[0]], [[1]], [[1]]], np.uint8)
    span = np.array([[0, 2], [2, 5]])
    assert queue_rows(span, 2).tolist() == [[0, 2], [1, 3], [-1, 4]]
    assert queue_experts(experts, span, 2, 4) == 1.0
    assert queue_experts(experts, span, 2, 4, most_tokens=1) == 1.0
    assert random_queue_experts(experts, span, 2, 4) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a"], "instances": 2}, "2 instances for 1 prompts"),
        ({"prompts": ["a", "b"], "batch": 1}, "nothing together"),
        ({"prompts": ["a", "b"], "trace": moeplan.open_trace("embedded"), "recorded": True}, "the trace has"),
    ],
)
def test_wrong_use_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(moeplan.MoeplanError, match=message):
        moeplan.order(**arguments)  # type: ignore[arg-type]


def test_word_ids_tell_words_and_signs_apart() -> None:
    ids = word_ids("Rain, rain!")
    assert len(ids) == 4 and ids[0] == ids[2] and len(set(ids.tolist())) == 3
    assert len(features(["a b", "c"]).of(0)[0]) == 2
    assert WordPoints().points(features(["a b", "a c", "d"]), 8).shape[0] == 3
