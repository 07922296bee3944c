"""Importer of Megatron-LM's router trace: `router_trace_rank{N}.jsonl`, one line per step, block and layer.

Form as in megatron/core/transformer/moe/router_trace.py at d98e8a64. The lines carry no request ids, so the tokens of
one step on one rank become one pseudo-request of unknown phase. Only the decoder's blocks are read: a block of
multi-token prediction routes drafts. Ids are logical, each token's in rising order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, located
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.importers.routed_experts import check_picks
from moeplan.importers.sources import source_files
from moeplan.io.json import read_json_lines
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN, Request, layer_spans
from moeplan.trace.reader import Trace

__all__ = ["import_megatron"]

#: One line holds one layer's picks of one step: a million tokens of top-8 are below this.
MAX_LINE_BYTES = 64 * 1024 * 1024

PSEUDO_REQUESTS = (
    "Megatron records no request ids: each step of each rank is one pseudo-request of unknown phase, so that groups,"
    " signatures and phases mean nothing on this trace; load and co-activation do"
)


Index = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    step: Index
    block: str
    layer: Index
    top_indices: list[list[int]]
    rank: Index | None = None
    num_tokens: Index | None = None
    topk: Index | None = None


@dataclass
class _Step:
    """The layers of one step as they come: {layer: int64 [tokens, k]}."""

    number: int
    where: str
    layers: dict[int, Int64Array] = field(default_factory=dict)


def import_megatron(
    sources: Sequence[Path], out: Path, options: ImportOptions = ImportOptions(), *, progress: Progress = silent
) -> Trace:
    """Turn router traces, one file per rank, into a trace of pseudo-requests.

    `options` must give the number of experts; k and, from a config, the number of layers are checked against it.

    Raises:
        UsageError: no number of experts.
        FormatError: a line that is truncated or ragged, a step without a layer that others have, steps of another k.
    """
    files, model = source_files(sources, ".jsonl"), options.model
    num_experts = model.need_experts(str(files[0]))
    notes: dict[str, None] = {PSEUDO_REQUESTS: None}
    steps = _all_steps(files, notes)
    first = next(steps, None)
    if first is None:
        raise FormatError("holds no decoder line", where=str(files[0]), hint="check how it was recorded")
    layers = sorted(first[1].layers)
    top_k = _stack(first[1], layers, model.top_k).shape[2]
    if model.moe_layers is not None and len(layers) != len(model.moe_layers):
        raise FormatError(
            f"has {len(layers)} decoder layers, the config {len(model.moe_layers)} MoE layers",
            where=first[1].where,
            hint="the file may be truncated; for one pipeline stage, give --num-experts instead of --config",
        )
    shape = options.shape(top_k=top_k, layer_ids=layers, where=str(files[0]))
    source: dict[str, Any] = {"import": "megatron", "files": len(files), "notes": []}

    def requests() -> Iterator[Request]:
        for index, step in chain([first], steps):
            block = _stack(step, layers, top_k)
            picks = check_picks(block, range(len(layers)), num_experts, step.where, layer_ids=layers)
            yield Request(picks, UNKNOWN, options.label(files[index]), where=step.where)
            progress(index + 1, len(files), files[index].name)
        source["notes"] += list(notes)

    return write_trace(out, shape, requests(), options, source)


def _all_steps(files: Sequence[Path], notes: dict[str, None]) -> Iterator[tuple[int, _Step]]:
    for index, path in enumerate(files):
        for step in _steps(path, notes):
            if any(len(picks) for picks in step.layers.values()):  # an idle step has no token
                yield index, step


def _steps(path: Path, notes: dict[str, None]) -> Iterator[_Step]:
    """The steps of one file, each whole once the next begins."""
    step: _Step | None = None
    rank: int | None = None
    for where, line in read_json_lines(path, _Line, max_bytes=MAX_LINE_BYTES):
        if line.block != "decoder":
            notes[f"lines of block {line.block[:20]} were left out: only the decoder is read"] = None
            continue
        number, layer, own_rank = line.step, line.layer, line.rank or 0
        if rank is not None and own_rank != rank:
            raise FormatError(f"rank {own_rank} in a file of rank {rank}", where=where, hint="give one file per rank")
        rank = own_rank
        if step is not None and number != step.number:
            yield step
        with located(where):
            if step is not None and number < step.number:
                raise FormatError(f"step {number} after step {step.number}", hint="steps must increase")
            if step is None or number != step.number:
                step = _Step(number, f"{path}, step {number}")
            if layer in step.layers:
                what = f"layer {layer} appears twice in step {number}"
                raise FormatError(what, hint="give one recording at a time")
            step.layers[layer] = _indices(line)
    if step is not None:
        yield step


def _indices(line: _Line) -> Int64Array:
    """int64 [tokens, k] of one line, which must agree with its own num_tokens and topk."""
    try:
        picks = np.array(line.top_indices, np.int64)
    except (ValueError, OverflowError):
        raise FormatError("top_indices is not [tokens][k] expert ids") from None
    if not line.top_indices:
        picks = picks.reshape(0, line.topk or 1)
    if picks.ndim != 2:
        raise FormatError("top_indices is not [tokens][k] expert ids")
    for key, given, size in (("num_tokens", line.num_tokens, len(picks)), ("topk", line.topk, picks.shape[1])):
        if given is not None and given != size:
            raise FormatError(f"{key} is {given}, but top_indices has {size}")
    return picks


def _stack(step: _Step, layers: Sequence[int], top_k: int | None) -> Int64Array:
    """Picks int64 [tokens, L, k] of one step, whose layers, tokens and k must agree."""
    with located(step.where):
        if sorted(step.layers) != list(layers):
            what = f"has layers {layer_spans(sorted(step.layers))}, the first step {layer_spans(layers)}"
            hint = "the file may be truncated; import pipeline stages into traces of their own"
            raise FormatError(what, hint=hint)
        forms = {picks.shape for picks in step.layers.values()}
        if len(forms) > 1:
            raise FormatError("its layers differ in tokens or k")
        k = forms.pop()[1]
        if top_k is not None and k != top_k:
            raise FormatError(f"{k} picks per token, expected {top_k}")
    return np.stack([step.layers[layer] for layer in layers], axis=1)
