"""Parts that hold token rows: one row for each token, with the experts that it used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.trace.columns import list_column, phase_column
from moeplan.trace.format import PHASES, UNKNOWN, VERSION, Request, StoredRequest, part_schema
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape, expert_dtype

if TYPE_CHECKING:
    import pyarrow as pa

    from moeplan.trace.reader import Trace

__all__ = ["TokenRows"]


class TokenRows:
    """How `TraceWriter` stores requests row by row; `RequestSums` has the same methods.

    Attributes:
        head: the keys of `trace.json` that name this form.
        requires: what a reader must know to read it, beside fewer picks.
        row_values: values in one row of a part.
        keeps_taken: whether `requests.parquet` must say how many requests had been added when each was stored.
        dropped: requests that were too short.
    """

    head: dict[str, Any] = {"version": VERSION}  # noqa: RUF012
    requires: tuple[str, ...] = ()

    def __init__(self, shape: ModelShape, retention: RetentionPolicy, *, weights: bool) -> None:
        self._shape, self._retention, self._weights = shape, retention, weights
        self._dtype = expert_dtype(shape.num_experts, fewer_picks=retention.fewer_picks)
        self.row_values = shape.num_layers * shape.top_k
        self.keeps_taken = retention.min_tokens > 1
        self.dropped = self._taken = 0

    def drop(self, domain: str) -> None:
        """Count a request that is too short."""
        self.dropped, self._taken = self.dropped + 1, self._taken + 1

    def take(self, request: Request) -> tuple[StoredRequest, Request]:
        """A request as it is stored."""
        rows = len(request.experts)
        positions = np.arange(rows) if request.positions is None else request.positions
        policy, prompt = self._retention.prompts, request.prompt
        if policy is not None and prompt is not None:
            prompt = policy.kept(prompt, request.where)
        stored = replace(
            request,
            experts=request.experts.astype(self._dtype),
            prompt=prompt if policy is not None else None,
            positions=positions.astype(np.uint32),
            weights=None if request.weights is None else request.weights.astype(np.float16),
        )
        self._taken += 1
        row = StoredRequest(
            rows,
            request.prefill,
            request.domain,
            request.arrival,
            request.dp_rank,
            self._taken,
            request.session,
            request.turn,
        )
        return row, stored

    def size(self, content: Request) -> int:
        """Rows of a part that a request takes."""
        return len(content.experts)

    def table(self, contents: Sequence[Request], first: int) -> pa.Table:
        """Whole requests as a part; `first` is the number of the first one."""
        import pyarrow as pa

        schema = part_schema(self._shape, weights=self._weights, fewer_picks=self._retention.fewer_picks)
        rows = [len(request.experts) for request in contents]
        columns = [
            pa.array(np.repeat(np.arange(first, first + len(rows), dtype=np.uint32), rows)),
            pa.array(np.concatenate([request.positions for request in contents])),
            phase_column(np.concatenate([_phase_codes(len(r.experts), r.prefill) for r in contents])),
            list_column(schema, "experts", [request.experts for request in contents]),
        ]
        if self._weights:
            columns.append(list_column(schema, "weights", [r.weights for r in contents if r.weights is not None]))
        return pa.Table.from_arrays(columns, schema=schema)

    def prompts(self, contents: Sequence[Request]) -> list[PromptFeatures] | None:
        """The prompt features of the requests of a part; None where they are not kept."""
        policy = self._retention.prompts
        if policy is None:
            return None
        counts = np.empty(0, np.uint16) if policy.kind == "hashed" else None
        unknown = PromptFeatures(policy.kind, np.zeros(2, np.int64), np.empty(0, np.uint32), counts, policy.key)
        return [unknown if request.prompt is None else request.prompt for request in contents]

    def read_back(self, trace: Trace) -> list[Request]:
        """The requests of the last part, as they were before it was written."""
        *_, rows = trace.parts(weights=self._weights, positions=True)  # this verifies every part
        assert rows.positions is not None
        found = []
        for number, (start, stop) in enumerate(pairwise(rows.offsets)):
            weights = None if rows.weights is None else rows.weights[start:stop]
            experts, positions = rows.experts[start:stop], rows.positions[start:stop]
            prompt = None if trace.prompts is None else trace.prompts.take([rows.first + number])
            found.append(
                Request(experts, int(rows.prefill[number]), positions=positions, weights=weights, prompt=prompt)
            )
        return found

    def restore(self, requests: Sequence[StoredRequest]) -> None:
        """Continue after these requests, those of a recording that was interrupted."""
        self._taken = requests[-1].taken
        self.dropped = self._taken - len(requests)

    def pending(self, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool [R]: which of all requests, given by their labels, have not been added yet."""
        return np.arange(len(domains)) >= self._taken

    def counts(self, stored: int) -> dict[str, int]:
        """What `trace.json` counts beside requests, tokens and picks."""
        return {"dropped": self.dropped} if self.keeps_taken else {}

    def why_empty(self) -> tuple[str, str]:
        """(what, hint) of the error for a trace without requests."""
        if self.dropped:
            what = f"none of the {self.dropped} requests has {self._retention.min_tokens} tokens"
            return what, "use a smaller --min-tokens"
        return "there is no request to write", "check the input"


def _phase_codes(rows: int, prefill: int) -> npt.NDArray[np.int8]:
    if prefill == UNKNOWN:
        return np.full(rows, PHASES.index("unknown"), np.int8)
    return (np.arange(rows) >= prefill).astype(np.int8)
