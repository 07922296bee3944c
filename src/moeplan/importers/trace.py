"""From a trace to one that leaks less: fewer requests, fewer layers, or sums in place of token rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.progress import Progress, silent
from moeplan.trace.format import Request
from moeplan.trace.reader import Trace, open_trace

__all__ = ["import_trace"]


def import_trace(
    source: str | Path, out: Path, options: ImportOptions = ImportOptions(), *, progress: Progress = silent
) -> Trace:
    """Copy a trace with token rows, less what `options` leaves out; one part is in memory at a time.

    Raises:
        UsageError: the trace is aggregated already, or no domain has as many requests as a sum takes.
        FormatError: a part that is damaged, or no request that is long enough; prompt tokens are to be kept and there
            are none.
        OutputError: `out` exists or cannot be written.
    """
    trace = open_trace(source, without_layers=options.without_layers)
    table, aggregate = trace.requests, options.retention.aggregate
    labels = [table.domains[d] if options.domain is None else options.domain for d in table.domain]
    options.retention.check(labels)
    weights = trace.has_weights and aggregate is None
    options = replace(options, retention=replace(options.retention, fewer_picks=trace.fewer_picks))
    prompts = trace.prompts if options.retention.prompts else None
    if options.retention.prompts and prompts is None:
        raise FormatError("holds no prompt tokens", where=str(trace.path), hint="leave out --keep-prompt-tokens")
    parts = trace.parts(weights=weights, positions=True)
    described: dict[str, Any] = {"import": "trace", "of": trace.source}
    if not trace.complete:
        described["notes"] = ["of a recording that was interrupted"]

    def requests() -> Iterator[Request]:
        for rows in parts:
            for number, (start, stop) in enumerate(pairwise(rows.offsets), rows.first):
                arrival, rank = table.arrival[number], int(table.dp_rank[number])
                session, turn = (
                    -1 if column is None else int(column[number]) for column in (table.session, table.turn)
                )
                yield Request(
                    rows.experts[start:stop],
                    int(table.prefill[number]),
                    labels[number],
                    arrival=None if np.isnan(arrival) else float(arrival),
                    positions=None if rows.positions is None else rows.positions[start:stop],
                    weights=None if rows.weights is None else rows.weights[start:stop],
                    dp_rank=None if rank < 0 else rank,
                    session=None if session < 0 else session,
                    turn=None if turn < 0 else turn,
                    prompt=None if prompts is None else prompts.take([number]),
                )
                progress(number + 1, len(table), labels[number])

    copied = replace(options, without_layers=())
    return write_trace(out, trace.shape, requests(), copied, described, synthetic=trace.synthetic, weights=weights)
