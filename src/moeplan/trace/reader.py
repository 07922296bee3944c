"""Reading a trace: part by part, checked, never whole unless asked."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan import embedded
from moeplan.errors import FormatError, UsageError
from moeplan.io.files import sha256
from moeplan.io.json import convert, read_json
from moeplan.trace.aggregation import Sums, read_sums
from moeplan.trace.columns import list_values, phase_names, read_columns
from moeplan.trace.counts import is_counts_profile
from moeplan.trace.format import (
    AGGREGATED,
    FEWER_PICKS,
    FORMAT,
    JSON_NAME,
    REQUESTS_NAME,
    UNKNOWN,
    VERSION,
    PartInfo,
    PromptsInfo,
    Requests,
    Rows,
    TraceHead,
    layers_kept,
)
from moeplan.trace.prompt_files import read_prompts
from moeplan.trace.prompts import PromptFeatures
from moeplan.types import ModelShape, expert_dtype

__all__ = ["Trace", "open_trace"]

#: How many requests `requests.parquet` may be ahead of the json after a kill: more than a part can hold.
MAX_AHEAD = 16 * 1024 * 1024


@dataclass(frozen=True)
class Trace:
    """An opened trace: its head and its requests; rows are read when asked for.

    Attributes:
        shape: the model, without the layers that were left out.
        requests: every request, usable for a question or not.
        synthetic: a generated workload; outputs must say so.
        complete: False for a recording that was cut off.
        checksum: identifies the rows (sha256 over the parts' own).
        aggregate: N where the trace holds no token rows but sums of N requests, which `requests` then are; else 1.
        dropped: requests that were shorter than asked for and are not stored.
        left_over: requests that filled no sum and are not stored.
        stored_parts: the files that hold the rows.
        requires: what a reader had to know to open it, such as `fewer-picks`.
        prompts_info: kind and key of its prompt features; None where it keeps none.
    """

    path: Path
    shape: ModelShape
    requests: Requests
    synthetic: bool
    complete: bool
    checksum: str
    source: dict[str, Any]
    without_layers: tuple[int, ...]
    aggregate: int
    dropped: int
    left_over: int
    stored_parts: tuple[PartInfo, ...]
    requires: tuple[str, ...]
    prompts_info: PromptsInfo | None
    _stored: ModelShape
    _weights: bool

    @property
    def label(self) -> str:
        """The model's name, marked where the workload is generated."""
        return f"{self.shape.name or self.path.name}{' (synthetic)' if self.synthetic else ''}"

    @property
    def request_noun(self) -> str:
        """What `requests` are, for output: requests, or sums of N requests."""
        return "requests" if self.aggregate == 1 else f"sums of {self.aggregate} requests"

    @property
    def row_bytes(self) -> int:
        """Bytes that `load` takes per token."""
        return self.shape.num_layers * self.shape.top_k * np.dtype(self.expert_dtype).itemsize

    @property
    def fewer_picks(self) -> bool:
        """Whether tokens may have fewer than k picks: the id E then stands for each one that a token lacks."""
        return FEWER_PICKS in self.requires

    @property
    def expert_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The type of its token rows."""
        return expert_dtype(self.shape.num_experts, fewer_picks=self.fewer_picks)

    @functools.cached_property
    def prompts(self) -> PromptFeatures | None:
        """Features of the prompts, in the order of `requests`; None where the trace keeps none.

        Raises:
            FormatError: a file that is damaged or missing.
        """
        if self.prompts_info is None:
            return None
        paths = [(self.path / part.prompts_file, part.requests) for part in self.stored_parts]
        for (path, _), part in zip(paths, self.stored_parts, strict=True):
            if sha256(path) != part.prompts_sha256:
                raise FormatError("checksum differs from trace.json", where=str(path), hint="it was changed or cut off")
        return read_prompts(paths, self.prompts_info.kind, self.prompts_info.key)

    @property
    def has_weights(self) -> bool:
        """Whether it holds gate weights."""
        return self._weights

    def parts(self, *, weights: bool = False, positions: bool = False) -> Iterator[Rows]:
        """Each part in turn, verified: checksum, schema, ids, and agreement with the table of requests.

        Raises:
            UsageError: an aggregated trace has no token rows; weights were asked for and are not there.
        """
        if self.aggregate > 1:
            raise UsageError(
                f"is aggregated (sums of {self.aggregate} requests): it has no token rows, which this needs",
                where=str(self.path),
                hint="use a trace made without --aggregate",
            )
        if weights and not self._weights:
            raise UsageError(
                "this trace holds no gate weights", where=str(self.path), hint="record it with --keep-gate-weights"
            )
        _, keep = layers_kept(self._stored, self.without_layers)
        for part, first in self._checked_files():
            yield self._read_part(part, first, keep, weights, positions)

    def sums(self) -> Iterator[Sums]:
        """Each part of an aggregated trace in turn, verified."""
        if self.aggregate == 1:
            raise UsageError("has token rows, it is not aggregated", where=str(self.path))
        _, keep = layers_kept(self._stored, self.without_layers)
        for part, first in self._checked_files():
            own = self.requests.between(first, first + part.requests)
            found = read_sums(self.path / part.file, first, own, self._stored, fewer_picks=self.fewer_picks)
            yield found if keep is None else Sums(first, found.counts[:, :, keep])

    def _checked_files(self) -> Iterator[tuple[PartInfo, int]]:
        """Each part's description and first request, once its file has the checksum it should have."""
        first = 0
        for part in self.stored_parts:
            path = self.path / part.file
            if sha256(path) != part.sha256:
                raise FormatError(
                    "checksum differs from trace.json",
                    where=str(path),
                    hint="the part was changed or truncated: record again",
                )
            yield part, first
            first += part.requests

    def load(self) -> Rows:
        """All rows in memory: tokens x `row_bytes` bytes."""
        total, layers, k = int(self.requests.rows.sum()), self.shape.num_layers, self.shape.top_k
        experts = np.empty((total, layers, k), self.expert_dtype)
        at = 0
        for rows in self.parts():
            experts[at : at + len(rows.experts)] = rows.experts
            at += len(rows.experts)
        return Rows(0, experts, self.requests.offsets, self.requests.prefill)

    def _read_part(self, part: PartInfo, first: int, keep: Any, weights: bool, positions: bool) -> Rows:
        path, stored = self.path / part.file, self._stored
        names = ["request", "phase", "experts"] + ["weights"] * weights + ["position"] * positions
        columns = read_columns(path, names, at_most=part.rows)
        count = len(columns["request"])
        picks = list_values(columns["experts"], stored.num_layers * stored.top_k, path)
        dtype, most = self.expert_dtype, stored.num_experts - 1 + self.fewer_picks
        if picks.dtype != dtype and not (picks.dtype.kind in "ui" and picks.size and int(picks.min()) >= 0):
            raise FormatError(f"column experts holds {picks.dtype}, not unsigned ids", where=str(path))
        experts = picks.reshape(count, stored.num_layers, stored.top_k)
        if picks.size and int(picks.max()) > most:
            row = int(np.argmax((experts > most).any(axis=(1, 2))))
            raise FormatError(
                f"row {row}: expert {int(experts[row].max())} is outside 0..{stored.num_experts - 1}", where=str(path)
            )
        requests = slice(first, first + part.requests)
        lengths, prefill = self.requests.rows[requests], self.requests.prefill[requests]
        self._check_rows(path, columns, lengths, prefill, first)
        gate = None
        if weights:
            gate = list_values(columns["weights"], stored.num_layers * stored.top_k, path).reshape(experts.shape)
        if keep is not None:
            experts = np.ascontiguousarray(experts[:, keep])
            gate = None if gate is None else gate[:, keep]
        at = columns["position"].to_numpy(zero_copy_only=False).astype(np.uint32) if positions else None
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return Rows(first, experts.astype(dtype, copy=False), offsets, prefill, gate, at)

    def _check_rows(self, path: Path, columns: dict[str, Any], lengths: Any, prefill: Any, first: int) -> None:
        """The part's request and phase columns must say what requests.parquet says."""
        request = columns["request"].to_numpy(zero_copy_only=False)
        expected = np.repeat(np.arange(first, first + len(lengths)), lengths)
        if len(request) != len(expected):
            raise FormatError(f"{len(request)} rows, but requests.parquet counts {len(expected)}", where=str(path))
        wrong = request != expected
        if wrong.any():
            row = int(np.argmax(wrong))
            raise FormatError(
                f"row {row}: request {request[row]} where requests.parquet has {expected[row]}", where=str(path)
            )
        text = phase_names(columns["phase"])
        start = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        index = np.arange(len(expected)) - np.repeat(start, lengths)
        length = np.repeat(prefill, lengths)
        should = np.where(length == UNKNOWN, "unknown", np.where(index < length, "prefill", "decode"))
        wrong = text != should
        if wrong.any():
            row = int(np.argmax(wrong))
            raise FormatError(f"row {row}: phase {str(text[row])!r}, expected {str(should[row])!r}", where=str(path))


def open_trace(path: str | Path, *, without_layers: Sequence[int] = ()) -> Trace:
    """Open a trace directory.

    Args:
        path: the directory; the word `embedded` for the trace that comes with the package.
        without_layers: the model's own indices of layers to leave out of everything.

    Raises:
        FormatError: not a trace, one that was interrupted before its first part, a newer version, a wrong checksum.
        UsageError: a layer that is not there.
    """
    root = embedded.named(path, embedded.TRACE)
    head_path = root / JSON_NAME
    if not root.exists():
        raise FormatError("does not exist", where=str(root), hint="check the path")
    if is_counts_profile(root):
        raise FormatError(
            "holds counts without requests; this needs a trace",
            where=str(root),
            hint="record request by request, or import stored responses",
        )
    if not root.is_dir() or not head_path.is_file():
        hint = "make one with 'moeplan record' or 'moeplan import'"
        if root.suffix in (".npz", ".json", ".csv"):
            hint = (
                f"import it first: moeplan import arrays {root.name} -o {root.stem}" if root.suffix == ".npz" else hint
            )
        raise FormatError("is not a moeplan trace (a directory with trace.json)", where=str(root), hint=hint)
    where = str(head_path)
    raw = read_json(head_path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f"is not a {FORMAT} file", where=where)
    version = raw.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(
            f"is of version {str(version)[:20]}, this moeplan reads up to {VERSION}", where=where, hint="update moeplan"
        )
    head: TraceHead = convert(raw, TraceHead, where)
    parts, aggregate, requires = head.parts, head.aggregate, head.requires
    for name in requires:
        if name not in (AGGREGATED, FEWER_PICKS):
            raise FormatError(
                f"requires {name[:40]!r}, which this moeplan does not know", where=where, hint="update moeplan"
            )
    summed = version == 2 if version < 3 else AGGREGATED in requires  # version 2 was for sums and nothing else
    if (aggregate > 1) != summed:
        raise FormatError(f"is of version {version} and sums {aggregate} requests a row", where=where)
    for number, part in enumerate(parts):
        if part.file != f"part-{number:05d}.parquet":  # a name of ours, never a path elsewhere
            raise FormatError(f"parts[{number}].file: {part.file[:40]!r} is not part-{number:05d}.parquet", where=where)
    if not parts:
        raise FormatError("the trace holds no request", where=str(root), hint="record or import again")
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    if head.checksum != digest:
        raise FormatError("checksum does not match its parts", where=where)
    requests_path = root / REQUESTS_NAME
    if head.complete and sha256(requests_path) != head.requests_sha256:
        raise FormatError("checksum differs from trace.json", where=str(requests_path))
    shape, _ = layers_kept(head.model, without_layers)
    return Trace(
        path=root,
        shape=shape,
        requests=_read_requests(requests_path, sum(p.requests for p in parts), sum(p.rows for p in parts)),
        synthetic=head.synthetic,
        complete=head.complete,
        checksum=digest,
        source=head.source,
        without_layers=tuple(without_layers),
        aggregate=aggregate,
        dropped=head.counts.dropped,
        left_over=head.counts.left_over,
        stored_parts=parts,
        requires=requires,
        prompts_info=head.prompts,
        _stored=head.model,
        _weights=head.weights,
    )


def _read_requests(path: Path, count: int, tokens: int) -> Requests:
    names = ["domain", "rows", "prefill", "arrival"]
    columns = read_columns(path, names, at_most=count + MAX_AHEAD, optional=["dp_rank", "session", "turn"])
    if len(columns["rows"]) < count:
        raise FormatError(f"{len(columns['rows'])} requests, but trace.json counts {count}", where=str(path))

    def numbers(name: str, missing: float, dtype: type[Any]) -> np.ndarray[Any, np.dtype[Any]]:
        column = columns[name].slice(0, count)
        try:
            return np.asarray(column.fill_null(missing).to_numpy(zero_copy_only=False), dtype)
        except (ValueError, TypeError, NotImplementedError):
            raise FormatError(f"column {name} does not hold numbers", where=str(path)) from None

    rows, prefill = numbers("rows", 0, np.int64), numbers("prefill", UNKNOWN, np.int64)
    wrong = (rows < 1) | (prefill < UNKNOWN) | (prefill > rows)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FormatError(f"row {row}: {prefill[row]} prefill rows of {rows[row]}", where=str(path))
    if int(rows.sum()) != tokens:
        raise FormatError(f"counts {int(rows.sum())} rows, the parts hold {tokens}", where=str(path))
    labels = [str(label) for label in columns["domain"].slice(0, count).to_pylist()]
    domains = tuple(dict.fromkeys(labels))
    index = {label: i for i, label in enumerate(domains)}

    def optional(name: str, what: str, bits: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """A column of numbers 0 .. 2**bits - 1, -1 where one is unknown; None where there is no column."""
        if name not in columns:
            return None
        values = numbers(name, -1, np.int64)
        wrong = (values < -1) | (values > 2**bits - 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise FormatError(f"row {row}: {what} {values[row]} is outside 0..{2**bits - 1}", where=str(path))
        return values

    rank, session = optional("dp_rank", "data-parallel rank", 31), optional("session", "session", 63)
    turn = optional("turn", "turn", 31)
    return Requests(
        rows,
        prefill,
        np.array([index[label] for label in labels], np.int64),
        domains,
        numbers("arrival", np.nan, np.float64),
        np.full(count, -1, np.int64) if rank is None else rank,
        session,
        None if turn is None else turn.astype(np.int32),
    )
