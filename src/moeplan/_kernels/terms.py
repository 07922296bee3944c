"""Sums over the terms of one prompt, kept up to date while text is appended.

A *term* is a hashed 1- or 2-gram. A prompt's weight of a term that occurs c times is (1 + ln c) x rarity.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Float32Array, FloatArray, Int32Array

__all__ = ["add_terms", "add_terms_reference", "index_terms", "move_terms"]

Uint32Array = npt.NDArray[np.uint32]
#: Spreads hashes over slots: 2**32 over the golden ratio (Knuth's multiplicative hashing).
_SPREAD = 2654435769


def index_terms(terms: Uint32Array) -> Int32Array:
    """A hash table of distinct terms: int32 [slots], each the place of a term in `terms`, or -1."""
    bits = max(4, math.ceil(math.log2(2 * len(terms) + 1)))
    slots = np.full(1 << bits, -1, np.int32)
    _fill(terms, slots)
    return slots


@compiled
def _fill(terms: Uint32Array, slots: Int32Array) -> None:
    mask = np.uint32(slots.size - 1)
    for i in range(terms.size):
        at = np.uint32(terms[i] * np.uint32(_SPREAD)) & mask
        while slots[at] >= 0:
            at = (at + np.uint32(1)) & mask
        slots[at] = i


@compiled
def add_terms(
    hashes: Uint32Array,
    counts: Int32Array,
    seen: Uint32Array,
    seen_counts: Int32Array,
    terms: Uint32Array,
    slots: Int32Array,
    rarity: Float32Array,
    unknown: float,
    rows: Float32Array,
    sums: FloatArray,
) -> int:
    """Add occurrences of terms to a prompt; returns how many of its terms are new to it.

    Args:
        hashes, counts: uint32 [H], int32 [H], terms and how often each occurs in what is added; they may repeat.
        seen, seen_counts: uint32 [2**b], int32 [2**b], hash table of the prompt's terms, changed; count 0 is a free
            slot. Its caller keeps at least half of it free.
        terms, slots: the known terms, and their hash table (`index_terms`).
        rarity: float32 [V], weight of a known term; unknown: of any other.
        rows: float32 [V, D], what a known term adds, per unit of weight.
        sums: float64 [D + 2], changed: the weighted sum of rows, the sum of squared weights, the number of known terms.
    """
    own_mask, mask, width = np.uint32(seen.size - 1), np.uint32(slots.size - 1), rows.shape[1]
    fresh = 0
    for i in range(hashes.size):
        spread = np.uint32(hashes[i] * np.uint32(_SPREAD))
        own = spread & own_mask
        while seen_counts[own] > 0 and seen[own] != hashes[i]:
            own = (own + np.uint32(1)) & own_mask
        before, after = seen_counts[own], seen_counts[own] + counts[i]
        if before == 0:
            seen[own] = hashes[i]
            fresh += 1
        seen_counts[own] = after
        found, at = -1, spread & mask
        while slots[at] >= 0:
            if terms[slots[at]] == hashes[i]:
                found = slots[at]
                break
            at = (at + np.uint32(1)) & mask
        old = 0.0 if before == 0 else 1.0 + math.log(before)
        new = 1.0 if after == 1 else 1.0 + math.log(after)
        weight = unknown if found < 0 else np.float64(rarity[found])
        sums[width] += (new * new - old * old) * weight * weight
        if found >= 0:
            if before == 0:
                sums[width + 1] += 1.0
            step = (new - old) * weight
            for d in range(width):
                sums[d] += step * rows[found, d]
    return fresh


@compiled
def move_terms(seen: Uint32Array, counts: Int32Array, into: Uint32Array, into_counts: Int32Array) -> None:
    """Copy a prompt's hash table into a larger, empty one."""
    mask = np.uint32(into.size - 1)
    for i in range(seen.size):
        if counts[i] > 0:
            at = np.uint32(seen[i] * np.uint32(_SPREAD)) & mask
            while into_counts[at] > 0:
                at = (at + np.uint32(1)) & mask
            into[at], into_counts[at] = seen[i], counts[i]


def add_terms_reference(
    counts: dict[int, int], terms: Uint32Array, rarity: Float32Array, unknown: float, rows: Float32Array
) -> FloatArray:
    """What `add_terms` leaves in `sums` for a prompt of these terms, in plain NumPy."""
    known, sums = {int(term): i for i, term in enumerate(terms)}, np.zeros(rows.shape[1] + 2)
    for term, count in counts.items():
        at = known.get(term)
        weight = (1.0 + math.log(count)) * (unknown if at is None else float(rarity[at]))
        sums[-2] += weight * weight
        if at is not None:
            sums[-1] += 1.0
            sums[:-2] += weight * rows[at].astype(np.float64)
    return sums
