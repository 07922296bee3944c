"""Counting picks: from token rows to counts per request (or any other row key), layer and expert."""

from __future__ import annotations

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["count_pairs", "count_pairs_reference", "count_ranges", "count_ranges_reference"]

Experts = npt.NDArray[np.unsignedinteger]


@nb.njit(cache=True, nogil=True, boundscheck=False)
def count_ranges(
    experts: Experts,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint32],
) -> None:
    """Add the picks of rows starts[i] .. stops[i] - 1 to `out[keys[i]]`; a negative key skips the range.

    Args:
        experts: unsigned [T, L, k], ids below E (the reader has checked them).
        starts, stops, keys: int64 [n].
        out: uint32 [keys, L, E], added to in place.
    """
    layers, k = experts.shape[1], experts.shape[2]
    for i in range(starts.size):
        key = keys[i]
        if key < 0:
            continue
        for t in range(starts[i], stops[i]):
            for layer in range(layers):
                for j in range(k):
                    out[key, layer, experts[t, layer, j]] += np.uint32(1)


def count_ranges_reference(
    experts: Experts,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint32],
) -> None:
    """`count_ranges` in plain NumPy: one `bincount` per range and layer."""
    for start, stop, key in zip(starts, stops, keys, strict=True):
        if key < 0:
            continue
        for layer in range(experts.shape[1]):
            picks = experts[start:stop, layer].ravel()
            out[key, layer] += np.bincount(picks, minlength=out.shape[2]).astype(np.uint32)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def count_pairs(
    experts: Experts,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint32],
) -> None:
    """Add, for rows starts[i] .. stops[i] - 1, one to `out[layer, a, b]` and `out[layer, b, a]` for each pair of picks.

    Args:
        experts: unsigned [T, L, k].
        starts, stops: int64 [n].
        out: uint32 [L, E, E], symmetric, added to in place; the diagonal stays 0 where a token's picks are distinct.
    """
    layers, k = experts.shape[1], experts.shape[2]
    for layer in range(layers):  # layer outermost: one [E, E] table stays in cache
        for i in range(starts.size):
            for t in range(starts[i], stops[i]):
                for a in range(k):
                    ea = experts[t, layer, a]
                    for b in range(a + 1, k):
                        eb = experts[t, layer, b]
                        out[layer, ea, eb] += np.uint32(1)
                        out[layer, eb, ea] += np.uint32(1)


def count_pairs_reference(
    experts: Experts,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint32],
) -> None:
    """`count_pairs` in plain NumPy."""
    k = experts.shape[2]
    for start, stop in zip(starts, stops, strict=True):
        for layer in range(experts.shape[1]):
            for a in range(k):
                for b in range(k):
                    if a != b:
                        np.add.at(out[layer], (experts[start:stop, layer, a], experts[start:stop, layer, b]), 1)
