"""Aggregated traces: no token rows, but counts of picks, summed over N requests of one domain.

A part has one row for each sum and phase; the documentation of the trace format says what MUST and MAY be there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.trace.columns import list_column, list_values, phase_column, phase_names, read_columns
from moeplan.trace.format import AGGREGATED, PHASES, UNKNOWN, VERSION, Request, Requests, StoredRequest
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape, expert_dtype

if TYPE_CHECKING:
    import pyarrow as pa

    from moeplan.trace.reader import Trace

__all__ = ["RequestSums", "Sums", "read_sums"]

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Sums:
    """Consecutive sums: one part of a trace.

    Attributes:
        first: number of the first sum.
        counts: uint32 [3, n, L, E], picks by phase, in the order of `PHASES`.
    """

    first: int
    counts: Counts

    def __len__(self) -> int:
        return len(self.counts[0])


def _part_schema(shape: ModelShape) -> pa.Schema:
    """The Arrow schema of a part: one row for each sum and phase."""
    import pyarrow as pa

    cells = pa.list_(pa.field("item", pa.uint32(), nullable=False), shape.num_layers * shape.num_experts)
    return pa.schema(
        [
            pa.field("request", pa.uint32(), nullable=False),
            pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("counts", cells, nullable=False),
        ]
    )


def read_sums(path: Path, first: int, requests: Requests, shape: ModelShape, *, fewer_picks: bool = False) -> Sums:
    """Read a part and check it against the table of sums.

    Args:
        first: the number of its first sum.
        requests: those sums, and no others.
        shape: the model as stored.
        fewer_picks: tokens may have fewer than k picks.

    Raises:
        FormatError: rows that are not those sums and phases, or counts that are not k picks a token and layer.
    """
    layers, experts = shape.num_layers, shape.num_experts
    tokens = np.stack((requests.prefill_known, requests.decode, np.where(requests.prefill < 0, requests.rows, 0)), 1)
    number, phase = np.nonzero(tokens)  # what the part must hold, row by row
    columns = read_columns(path, ["request", "phase", "counts"], at_most=len(number))
    found = columns["request"].to_numpy(zero_copy_only=False)
    if len(found) != len(number):
        raise FormatError(f"{len(found)} rows, but requests.parquet counts {len(number)}", where=str(path))
    wrong = (found != first + number) | (phase_names(columns["phase"]) != np.array(PHASES)[phase])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FormatError(
            f"row {row}: request {found[row]}, expected {PHASES[phase[row]]} of {first + number[row]}",
            where=str(path),
        )
    values = list_values(columns["counts"], layers * experts, path, "counts")
    if values.dtype.kind not in "ui":
        raise FormatError(f"column counts holds {values.dtype}, not integers", where=str(path))
    values = values.reshape(-1, layers, experts)
    found_picks, all_picks = values.sum(axis=2, dtype=np.int64), tokens[number, phase, None] * shape.top_k
    wrong = ((found_picks > all_picks) if fewer_picks else (found_picks != all_picks)).any(axis=1)
    if wrong.any() or (values.size and int(values.min()) < 0):
        row = int(np.argmax(wrong))
        raise FormatError(
            f"row {row}: its counts are not {shape.top_k} picks a layer for each of {tokens[number[row], phase[row]]}"
            " tokens",
            where=str(path),
        )
    counts = np.zeros((len(PHASES), len(requests), layers, experts), np.uint32)
    counts[phase, number] = values
    return Sums(first, counts)


@dataclass
class _OpenSum:
    """A sum that is not full yet.

    Attributes:
        counts: uint32 [3, L, E], picks by phase.
        members, rows, prefill: requests, and their token rows, so far.
    """

    counts: Counts
    members: int = 0
    rows: int = 0
    prefill: int = 0


@dataclass
class _Domain:
    """A domain's requests: `taken` were added, of them `dropped`; `open` if a sum has begun."""

    taken: int = 0
    dropped: int = 0
    open: _OpenSum | None = None


class RequestSums:
    """How `TraceWriter` stores sums of N requests; `TokenRows` has the same methods, and says what they are for.

    A sum is made of N consecutive requests of one domain, in the order in which they are added, so that which requests
    make a sum is fixed before anything runs: a recording that was interrupted continues with the requests of unfinished
    sums. Requests that fill no sum are not written, or a row could be about fewer than N. Token rows stay in memory
    only until they are counted.
    """

    keeps_taken = True

    def __init__(self, shape: ModelShape, retention: RetentionPolicy) -> None:
        assert retention.aggregate
        self._shape, self._retention, self._members = shape, retention, retention.aggregate
        self._domains: dict[str, _Domain] = {}
        self.head = {"version": VERSION, "aggregate": self._members}
        self.requires = (AGGREGATED,)
        self.row_values = shape.num_layers * shape.num_experts

    @property
    def dropped(self) -> int:
        return sum(domain.dropped for domain in self._domains.values())

    def drop(self, domain: str) -> None:
        of = self._domains.setdefault(domain, _Domain())
        of.dropped, of.taken = of.dropped + 1, of.taken + 1

    def take(self, request: Request) -> tuple[StoredRequest, Counts] | None:
        """Add a request to its domain's sum; the sum, when it is full."""
        from moeplan._kernels.counting import count_ranges

        shape, prefill, rows = self._shape, request.prefill, len(request.experts)
        of = self._domains.setdefault(request.domain, _Domain())
        if of.open is None:
            of.open = _OpenSum(np.zeros((len(PHASES), shape.num_layers, shape.num_experts), np.uint32))
        own = of.open
        if (own.rows + rows) * shape.top_k >= 2**32:
            raise FormatError(f"a sum of {self._members} requests does not fit in 32 bits", where=request.where)
        known = prefill != UNKNOWN
        ends = np.array([0, prefill, rows] if known else [0, 0, rows])
        phase = np.array([PHASES.index("prefill"), PHASES.index("decode" if known else "unknown")])
        dtype = expert_dtype(shape.num_experts, fewer_picks=self._retention.fewer_picks)
        experts: npt.NDArray[Any] = np.ascontiguousarray(request.experts, dtype)
        count_ranges(experts, ends[:-1], ends[1:], phase, own.counts)
        own.members, own.rows, own.prefill = own.members + 1, own.rows + rows, own.prefill + max(prefill, 0)
        of.taken += 1
        if own.members < self._members:
            return None
        of.open, counts = None, _one_phase(own.counts)
        total = UNKNOWN if counts[PHASES.index("unknown")].any() else own.prefill
        return StoredRequest(own.rows, total, request.domain, None, None, of.taken), counts

    def size(self, content: Counts) -> int:
        return int(content.any(axis=(1, 2)).sum())

    def table(self, contents: Sequence[Counts], first: int) -> pa.Table:
        """Sums, uint32 [3, L, E] each, as a part; a phase without picks gets no row."""
        import pyarrow as pa

        schema = _part_schema(self._shape)
        number, phase = np.nonzero([counts.any(axis=(1, 2)) for counts in contents])
        found = [contents[i][p] for i, p in zip(number.tolist(), phase.tolist(), strict=True)]
        request = pa.array((first + number).astype(np.uint32))
        columns = [request, phase_column(phase.astype(np.int8)), list_column(schema, "counts", found)]
        return pa.Table.from_arrays(columns, schema=schema)

    def prompts(self, contents: Sequence[Counts]) -> None:
        """Sums have no prompts."""

    def read_back(self, trace: Trace) -> list[Counts]:
        *_, last = trace.sums()
        return [last.counts[:, i] for i in range(len(last))]

    def restore(self, requests: Sequence[StoredRequest]) -> None:
        for stored in requests:
            of = self._domains.setdefault(stored.domain, _Domain())
            of.dropped += stored.taken - of.taken - self._members
            of.taken = stored.taken

    def pending(self, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
        """All but those that finished sums account for: of each domain the first so many."""
        before = Counter({label: domain.taken for label, domain in self._domains.items()})
        found = np.ones(len(domains), np.bool_)
        for number, label in enumerate(domains):
            before[label] -= 1
            found[number] = before[label] < 0
        return found

    def counts(self, stored: int) -> dict[str, int]:
        left_over = sum(domain.open.members for domain in self._domains.values() if domain.open)
        return {"requests": stored * self._members, "sums": stored, "dropped": self.dropped, "left_over": left_over}

    def why_empty(self) -> tuple[str, str]:
        if not self._domains:
            return "there is no request to write", "check the input"
        least = self._retention.min_tokens
        enough = f" of at least {least} tokens" if least > 1 else ""
        what = f"no domain has {self._members} requests{enough}, so there is no sum to write"
        return what, "give a smaller --aggregate, or one label for all with --domain"


def _one_phase(counts: Counts) -> Counts:
    """uint32 [3, L, E] with all under `unknown` where any is: a sum cannot say which of its tokens were prefill."""
    prefill, decode, unknown = counts
    if not unknown.any():
        return counts
    return np.stack((np.zeros_like(prefill), np.zeros_like(prefill), prefill + decode + unknown))
