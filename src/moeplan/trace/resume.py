"""Going on with a recording that was cut off.

What is on disk is a readable trace of finished parts. Its last part may be short (Ctrl-C writes what there is), so it
is taken back into memory and written again once full: parts then end where they would have ended without the
interruption, and the finished trace is the same, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.trace.files import read_json
from moeplan.trace.format import JSON_NAME
from moeplan.trace.reader import Trace
from moeplan.types import ModelShape

__all__ = ["Recorded", "read_recorded"]


@dataclass(frozen=True)
class Recorded:
    """What a writer must know to go on.

    Attributes:
        parts: descriptions of all parts but the last, as in `trace.json`.
        last: the description of the last part.
        items: its requests: (experts [rows, L, k], prefill, positions uint32 [rows], weights [rows, L, k] or None).
        rows, prefill, domain, arrival: one entry per request, of all parts.
    """

    parts: list[dict[str, Any]]
    last: dict[str, Any]
    items: list[tuple[Any, ...]]
    rows: list[int]
    prefill: list[int]
    domain: list[str]
    arrival: list[float | None]


def read_recorded(trace: Trace, shape: ModelShape, source: dict[str, Any], *, weights: bool) -> Recorded:
    """Read back an incomplete trace, which must have been begun with the same model and settings.

    Raises:
        UsageError: the trace is complete, or another model, source or choice of weights began it.
        FormatError: one of its parts is damaged.
    """
    import pyarrow.parquet as pq

    where = str(trace.path)
    if trace.complete:
        raise UsageError("is complete; there is nothing to resume", where=where)
    if trace.shape != shape:
        raise UsageError("was recorded from a model of another shape", where=where, mend="record to another place")
    for key in sorted({*trace.source, *source}):
        if trace.source.get(key) != source.get(key):
            raise UsageError(
                f"was begun with {key} {trace.source.get(key)!r}, not {source.get(key)!r}",
                where=where,
                mend="resume with the same settings, or record to another place",
            )
    head = read_json(trace.path / JSON_NAME)
    stored = bool(head.get("weights"))
    if stored != weights:
        mend = "resume with --weights" if stored else "resume without --weights"
        raise UsageError("was begun with another choice of gate weights", where=where, mend=mend)
    *_, rows = trace.parts(weights=weights)  # every part is verified on the way
    last = head["parts"][-1]
    column = pq.read_table(trace.path / last["file"], columns=["position"]).column(0)
    positions = column.to_numpy().astype(np.uint32)
    starts = rows.offsets[:-1]
    items: list[tuple[Any, ...]] = []
    for number, (start, stop) in enumerate(zip(starts, rows.offsets[1:], strict=True)):
        gate = None if rows.weights is None else rows.weights[start:stop]
        items.append((rows.experts[start:stop], int(rows.prefill[number]), positions[start:stop], gate))
    requests = trace.requests
    return Recorded(
        parts=head["parts"][:-1],
        last=last,
        items=items,
        rows=[int(n) for n in requests.rows],
        prefill=[int(n) for n in requests.prefill],
        domain=[requests.domains[i] for i in requests.domain],
        arrival=_arrivals(requests.arrival),
    )


def _arrivals(arrival: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(a) else float(a) for a in arrival]
