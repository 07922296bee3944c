"""What responses of vLLM and SGLang share: encodings, phases, dense layers, and the way into a trace.

Both engines send one row per token of prompt and output except the last sampled token, which is never forwarded; ids
are logical; the layer axis counts all hidden layers, and a dense layer's rows are zeros.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, UsageError
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.importers.sources import response_files
from moeplan.io.json import read_json_objects
from moeplan.io.npz import read_npy_header
from moeplan.model.spec import ModelSpec
from moeplan.progress import Progress
from moeplan.trace.format import UNKNOWN, Request, layer_spans
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.reader import Trace
from moeplan.types import MAX_K, MAX_LAYERS, ModelShape

__all__ = [
    "EngineResponse",
    "Picks",
    "ResponseLayout",
    "TokenCount",
    "Usage",
    "check_picks",
    "decode_npy",
    "decode_raw",
    "from_base64",
    "import_responses",
    "infer_moe_layers",
    "place_rows",
]

Picks = npt.NDArray[np.integer[Any]]
#: Positions are stored in 32 bits.
MAX_POSITION = 2**32
_CUT_OFF = "the response may be cut off: copy or record it again"


TokenCount = Annotated[int, msgspec.Meta(ge=0)]


class Usage(msgspec.Struct):
    """What a response counts."""

    prompt_tokens: TokenCount | None = None
    completion_tokens: TokenCount | None = None
    dp_rank: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None


@dataclass(frozen=True)
class EngineResponse:
    """One request, as an engine recorded it.

    Attributes:
        picks: integers [rows, hidden layers, k]; prompt rows first.
        prefill: how many rows are prefill; -1 where the response does not tell.
        start: position of the first row in its sequence.
        model: the name that the response gives, or "".
        where: file and place, for errors.
        dp_rank: the data-parallel rank that served it; None where the response does not tell.
        prompt: token ids of its prompt; None where the response does not hold them.
    """

    picks: Picks
    prefill: int
    start: int
    model: str
    where: str
    dp_rank: int | None = None
    prompt: PromptFeatures | None = None


def from_base64(text: str, where: str) -> bytes:
    """Decode base64 text strictly: a character outside its alphabet is an error, not skipped."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"routed_experts is not base64 ({error})", where=where, hint=_CUT_OFF) from None


def decode_npy(data: bytes, where: str) -> Picks:
    """Integers [rows, layers, k] of a .npy file in memory; pickled objects are refused, as is a header that lies."""
    file = io.BytesIO(data)
    shape, dtype = read_npy_header(file, where)
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
                f"{rows} rows are fewer than the prompt's {prompt - asked}", where=where, hint=_start_hint(rows, prompt)
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
            hint=_start_hint(rows, expected),
        )
    return min(prompt - start, rows), start


def _start_hint(rows: int, expected: int) -> str:
    if rows < expected:
        return f"if the request asked for a start length, give it: --start {expected - rows}; else record it again"
    return "check that the response is of this model and whole"


def infer_moe_layers(picks: Picks, model: ModelSpec, dense_layers: Sequence[int] | None, where: str) -> tuple[int, ...]:
    """The MoE layers of a recording, from its first answer: flag or config first, else the rows that are all zeros.

    k > 1 identical ids are no top-k row, so zeros mean a dense layer. With k = 1, expert 0 looks the same: then only a
    flag or a config can tell.

    Raises:
        FormatError: a recording whose layers or k are not those of the config.
        UsageError: k = 1 and nothing says which layers are dense; a dense layer that does not exist; no MoE layer.
    """
    _, layers, k = picks.shape
    for label, value, known in (("hidden layers", layers, model.layers), ("picks per token", k, model.top_k)):
        if known is not None and value != known:
            raise FormatError(f"{value} {label}, but the config or a flag says {known}", where=where)
    if dense_layers is not None:
        wrong = [layer for layer in dense_layers if not 0 <= layer < layers]
        if wrong:
            raise UsageError(f"--dense-layers {wrong[0]}: the recording has layers 0..{layers - 1}")
        found = tuple(i for i in range(layers) if i not in set(dense_layers))
    elif model.moe_layers is not None:
        found = model.moe_layers
    elif k > 1:
        found = tuple(int(i) for i in np.flatnonzero(picks.any(axis=(0, 2))))
    else:
        hint = "give --config config.json, or --dense-layers 0,1,2 (or: none)"
        raise UsageError("with top-1, a dense layer's zeros cannot be told from expert 0", where=where, hint=hint)
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
class ResponseLayout:
    """The shape that the first response of a recording has, and all others must have.

    Attributes:
        shape: the model; its layers are those with experts.
        picks: (hidden layers, k) of every response.
    """

    shape: ModelShape
    picks: tuple[int, int]

    @classmethod
    def infer(cls, first: EngineResponse, options: ImportOptions) -> ResponseLayout:
        """Raises UsageError or FormatError where flags, config and response leave something open or contradict."""
        options.model.need_experts(first.where)
        _, layers, k = first.picks.shape
        moe_layers = infer_moe_layers(first.picks, options.model, options.dense_layers, first.where)
        shape = options.shape(top_k=k, layer_ids=moe_layers, where=first.where, name=first.model)
        return cls(shape, (layers, k))

    def moe_picks(self, response: EngineResponse) -> Picks:
        """Integers [rows, L, k] of a response, dense layers dropped; raises FormatError where its shape differs."""
        if response.picks.shape[1:] != self.picks:
            raise FormatError(
                f"{response.picks.shape[1]} layers, top-{response.picks.shape[2]}, but the first response has"
                f" {self.picks[0]} and top-{self.picks[1]}",
                where=response.where,
                hint="record different models into different traces",
            )
        return check_picks(response.picks, self.shape.layer_ids, self.shape.num_experts, response.where)


def import_responses(
    engine: str,
    sources: Sequence[Path],
    read: Callable[..., list[EngineResponse]],
    out: Path,
    options: ImportOptions,
    progress: Progress,
) -> Trace:
    """Write the requests of an engine's stored responses, JSON or JSON lines, as a trace.

    Args:
        read: gives the requests of a response; called with it, `where`, and the `notes` that it may add lines to.
    """
    files, notes = response_files(sources), dict[str, None]()
    stream = _with_rows(files, read, notes)
    first = next(stream, None)
    if first is None:
        raise FormatError("holds no response with a row", where=str(files[0]), hint="check how it was recorded")
    layout = ResponseLayout.infer(first[1], options)
    source: dict[str, Any] = {"import": engine, "files": len(files), "notes": []}

    def requests() -> Iterator[Request]:
        for index, response in chain([first], stream):
            picks = layout.moe_picks(response)
            if options.retention.prompts is not None and response.prompt is None:
                notes["some responses do not hold their prompt's token ids (return_token_ids)"] = None
            yield Request(
                picks,
                response.prefill,
                options.label(files[index]),
                positions=np.arange(response.start, response.start + len(picks)),
                dp_rank=response.dp_rank,
                where=response.where,
                prompt=response.prompt,
            )
            progress(index + 1, len(files), files[index].name)
        source["notes"] += list(notes)

    return write_trace(out, layout.shape, requests(), options, source)


def _with_rows(
    files: Sequence[Path], read: Callable[..., list[EngineResponse]], notes: dict[str, None]
) -> Iterator[tuple[int, EngineResponse]]:
    """(index into `files`, response) of every response that has a row."""
    for index, path in enumerate(files):
        for where, value in read_json_objects(path):
            for response in read(value, where=where, notes=notes):
                if len(response.picks):
                    yield index, response
                else:
                    notes["responses without a row (their start length leaves none) were left out"] = None
