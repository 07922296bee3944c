"""Writing a trace: whole requests in, parts out as they fill, readable at every moment.

Order on disk at every flush: the part, then `requests.parquet`, then `trace.json`, each under a temporary name and then
renamed. A kill between two of them leaves the older json, which names only finished parts; the reader takes from
`requests.parquet` only as many rows as the json counts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, MoeplanError, OutputError
from moeplan.io.files import atomic_path, sha256, write_json
from moeplan.trace.columns import token_table
from moeplan.trace.format import FORMAT, JSON_NAME, REQUESTS_NAME, UNKNOWN, VERSION, Request
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.resume import Recorded, read_recorded, token_items
from moeplan.types import ModelShape, expert_dtype

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TraceWriter"]

#: Picks per part: 16 Mi picks decode to 16 MiB (32 MiB above 256 experts), whatever the model.
PART_PICKS = 16 * 1024 * 1024
MAX_DOMAIN_CHARS = 200

Experts = npt.NDArray[np.unsignedinteger]


class TraceWriter:
    """Writes a trace request by request; use it as a context manager.

    Leaving the block normally marks the trace complete. Ctrl-C and other exceptions keep what was added and leave the
    trace readable but marked incomplete; an error of the input itself (`MoeplanError`) removes what this writer made,
    unless `keep_on_error`.

    Args:
        path: the directory to make; it must not exist, or be empty.
        shape: the model.
        source: how the trace came about, as plain JSON values (no prompt text).
        synthetic: True for a generated workload; every output then says so.
        weights: store gate weights as well.
        part_picks: picks per part.
        keep_on_error: keep finished parts when the input turns out bad.
        resume: go on with a recording at `path` that was cut off: `needed` says with which requests. The finished trace
            then equals that of a recording without interruption, given the same arguments and requests; what is on disk
            is kept whatever happens.
        min_tokens: requests of fewer rows are dropped; `dropped` counts them.

    Raises:
        OutputError: `path` is taken or cannot be made.
        UsageError: to resume, and the trace is complete or was begun with another shape, source or choice of weights.
        FormatError: to resume, and `path` is not a trace or a part of it is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        *,
        source: dict[str, Any],
        synthetic: bool = False,
        weights: bool = False,
        part_picks: int = PART_PICKS,
        keep_on_error: bool = False,
        resume: bool = False,
        min_tokens: int = 1,
    ) -> None:
        self.path, self.shape, self.source = Path(path), shape, source
        self.synthetic, self.weights, self.keep_on_error = synthetic, weights, keep_on_error
        self.min_tokens, self.dropped = min_tokens, 0
        self._part_rows = max(1, part_picks // self._row_values())
        self._pending: list[tuple[Any, ...]] = []  # whole requests, as `_read_back` and `_table` know them
        self._pending_rows = 0
        self._parts: list[dict[str, Any]] = []
        self._rows: list[int] = []
        self._prefill: list[int] = []
        self._domain: list[str] = []
        self._arrival: list[float | None] = []
        self._dp_rank: list[int | None] = []
        self._taken: list[int] = []  # how many requests had been taken in when this one was stored
        self._flushed = 0
        self._taken_back: dict[str, Any] | None = None  # description of the last part of a recording that is resumed
        self._made = False
        if resume:
            self._take_back(read_recorded(open_trace(path), shape, source, weights=weights, read_back=self._read_back))
        else:
            self._make_directory()

    def __len__(self) -> int:
        """Requests stored so far."""
        return len(self._rows)

    def needed(self, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which requests are still to be added, of all that there are, in their order: not those taken in before.

        Args:
            domains: the label of every request.
        """
        return np.arange(len(domains)) >= len(self) + self.dropped

    def _take_back(self, recorded: Recorded) -> None:
        self.keep_on_error = True
        self._parts, self._taken_back = recorded.parts, recorded.last
        self._rows, self._prefill = recorded.rows, recorded.prefill
        self._domain, self._arrival, self._dp_rank = recorded.domain, recorded.arrival, recorded.dp_rank
        self._taken, self.dropped = recorded.taken, recorded.taken[-1] - len(recorded.rows)
        self._pending, self._pending_rows = recorded.items, sum(self._size(item) for item in recorded.items)
        self._flushed = len(recorded.rows) - len(recorded.items)

    def _make_directory(self) -> None:
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise OutputError("already exists", where=str(self.path), hint="choose another place, or remove it")
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot be made ({error.strerror})", where=str(self.path), hint="choose a place that you may write to"
            ) from None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            try:
                self.close()
            except MoeplanError:
                self._discard()
                raise
        elif issubclass(kind, MoeplanError) and not self.keep_on_error:
            self._discard()
        else:
            self._flush()

    def _discard(self) -> None:
        names = [part["file"] for part in self._parts] + [REQUESTS_NAME, JSON_NAME]
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)

    def add(
        self,
        experts: npt.NDArray[np.integer],
        *,
        prefill: int,
        domain: str = "",
        arrival: float | None = None,
        positions: npt.NDArray[np.integer] | None = None,
        weights: npt.NDArray[np.floating] | None = None,
        dp_rank: int | None = None,
        where: str | None = None,
    ) -> None:
        """`add_request(Request(...))`."""
        self.add_request(Request(experts, prefill, domain, arrival, positions, weights, dp_rank, where))

    def add_request(self, request: Request) -> None:
        """Add one request; one of fewer than `min_tokens` rows is checked and dropped.

        Raises:
            FormatError: wrong shape, an id outside 0 .. E - 1, lengths that do not fit.
        """
        experts, prefill, domain, weights = request.experts, request.prefill, request.domain, request.weights
        positions, dp_rank, where = request.positions, request.dp_rank, request.where
        where = where or f"request {len(self._rows)}"
        layers, k, count = self.shape.num_layers, self.shape.top_k, self.shape.num_experts
        if experts.ndim != 3 or experts.shape[1:] != (layers, k):
            raise FormatError(
                f"rows of shape {list(experts.shape[1:])}, but the trace has {layers} layers x {k} picks", where=where
            )
        rows = len(experts)
        if rows == 0:
            raise FormatError("a request without any token row", where=where)
        if not UNKNOWN <= prefill <= rows:
            raise FormatError(f"prefill length {prefill} does not fit {rows} rows", where=where)
        if len(domain) > MAX_DOMAIN_CHARS or any(ord(c) < 32 for c in domain):
            raise FormatError("the domain label is too long or holds control characters", where=where)
        if int(experts.min()) < 0 or int(experts.max()) >= count:
            row, layer, _ = np.argwhere((experts < 0) | (experts >= count))[0]
            bad = experts[row, layer][(experts[row, layer] < 0) | (experts[row, layer] >= count)][0]
            raise FormatError(
                f"row {row}, layer {self.shape.layer_ids[layer]}: expert {bad} is outside 0..{count - 1}",
                where=where,
                hint="check the number of experts",
            )
        if (weights is not None) != self.weights or (weights is not None and weights.shape != experts.shape):
            raise FormatError("gate weights are missing or do not match the picks", where=where)
        if positions is not None and positions.shape != (rows,):
            raise FormatError(f"{positions.shape} positions for {rows} rows", where=where)
        if dp_rank is not None and not 0 <= dp_rank < 2**31:
            raise FormatError(f"data-parallel rank {str(dp_rank)[:20]} is none", where=where)
        if rows < self.min_tokens:
            self._drop(domain)
        else:
            self._keep(
                experts.astype(expert_dtype(count)), prefill, domain, request.arrival, dp_rank, positions, weights
            )

    def _drop(self, domain: str) -> None:
        self.dropped += 1

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
        """One request that was found good."""
        item = (
            experts,
            prefill,
            np.arange(len(experts), dtype=np.uint32) if positions is None else positions.astype(np.uint32),
            None if weights is None else weights.astype(np.float16),
        )
        self._store(item, len(experts), prefill, domain, arrival, dp_rank, len(self) + self.dropped + 1)

    def _store(
        self,
        item: tuple[Any, ...],
        rows: int,
        prefill: int,
        domain: str,
        arrival: float | None,
        dp_rank: int | None,
        taken: int,
    ) -> None:
        if self._pending_rows and self._pending_rows + self._size(item) > self._part_rows:
            self._flush()
        self._rows.append(rows)
        self._prefill.append(prefill)
        self._domain.append(domain)
        self._arrival.append(arrival)
        self._dp_rank.append(dp_rank)
        self._taken.append(taken)
        self._pending_rows += self._size(item)
        self._pending.append(item)  # last: a Ctrl-C before this line leaves the request out, never half in

    def close(self) -> None:
        """Write what is left and mark the trace complete."""
        if not self._rows:
            what, hint = "there is no request to write", "check the input"
            if self.dropped:
                what = f"none of the {self.dropped} requests has {self.min_tokens} tokens"
                hint = "use a smaller --min-tokens"
            raise FormatError(what, where=str(self.path), hint=hint)
        self._flush(complete=True)

    def _flush(self, *, complete: bool = False) -> None:
        if self._pending and not self._already_written():
            self._write_part()
        if self._parts:
            self._write_requests()
            self._write_json(complete)
        elif self._made:
            shutil.rmtree(self.path, ignore_errors=True)

    def _already_written(self) -> bool:
        """Whether the pending requests are just those of the part that was taken back; if more came, it must go.

        The json is made to forget a part before its file changes, so that a kill at any moment leaves a readable trace.
        """
        last, self._taken_back = self._taken_back, None
        if last is None:
            return False
        if last["requests"] == len(self._pending):
            parts, flushed = [*self._parts, last], self._flushed + len(self._pending)
            self._parts, self._flushed, self._pending, self._pending_rows = parts, flushed, [], 0
            return True
        if self._parts:
            self._write_json(complete=False)
        else:
            (self.path / JSON_NAME).unlink(missing_ok=True)
        return False

    def _row_values(self) -> int:
        """Values in one row of a part."""
        return self.shape.num_layers * self.shape.top_k

    def _size(self, item: tuple[Any, ...]) -> int:
        """Rows of a part that a request takes."""
        return len(item[0])

    def _read_back(self, trace: Trace) -> list[tuple[Any, ...]]:
        """The requests of the last part, as they were before it was written."""
        return token_items(trace, weights=self.weights)

    def _write_part(self) -> None:
        import pyarrow.parquet as pq

        count = len(self._pending)
        table = self._table(self._flushed)
        path = self.path / f"part-{len(self._parts):05d}.parquet"
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=table.num_rows)
        tokens = sum(self._rows[self._flushed : self._flushed + count])
        part = {"file": path.name, "rows": tokens, "requests": count, "sha256": sha256(path)}
        parts, flushed, pending = [*self._parts, part], self._flushed + count, list[tuple[Any, ...]]()
        # Plain assignments, no call between them: a Ctrl-C cannot fall in here and write the same rows twice.
        self._parts, self._flushed, self._pending, self._pending_rows = parts, flushed, pending, 0

    def _table(self, first: int) -> pa.Table:
        """The pending requests as a part; `first` is the number of the first one."""
        return token_table(self.shape, self._pending, first, weights=self.weights)

    def _write_requests(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        done = slice(0, self._flushed)
        rows = np.array(self._rows[done], np.int64)
        prefill = np.array(self._prefill[done], np.int64)
        unknown = prefill == UNKNOWN
        columns = {
            "id": pa.array(np.arange(self._flushed, dtype=np.uint32)),
            "domain": pa.array(self._domain[done]).dictionary_encode(),
            "rows": pa.array(rows),
            "prefill": pa.array(prefill, mask=unknown),
            "decode": pa.array(rows - prefill, mask=unknown),
            "arrival": pa.array(self._arrival[done], pa.float64()),
        }
        if any(rank is not None for rank in self._dp_rank[done]):
            columns["dp_rank"] = pa.array(self._dp_rank[done], pa.int32())
        if self._needs_taken():
            columns["taken"] = pa.array(self._taken[done], pa.uint32())
        table = pa.table(columns)
        with atomic_path(self.path / REQUESTS_NAME) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _needs_taken(self) -> bool:
        """Whether a request's number does not say how many had been taken in before it."""
        return self.min_tokens > 1

    def _counts(self) -> dict[str, int]:
        """Counts beside requests, tokens and picks."""
        return {"dropped": self.dropped} if self.min_tokens > 1 else {}

    def _head(self) -> dict[str, Any]:
        """What tells this form of a trace from others."""
        return {"version": VERSION}

    def _write_json(self, complete: bool) -> None:
        tokens = sum(part["rows"] for part in self._parts)
        digest = hashlib.sha256("".join(part["sha256"] for part in self._parts).encode()).hexdigest()
        data: dict[str, Any] = {
            "format": FORMAT,
            **self._head(),
            "complete": complete,
            "synthetic": self.synthetic,
            "model": self.shape.to_dict(),
            "source": self.source,
            "weights": self.weights,
            "counts": {
                "requests": self._flushed,
                "tokens": tokens,
                "picks": tokens * self.shape.num_layers * self.shape.top_k,
                **self._counts(),
            },
            "parts": self._parts,
            "checksum": digest,
        }
        if complete:  # before that, a kill may leave it one part ahead of this file
            data["requests_sha256"] = sha256(self.path / REQUESTS_NAME)
        write_json(self.path / JSON_NAME, data)
