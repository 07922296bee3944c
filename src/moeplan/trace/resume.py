"""Going on with a recording that was cut off.

What is on disk is a readable trace of finished parts. Its last part may be short (Ctrl-C writes what there is), so it
is taken back into memory and written again once full: parts then end where they would have ended without the
interruption, and the finished trace is the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moeplan.errors import UsageError
from moeplan.io.files import read_json
from moeplan.trace.columns import read_columns
from moeplan.trace.format import JSON_NAME, REQUESTS_NAME
from moeplan.trace.reader import MAX_AHEAD, Trace
from moeplan.types import ModelShape

__all__ = ["Recorded", "check_same", "read_recorded", "token_items"]


@dataclass(frozen=True)
class Recorded:
    """What a writer must know to go on.

    Attributes:
        parts: descriptions of all parts but the last, as in `trace.json`.
        last: the description of the last part.
        items: its requests, as the writer keeps them until they are written.
        rows, prefill, domain, arrival, dp_rank: one entry per request, of all parts.
        taken: the same: how many requests had been taken in when this one was stored, those not stored included.
    """

    parts: list[dict[str, Any]]
    last: dict[str, Any]
    items: list[tuple[Any, ...]]
    rows: list[int]
    prefill: list[int]
    domain: list[str]
    arrival: list[float | None]
    dp_rank: list[int | None]
    taken: list[int]


def read_recorded(
    trace: Trace,
    shape: ModelShape,
    source: dict[str, Any],
    *,
    weights: bool,
    read_back: Callable[[Trace], list[tuple[Any, ...]]],
) -> Recorded:
    """Read back an incomplete trace, which must have been begun with the same model and settings.

    Args:
        read_back: the last part's items, from a trace whose parts it verifies.

    Raises:
        UsageError: the trace is complete, or another model, source or choice of weights began it.
        FormatError: one of its parts is damaged.
    """
    check_same(trace, shape, source, weights=weights)
    if trace.complete:
        raise UsageError("is complete; there is nothing to resume", where=str(trace.path))
    items = read_back(trace)
    requests, parts = trace.requests, read_json(trace.path / JSON_NAME)["parts"]
    return Recorded(
        parts=parts[:-1],
        last=parts[-1],
        items=items,
        rows=[int(n) for n in requests.rows],
        prefill=[int(n) for n in requests.prefill],
        domain=[requests.domains[i] for i in requests.domain],
        arrival=[None if np.isnan(a) else a for a in requests.arrival.tolist()],
        dp_rank=[None if rank < 0 else rank for rank in requests.dp_rank.tolist()],
        taken=_taken(trace),
    )


def check_same(trace: Trace, shape: ModelShape, source: dict[str, Any], *, weights: bool) -> None:
    """Refuse to go on with a recording, complete or not, that was begun otherwise.

    Raises:
        UsageError: another model, source or choice of weights began it.
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
        hint = "resume with --weights" if trace.has_weights else "resume without --weights"
        raise UsageError("was begun with another choice of gate weights", where=where, hint=hint)


def token_items(trace: Trace, *, weights: bool) -> list[tuple[Any, ...]]:
    """The last part's requests: (experts [rows, L, k], prefill, positions uint32 [rows], weights or None) each."""
    *_, rows = trace.parts(weights=weights, positions=True)  # every part is verified on the way
    assert rows.positions is not None
    items: list[tuple[Any, ...]] = []
    for number, (start, stop) in enumerate(pairwise(rows.offsets)):
        gate = None if rows.weights is None else rows.weights[start:stop]
        items.append((rows.experts[start:stop], int(rows.prefill[number]), rows.positions[start:stop], gate))
    return items


def _taken(trace: Trace) -> list[int]:
    """Requests taken in when each was stored; where the trace has no such column, all were stored."""
    count = len(trace.requests)
    columns = read_columns(trace.path / REQUESTS_NAME, ["rows"], at_most=count + MAX_AHEAD, optional=["taken"])
    if "taken" not in columns:
        return list(range(1, count + 1))
    return list(columns["taken"].slice(0, count).to_pylist())
