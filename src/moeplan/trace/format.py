"""The trace format: names, schemas, and the two values that everything reads (`Requests`, `Rows`).

A trace is a directory: `trace.json`, `requests.parquet` (one row per request) and `part-00000.parquet` .. (one row per
token; an aggregated trace has sums over requests instead: `aggregation.py`); where prompt features are kept,
`prompts-00000.parquet` .. beside the parts (`prompts.py`). A request's rows are whole in one part, in order, prefill
before decode; requests are numbered 0, 1, .. in the order of the parts. The documentation of the trace format says what
MUST and MAY be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.trace.prompts import PromptFeatures, PromptKind
from moeplan.types import ModelShape, expert_dtype

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "AGGREGATED",
    "FEWER_PICKS",
    "FORMAT",
    "JSON_NAME",
    "PHASES",
    "REQUESTS_NAME",
    "UNKNOWN",
    "VERSION",
    "PartInfo",
    "PromptsInfo",
    "Request",
    "Requests",
    "Rows",
    "StoredRequest",
    "TraceHead",
    "layer_spans",
    "layers_kept",
    "part_schema",
]

#: Version 3 is written; 1 (token rows) and 2 (sums) are read.
FORMAT, VERSION = "moeplan-trace", 3
#: What `requires` in `trace.json` may name: a reader that does not know a name refuses the trace.
AGGREGATED, FEWER_PICKS = "aggregated", "fewer-picks"
JSON_NAME, REQUESTS_NAME = "trace.json", "requests.parquet"
PHASES = ("prefill", "decode", "unknown")
#: Prefill length of a request whose phases nobody recorded.
UNKNOWN = -1

Int64Array = npt.NDArray[np.int64]


Count = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


class PartInfo(msgspec.Struct, frozen=True):
    """A part as `trace.json` describes it: its file's name, token rows, requests, and checksums.

    `prompts_sha256` is of the file with the prompt features of its requests, where the trace keeps them.
    """

    file: str
    rows: Count
    requests: Count
    sha256: str
    prompts_sha256: str | None = None

    @property
    def prompts_file(self) -> str:
        """The name of the file with its prompt features."""
        return self.file.replace("part-", "prompts-")


class PromptsInfo(msgspec.Struct, frozen=True):
    """The prompt features of a trace: their kind, and what names the secret of hashed ones."""

    kind: PromptKind
    key: Annotated[str, msgspec.Meta(max_length=64)] = ""


class HeadCounts(msgspec.Struct, frozen=True):
    """What `trace.json` counts of the requests that are not stored."""

    dropped: Annotated[int, msgspec.Meta(ge=0)] = 0
    left_over: Annotated[int, msgspec.Meta(ge=0)] = 0


class TraceHead(msgspec.Struct, frozen=True):
    """What `trace.json` holds beside its format and version."""

    model: ModelShape
    parts: tuple[PartInfo, ...]
    checksum: str
    complete: bool = False
    synthetic: bool = False
    weights: bool = False
    aggregate: Annotated[int, msgspec.Meta(ge=1)] = 1
    source: dict[str, Any] = {}  # msgspec copies it
    counts: HeadCounts = HeadCounts()
    requests_sha256: str | None = None
    requires: tuple[str, ...] = ()
    prompts: PromptsInfo | None = None


@dataclass(frozen=True)
class Request:
    """One request, as it is added to a trace.

    Attributes:
        experts: integers [rows, L, k], prefill rows first. Where the writer allows fewer picks, -1 (or E) marks each
            pick that a token lacks.
        prefill: how many rows are prefill; `UNKNOWN` (-1) where phases are not known.
        domain: a label; at most 200 characters.
        arrival: seconds since any fixed moment.
        positions: integers [rows], each token's index in its sequence; None for 0, 1, .. (tokens of a cached prefix are
            absent from a trace, so that the first row may have another index).
        weights: gate weights, floats [rows, L, k]; None where the trace does not store them.
        dp_rank: the data-parallel rank that served it, 0 .. 2**31 - 1; None where unknown.
        where: what an error calls this request (a file and row).
        session: number of the conversation that it belongs to, 0 .. 2**63 - 1; None where unknown.
        turn: its place in the session, 0 for the first; None where unknown.
        prompt: features of its prompt (of one request), stored where the writer keeps them; None where unknown.
    """

    experts: npt.NDArray[np.integer[Any]]
    prefill: int
    domain: str = ""
    arrival: float | None = None
    positions: npt.NDArray[np.integer[Any]] | None = None
    weights: npt.NDArray[np.floating[Any]] | None = None
    dp_rank: int | None = None
    where: str | None = None
    session: int | None = None
    turn: int | None = None
    prompt: PromptFeatures | None = None


class StoredRequest(NamedTuple):
    """One row of `requests.parquet`: a request, or a sum of requests.

    Attributes:
        rows, prefill: token rows, and how many of them are prefill; see `Request`.
        domain, arrival, dp_rank, session, turn: see `Request`.
        taken: how many requests (of a sum: of its domain) had been added to the writer when this one was stored.
    """

    rows: int
    prefill: int
    domain: str
    arrival: float | None
    dp_rank: int | None
    taken: int
    session: int | None = None
    turn: int | None = None


@dataclass(frozen=True)
class Requests:
    """The requests of a trace.

    Attributes:
        rows: int64 [R], token rows of each request.
        prefill: int64 [R], how many of them are prefill; `UNKNOWN` (-1) where phases are not known.
        domain: int64 [R], index into `domains`.
        domains: the labels, in order of first appearance.
        arrival: float64 [R], seconds; NaN where unknown.
        dp_rank: int64 [R], the data-parallel rank that served each request; -1 where unknown.
        session: int64 [R], number of the conversation; -1 where unknown. None where the trace has no sessions.
        turn: int32 [R], place in the session, 0 for the first; -1 where unknown. None where the trace has no turns.
    """

    rows: Int64Array
    prefill: Int64Array
    domain: Int64Array
    domains: tuple[str, ...]
    arrival: npt.NDArray[np.float64]
    dp_rank: Int64Array
    session: Int64Array | None = None
    turn: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def offsets(self) -> Int64Array:
        """int64 [R + 1], the first row of each request in the whole trace."""
        return np.concatenate(([0], np.cumsum(self.rows)))

    def between(self, first: int, last: int) -> Requests:
        """Requests first .. last - 1."""
        part = slice(first, last)
        return Requests(
            self.rows[part],
            self.prefill[part],
            self.domain[part],
            self.domains,
            self.arrival[part],
            self.dp_rank[part],
            None if self.session is None else self.session[part],
            None if self.turn is None else self.turn[part],
        )

    @property
    def prefill_known(self) -> Int64Array:
        """int64 [R], prefill rows, 0 where phases are unknown."""
        return np.maximum(self.prefill, 0)

    @property
    def decode(self) -> Int64Array:
        """int64 [R], decode rows, 0 where phases are unknown."""
        return np.where(self.prefill == UNKNOWN, 0, self.rows - self.prefill_known)


@dataclass(frozen=True)
class Rows:
    """Token rows of consecutive requests: one part of a trace, or all of it.

    Attributes:
        first: number of the first request.
        experts: unsigned [T, L, k]; E in place of a pick that a token lacks.
        offsets: int64 [n + 1]; request first + i has rows offsets[i] .. offsets[i + 1] - 1.
        prefill: int64 [n], prefill rows, -1 where phases are unknown.
        weights: float16 [T, L, k] gate weights, or None.
        positions: uint32 [T], each token's index in its sequence, or None.
    """

    first: int
    experts: npt.NDArray[np.unsignedinteger]
    offsets: Int64Array
    prefill: Int64Array
    weights: npt.NDArray[np.float16] | None = None
    positions: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.prefill)

    def phase_ranges(self, phase: str) -> tuple[Int64Array, Int64Array]:
        """(starts, stops), int64 [n] each: every request's rows of one phase, empty where it has none."""
        start, stop = self.offsets[:-1], self.offsets[1:]
        known = self.prefill != UNKNOWN
        middle = start + np.maximum(self.prefill, 0)
        if phase == "prefill":
            return start, np.where(known, middle, start)
        if phase == "decode":
            return np.where(known, middle, stop), stop
        if phase == "unknown":
            return start, np.where(known, start, stop)
        raise ValueError(f"no phase {phase!r}")


def layers_kept(shape: ModelShape, without: Sequence[int]) -> tuple[ModelShape, npt.NDArray[np.intp] | None]:
    """The shape without some layers (by the model's own index), and which layers of arrays remain; None for all.

    Raises:
        UsageError: a layer that the trace does not have, or none left.
    """
    if not without:
        return shape, None
    missing = [layer for layer in without if layer not in shape.layer_ids]
    if missing:
        raise UsageError(
            f"--without-layers {missing[0]}: the trace has no such layer",
            hint=f"its MoE layers are {layer_spans(shape.layer_ids)}",
        )
    keep = np.array([i for i, layer in enumerate(shape.layer_ids) if layer not in set(without)], np.intp)
    if not len(keep):
        raise UsageError("--without-layers leaves no layer")
    return shape.without_layers(tuple(without)), keep


def layer_spans(ids: Sequence[int]) -> str:
    """1,2,3,7 as '1-3, 7', cut after a dozen."""
    spans: list[list[int]] = []
    for i in ids:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
    return ", ".join(texts[:24]) + (", .." if len(texts) > 24 else "")


def part_schema(shape: ModelShape, *, weights: bool, fewer_picks: bool = False) -> pa.Schema:
    """The Arrow schema of a part: one row per token."""
    import pyarrow as pa

    picks = shape.num_layers * shape.top_k
    ids = pa.uint8() if expert_dtype(shape.num_experts, fewer_picks=fewer_picks) is np.uint8 else pa.uint16()
    fields = [
        pa.field("request", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("experts", pa.list_(pa.field("item", ids, nullable=False), picks), nullable=False),
    ]
    if weights:
        fields.append(
            pa.field("weights", pa.list_(pa.field("item", pa.float16(), nullable=False), picks), nullable=False)
        )
    return pa.schema(fields)
