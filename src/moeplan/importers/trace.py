"""From a trace to one that gives less away."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from moeplan.progress import Progress, silent
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.retention import RetentionPolicy

__all__ = ["import_trace"]


def import_trace(
    trace: Trace, out: Path, keep: RetentionPolicy, *, domain: str | None = None, progress: Progress = silent
) -> Trace:
    """Copy a trace, less what `keep` leaves out; one part is in memory at a time.

    Args:
        trace: with token rows; layers that it was opened without are left out for good.
        domain: one label for all requests; None leaves each its own.
        progress: called after each request.

    Raises:
        UsageError: the trace is of sums already, or no domain has as many requests as a sum takes.
        FormatError: a part that is not what it should be, or no request that is long enough.
        OutputError: `out` exists or cannot be written.
    """
    requests = trace.requests
    labels = [requests.domains[d] if domain is None else domain for d in requests.domain]
    keep.check(labels)
    weights = trace.has_weights and keep.aggregate is None
    parts = trace.parts(weights=weights, positions=True)
    source = {"import": "trace", "of": trace.source, **keep.source()}
    if not trace.complete:
        source["notes"] = ["of a recording that was cut off"]
    with keep.writer(out, trace.shape, source=source, synthetic=trace.synthetic, weights=weights) as writer:
        for rows in parts:
            for number, (start, stop) in enumerate(pairwise(rows.offsets), rows.first):
                arrival, rank = requests.arrival[number], int(requests.dp_rank[number])
                writer.add(
                    rows.experts[start:stop],
                    prefill=int(requests.prefill[number]),
                    domain=labels[number],
                    arrival=None if np.isnan(arrival) else float(arrival),
                    positions=None if rows.positions is None else rows.positions[start:stop],
                    weights=None if rows.weights is None else rows.weights[start:stop],
                    dp_rank=None if rank < 0 else rank,
                )
                progress(number + 1, len(requests), labels[number])
    return open_trace(out)
