"""Writing a trace request by request: parts are written as they fill, and the trace is readable at every moment.

Order on disk at every flush: the part, the prompt features of its requests where they are kept, `requests.parquet`,
`trace.json`, each under a temporary name and then renamed. A kill between two of them leaves the older json, which
names only finished parts; the reader takes from `requests.parquet` only as many rows as the json counts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.io.files import atomic_path, make_folder, sha256
from moeplan.io.json import write_json
from moeplan.trace.aggregation import RequestSums
from moeplan.trace.format import (
    FEWER_PICKS,
    FORMAT,
    JSON_NAME,
    REQUESTS_NAME,
    UNKNOWN,
    PartInfo,
    PromptsInfo,
    Request,
    StoredRequest,
)
from moeplan.trace.prompt_files import write_prompts
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.resume import check_same, read_recorded, read_stored
from moeplan.trace.retention import RetentionPolicy
from moeplan.trace.token_rows import TokenRows
from moeplan.types import ModelShape

__all__ = ["TraceWriter"]

#: Picks per part: 16 Mi picks decode to 16 MiB (32 MiB above 256 experts), whatever the model.
PART_PICKS = 16 * 1024 * 1024
MAX_DOMAIN_CHARS = 200

#: "import": an error of the input removes what the writer made. "record": what is on disk is kept. "resume": as record,
#: and the recording at the path, which was interrupted, is continued.
#: "append": as record, and the trace at the path gets more parts.
WriterMode = Literal["import", "record", "resume", "append"]


class TraceWriter:
    """Writes a trace request by request; use it as a context manager.

    Leaving the block normally marks the trace complete. Ctrl-C and other exceptions keep what was added and leave the
    trace readable but marked incomplete; what an error of the input itself (`MoeplanError`) does, `mode` says.

    Args:
        path: the directory to make; it must not exist, or be empty.
        shape: the model.
        source: how the trace came about, as plain JSON values (no prompt text).
        synthetic: True for a generated workload; every output then says so.
        weights: store gate weights as well.
        retention: which requests are stored, and in what form; all of them, row by row, when not given.
        part_picks: picks per part.
        mode: "import" removes what was made when the input turns out bad; "record" keeps it; "resume" continues the
            recording at `path` that was interrupted: `pending` says with which requests. The finished trace then equals
            that of a recording without interruption, given the same arguments and requests. "append" adds requests to
            the trace at `path`, complete or not, in parts of their own; see `open_to_append`.

    Raises:
        OutputError: `path` is taken or cannot be made.
        UsageError: to resume, and the trace is complete or was begun with another shape, source or choice of weights;
            to append, and it is aggregated.
        FormatError: to resume, and `path` is not a trace or a part of it is damaged.

    Examples:
        >>> with TraceWriter(path, ModelShape("m", num_layers=2, num_experts=8, top_k=2), source={}) as writer:
        ...     writer.add(np.zeros((5, 2, 2), int) + [0, 7], prefill=3, domain="chat")
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        *,
        source: dict[str, Any],
        synthetic: bool = False,
        weights: bool = False,
        retention: RetentionPolicy | None = None,
        part_picks: int = PART_PICKS,
        mode: WriterMode = "import",
    ) -> None:
        self.retention = retention or RetentionPolicy()
        self.path, self.shape, self.source = Path(path), shape, {**source, **self.retention.source()}
        self.synthetic, self.weights, self._keep_on_error = synthetic, weights, mode != "import"
        self._form: TokenRows | RequestSums = TokenRows(shape, self.retention, weights=weights)
        if self.retention.aggregate:
            self._form = RequestSums(shape, self.retention)
        self._part_rows = max(1, part_picks // self._form.row_values)
        self._requests: list[StoredRequest] = []  # those in parts and those pending
        self._pending: list[Any] = []  # what the form stores of those that are in no part yet
        self._pending_rows = 0
        self._parts: list[PartInfo] = []
        self._flushed = 0  # requests in parts
        self._last: PartInfo | None = None  # description of the last part of a recording that is resumed
        self._made = False
        self._unmarked = mode == "append"  # its `trace.json` may still call it complete
        if mode == "resume":
            self._restore(open_trace(path))
        elif mode == "append":
            self._restore_all(open_trace(path))
        else:
            self._made = make_folder(self.path)

    def __len__(self) -> int:
        """Requests (or sums over requests) stored so far."""
        return len(self._requests)

    @property
    def dropped(self) -> int:
        """Requests of fewer than `retention.min_tokens` rows."""
        return self._form.dropped

    def pending(self, domains: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool [R]: which requests are still to be added to a resumed recording.

        Args:
            domains: the label of every request, in their order.
        """
        return self._form.pending(domains)

    def _restore(self, trace: Trace) -> None:
        check_same(trace, self.shape, self.source, weights=self.weights)
        recorded = read_recorded(trace)
        self._pending = list(self._form.read_back(trace))
        self._form.restore(recorded.requests)
        self._parts, self._last, self._requests = recorded.parts, recorded.last, recorded.requests
        self._pending_rows = sum(self._form.size(content) for content in self._pending)
        self._flushed = len(self._requests) - len(self._pending)

    def _restore_all(self, trace: Trace) -> None:
        if trace.aggregate > 1:
            raise UsageError("is aggregated: requests cannot be added to it", where=str(trace.path))
        recorded = read_stored(trace)
        self._form.restore(recorded.requests)
        self._parts, self._requests = [*recorded.parts, recorded.last], recorded.requests
        self._flushed = len(self._requests)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            try:
                self.close()
            except MoeplanError:
                if not (self._keep_on_error and self._parts):
                    self._discard()
                raise
        elif issubclass(kind, MoeplanError) and not self._keep_on_error:
            self._discard()
        else:
            self._flush()

    def _discard(self) -> None:
        names = [name for part in self._parts for name in (part.file, part.prompts_file)]
        for name in (*names, REQUESTS_NAME, JSON_NAME):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)

    def add(self, experts: npt.NDArray[np.integer[Any]], *, prefill: int, **fields: Any) -> None:
        """Add one request; `fields` are further ones of `Request`, the errors those of `add_request`."""
        self.add_request(Request(experts, prefill, **fields))

    def add_request(self, request: Request) -> None:
        """Add one request; one of fewer than `retention.min_tokens` rows is checked and dropped.

        Raises:
            FormatError: wrong shape, an id outside 0 .. E - 1, lengths that do not fit.
        """
        where, missing = request.where or f"request {len(self)}", self.shape.num_experts
        if self.retention.fewer_picks:
            request = replace(request, experts=np.where(request.experts == -1, missing, request.experts))
        self._check(request, where)
        if len(request.experts) < self.retention.min_tokens:
            self._form.drop(request.domain)
            return
        taken = self._form.take(request)
        if taken is None:
            return
        stored, content = taken
        size = self._form.size(content)  # type: ignore[arg-type]
        if self._pending_rows and self._pending_rows + size > self._part_rows:
            self._flush()
        self._requests.append(stored)
        self._pending_rows += size
        self._pending.append(content)  # last: a Ctrl-C before this line leaves the request out, never half in

    def _check(self, request: Request, where: str) -> None:
        """Raise FormatError for a request that does not fit the model, or itself."""
        experts, shape, rows = request.experts, self.shape, len(request.experts)
        layers, k, count = shape.num_layers, shape.top_k, shape.num_experts
        most = count - 1 + self.retention.fewer_picks
        if experts.ndim != 3 or experts.shape[1:] != (layers, k):
            raise FormatError(
                f"rows of shape {list(experts.shape[1:])}, but the trace has {layers} layers x {k} picks", where=where
            )
        if rows == 0:
            raise FormatError("a request without any token row", where=where)
        if not UNKNOWN <= request.prefill <= rows:
            raise FormatError(f"prefill length {request.prefill} does not fit {rows} rows", where=where)
        if len(request.domain) > MAX_DOMAIN_CHARS or any(ord(c) < 32 for c in request.domain):
            raise FormatError("the domain label is too long or holds control characters", where=where)
        if int(experts.min()) < 0 or int(experts.max()) > most:
            row, layer, pick = np.argwhere((experts < 0) | (experts > most))[0]
            raise FormatError(
                f"row {row}, layer {shape.layer_ids[layer]}: expert {experts[row, layer, pick]} is outside"
                f" 0..{count - 1}",
                where=where,
                hint="check the number of experts",
            )
        weights, positions, dp_rank = request.weights, request.positions, request.dp_rank
        if (weights is not None) != self.weights or (weights is not None and weights.shape != experts.shape):
            raise FormatError("gate weights are missing or do not match the picks", where=where)
        if positions is not None and positions.shape != (rows,):
            raise FormatError(f"{positions.shape} positions for {rows} rows", where=where)
        if dp_rank is not None and not 0 <= dp_rank < 2**31:
            raise FormatError(f"data-parallel rank {str(dp_rank)[:20]} is outside 0..{2**31 - 1}", where=where)
        for label, number, bits in (("session", request.session, 63), ("turn", request.turn, 31)):
            if number is not None and not 0 <= number < 2**bits:
                raise FormatError(f"{label} {str(number)[:20]} is outside 0..{2**bits - 1}", where=where)
        if request.prompt is not None and len(request.prompt) != 1:
            raise FormatError(f"the features of {len(request.prompt)} prompts for one request", where=where)

    def close(self) -> None:
        """Write what is left and mark the trace complete; sums that are not full are left out."""
        if not self._requests:
            what, hint = self._form.why_empty()
            raise FormatError(what, where=str(self.path), hint=hint)
        self._flush(complete=True)

    def flush(self) -> None:
        """Write what was added so far; it is then in a part of its own, and readers see it."""
        self._flush()

    def _flush(self, *, complete: bool = False) -> None:
        if self._unmarked and self._pending:  # before requests.parquet changes: its checksum binds complete traces
            self._write_json(complete=False)
            self._unmarked = False
        if self._pending and not self._already_written():
            self._write_part()
        if self._parts:
            self._write_requests()
            self._write_json(complete)
        elif self._made:
            shutil.rmtree(self.path, ignore_errors=True)

    def _already_written(self) -> bool:
        """Whether the pending requests are just those of the part that was read back; if more came, it must go.

        The json is written without a part before the part's file changes, so that a kill at any moment leaves a
        readable trace.
        """
        last, self._last = self._last, None
        if last is None:
            return False
        if last.requests == len(self._pending):
            parts, flushed = [*self._parts, last], self._flushed + len(self._pending)
            self._parts, self._flushed, self._pending, self._pending_rows = parts, flushed, [], 0
            return True
        if self._parts:
            self._write_json(complete=False)
        else:
            (self.path / JSON_NAME).unlink(missing_ok=True)
        return False

    def _write_part(self) -> None:
        import pyarrow.parquet as pq

        count = len(self._pending)
        table = self._form.table(self._pending, self._flushed)
        path = self.path / f"part-{len(self._parts):05d}.parquet"
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=table.num_rows)
        tokens = sum(request.rows for request in self._requests[self._flushed : self._flushed + count])
        part = PartInfo(path.name, tokens, count, sha256(path))
        prompts = self._form.prompts(self._pending)
        if prompts is not None:
            write_prompts(self.path / part.prompts_file, prompts)
            part = msgspec.structs.replace(part, prompts_sha256=sha256(self.path / part.prompts_file))
        parts, flushed, pending = [*self._parts, part], self._flushed + count, list[Any]()
        # Plain assignments, no call between them: a Ctrl-C cannot fall in here and write the same rows twice.
        self._parts, self._flushed, self._pending, self._pending_rows = parts, flushed, pending, 0

    def _write_requests(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        done = self._requests[: self._flushed]
        rows = np.array([request.rows for request in done], np.int64)
        prefill = np.array([request.prefill for request in done], np.int64)
        unknown = prefill == UNKNOWN
        columns = {
            "id": pa.array(np.arange(self._flushed, dtype=np.uint32)),
            "domain": pa.array([request.domain for request in done]).dictionary_encode(),
            "rows": pa.array(rows),
            "prefill": pa.array(prefill, mask=unknown),
            "decode": pa.array(rows - prefill, mask=unknown),
            "arrival": pa.array([request.arrival for request in done], pa.float64()),
        }
        for name, kind in (("dp_rank", pa.int32()), ("session", pa.int64()), ("turn", pa.int32())):
            values = [getattr(request, name) for request in done]
            if any(value is not None for value in values):
                columns[name] = pa.array(values, kind)
        if self._form.keeps_taken:
            columns["taken"] = pa.array([request.taken for request in done], pa.uint32())
        table = pa.table(columns)
        with atomic_path(self.path / REQUESTS_NAME) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _write_json(self, complete: bool) -> None:
        tokens = sum(part.rows for part in self._parts)
        digest = hashlib.sha256("".join(part.sha256 for part in self._parts).encode()).hexdigest()
        data: dict[str, Any] = {
            "format": FORMAT,
            **self._form.head,
            "requires": [*self._form.requires, *([FEWER_PICKS] if self.retention.fewer_picks else [])],
            "complete": complete,
            "synthetic": self.synthetic,
            "model": self.shape.to_dict(),
            "source": self.source,
            "weights": self.weights,
            "counts": {
                "requests": self._flushed,
                "tokens": tokens,
                **({} if self.retention.fewer_picks else {"picks": tokens * self.shape.num_layers * self.shape.top_k}),
                **self._form.counts(self._flushed),
            },
            "parts": [_described(part) for part in self._parts],
            "checksum": digest,
        }
        policy = self.retention.prompts
        if policy is not None:
            data["prompts"] = msgspec.to_builtins(PromptsInfo(policy.kind, policy.key))
        if complete:  # before that, a kill may leave it one part ahead of this file
            data["requests_sha256"] = sha256(self.path / REQUESTS_NAME)
        write_json(self.path / JSON_NAME, data)


def _described(part: PartInfo) -> dict[str, Any]:
    """A part as `trace.json` has it."""
    described: dict[str, Any] = msgspec.to_builtins(part)
    return {key: value for key, value in described.items() if value is not None}
