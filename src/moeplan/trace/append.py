"""Adding requests to a trace that exists."""

from __future__ import annotations

from pathlib import Path

from moeplan.errors import UsageError
from moeplan.trace.prompts import PromptPolicy
from moeplan.trace.reader import open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.trace.writer import PART_PICKS, TraceWriter

__all__ = ["open_to_append"]


def open_to_append(
    path: str | Path, *, prompts: PromptPolicy | None = None, part_picks: int = PART_PICKS
) -> TraceWriter:
    """A writer that adds requests to a trace; the parts that the trace has stay as they are.

    Until the writer is closed the trace is marked incomplete, and can be read at every moment. After a kill it holds
    every part that was finished, and can be appended to again. Its format version is then the newest.

    Args:
        path: the trace, complete or not, with token rows.
        prompts: what is kept of the prompts, by default what the trace keeps; needed where it keeps hashed features and
            the requests bring token ids.
        part_picks: picks per part.

    Raises:
        FormatError: no trace, or one that is damaged.
        UsageError: the trace is aggregated, or keeps other prompt features.

    Examples:
        >>> import moeplan
        >>> with moeplan.open_to_append("my-trace") as writer:  # doctest: +SKIP
        ...     writer.add(np.zeros((5, 2, 2), int) + [0, 7], prefill=3, domain="chat")
    """
    trace = open_trace(path)
    info = trace.prompts_info
    if prompts is None and info is not None:
        prompts = PromptPolicy(info.kind, key=info.key)
    if (info and (info.kind, info.key)) != (prompts and (prompts.kind, prompts.key)):
        raise UsageError("keeps other prompt features", where=str(path), hint="give the kind and secret that it has")
    shortest = trace.source.get("min_tokens", 1)
    return TraceWriter(
        trace.path,
        trace.shape,
        source=trace.source,
        synthetic=trace.synthetic,
        weights=trace.has_weights,
        retention=RetentionPolicy(
            shortest if type(shortest) is int else 1, prompts=prompts, fewer_picks=trace.fewer_picks
        ),
        part_picks=part_picks,
        mode="append",
    )
