"""Distinct experts of decode steps."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.distinct import distinct_reference
from moeplan.replay.distinct import count_distinct, count_distinct_steps, experts_per_step


def test_loop_and_reference_agree() -> None:
    rng = np.random.default_rng(0)
    for experts_dtype, count, k in ((np.uint8, 32, 4), (np.uint16, 256, 8), (np.uint8, 8, 1)):
        experts = rng.integers(0, count + 1, (200, 5, k)).astype(experts_dtype)  # `count` itself: a missing pick
        rows = rng.integers(-1, 200, (40, 12))
        found = count_distinct_steps(experts, rows, count)
        assert found.shape == (40, 5)
        for step in range(40):
            np.testing.assert_array_equal(found[step], distinct_reference(experts, rows[step], count))
            np.testing.assert_array_equal(found[step], count_distinct(experts, rows[step], count))


def test_an_empty_step_reads_nothing() -> None:
    experts = np.zeros((3, 2, 2), np.uint8)
    assert count_distinct(experts, np.array([-1, -1]), 4).tolist() == [0, 0]
    assert count_distinct(experts, np.array([], np.int64), 4).tolist() == [0, 0]


def test_steps_weigh_by_their_tokens() -> None:
    distinct, tokens = np.array([[4, 4], [10, 12]]), np.array([1, 3])
    assert experts_per_step(distinct, tokens) == (4 * 1 + 11 * 3) / 4
