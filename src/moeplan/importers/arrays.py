"""Importer of request-level .npz files.

Arrays: `experts` unsigned [T, L, k] (a request's prefill rows before its decode rows), `request_offsets` [R + 1],
`prefill_lengths` [R] (0: no prefill was recorded, every row is decode; -1: phases unknown), `domain` text [R],
`layer_ids` [L], and the scalars `num_experts` and `model`. `domain`, `layer_ids` and `model` may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.io.npz import Npz, open_npz
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN, Request
from moeplan.trace.reader import Trace

__all__ = ["import_arrays"]

Int64Array = npt.NDArray[np.int64]


def import_arrays(
    source: Path, out: Path, options: ImportOptions | None = None, *, progress: Progress = silent
) -> Trace:
    """Turn an .npz into a trace, one request in memory at a time.

    Raises:
        FormatError: a truncated or malformed file, offsets that decrease, an id >= num_experts.
        UsageError: a layer to leave out that the file does not have.
        OutputError: `out` exists or cannot be written.
    """
    options = options or ImportOptions()
    with open_npz(source) as npz, npz.stream("experts", kinds="iu", ndim=3) as experts:
        tokens, layers, top_k = experts.shape
        offsets = _read_offsets(npz, tokens)
        prefill = _read_prefill(npz, np.diff(offsets))
        domains = _read_domains(npz, len(prefill))
        layer_ids = npz.small("layer_ids", kinds="iu", ndim=1) if "layer_ids" in npz.names else np.arange(layers)
        if len(layer_ids) != layers:
            raise FormatError(f"{len(layer_ids)} layer_ids for {layers} layers of experts", where=str(source))
        shape = options.shape(
            name=str(npz.small("model", kinds="U", ndim=0)) if "model" in npz.names else source.stem,
            num_experts=int(npz.small("num_experts", kinds="iu", ndim=0)),
            top_k=top_k,
            layer_ids=[int(i) for i in layer_ids],
            where=str(source),
        )

        def requests() -> Iterator[Request]:
            for number, (rows, length) in enumerate(zip(np.diff(offsets), prefill, strict=True)):
                domain = str(domains[number]) if options.domain is None else options.domain
                where = f"{source}, request {number} (from row {offsets[number]})"
                yield Request(experts.take(int(rows)), int(length), domain, where=where)
                progress(number + 1, len(prefill), domain)
            experts.finish()

        return write_trace(out, shape, requests(), options, {"import": "arrays", "file": source.name})


def _read_offsets(npz: Npz, tokens: int) -> Int64Array:
    """int64 [R + 1], increasing from 0 to the number of rows."""
    where = f"{npz.path}, array request_offsets"
    offsets = npz.small("request_offsets", kinds="iu", ndim=1).astype(np.int64)
    if len(offsets) < 2 or tokens == 0:
        raise FormatError("there is no request to import", where=str(npz.path), hint="check how it was recorded")
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise FormatError(f"run from {offsets[0]} to {offsets[-1]}, but the file has rows 0 to {tokens}", where=where)
    falling = np.diff(offsets) < 1
    if falling.any():
        request = int(np.argmax(falling))
        what = "decrease" if offsets[request + 1] < offsets[request] else "leave no row"
        raise FormatError(
            f"{what} at request {request}: {offsets[request]} to {offsets[request + 1]}",
            where=where,
            hint="offsets must increase",
        )
    return offsets


def _read_prefill(npz: Npz, rows: Int64Array) -> Int64Array:
    """int64 [R], prefill rows of each request, -1 where phases are unknown."""
    where = f"{npz.path}, array prefill_lengths"
    prefill = npz.small("prefill_lengths", kinds="iu", ndim=1).astype(np.int64)
    if len(prefill) != len(rows):
        raise FormatError(f"{len(prefill)} lengths for {len(rows)} requests", where=where)
    wrong = (prefill < UNKNOWN) | (prefill > rows)
    if wrong.any():
        request = int(np.argmax(wrong))
        raise FormatError(
            f"request {request}: {prefill[request]} prefill rows of {rows[request]}",
            where=where,
            hint="use -1 where unknown",
        )
    return prefill


def _read_domains(npz: Npz, requests: int) -> npt.NDArray[np.str_]:
    if "domain" not in npz.names:
        return np.full(requests, "", dtype=np.str_)
    domains = npz.small("domain", kinds="U", ndim=1)
    if len(domains) != requests:
        raise FormatError(f"{len(domains)} labels for {requests} requests", where=f"{npz.path}, array domain")
    return domains
