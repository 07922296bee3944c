"""Importer of stored SGLang responses (0.5.23, `--enable-return-routed-experts`).

`/generate` carries `meta_info.routed_experts`, the OpenAI endpoints `sglext.routed_experts` at the top, Dynamo
`nvext.routed_experts`: base64 of int32, little-endian, [rows, hidden layers, k] without its shape, rows being the
tokens [start, length - 1) (srt/state_capturer/routed_experts.py). Text and token ids are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moeplan.errors import FormatError, UsageError
from moeplan.importers.options import ImportOptions
from moeplan.importers.routed_experts import (
    EngineResponse,
    Picks,
    Usage,
    decode_raw,
    from_base64,
    import_responses,
    place_rows,
)
from moeplan.io.json import convert
from moeplan.model.spec import ModelSpec
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN
from moeplan.trace.reader import Trace

__all__ = ["decode_routed_experts", "import_sglang", "picks_shape", "read_response"]

_ASK = 'start the server with --enable-return-routed-experts (requests must carry "return_routed_experts": true)'
_UNKNOWN_PHASES = "some responses do not say how long the prompt was: their phases are unknown"


def import_sglang(
    sources: Sequence[Path],
    out: Path,
    options: ImportOptions = ImportOptions(),
    *,
    start: int = 0,
    progress: Progress = silent,
) -> Trace:
    """Turn stored responses, JSON or JSON lines, into a trace, one request each.

    `options` must give experts, hidden layers and k: the responses hold none of them.

    Args:
        start: `routed_experts_start_len` of the requests; the responses do not hold it.

    Raises:
        UsageError: a part of the shape is not known; top-1 without knowledge of dense layers.
        FormatError: a response that is truncated, has no picks, or whose rows do not fit its own counts of tokens.
    """
    read = partial(read_response, form=picks_shape(options.model), start=start)
    return import_responses("sglang", sources, read, out, options, progress)


def picks_shape(model: ModelSpec, where: str | None = None) -> tuple[int, int]:
    """(hidden layers, k), which SGLang's responses do not hold.

    Raises:
        UsageError: one of them is not known.
    """
    if model.layers is None or model.top_k is None:
        hint = "give --config with the model's folder, or --num-layers (dense ones included) and --top-k"
        raise UsageError("SGLang sends picks without their shape", where=where, hint=hint)
    return model.layers, model.top_k


class _Part(Usage):
    routed_experts: str | None = None


class _Response(msgspec.Struct):
    meta_info: _Part | None = None
    sglext: _Part | None = None
    nvext: _Part | None = None
    usage: Usage | None = None
    choices: list[Any] | None = None
    model: str | None = None


def decode_routed_experts(text: str, layers: int, top_k: int, where: str) -> Picks:
    """Picks int32 [rows, layers, k] of one `routed_experts`."""
    data = from_base64(text, where)
    rows, rest = divmod(len(data), 4 * layers * top_k)
    if rest:
        raise FormatError(
            f"{len(data)} bytes are not a whole number of rows of {layers} layers x top-{top_k} int32",
            where=where,
            hint="check layers (dense ones included) and top-k; else the response is truncated",
        )
    return decode_raw(data, (rows, layers, top_k), np.dtype("<i4"), where)


def read_response(
    response: dict[str, Any], form: tuple[int, int], start: int, where: str, notes: dict[str, None]
) -> list[EngineResponse]:
    """The one request of a response.

    Args:
        form: (hidden layers, k).
        start: `routed_experts_start_len` of the request.
        notes: gains a line for what was odd but kept.

    Raises:
        FormatError: no picks in it, or rows that do not fit its own counts of tokens.
    """
    found: _Response = convert(response, _Response, where)
    usage = found.meta_info or found.usage or Usage()
    texts = (part.routed_experts for part in (found.meta_info, found.sglext, found.nvext) if part is not None)
    text = next((text for text in texts if text is not None), None)
    if text is None:
        raise FormatError("has no routed_experts in meta_info or sglext", where=where, hint=_ASK)
    picks = decode_routed_experts(text, *form, where)
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if len(found.choices or ()) > 1:
        # Only one choice's picks came (the first that had some), and usage adds all choices up.
        prompt = completion = None
        notes["a response of several choices carries the picks of one only"] = None
    prefill, first = place_rows(len(picks), prompt=prompt, completion=completion, asked=start, where=where, notes=notes)
    if prefill == UNKNOWN:
        notes[_UNKNOWN_PHASES] = None
    return [EngineResponse(picks, prefill, first, found.model or "", where, usage.dp_rank)]
