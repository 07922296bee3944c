"""Importer of the CSV of MoE-Beyond: `Layer ID,Batch Number,Token,Activated Expert IDs`.

One line per layer and prompt token, layer by layer; ids as "[8, 26, 56]". Each batch number of a file is a request of
its own, all prefill (these are prompts). The token's text is dropped as it is read.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, located
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.importers.sources import source_files
from moeplan.io.paths import check_input, readable
from moeplan.progress import Progress, silent
from moeplan.trace.format import Request
from moeplan.trace.reader import Trace

__all__ = ["import_moe_beyond"]

HEADER = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]
MAX_FILE_BYTES = 1024 * 1024 * 1024
MAX_ID = 65535

#: Picks of one request by layer, as they come: (k, ids one after the other).
Layers = dict[int, "array[int]"]


def import_moe_beyond(
    sources: Sequence[Path], out: Path, options: ImportOptions = ImportOptions(), *, progress: Progress = silent
) -> Trace:
    """Turn CSV files (or folders of them) into a trace; the files do not hold the number of experts: `options` must.

    Raises:
        UsageError: no number of experts, or a layer to leave out that is not there.
        FormatError: a file that is truncated, ragged, or differs from the first in layers or k.
    """
    files = source_files(sources, ".csv")
    first = layers, picks = _read_file(files[0])
    shape = options.shape(top_k=picks[0].shape[2], layer_ids=layers, where=str(files[0]))

    def requests() -> Iterator[Request]:
        for done, (path, item) in enumerate(zip(files, chain([first], map(_read_file, files[1:])), strict=True)):
            found, batches = item
            if found != layers or batches[0].shape[2] != shape.top_k:
                raise FormatError(
                    f"{len(found)} layers and top-{batches[0].shape[2]}, but {files[0].name} has"
                    f" {len(layers)} layers and top-{shape.top_k}",
                    where=str(path),
                    hint="the file may be truncated, or of another model",
                )
            for picks in batches:
                yield Request(picks, len(picks), options.label(path), where=str(path))
            progress(done + 1, len(files), path.name)

    return write_trace(out, shape, requests(), options, {"import": "moe-beyond", "files": len(files)})


def _read_file(path: Path) -> tuple[list[int], list[Int64Array]]:
    """(layers, picks int64 [tokens, L, k] of each batch number, in order of appearance)."""
    batches: dict[int, Layers] = {}
    k = 0
    with located(str(path)):
        for line, layer, batch, ids in _read_lines(path):
            k = k or len(ids)
            if len(ids) != k:
                raise FormatError(f"row {line}: {len(ids)} expert ids, {k} before")
            batches.setdefault(batch, {}).setdefault(layer, array("H")).extend(ids)
        if not batches:
            raise FormatError("holds no row of picks", hint="leave the file out")
        layers = sorted(next(iter(batches.values())))
        for batch, by_layer in batches.items():
            tokens = {layer: len(ids) // k for layer, ids in by_layer.items()}
            if sorted(tokens) != layers or len(set(tokens.values())) != 1:
                what = "other layers than the first batch"
                first = tokens.get(layers[0])
                odd = next((i for i in tokens if tokens[i] != first), None)
                if first is not None and odd is not None:
                    what = f"{tokens[odd]} tokens in layer {odd}, {first} in layer {layers[0]}"
                raise FormatError(f"batch {batch}: {what}", hint="the file may be cut off: copy it again")
    return layers, [_stack(by_layer, layers, k) for by_layer in batches.values()]


def _stack(by_layer: Layers, layers: list[int], k: int) -> Int64Array:
    columns = [np.frombuffer(by_layer[layer], np.uint16).reshape(-1, k) for layer in layers]
    return np.stack(columns, axis=1).astype(np.int64)


def _read_lines(path: Path) -> Iterator[tuple[int, int, int, list[int]]]:
    """(line number, layer, batch, ids) of each line."""
    try:
        with readable(path):
            if check_input(path) > MAX_FILE_BYTES:
                raise FormatError(f"more than the {MAX_FILE_BYTES} bytes that moeplan reads")
            with path.open(encoding="utf-8", newline="") as file:
                lines = csv.reader(file)
                if next(lines, None) != HEADER:
                    raise FormatError(f"does not begin with {','.join(HEADER)}")
                for fields in lines:
                    yield lines.line_num, *_read_fields(fields, lines.line_num)
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", hint="it may be cut off: copy it again") from None
    except csv.Error as error:
        raise FormatError(f"is not CSV ({error})") from None


def _read_fields(fields: list[str], line: int) -> tuple[int, int, list[int]]:
    try:
        layer, batch, _, text = fields
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError
        ids = [int(item) for item in text[1:-1].split(",")]
        if int(layer) < 0 or min(ids) < 0 or max(ids) > MAX_ID:
            raise ValueError
        return int(layer), int(batch), ids
    except ValueError:
        what = f"row {line} is not layer, batch, token and a list of expert ids"
        raise FormatError(what, hint="the file may be cut off: copy it again") from None
