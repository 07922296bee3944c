"""Balanced partition by swapping: raise the weight inside the parts, keep their sizes."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import FloatArray, Int64Array

__all__ = ["swap_partition"]


@compiled
def swap_partition(weight: FloatArray, part: Int64Array, parts: int, sweeps: int) -> float:
    """Swap pairs of nodes of different parts while the weight inside the parts rises.

    Args:
        weight: float64 [n, n], symmetric with a zero diagonal.
        part: int64 [n], the part of each node; changed in place, sizes kept.
        sweeps: most sweeps over all pairs.

    Returns:
        The gain in weight inside the parts (each pair counted once).
    """
    n = part.size
    pull = np.zeros((n, parts))  # pull[a, p]: weight between a and the members of p
    for a in range(n):
        for b in range(n):
            pull[a, part[b]] += weight[a, b]
    total = 0.0
    scale = 1e-9 * (weight.max() + 1e-300)
    for _ in range(sweeps):
        improved = False
        for a in range(n):
            best, partner = scale, -1
            pa = part[a]
            for b in range(n):
                pb = part[b]
                if pb == pa:
                    continue
                gain = pull[a, pb] - pull[a, pa] + pull[b, pa] - pull[b, pb] - 2.0 * weight[a, b]
                if gain > best:
                    best, partner = gain, b
            if partner >= 0:
                b = partner
                pb = part[b]
                for c in range(n):
                    change = weight[c, a] - weight[c, b]
                    pull[c, pa] -= change
                    pull[c, pb] += change
                part[a], part[b] = pb, pa
                total += best
                improved = True
        if not improved:
            break
    return total
