"""The counting kernels equal their references, whatever the shape, the strides and the ranges."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan._kernels.counting import count_pairs, count_pairs_reference, count_ranges, count_ranges_reference

shapes = st.tuples(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.sampled_from([9, 32, 256, 300]), st.integers(0, 2**31)
)


def make(tokens: int, layers: int, k: int, experts: int, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    dtype = np.uint8 if experts <= 256 else np.uint16
    return rng.integers(0, experts, (tokens, layers, k)).astype(dtype), rng


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans())
def test_count_ranges_equals_the_reference(shape, strided):
    tokens, layers, k, count, _ = shape
    picks, rng = make(*shape)
    if strided:  # every second layer of a wider array
        picks = np.repeat(picks, 2, axis=1)[:, ::2]
    cuts = np.sort(rng.integers(0, tokens + 1, 6))
    starts, stops, keys = cuts[:-1], cuts[1:], rng.integers(-1, 3, 5)
    got, want = np.zeros((3, layers, count), np.uint32), np.zeros((3, layers, count), np.uint32)
    count_ranges(picks, starts, stops, keys, got)
    count_ranges_reference(picks, starts, stops, keys, want)
    assert (got == want).all()
    assert got.sum() == (stops - starts)[keys >= 0].sum() * layers * k


def test_count_ranges_adds_to_what_is_there():
    picks, _ = make(10, 2, 2, 9, 0)
    out = np.ones((1, 2, 9), np.uint32)
    count_ranges(picks, np.array([0]), np.array([10]), np.array([0]), out)
    assert out.sum() == 2 * 9 + 10 * 2 * 2


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_count_pairs_equals_the_reference(shape):
    tokens, layers, _, count, _ = shape
    picks, _ = make(*shape)
    starts, stops = np.array([0, tokens // 2]), np.array([tokens // 3, tokens])
    got, want = np.zeros((layers, count, count), np.uint32), np.zeros((layers, count, count), np.uint32)
    count_pairs(picks, starts, stops, got)
    count_pairs_reference(picks, starts, stops, want)
    assert (got == want).all()
    assert (got == got.transpose(0, 2, 1)).all()
