"""Importer of stored SGLang responses (0.5.23, `--enable-return-routed-experts`).

`/generate` carries `meta_info.routed_experts`, the OpenAI endpoints `sglext.routed_experts` at the top, Dynamo
`nvext.routed_experts`: base64 of int32, little-endian, [rows, hidden layers, k] without its shape, rows being the
tokens [start, length - 1) (srt/state_capturer/routed_experts.py). Text and token ids are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import FormatError, UsageError
from moeplan.importers.routed_experts import (
    EngineResponse,
    Picks,
    decode_raw,
    from_base64,
    place_rows,
    response_files,
    write_answers,
)
from moeplan.io.jsonl import json_objects, whole
from moeplan.model.facts import ModelFacts
from moeplan.model.overrides import ModelExtras
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN
from moeplan.trace.reader import Trace

__all__ = ["decode_routed_experts", "import_sglang", "read_response"]

_ASK = 'start the server with --enable-return-routed-experts (requests must carry "return_routed_experts": true)'
_UNKNOWN_PHASES = "some responses do not say how long the prompt was: their phases are unknown"


def import_sglang(
    sources: Sequence[Path],
    out: Path,
    *,
    facts: ModelFacts,
    extras: ModelExtras | None = None,
    start: int = 0,
    dense_layers: Sequence[int] | None = None,
    domain: str | None = None,
    without_layers: Sequence[int] = (),
    progress: Progress = silent,
) -> Trace:
    """Turn stored responses, JSON or JSON lines, into a trace, one request each.

    Args:
        facts: experts, hidden layers and k, all three: the responses say none of them.
        start: `routed_experts_start_len` of the requests; the responses do not say it.
        dense_layers: hidden layers without experts; needed for top-1 without a config.

    Raises:
        UsageError: a part of the shape is not known; top-1 without knowledge of dense layers.
        FormatError: a response that is cut off, has no picks, or whose rows do not fit its own counts of tokens.
    """
    if facts.num_layers is None or facts.top_k is None:
        raise UsageError(
            "SGLang sends picks without their shape",
            hint="give --config config.json, or --num-layers (dense ones included) and --top-k",
        )
    files = response_files(sources)
    notes: dict[str, None] = {}
    return write_answers(
        files,
        _read(files, (facts.num_layers, facts.top_k), start, notes),
        out,
        facts=facts,
        extras=extras or ModelExtras(),
        source={"import": "sglang", "files": len(files)},
        notes=notes,
        dense_layers=dense_layers,
        domain=domain,
        without_layers=without_layers,
        progress=progress,
    )


def decode_routed_experts(text: Any, layers: int, top_k: int, where: str) -> Picks:
    """Picks int32 [rows, layers, k] of one `routed_experts`."""
    data = from_base64(text, where)
    rows, rest = divmod(len(data), 4 * layers * top_k)
    if rest:
        raise FormatError(
            f"{len(data)} bytes are no whole rows of {layers} layers x top-{top_k} int32",
            where=where,
            hint="check layers (dense ones included) and top-k; else the response is cut off",
        )
    return decode_raw(data, (rows, layers, top_k), np.dtype("<i4"), where)


def _read(
    files: Sequence[Path], form: tuple[int, int], start: int, notes: dict[str, None]
) -> Iterator[tuple[int, EngineResponse]]:
    for index, path in enumerate(files):
        for where, response in json_objects(path):
            yield index, read_response(response, form, start, where, notes)


def read_response(
    response: dict[str, Any], form: tuple[int, int], start: int, where: str, notes: dict[str, None]
) -> EngineResponse:
    """The answer of one response.

    Args:
        form: (hidden layers, k).
        start: `routed_experts_start_len` of the request.
        notes: gains a line for what was odd but kept.

    Raises:
        FormatError: no picks in it, or rows that do not fit its own counts of tokens.
    """
    meta = response.get("meta_info")
    choices = response.get("choices")
    usage = meta if isinstance(meta, dict) else response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text = next(
        (
            place["routed_experts"]
            for place in (meta, response.get("sglext"), response.get("nvext"))
            if isinstance(place, dict) and place.get("routed_experts") is not None
        ),
        None,
    )
    if text is None:
        raise FormatError("has no routed_experts in meta_info or sglext", where=where, hint=_ASK)
    picks = decode_routed_experts(text, *form, where)
    prompt = whole(usage.get("prompt_tokens"), "prompt_tokens", where)
    completion = whole(usage.get("completion_tokens"), "completion_tokens", where)
    if isinstance(choices, list) and len(choices) > 1:
        # Only one choice's picks came (the first that had some), and usage adds all choices up.
        prompt = completion = None
        notes["a response of several choices carries the picks of one only"] = None
    prefill, first = place_rows(len(picks), prompt=prompt, completion=completion, asked=start, where=where, notes=notes)
    if prefill == UNKNOWN:
        notes[_UNKNOWN_PHASES] = None
    model = response.get("model")
    rank = whole(usage.get("dp_rank"), "dp_rank", where)
    return EngineResponse(picks, prefill, first, model if isinstance(model, str) else "", where, rank)
