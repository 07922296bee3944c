"""Which requests decode in a step, and at which row: one rule for evaluation and for planning."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int64Array

__all__ = ["draw_rows", "live_members"]

Keys = npt.NDArray[np.floating[Any]]


def draw_rows(
    span: Int64Array, steps: int, rng: np.random.Generator, dtype: type[np.float32] | type[np.float64] = np.float32
) -> tuple[Keys, Int64Array]:
    """The random draws for each request at each step.

    Args:
        span: int64 [2, n], first row and end of each request, at least one row.
        dtype: of the keys.

    Returns:
        key, dtype [S, n]: smaller goes first. Requests are drawn without replacement in proportion to their rows
            (Efraimidis and Spirakis 2006: exponential keys with the rows as rates).
        row, int64 [S, n]: the row at which the request is if it is live, uniform over its rows.
    """
    start, length = span[0], span[1] - span[0]
    key: Keys = np.asarray(rng.standard_exponential((steps, len(length)), dtype=dtype) / length, dtype)
    return key, start + (rng.random((steps, len(length))) * length).astype(np.int64)


def live_members(key: Keys, members: Int64Array, live: int) -> Int64Array:
    """int64 [S, live]: those of a group's members that are live at each step, by rising key [S, n]."""
    return members[np.argsort(key[:, members], axis=1, kind="stable")[:, :live]]
