"""What of the requests is stored: all of them, only those long enough, or nothing but sums over N of a domain.

A sum is made of N consecutive requests of one domain, in the order in which they are taken in, so that which requests
make a sum is fixed before anything runs: a recording that was cut off goes on with the requests of unfinished sums.
Requests that fill no sum are not written at all, or a row could be about fewer than N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, UsageError
from moeplan.trace.aggregation import SUMS_VERSION, one_phase, sums_table
from moeplan.trace.format import PHASES, UNKNOWN
from moeplan.trace.reader import Trace
from moeplan.trace.resume import Recorded
from moeplan.trace.writer import Experts, TraceWriter
from moeplan.types import ModelShape

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["RetentionPolicy"]


@dataclass(frozen=True)
class RetentionPolicy:
    """What a recording stores.

    Attributes:
        min_tokens: requests of fewer rows (prefill and decode together) are dropped.
        aggregate: N, to store sums of N requests of a domain in place of token rows; None for token rows.
    """

    min_tokens: int = 1
    aggregate: int | None = None

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UsageError(f"--min-tokens {self.min_tokens} is not positive")
        if self.aggregate is not None and self.aggregate < 2:
            raise UsageError(f"--aggregate {self.aggregate} sums nothing", hint="give 2 or more")

    def source(self) -> dict[str, Any]:
        """What belongs into a trace's `source`, so that a recording only goes on as it was begun."""
        return {
            **({"min_tokens": self.min_tokens} if self.min_tokens > 1 else {}),
            **({"aggregate": self.aggregate} if self.aggregate else {}),
        }

    def check(self, domains: Sequence[str], *, weights: bool = False) -> None:
        """Refuse, before any work, what could only end without a trace.

        Args:
            domains: the label of every request.
            weights: gate weights are to be stored.

        Raises:
            UsageError: no domain has N requests, or weights, which belong to tokens, are asked for beside sums.
        """
        if self.aggregate is None:
            return
        if weights:
            raise UsageError(
                "--aggregate stores no tokens, and so no gate weights", hint="leave --weights or --aggregate out"
            )
        most = max(Counter(domains).values(), default=0)
        if most < self.aggregate:
            raise UsageError(
                f"--aggregate {self.aggregate}: no domain has so many requests, the largest has {most}",
                hint="give a smaller number, or one label for all with --domain",
            )

    def writer(self, path: str | Path, shape: ModelShape, **options: Any) -> TraceWriter:
        """The writer of such a trace; the options are those of `TraceWriter`."""
        if self.aggregate is None:
            return TraceWriter(path, shape, min_tokens=self.min_tokens, **options)
        return SumsWriter(path, shape, self.aggregate, min_tokens=self.min_tokens, **options)


@dataclass
class _Open:
    """A sum that is being made.

    Attributes:
        counts: uint32 [3, L, E], picks by phase.
        members, rows, prefill: requests, and their token rows, so far.
    """

    counts: npt.NDArray[np.uint32]
    members: int = 0
    rows: int = 0
    prefill: int = 0


@dataclass
class _Domain:
    """What a domain's requests have come to: `taken` in, of them `dropped`; `open` if a sum has begun."""

    taken: int = 0
    dropped: int = 0
    open: _Open | None = field(default=None)


class SumsWriter(TraceWriter):
    """Writes sums of requests; token rows stay in memory only until they are counted.

    Args:
        aggregate: N, requests in a sum.
    """

    def __init__(self, path: str | Path, shape: ModelShape, aggregate: int, **options: Any) -> None:
        self._aggregate, self._domains = aggregate, dict[str, _Domain]()
        super().__init__(path, shape, **options)

    @property
    def left_over(self) -> int:
        """Requests in sums that are not full."""
        return sum(domain.open.members for domain in self._domains.values() if domain.open)

    def needed(self, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
        """All but those that finished sums account for: of each domain the first so many."""
        before = Counter({label: domain.taken for label, domain in self._domains.items()})
        needed = np.ones(len(domains), np.bool_)
        for number, label in enumerate(domains):
            before[label] -= 1
            needed[number] = before[label] < 0
        return needed

    def close(self) -> None:
        """Write what is left, less the sums that are not full, and mark the trace complete."""
        if not len(self) and self._domains:
            enough = f" of at least {self.min_tokens} tokens" if self.min_tokens > 1 else ""
            raise FormatError(
                f"no domain has {self._aggregate} requests{enough}, so there is no sum to write",
                where=str(self.path),
                hint="give a smaller --aggregate, or one label for all with --domain",
            )
        super().close()

    def _drop(self, domain: str) -> None:
        of = self._domains.setdefault(domain, _Domain())
        of.dropped, of.taken = of.dropped + 1, of.taken + 1
        super()._drop(domain)

    def _keep(
        self,
        experts: Experts,
        prefill: int,
        domain: str,
        arrival: float | None,
        dp_rank: int | None,
        positions: Any,
        weights: Any,
    ) -> None:
        """Add a request to its domain's sum, and store the sum when it is full."""
        from moeplan._kernels.counting import count_ranges

        shape = self.shape
        of = self._domains.setdefault(domain, _Domain())
        if of.open is None:
            of.open = _Open(np.zeros((len(PHASES), shape.num_layers, shape.num_experts), np.uint32))
        sum_ = of.open
        if (sum_.rows + len(experts)) * shape.top_k >= 2**32:
            raise FormatError(f"a sum of {self._aggregate} requests is more than 32 bits count", where=str(self.path))
        known = prefill != UNKNOWN
        ends = np.array([0, prefill, len(experts)] if known else [0, 0, len(experts)])
        phase = np.array([PHASES.index("prefill"), PHASES.index("decode" if known else "unknown")])
        count_ranges(np.ascontiguousarray(experts), ends[:-1], ends[1:], phase, sum_.counts)
        sum_.members, sum_.rows = sum_.members + 1, sum_.rows + len(experts)
        sum_.prefill += max(prefill, 0)
        of.taken += 1
        if sum_.members == self._aggregate:
            counts = one_phase(sum_.counts)
            prefill = UNKNOWN if counts[PHASES.index("unknown")].any() else sum_.prefill
            of.open = None
            self._store((counts,), sum_.rows, prefill, domain, None, None, of.taken)

    def _take_back(self, recorded: Recorded) -> None:
        super()._take_back(recorded)
        for label, taken in zip(recorded.domain, recorded.taken, strict=True):
            of = self._domains.setdefault(label, _Domain())
            of.dropped += taken - of.taken - self._aggregate
            of.taken = taken
        self.dropped = sum(of.dropped for of in self._domains.values())

    def _row_values(self) -> int:
        return self.shape.num_layers * self.shape.num_experts

    def _size(self, item: tuple[Any, ...]) -> int:
        return int(item[0].any(axis=(1, 2)).sum())

    def _read_back(self, trace: Trace) -> list[tuple[Any, ...]]:
        *_, last = trace.sums()
        return [(last.counts[:, i],) for i in range(len(last))]

    def _table(self, first: int) -> pa.Table:
        return sums_table(self.shape, [item[0] for item in self._pending], first)

    def _needs_taken(self) -> bool:
        return True

    def _counts(self) -> dict[str, int]:
        stored = self._flushed * self._aggregate
        return {"requests": stored, "sums": self._flushed, "dropped": self.dropped, "left_over": self.left_over}

    def _head(self) -> dict[str, Any]:
        return {"version": SUMS_VERSION, "aggregate": self._aggregate}
