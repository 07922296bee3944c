"""How many distinct experts a set of requests reads in one decode step: what bounds a small step's time.

A step reads the weights of each expert that at least one of its tokens picks, once. Requests that share experts read
fewer. This is the one definition: figures, planning for instances, and the simulation count with it.
"""

from __future__ import annotations

import numpy as np

from moeplan._kernels.distinct import distinct_of_steps
from moeplan.arrays import ExpertArray, Int64Array

__all__ = ["count_distinct", "count_distinct_steps", "experts_per_step"]


def count_distinct(experts: ExpertArray, rows: Int64Array, num_experts: int) -> Int64Array:
    """int64 [L]: distinct experts of each layer that a step's tokens pick.

    Args:
        experts: unsigned [T, L, k]; ids of `num_experts` and more are missing picks, which read nothing.
        rows: int64 [B], the rows decoded in this step on one instance; -1: none.

    Examples:
        >>> picks = np.array([[[0, 1]], [[1, 2]], [[5, 6]]], np.uint8)
        >>> count_distinct(picks, np.array([0, 1, -1]), 8)
        array([3])
    """
    return np.asarray(count_distinct_steps(experts, np.asarray(rows, np.int64)[None], num_experts)[0], np.int64)


def count_distinct_steps(experts: ExpertArray, rows: Int64Array, num_experts: int) -> Int64Array:
    """int64 [S, L]: `count_distinct` of many steps, rows int64 [S, B]."""
    out = np.zeros((len(rows), experts.shape[1]), np.int64)
    distinct_of_steps(experts, np.ascontiguousarray(rows, np.int64), num_experts, out)
    return out


def experts_per_step(distinct: Int64Array, tokens: Int64Array) -> float:
    """Distinct experts that a token's step reads of a layer: mean over decoded tokens and layers.

    Weighted by tokens, so that batches of different sizes do not flatter: a step of one request reads few experts, and
    serves one.

    Args:
        distinct: int64 [S, L]. tokens: int64 [S], tokens of each step; at least one in all.
    """
    return float((distinct.mean(axis=1) * tokens).sum() / tokens.sum())
