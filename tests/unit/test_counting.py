"""The counting kernels equal their references, whatever the shape, the strides and the ranges."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan._kernels.counting import count_pairs, count_pairs_reference, count_ranges, count_ranges_reference
from moeplan.types import expert_dtype

shapes = st.tuples(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.sampled_from([9, 32, 256, 300]), st.integers(0, 2**31)
)


def make(
    tokens: int, layers: int, k: int, experts: int, seed: int, missing: float = 0.0
) -> tuple[np.ndarray, np.random.Generator]:
    """Picks, of which about a share is missing."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, experts, (tokens, layers, k))
    dtype = expert_dtype(experts, fewer_picks=missing > 0)
    picks[rng.random(picks.shape) < missing] = experts if seed % 2 else np.iinfo(dtype).max
    return picks.astype(dtype), rng


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
def test_count_ranges_equals_the_reference(shape, strided, missing):
    tokens, layers, k, count, _ = shape
    picks, rng = make(*shape, missing)
    picks = np.concatenate([picks, *[picks] * (shape[-1] % 3 * 40 // tokens)])  # also ranges of many rows
    tokens = len(picks)
    if strided:  # every second layer of a wider array
        picks = np.repeat(picks, 2, axis=1)[:, ::2]
    cuts = np.sort(rng.integers(0, tokens + 1, 6))
    starts, stops, keys = cuts[:-1], cuts[1:], rng.integers(-1, 3, 5)
    got, want = np.zeros((3, layers, count), np.uint32), np.zeros((3, layers, count), np.uint32)
    count_ranges(picks, starts, stops, keys, got)
    count_ranges_reference(picks, starts, stops, keys, want)
    assert (got == want).all()
    there = [(picks[a:b] < count).sum() for a, b, key in zip(starts, stops, keys, strict=True) if key >= 0]
    assert got.sum() == sum(there)
    assert missing or got.sum() == (stops - starts)[keys >= 0].sum() * layers * k


def test_count_ranges_adds_to_what_is_there():
    picks, _ = make(10, 2, 2, 9, 0)
    out = np.ones((1, 2, 9), np.uint32)
    count_ranges(picks, np.array([0]), np.array([10]), np.array([0]), out)
    assert out.sum() == 2 * 9 + 10 * 2 * 2


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from([0.0, 0.3, 1.0]))
def test_count_pairs_equals_the_reference(shape, missing):
    tokens, layers, _, count, _ = shape
    picks, _ = make(*shape, missing)
    starts, stops = np.array([0, tokens // 2]), np.array([tokens // 3, tokens])
    got, want = np.zeros((layers, count, count), np.uint32), np.zeros((layers, count, count), np.uint32)
    count_pairs(picks, starts, stops, got)
    count_pairs_reference(picks, starts, stops, want)
    assert (got == want).all()
    assert (got == got.transpose(0, 2, 1)).all()
