"""Distinct experts that one decode step reads: of each layer, the union over the step's tokens."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import ExpertArray, Int64Array

__all__ = ["distinct_of_step", "distinct_of_steps", "distinct_reference"]


@compiled
def distinct_of_step(experts: ExpertArray, rows: Int64Array, mark: int, marks: Int64Array, out: Int64Array) -> None:
    """Write to `out` how many experts of each layer the tokens in `rows` pick.

    Args:
        experts: unsigned [T, L, k]; ids of E and more are missing picks.
        rows: int64 [B]; a negative row is nobody.
        mark: a number that no earlier step left in `marks`.
        marks: int64 [L, E], scratch; need not be cleared between steps.
        out: int64 [L].
    """
    layers, k, count = experts.shape[1], experts.shape[2], np.uint64(marks.shape[1])
    out[:] = 0
    for i in range(rows.size):
        if rows[i] < 0:
            continue
        token = experts[rows[i]]
        for layer in range(layers):
            for j in range(k):
                expert = np.uint64(token[layer, j])
                if expert < count:
                    out[layer] += marks[layer, expert] != mark  # without a branch: nobody could guess it
                    marks[layer, expert] = mark


@compiled
def distinct_of_steps(experts: ExpertArray, rows: Int64Array, num_experts: int, out: Int64Array) -> None:
    """`distinct_of_step` of many steps: rows int64 [S, B] -> out int64 [S, L]."""
    marks = np.full((experts.shape[1], num_experts), -1, np.int64)
    for step in range(rows.shape[0]):
        distinct_of_step(experts, rows[step], step, marks, out[step])


def distinct_reference(experts: ExpertArray, rows: Int64Array, num_experts: int) -> Int64Array:
    """`distinct_of_step` in plain NumPy: int64 [L]."""
    picked = experts[rows[rows >= 0]]
    counts = [np.unique(picked[:, layer][picked[:, layer] < num_experts]).size for layer in range(experts.shape[1])]
    return np.array(counts, np.int64)
