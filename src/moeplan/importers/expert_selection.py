"""Importer of expert-selection JSON: one file per request.

A file is a list of steps: item 0 the prefill, then one item per decode token. A step maps each layer (its number as
text) to [tokens][k] expert ids, or to null where the layer is dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, located
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.importers.sources import source_files
from moeplan.io.json import read_json
from moeplan.progress import Progress, silent
from moeplan.trace.format import Request
from moeplan.trace.reader import Trace

__all__ = ["import_expert_selection"]

#: Parsed JSON takes some thirty times its size in memory; one request of 10 million picks is far below this.
MAX_FILE_BYTES = 64 * 1024 * 1024


def import_expert_selection(
    sources: Sequence[Path], out: Path, options: ImportOptions = ImportOptions(), *, progress: Progress = silent
) -> Trace:
    """Turn JSON files (or folders of them), one request each, into a trace.

    The files do not hold the number of experts: `options` must.

    Raises:
        UsageError: no number of experts, or a layer to leave out that is not there.
        FormatError: a file that is truncated, nested too deeply, ragged, or differs from the first in layers or k.
    """
    files = source_files(sources, ".json")
    first = layers, picks, _ = _read_request(files[0])
    shape = options.shape(top_k=picks.shape[2], layer_ids=layers, where=str(files[0]))

    def requests() -> Iterator[Request]:
        for done, (path, item) in enumerate(zip(files, chain([first], map(_read_request, files[1:])), strict=True)):
            found, picks, prefill = item
            if found != layers or picks.shape[2] != shape.top_k:
                raise FormatError(
                    f"{len(found)} MoE layers and top-{picks.shape[2]}, but {files[0].name} has"
                    f" {len(layers)} layers and top-{shape.top_k}",
                    where=str(path),
                    hint="import different models into different traces",
                )
            yield Request(picks, prefill, options.label(path), where=str(path))
            progress(done + 1, len(files), path.name)

    return write_trace(out, shape, requests(), options, {"import": "expert-selection", "files": len(files)})


def _read_request(path: Path) -> tuple[list[int], Int64Array, int]:
    """(MoE layers, picks int64 [rows, L, k], prefill rows) of one file."""
    steps = read_json(path, max_bytes=MAX_FILE_BYTES)
    blocks: list[Int64Array] = []
    with located(str(path)):
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise FormatError("is not a list of steps, each a map from layer to picks")
        if not steps:
            raise FormatError("holds no step", hint="leave the file out")
        layers = _moe_layers(steps, path)
        for number, step in enumerate(steps):
            with located(f"{path}, step {number}"):
                block = _read_step(step, layers)
                if number and len(block) != 1:
                    raise FormatError(f"{len(block)} tokens, but a decode step holds one")
                if len(block) and blocks and block.shape[2] != blocks[0].shape[2]:
                    raise FormatError(f"{block.shape[2]} picks per token, {blocks[0].shape[2]} before")
            if len(block):  # a prompt that was wholly in the prefix cache leaves an empty prefill
                blocks.append(block)
        if not blocks:
            raise FormatError("holds no token", hint="leave the file out")
    prefill = len(blocks[0]) if any(steps[0][str(layer)] for layer in layers) else 0
    return layers, np.concatenate(blocks), prefill


def _moe_layers(steps: list[dict[str, Any]], path: Path) -> list[int]:
    """The layers that are not null, rising; the same in every step."""
    names = {name for name, picks in steps[0].items() if picks is not None}
    if not names:
        raise FormatError("step 0 has no MoE layer")
    for number, step in enumerate(steps):
        differs = names ^ {name for name, picks in step.items() if picks is not None}
        if differs:
            what = f"layer {min(differs)[:20]!r} has picks in one step and none in another"
            raise FormatError(what, where=f"{path}, step {number}")
    if not all(name.isascii() and name.isdigit() and len(name) < 6 for name in names):
        raise FormatError("has a layer that is not a number")
    return sorted(int(name) for name in names)


def _read_step(step: dict[str, Any], layers: list[int]) -> Int64Array:
    """Picks int64 [tokens, L, k] of one step; an empty step is [0, L, 0]."""
    rows = [step.get(str(layer)) for layer in layers]
    if all(row == [] for row in rows):
        return np.zeros((0, len(layers), 0), np.int64)
    try:
        picks = np.array(rows)
    except (ValueError, OverflowError):
        picks = np.array([])
    if picks.ndim != 3 or picks.dtype.kind not in "iu" or picks.dtype == np.uint64:
        raise FormatError(_ragged(rows, layers), hint="every token needs k expert ids in every layer")
    return np.ascontiguousarray(picks.transpose(1, 0, 2), np.int64)


def _ragged(rows: list[Any], layers: list[int]) -> str:
    """Which layer of a step differs from the first one."""

    def form(row: Any) -> list[int] | None:
        good = isinstance(row, list) and all(isinstance(token, list) for token in row)
        return [len(token) for token in row] if good else None

    for layer, row in zip(layers, rows, strict=True):
        lengths = form(row)
        if lengths is None or any(type(pick) is not int for token in row for pick in token):
            return f"layer {layer} is not [tokens][k] whole numbers"
        if len(set(lengths)) > 1:
            return f"layer {layer} has {lengths[0]} picks in its first token and another number in a later one"
        if lengths != form(rows[0]):
            return f"layer {layer} has other tokens or another k than layer {layers[0]}"
    return "holds ids too large for any model"
