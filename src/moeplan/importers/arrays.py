"""Importer of request-level .npz files.

Arrays: `experts` unsigned [T, L, k] (a request's prefill rows before its decode rows), `request_offsets` [R + 1],
`prefill_lengths` [R] (0: no prefill was recorded, every row is decode; -1: phases unknown), `domain` text [R],
`layer_ids` [L], and the scalars `num_experts` and `model`. `domain`, `layer_ids` and `model` may be absent, as may
`session` and `turn` [R] (whole numbers, -1: unknown), `arrival` [R] (seconds, NaN: unknown), `prompt_tokens` unsigned
[P] with `prompt_offsets` [R + 1] (equal offsets: unknown), and the scalar `fewer_picks`: where it is true, a pick of -1
or `num_experts` stands for one that the token lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.io.npz import ArrayStream, Npz, open_npz
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN, Request
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.reader import Trace

__all__ = ["import_arrays"]

Int64Array = npt.NDArray[np.int64]


def import_arrays(
    source: Path, out: Path, options: ImportOptions | None = None, *, progress: Progress = silent
) -> Trace:
    """Turn an .npz into a trace, one request in memory at a time.

    Raises:
        FormatError: a truncated or malformed file, offsets that decrease, an id >= num_experts; prompt tokens are to be
            kept and there are none.
        UsageError: a layer to leave out that the file does not have.
        OutputError: `out` exists or cannot be written.
    """
    options = options or ImportOptions()
    with open_npz(source) as npz, npz.stream("experts", kinds="iu", ndim=3) as experts, ExitStack() as stack:
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

        columns = [_read_optional(npz, name, len(prefill)) for name in ("arrival", "session", "turn")]
        prompts = _open_prompts(npz, len(prefill), stack) if options.retention.prompts else None
        if "fewer_picks" in npz.names and bool(npz.small("fewer_picks", kinds="biu", ndim=0)):
            options = replace(options, retention=replace(options.retention, fewer_picks=True))

        def requests() -> Iterator[Request]:
            for number, (rows, length) in enumerate(zip(np.diff(offsets), prefill, strict=True)):
                domain = str(domains[number]) if options.domain is None else options.domain
                where = f"{source}, request {number} (from row {offsets[number]})"
                arrival, session, turn = (column[number] for column in columns)
                yield Request(
                    experts.take(int(rows)),
                    int(length),
                    domain,
                    arrival,
                    where=where,
                    session=session,
                    turn=turn,
                    prompt=prompts.take(number) if prompts else None,
                )
                progress(number + 1, len(prefill), domain)
            experts.finish()
            if prompts:
                prompts.tokens.finish()

        return write_trace(out, shape, requests(), options, {"import": "arrays", "file": source.name})


@dataclass(frozen=True)
class _Prompts:
    """The prompts of an .npz, read in the order of the requests."""

    tokens: ArrayStream
    offsets: Int64Array
    where: str

    def take(self, number: int) -> PromptFeatures:
        """The token ids of the next request."""
        ids = self.tokens.take(int(self.offsets[number + 1] - self.offsets[number]))
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
            raise FormatError(f"request {number}: a token id is outside 0..{2**32 - 1}", where=self.where)
        return PromptFeatures.of_ids([ids])


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


def _open_prompts(npz: Npz, requests: int, stack: ExitStack) -> _Prompts:
    """The stream of prompt tokens, and int64 [R + 1] offsets into it."""
    if "prompt_tokens" not in npz.names:
        raise FormatError(
            "has no array 'prompt_tokens'", where=str(npz.path), hint="leave out --keep-prompt-tokens, or store them"
        )
    tokens = stack.enter_context(npz.stream("prompt_tokens", kinds="iu", ndim=1))
    offsets = npz.small("prompt_offsets", kinds="iu", ndim=1).astype(np.int64)
    where = f"{npz.path}, array prompt_offsets"
    if len(offsets) != requests + 1:
        raise FormatError(f"{len(offsets)} offsets for {requests} requests", where=where, hint="one more is needed")
    if offsets[0] != 0 or offsets[-1] != tokens.shape[0] or (np.diff(offsets) < 0).any():
        raise FormatError(f"do not rise from 0 to {tokens.shape[0]}, the number of prompt_tokens", where=where)
    return _Prompts(tokens, offsets, f"{npz.path}, array prompt_tokens")


def _read_optional(npz: Npz, name: str, requests: int) -> list[Any]:
    """A column of one number per request, None where one is unknown."""
    if name not in npz.names:
        return [None] * requests
    values = npz.small(name, kinds="f" if name == "arrival" else "iu", ndim=1)
    if len(values) != requests:
        raise FormatError(f"{len(values)} values for {requests} requests", where=f"{npz.path}, array {name}")
    if name == "arrival" and np.isinf(values).any():
        raise FormatError("a time is infinite", where=f"{npz.path}, array {name}", hint="use NaN where unknown")
    return [None if value != value or (name != "arrival" and value == -1) else value for value in values.tolist()]


def _read_domains(npz: Npz, requests: int) -> npt.NDArray[np.str_]:
    if "domain" not in npz.names:
        return np.full(requests, "", dtype=np.str_)
    domains = npz.small("domain", kinds="U", ndim=1)
    if len(domains) != requests:
        raise FormatError(f"{len(domains)} labels for {requests} requests", where=f"{npz.path}, array domain")
    return domains
