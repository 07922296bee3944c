"""What responses of vLLM and SGLang share: encodings, phases, dense layers, and the way into a trace.

Both engines send one row per token of prompt and output except the last sampled token, which is never forwarded; ids
are logical; the layer axis counts all hidden layers, and a dense layer's rows are zeros.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, UsageError
from moeplan.importers.sources import domain_of
from moeplan.io.npz import _read_header, source_files
from moeplan.model.facts import ModelFacts
from moeplan.model.overrides import ModelExtras
from moeplan.progress import Progress
from moeplan.trace.format import UNKNOWN, layer_spans, layers_kept
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.writer import TraceWriter
from moeplan.types import MAX_K, MAX_LAYERS, ModelShape

__all__ = [
    "EngineResponse",
    "Layout",
    "Picks",
    "check_picks",
    "decode_npy",
    "decode_raw",
    "from_base64",
    "moe_layers_of",
    "place_rows",
    "response_files",
    "write_answers",
]

Picks = npt.NDArray[np.integer[Any]]
#: Positions are stored in 32 bits.
MAX_POSITION = 2**32
_CUT_OFF = "the response may be cut off: copy or record it again"


@dataclass(frozen=True)
class EngineResponse:
    """One answered request, as an engine recorded it.

    Attributes:
        picks: integers [rows, hidden layers, k]; prompt rows first.
        prefill: how many rows are prefill; -1 where the response does not tell.
        start: position of the first row in its sequence.
        model: the name that the response gives, or "".
        where: file and place, for errors.
        dp_rank: the data-parallel rank that served it; None where the response does not tell.
    """

    picks: Picks
    prefill: int
    start: int
    model: str
    where: str
    dp_rank: int | None = None


def response_files(sources: Sequence[Path]) -> list[Path]:
    """The files named, and the .json or, where there are some, .jsonl files of the folders named."""
    found: list[Path] = []
    for source in sources:
        lines = source.is_dir() and any(path.suffix.lower() == ".jsonl" for path in source.iterdir())
        found += source_files([source], ".jsonl" if lines else ".json")
    return found


def from_base64(text: Any, where: str) -> bytes:
    """Decode base64 text strictly: a character outside its alphabet is an error, not skipped."""
    if not isinstance(text, str):
        raise FormatError(f"routed_experts is a {type(text).__name__}, not base64 text", where=where)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"routed_experts is not base64 ({error})", where=where, hint=_CUT_OFF) from None


def decode_npy(data: bytes, where: str) -> Picks:
    """Integers [rows, layers, k] of a .npy file in memory; pickled objects are refused, as is a header that lies."""
    file = io.BytesIO(data)
    shape, dtype = _read_header(file, where)
    return decode_raw(data[file.tell() :], shape, dtype, where)


def decode_raw(data: bytes, shape: Sequence[int], dtype: np.dtype[Any], where: str) -> Picks:
    """Integers [rows, layers, k] of plain bytes whose shape is known; exactly as many bytes as it needs."""
    if dtype.kind not in "iu" or len(shape) != 3:
        raise FormatError(f"picks of type {dtype} in {len(shape)} dimensions, expected whole numbers in 3", where=where)
    if not (shape[0] >= 0 and 1 <= shape[1] <= MAX_LAYERS and 1 <= shape[2] <= MAX_K):
        raise FormatError(f"the shape {list(shape)} is no [tokens, layers, picks]", where=where)
    need = shape[0] * shape[1] * shape[2] * dtype.itemsize
    if need != len(data):
        raise FormatError(
            f"the shape {list(shape)} of {dtype} needs {need} bytes, {len(data)} are there", where=where, hint=_CUT_OFF
        )
    return np.frombuffer(data, dtype).reshape(shape)


def place_rows(
    rows: int, *, prompt: int | None, completion: int | None, asked: int, where: str, notes: dict[str, None]
) -> tuple[int, int]:
    """(prefill rows, position of the first row) of an answer, from the engine's own counts of tokens.

    Args:
        rows: rows that came.
        prompt, completion: tokens as the response counts them; None where it does not.
        asked: the start length that the request asked for; rows before it are absent.
        notes: gains a line where an engine ignored the start length (older SGLang builds do).

    Raises:
        FormatError: rows that are neither [asked, prompt + completion - 1) nor all of them.
    """
    if asked + rows > MAX_POSITION:
        raise FormatError(f"a start of {str(asked)[:20]} is beyond any sequence", where=where)
    if prompt is None:
        return UNKNOWN, asked
    if asked > prompt:
        raise FormatError(f"a start of {asked} lies behind the prompt's {prompt} tokens", where=where)
    if completion is None:
        if rows < prompt - asked:
            raise FormatError(
                f"{rows} rows are fewer than the prompt's {prompt - asked}", where=where, hint=_start_mend(rows, prompt)
            )
        return prompt - asked, asked
    expected = max(prompt + completion - 1, 0)
    start = asked
    if asked and rows == expected:
        start = 0
        notes["the engine ignored the start length: every row is there, and all were kept"] = None
    elif rows != expected - asked:
        raise FormatError(
            f"{rows} rows, but {prompt} prompt and {completion} completion tokens make {expected - asked}"
            f" (the last sampled token has none{f', and the first {asked} were not asked for' if asked else ''})",
            where=where,
            hint=_start_mend(rows, expected),
        )
    return min(prompt - start, rows), start


def _start_mend(rows: int, expected: int) -> str:
    if rows < expected:
        return f"if the request asked for a start length, give it: --start {expected - rows}; else record it again"
    return "check that the response is of this model and whole"


def moe_layers_of(picks: Picks, facts: ModelFacts, dense_layers: Sequence[int] | None, where: str) -> tuple[int, ...]:
    """The MoE layers of a recording, from its first answer: flag or config first, else the rows that are all zeros.

    k > 1 identical ids are no top-k row, so zeros mean a dense layer. With k = 1, expert 0 looks the same: then only a
    flag or a config can tell.

    Raises:
        FormatError: a recording whose layers or k are not those of the config.
        UsageError: k = 1 and nothing says which layers are dense; a dense layer that does not exist; no MoE layer.
    """
    _, layers, k = picks.shape
    for label, value, known in (("hidden layers", layers, facts.num_layers), ("picks per token", k, facts.top_k)):
        if known is not None and value != known:
            raise FormatError(f"{value} {label}, but the config or a flag says {known}", where=where)
    if dense_layers is not None:
        wrong = [layer for layer in dense_layers if not 0 <= layer < layers]
        if wrong:
            raise UsageError(f"--dense-layers {wrong[0]}: the recording has layers 0..{layers - 1}")
        found = tuple(i for i in range(layers) if i not in set(dense_layers))
    elif facts.moe_layers is not None:
        found = facts.moe_layers
    elif k > 1:
        found = tuple(int(i) for i in np.flatnonzero(picks.any(axis=(0, 2))))
    else:
        raise UsageError(
            "with top-1, a dense layer's zeros cannot be told from expert 0",
            where=where,
            hint="give --config config.json, or --dense-layers 0,1,2 (or: none)",
        )
    if not found:
        raise FormatError("no layer has a pick: every row is zeros", where=where, hint="check how it was recorded")
    return found


def check_picks(
    picks: Picks,
    moe_layers: Sequence[int],
    num_experts: int,
    where: str,
    *,
    layer_ids: Sequence[int] | None = None,
) -> Picks:
    """The MoE layers' picks [rows, L, k], after dense rows proved to be zeros and every token's picks distinct.

    Args:
        picks: integers [rows, layers, k].
        moe_layers: which of those layers have experts.
        layer_ids: their names in errors, where the array's rows are not the model's layers; default `moe_layers`.
    """
    dense = [i for i in range(picks.shape[1]) if i not in set(moe_layers)]
    if dense and picks[:, dense].any():
        row, column, _ = np.argwhere(picks[:, dense])[0]
        raise FormatError(
            f"row {row}: layer {dense[column]} has picks, but is dense in the config, the flag or the first answer",
            where=where,
            hint=f"MoE layers were taken to be {layer_spans(moe_layers)}: check --config and --dense-layers",
        )
    kept = picks[:, list(moe_layers)]
    in_range = not kept.size or (int(kept.min()) >= 0 and int(kept.max()) < num_experts)
    if in_range and kept.shape[2] > 1:  # an id out of range is the writer's to refuse
        order = np.sort(kept, axis=2)
        twice = np.argwhere(order[:, :, 1:] == order[:, :, :-1])
        if len(twice):
            row, column, pick = twice[0]
            names = moe_layers if layer_ids is None else layer_ids
            raise FormatError(
                f"row {row}, layer {names[column]}: expert {order[row, column, pick]} is picked twice",
                where=where,
                hint="the shape or the model is another one, or the engine did not capture this token",
            )
    return kept


@dataclass(frozen=True)
class Layout:
    """How the first answer of a recording says all of them look.

    Attributes:
        shape: the model; its layers are those with experts.
        form: (hidden layers, k) of every answer.
    """

    shape: ModelShape
    form: tuple[int, int]

    @classmethod
    def of(
        cls, first: EngineResponse, facts: ModelFacts, extras: ModelExtras, dense_layers: Sequence[int] | None
    ) -> Layout:
        """Raises UsageError or FormatError where flags, config and answer leave something open or contradict."""
        num_experts = facts.need_experts(first.where)
        _, layers, k = first.picks.shape
        shape = facts.add_to(extras).shape(
            name=first.model,
            num_experts=num_experts,
            top_k=k,
            layer_ids=moe_layers_of(first.picks, facts, dense_layers, first.where),
            where=first.where,
        )
        return cls(shape, (layers, k))

    def picks_of(self, answer: EngineResponse) -> Picks:
        """Integers [rows, L, k] of an answer, dense layers dropped; raises FormatError where it looks otherwise."""
        if answer.picks.shape[1:] != self.form:
            raise FormatError(
                f"{answer.picks.shape[1]} layers, top-{answer.picks.shape[2]}, but the first answer has"
                f" {self.form[0]} and top-{self.form[1]}",
                where=answer.where,
                hint="record different models into different traces",
            )
        return check_picks(answer.picks, self.shape.layer_ids, self.shape.num_experts, answer.where)


def write_answers(
    files: Sequence[Path],
    answers: Iterable[tuple[int, EngineResponse]],
    out: Path,
    *,
    facts: ModelFacts,
    extras: ModelExtras,
    source: dict[str, Any],
    notes: dict[str, None],
    dense_layers: Sequence[int] | None,
    domain: str | None,
    without_layers: Sequence[int],
    progress: Progress,
) -> Trace:
    """Write answers, (index into `files`, answer) each, as the requests of a trace; `source` gains the notes."""
    stream = _with_rows(iter(answers), notes)
    first = next(stream, None)
    if first is None:
        raise FormatError("holds no answer with a row", where=str(files[0]), hint="check how it was recorded")
    layout = Layout.of(first[1], facts, extras, dense_layers)
    shape, keep = layers_kept(layout.shape, without_layers)
    source = {**source, "notes": []}
    with TraceWriter(out, shape, source=source) as writer:
        for index, answer in _chain(first, stream):
            picks = layout.picks_of(answer)
            writer.add(
                picks if keep is None else picks[:, keep],
                prefill=answer.prefill,
                domain=domain_of(files[index]) if domain is None else domain,
                positions=np.arange(answer.start, answer.start + len(picks)),
                dp_rank=answer.dp_rank,
                where=answer.where,
            )
            progress(index + 1, len(files), files[index].name)
        source["notes"] += list(notes)
    return open_trace(out)


def _with_rows(
    answers: Iterator[tuple[int, EngineResponse]], notes: dict[str, None]
) -> Iterator[tuple[int, EngineResponse]]:
    for index, answer in answers:
        if len(answer.picks):
            yield index, answer
        else:
            notes["answers without a row (their start length leaves none) were left out"] = None


def _chain(
    first: tuple[int, EngineResponse], rest: Iterator[tuple[int, EngineResponse]]
) -> Iterator[tuple[int, EngineResponse]]:
    yield first
    yield from rest
