"""Counting picks: from token rows to counts per request (or any other row key), layer and expert.

A token may lack picks: ids of E and above stand for those, and are not counted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan.arrays import CountArray, ExpertArray, Int64Array

#: From this k on, a loop over one token's picks pays for its own start; below it, rows are walked flat (measured, see
#: benchmarks/counting.py: by layer 2.9 against 2.4 G picks/s at k = 8, 1.5 against 2.8 at k = 6).
LONG_INNER_LOOP = 8
#: From so many rows on, counters of their own pay, which are added to the result at the end.
LONG_RANGE = 32
#: uint32 counters in 30 KiB: a 32 KiB first-level cache, less the rows being read.
CACHED_COUNTERS = 30 * 1024 // 4


def count_ranges(
    experts: ExpertArray, starts: Int64Array, stops: Int64Array, keys: Int64Array, out: CountArray
) -> None:
    """Add the picks of rows starts[i] .. stops[i] - 1 to `out[keys[i]]`; a negative key skips the range.

    Args:
        experts: unsigned [T, L, k].
        starts, stops, keys: int64 [n].
        out: uint32 [keys, L, E], added to in place.
    """
    layers, k = experts.shape[1:]
    largest = 255 if experts.dtype.itemsize == 1 else int(experts.max(initial=0))
    wide = max(out.shape[2], largest + 1)  # counters of a layer, so many that every id has one
    if k < LONG_INNER_LOOP and experts.flags.c_contiguous and out.flags.c_contiguous:
        # The layer of each of a row's L x k picks: the inner loop is then one flat walk over the row.
        layer = np.repeat(np.arange(layers, dtype=np.uint64), k)
        _count_flat(experts.reshape(len(experts), layers * k), starts, stops, keys, layer, wide, out)
    else:
        _count_by_layer(experts, starts, stops, keys, wide, out)


@compiled
def _count_flat(
    picks: ExpertArray,
    starts: Int64Array,
    stops: Int64Array,
    keys: Int64Array,
    layer: npt.NDArray[np.uint64],
    wide: int,
    out: CountArray,
) -> None:
    """`picks` [T, L * k]; all indices unsigned, so that numba need not test for negative ones.

    Long ranges are counted into counters with a place for each of `wide` ids, so that no loop tests for picks that
    tokens lack. Four rows at a time share each load of `base`.
    """
    width, one = np.uint64(picks.shape[1]), np.uint32(1)
    base = layer * np.uint64(wide)
    counters = np.zeros((out.shape[1], wide), np.uint32)
    flat = counters.reshape(-1)
    for i in range(starts.size):
        if keys[i] < 0:
            continue
        if stops[i] - starts[i] < LONG_RANGE:
            _count_few(picks, starts[i], stops[i], layer, out[keys[i]])
            continue
        rest = stops[i] - (stops[i] - starts[i]) % 4
        for t in range(starts[i], rest, 4):
            row0, row1, row2, row3 = picks[t], picks[t + 1], picks[t + 2], picks[t + 3]
            for c in range(width):
                at = base[c]
                flat[at + np.uint64(row0[c])] += one
                flat[at + np.uint64(row1[c])] += one
                flat[at + np.uint64(row2[c])] += one
                flat[at + np.uint64(row3[c])] += one
        _count_few(picks, rest, stops[i], layer, out[keys[i]])
        _move(counters, out[keys[i]])


@compiled
def _count_few(picks: ExpertArray, start: int, stop: int, layer: npt.NDArray[np.uint64], out: CountArray) -> None:
    """Rows start .. stop - 1 of `picks` [T, L * k], added to `out` [L, E]."""
    size = np.uint64(out.shape[1])
    for t in range(start, stop):
        row = picks[t]
        for c in range(np.uint64(picks.shape[1])):
            e = np.uint64(row[c])
            if e < size:
                out[layer[c], e] += np.uint32(1)


@compiled
def _move(counters: CountArray, out: CountArray) -> None:
    """Add counters [L, ids] to `out` [L, E], ids of E and above left out, and set them to 0."""
    for layer in range(out.shape[0]):
        own, row = out[layer], counters[layer]
        for e in range(out.shape[1]):
            own[e] += row[e]
    counters[:] = 0


@compiled
def _count_by_layer(
    experts: ExpertArray, starts: Int64Array, stops: Int64Array, keys: Int64Array, wide: int, out: CountArray
) -> None:
    """For any strides; as many layers at a time as have counters that stay in a first-level cache."""
    layers, k = np.uint64(experts.shape[1]), np.uint64(experts.shape[2])
    block = np.uint64(max(1, CACHED_COUNTERS // wide))
    counters = np.zeros((block, wide), np.uint32)
    for i in range(starts.size):
        if keys[i] < 0 or stops[i] <= starts[i]:
            continue
        for first in range(np.uint64(0), layers, block):
            last = min(first + block, layers)
            for t in range(starts[i], stops[i]):
                for layer in range(first, last):
                    row, own = experts[t, layer], counters[layer - first]
                    for j in range(k):
                        own[np.uint64(row[j])] += np.uint32(1)
            _move(counters, out[keys[i], first:last])


def count_ranges_reference(
    experts: ExpertArray, starts: Int64Array, stops: Int64Array, keys: Int64Array, out: CountArray
) -> None:
    """`count_ranges` in plain NumPy: one `bincount` per range and layer."""
    for start, stop, key in zip(starts, stops, keys, strict=True):
        if key < 0:
            continue
        for layer in range(experts.shape[1]):
            picks = experts[start:stop, layer].ravel()
            picks = picks[picks < out.shape[2]]
            out[key, layer] += np.bincount(picks, minlength=out.shape[2]).astype(np.uint32)


@compiled
def count_pairs(experts: ExpertArray, starts: Int64Array, stops: Int64Array, out: CountArray) -> None:
    """Add, for rows starts[i] .. stops[i] - 1, one to `out[layer, a, b]` and `out[layer, b, a]` for each pair of picks.

    Args:
        experts: unsigned [T, L, k].
        starts, stops: int64 [n].
        out: uint32 [L, E, E], symmetric, added to in place; the diagonal stays 0 where a token's picks are distinct.
    """
    layers, k, size = np.uint64(experts.shape[1]), np.uint64(experts.shape[2]), np.uint64(out.shape[1])
    one_way = np.zeros((out.shape[1], out.shape[2]), np.uint32)
    for layer in range(layers):  # layer outermost: one [E, E] table stays in cache
        one_way[:] = 0
        for i in range(starts.size):
            for t in range(starts[i], stops[i]):
                for a in range(k):
                    first = np.uint64(experts[t, layer, a])
                    if first >= size:
                        continue
                    row = one_way[first]
                    for b in range(a + np.uint64(1), k):
                        second = np.uint64(experts[t, layer, b])
                        if second < size:
                            row[second] += np.uint32(1)
        for a in range(out.shape[1]):
            for b in range(out.shape[2]):
                out[layer, a, b] += one_way[a, b] + one_way[b, a]


def count_pairs_reference(experts: ExpertArray, starts: Int64Array, stops: Int64Array, out: CountArray) -> None:
    """`count_pairs` in plain NumPy."""
    k = experts.shape[2]
    for start, stop in zip(starts, stops, strict=True):
        for layer in range(experts.shape[1]):
            for a in range(k):
                for b in range(k):
                    if a != b:
                        pair = experts[start:stop, layer][:, [a, b]]
                        pair = pair[(pair < out.shape[1]).all(axis=1)]
                        np.add.at(out[layer], (pair[:, 0], pair[:, 1]), 1)
