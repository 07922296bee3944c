"""Continuing a recording that was interrupted.

What is on disk is a readable trace of finished parts. Its last part may be short (Ctrl-C writes what there is), so it
is read back into memory and written again once full: parts then end where they would have ended without the
interruption, and the finished trace is the same, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.trace.columns import read_columns
from moeplan.trace.format import REQUESTS_NAME, PartInfo, StoredRequest
from moeplan.trace.reader import MAX_AHEAD, Trace
from moeplan.types import ModelShape

__all__ = ["Recorded", "check_same", "read_recorded", "read_stored"]


@dataclass(frozen=True)
class Recorded:
    """What a writer must know to continue.

    Attributes:
        parts: descriptions of all parts but the last, as in `trace.json`.
        last: the description of the last part.
        requests: all that are stored, in all parts.
    """

    parts: list[PartInfo]
    last: PartInfo
    requests: list[StoredRequest]


def read_recorded(trace: Trace) -> Recorded:
    """Describe an incomplete trace.

    Raises:
        UsageError: the trace is complete.
    """
    if trace.complete:
        raise UsageError("is complete; there is nothing to resume", where=str(trace.path))
    return read_stored(trace)


def read_stored(trace: Trace) -> Recorded:
    """Describe what a trace holds, complete or not."""
    requests, (*parts, last) = trace.requests, trace.stored_parts
    columns = (
        requests.rows.tolist(),
        requests.prefill.tolist(),
        [requests.domains[i] for i in requests.domain],
        [None if np.isnan(arrival) else arrival for arrival in requests.arrival.tolist()],
        [None if rank < 0 else rank for rank in requests.dp_rank.tolist()],
        _taken(trace),
        _optional(requests.session, len(requests)),
        _optional(requests.turn, len(requests)),
    )
    return Recorded(parts, last, [StoredRequest(*row) for row in zip(*columns, strict=True)])


def check_same(trace: Trace, shape: ModelShape, source: dict[str, Any], *, weights: bool) -> None:
    """Refuse to continue a recording, complete or not, that was begun differently.

    Raises:
        UsageError: it was begun with another model, source or choice of weights.
    """
    where = str(trace.path)
    if trace.shape != shape:
        raise UsageError("was recorded from a model of another shape", where=where, hint="record to another place")
    for key in sorted({*trace.source, *source}):
        if trace.source.get(key) != source.get(key):
            raise UsageError(
                f"was begun with {key} {trace.source.get(key)!r}, not {source.get(key)!r}",
                where=where,
                hint="resume with the same settings, or record to another place",
            )
    if trace.has_weights != weights:
        hint = "resume with --keep-gate-weights" if trace.has_weights else "resume without --keep-gate-weights"
        raise UsageError("was begun with another choice of gate weights", where=where, hint=hint)


def _optional(column: npt.NDArray[np.signedinteger] | None, count: int) -> list[int | None]:
    """The values of a column, None where one is unknown or there is no column."""
    return [None] * count if column is None else [None if value < 0 else value for value in column.tolist()]


def _taken(trace: Trace) -> list[int]:
    """Requests added when each was stored; where the trace has no such column, all were stored."""
    count = len(trace.requests)
    columns = read_columns(trace.path / REQUESTS_NAME, ["rows"], at_most=count + MAX_AHEAD, optional=["taken"])
    if "taken" not in columns:
        return list(range(1, count + 1))
    return list(columns["taken"].slice(0, count).to_pylist())
