"""A counts profile: how often each expert was picked, without requests.

A directory: `counts.npy`, uint64 [L, E], and `counts.json` (format name and version, model, stage, source, checksum of
the array). Engines that count without telling requests apart leave no more than this. It shows imbalance; what needs
requests (groups, comparing strategies on held-out requests, signatures, co-activation) it cannot do, and a trace of
requests would add exactly that.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, located
from moeplan.io.files import atomic_path, make_folder
from moeplan.io.json import convert, read_json, write_json
from moeplan.io.npz import read_npy_header
from moeplan.io.paths import check_input, readable
from moeplan.trace.format import layer_spans
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

__all__ = [
    "COUNTED_PHASES",
    "WITHOUT_REQUESTS",
    "CountsProfile",
    "equal_ranks_notes",
    "is_counts_profile",
    "make_counts",
    "read_counts",
    "write_counts",
]

FORMAT, VERSION = "moeplan-counts", 1
JSON_NAME, ARRAY_NAME = "counts.json", "counts.npy"
#: Which rows were counted: those of one phase, of both, or not known.
COUNTED_PHASES = ("prefill", "decode", "mixed", "unknown")
#: Far above any model (DeepSeek-V3: 15 Ki), far below what would exhaust memory.
MAX_CELLS = 16 * 1024 * 1024

WITHOUT_REQUESTS = (
    "these are counts without requests: they show imbalance per layer, but compare, and plans with groups, cannot be"
    " made of them; a request-level trace (vLLM or SGLang with --enable-return-routed-experts) would add which request"
    " picked what"
)

Counts = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CountsProfile:
    """Picks per expert.

    Attributes:
        counts: uint64 [L, E], MoE layers only.
        layer_ids: the model's own index of each layer, rising, length L.
        name: the model's name, or "".
        top_k: k, None when unknown.
        phase: one of `COUNTED_PHASES`.
        source: how it came about, plain values; `notes` in it are lines for the reader.
        path: where it lies.
    """

    counts: Counts
    layer_ids: tuple[int, ...]
    name: str = ""
    top_k: int | None = None
    phase: str = "unknown"
    source: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    def __post_init__(self) -> None:
        layers, experts = _checked_shape(self.counts)
        if len(self.layer_ids) != layers or any(
            b <= a for a, b in zip(self.layer_ids, self.layer_ids[1:], strict=False)
        ):
            raise FormatError(f"{len(self.layer_ids)} layer ids for {layers} layers, or they do not rise")
        if self.phase not in COUNTED_PHASES:
            raise FormatError(f"phase {self.phase[:20]!r} is not one of {', '.join(COUNTED_PHASES)}")
        if self.top_k is not None and not 1 <= self.top_k <= min(experts, MAX_K):
            raise FormatError(f"top-{self.top_k} of {experts} experts is impossible")
        empty = np.flatnonzero(~self.counts.any(axis=1))
        if len(empty):
            raise FormatError(f"layer {self.layer_ids[empty[0]]} has no pick", hint="leave dense layers out")

    @property
    def checksum(self) -> str:
        """sha256 of the array's bytes, layer by layer, little-endian."""
        return digest(np.ascontiguousarray(self.counts, "<u8").tobytes()).hexdigest()


class _Model(msgspec.Struct):
    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    name: str = ""
    top_k: int | None = None


class _Head(msgspec.Struct):
    """What `counts.json` holds beside its format and version."""

    model: _Model
    stage: str
    source: dict[str, Any]
    checksum: str


def equal_ranks_notes(per_rank: Sequence[npt.NDArray[np.int64]]) -> list[str]:
    """A warning where several ranks counted the same: without data-parallel attention each rank counts all tokens."""
    ranks = len(per_rank)
    if ranks < 2 or not all(np.array_equal(own, per_rank[0]) for own in per_rank):
        return []
    return [f"all {ranks} ranks counted the same: likely the same tokens, so that totals are {ranks} times too large"]


def make_counts(
    totals: npt.NDArray[Any],
    *,
    where: str,
    source: dict[str, Any],
    layer_ids: tuple[int, ...] | None = None,
    name: str = "",
    top_k: int | None = None,
    phase: str = "unknown",
) -> CountsProfile:
    """A profile from totals [hidden layers, E], dense layers (all zeros) left out and what looks odd noted.

    Raises:
        FormatError: a shape that is no [layers, experts]; a count that is negative or no whole number; nothing counted.
    """
    _checked_shape(totals, where)
    if totals.dtype.kind not in "iuf":
        raise FormatError("holds something else than counts", where=where)
    with np.errstate(invalid="ignore"):
        wrong = np.argwhere(~((totals >= 0) & (totals < 2.0**53) & (totals == np.floor(totals))))
    if len(wrong):
        row, expert = wrong[0]
        raise FormatError(
            f"layer row {row}, expert {expert}: {totals[row, expert]} is not a count (a whole number >= 0)", where=where
        )
    used = np.flatnonzero(totals.any(axis=1))
    if not len(used):
        raise FormatError("no pick was counted", where=where, hint="record while requests run")
    ids = tuple(range(len(totals))) if layer_ids is None else layer_ids
    counts = np.ascontiguousarray(totals[used]).astype(np.uint64)
    notes = [*source.get("notes", ())]
    sums = counts.sum(axis=1)
    if sums.max() != sums.min():
        share = float(sums.max() - sums.min()) / float(sums.max())
        notes.append(f"layers differ in their number of picks, by up to {100 * share:.2g} %")
    if len(used) < len(totals):
        notes.append(
            f"layers without a pick, left out as dense: {layer_spans(sorted(set(ids) - {ids[i] for i in used}))}"
        )
    with located(where):
        return CountsProfile(
            counts=counts,
            layer_ids=tuple(ids[i] for i in used),
            name=name,
            top_k=top_k,
            phase=phase,
            source={**source, "notes": notes},
        )


def is_counts_profile(path: Path) -> bool:
    """Whether a directory is a counts profile, good or damaged."""
    return (path / JSON_NAME).is_file()


def write_counts(profile: CountsProfile, out: Path) -> CountsProfile:
    """Write the directory, the json last; an error leaves nothing.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    made = make_folder(out)
    try:
        with atomic_path(out / ARRAY_NAME) as temporary, temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(profile.counts, "<u8"), allow_pickle=False)
        write_json(out / JSON_NAME, _description(profile))
    except BaseException:
        for name in (ARRAY_NAME, JSON_NAME):
            (out / name).unlink(missing_ok=True)
        if made:
            out.rmdir()
        raise
    return read_counts(out)


def _description(profile: CountsProfile) -> dict[str, Any]:
    layers, experts = profile.counts.shape
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "name": profile.name,
            "num_layers": layers,
            "num_experts": experts,
            "top_k": profile.top_k,
            "layer_ids": list(profile.layer_ids),
        },
        "stage": profile.phase,
        "source": profile.source,
        "picks": int(profile.counts.sum()),
        "checksum": profile.checksum,
    }


def read_counts(path: str | Path) -> CountsProfile:
    """Read a counts profile and check it.

    Raises:
        FormatError: not a counts profile, of a newer version, cut off, changed, or in contradiction with itself.
    """
    path = Path(path)
    place = path / JSON_NAME
    raw = read_json(place)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f"is not a {FORMAT} file", where=str(place), hint="give a directory that `import` wrote")
    if raw.get("version") != VERSION:
        raise FormatError(
            f"version {str(raw.get('version'))[:20]} is not {VERSION}", where=str(place), hint="use a newer moeplan"
        )
    head: _Head = convert(raw, _Head, str(place))
    model, counts = head.model, _read_array(path / ARRAY_NAME)
    if counts.shape != (model.num_layers, model.num_experts):
        raise FormatError(f"counts {list(counts.shape)} are not of the shape in {JSON_NAME}", where=str(path))
    with located(str(path)):
        profile = CountsProfile(counts, model.layer_ids, model.name, model.top_k, head.stage, head.source, path)
    if profile.checksum != head.checksum:
        raise FormatError(
            f"checksum differs from {JSON_NAME}",
            where=str(path / ARRAY_NAME),
            hint="the file was changed: import again",
        )
    return profile


def _read_array(path: Path) -> Counts:
    """uint64 [L, E], read only after its header and the file's size agree."""
    with readable(path):
        if check_input(path) > 8 * MAX_CELLS + 65536:
            raise FormatError(f"is larger than any counts of {MAX_CELLS} cells", where=str(path))
        data = path.read_bytes()
    file = io.BytesIO(data)
    shape, dtype = read_npy_header(file, str(path))
    if dtype != np.dtype("<u8") or len(shape) != 2:
        raise FormatError(f"is {dtype} of {len(shape)} dimensions, expected uint64 of 2", where=str(path))
    if len(data) - file.tell() != 8 * shape[0] * shape[1]:
        raise FormatError("does not hold as many bytes as its shape needs", where=str(path), hint="it may be cut off")
    return np.frombuffer(data, "<u8", offset=file.tell()).reshape(shape).astype(np.uint64)


def _checked_shape(counts: npt.NDArray[Any], where: str | None = None) -> tuple[int, int]:
    if counts.ndim != 2:
        raise FormatError(f"counts of {counts.ndim} dimensions, expected [layers, experts]", where=where)
    layers, experts = counts.shape
    if not (1 <= layers <= MAX_LAYERS and 1 <= experts <= MAX_EXPERTS and layers * experts <= MAX_CELLS):
        raise FormatError(f"{layers} layers x {experts} experts are outside what moeplan reads", where=where)
    return layers, experts
