"""Interpolated Kneser-Ney n-grams over token ids, the baseline that the embedded model must beat.

Kneser and Ney (1995), in the interpolated form of Chen and Goodman (1999), one discount for each
order, estimated as n1 / (n1 + 2 n2). Five ids of 12 bits fit one 64-bit key, so that counting is
sorting.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BITS = 12
Ids = NDArray[np.int64]


def _keys(ids: Ids, order: int) -> Ids:
    """Packed n-grams of one order: the key at position i holds the ids i .. i + order - 1."""
    length = len(ids) - order + 1
    keys = np.zeros(length, np.int64)
    for offset in range(order):
        keys = keys << BITS | ids[offset : offset + length]
    return keys


class KneserNey:
    """``KneserNey(ids, order)``; ids below 4096, order at most 5."""

    def __init__(self, ids: Ids, order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.levels = []
        for n in range(1, order + 1):
            grams, counts = np.unique(_keys(ids, n), return_counts=True)
            if n < order:  # lower orders count in how many contexts an n-gram was seen
                longer = np.unique(_keys(ids, n + 1)) & ((1 << BITS * n) - 1)
                grams, counts = np.unique(longer, return_counts=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            discount = once / (once + 2 * twice) if once and twice else 0.5
            contexts, first = np.unique(grams >> BITS, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(grams)))
            self.levels.append((grams, counts, contexts, totals, kinds, discount))

    def loss(self, ids: Ids) -> NDArray[np.float64]:
        """-log p of the ids from the ``order``-th on, in nats."""
        skip = self.order - 1
        probability = np.full(len(ids) - skip, 1 / self.vocabulary)
        for n, (grams, counts, contexts, totals, kinds, discount) in enumerate(self.levels, start=1):
            keys = _keys(ids, n)[skip - n + 1 :]
            at = np.searchsorted(grams, keys).clip(max=len(grams) - 1)
            count = np.where(grams[at] == keys, counts[at], 0)
            where = np.searchsorted(contexts, keys >> BITS).clip(max=len(contexts) - 1)
            known = contexts[where] == keys >> BITS
            total = totals[where]
            mixed = (np.maximum(count - discount, 0) + discount * kinds[where] * probability) / total
            probability = np.where(known, mixed, probability)
        return -np.log(probability)
