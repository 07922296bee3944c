"""Importer of stored vLLM responses (0.33.0, `--enable-return-routed-experts`): completions and chat alike.

`choices[i].routed_experts` is base64 of a .npy file, uint8 or uint16 [tokens - 1 - start, hidden layers, k]
(vllm/utils/serial_utils.py). Through Dynamo 1.6 it is `nvext.routed_experts`, an object of base64 plain bytes with
`shape`, `dtype` and `start`. Text and token ids are not looked at, but for the lengths of the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions
from moeplan.importers.routed_experts import (
    EngineResponse,
    Picks,
    decode_npy,
    decode_raw,
    from_base64,
    place_rows,
    write_responses,
)
from moeplan.importers.sources import response_files
from moeplan.io.jsonl import json_objects, whole
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN
from moeplan.trace.reader import Trace

__all__ = ["decode_routed_experts", "import_vllm", "read_response"]

_FLAG = "start the server with --enable-return-routed-experts and record again"
_UNKNOWN_PHASES = "some responses do not say how long a choice's prompt was: its phases are unknown"


def import_vllm(
    sources: Sequence[Path],
    out: Path,
    options: ImportOptions | None = None,
    *,
    start: int = 0,
    progress: Progress = silent,
) -> Trace:
    """Turn stored responses, JSON or JSON lines, into a trace; every choice is a request.

    `options` must give the number of experts; layers and k are checked against it.

    Args:
        start: `routed_experts_prompt_start` of the requests; the .npy form does not hold it.

    Raises:
        UsageError: no number of experts; top-1 without knowledge of dense layers.
        FormatError: a response that is truncated, has no picks, or whose rows do not fit its own counts of tokens.
    """
    files, notes = response_files(sources), dict[str, None]()
    source: dict[str, Any] = {"import": "vllm", "files": len(files)}
    return write_responses(files, _read(files, start, notes), out, options or ImportOptions(), source, notes, progress)


def decode_routed_experts(value: Any, where: str) -> tuple[Picks, int | None]:
    """(picks [rows, hidden layers, k], start or None) of one `routed_experts`, in either of its two forms."""
    if value is None:
        raise FormatError("has no routed_experts", where=where, hint=_FLAG)
    if not isinstance(value, dict):
        return decode_npy(from_base64(value, where), where), None
    shape, name = value.get("shape"), value.get("dtype")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise FormatError("routed_experts.shape is not a list of whole numbers", where=where)
    if name not in ("uint8", "uint16", "int16", "int32", "int64"):
        raise FormatError(f"routed_experts.dtype is {str(name)[:40]!r}, not a type of whole numbers", where=where)
    dtype = np.dtype(str(name)).newbyteorder("<")
    picks = decode_raw(from_base64(value.get("data"), where), shape, dtype, where)
    return picks, whole(value.get("start"), "routed_experts.start", where)


def _read(files: Sequence[Path], start: int, notes: dict[str, None]) -> Iterator[tuple[int, EngineResponse]]:
    for index, path in enumerate(files):
        for where, response in json_objects(path):
            for answer in read_response(response, start, where, notes):
                yield index, answer


def read_response(response: dict[str, Any], start: int, where: str, notes: dict[str, None]) -> list[EngineResponse]:
    """The answers of one response, one for each choice.

    Args:
        start: `routed_experts_prompt_start` of the request.
        notes: gains a line for what was odd but kept.

    Raises:
        FormatError: no choices or no picks in it, or rows that do not fit its own counts of tokens.
    """
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise FormatError("is no completion or chat response: it has no choices", where=where)
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt = whole(usage.get("prompt_tokens"), "usage.prompt_tokens", where)
    completion = whole(usage.get("completion_tokens"), "usage.completion_tokens", where)
    model = response.get("model")
    model = model if isinstance(model, str) else ""
    places = [f"{where}, choice {number}" for number in range(len(choices))]
    decoded = [
        decode_routed_experts(_routed(response, choice, alone=len(choices) == 1), place)
        for choice, place in zip(choices, places, strict=True)
    ]
    starts = [start if told is None else told for _, told in decoded]
    if len(choices) > 1:
        lengths = [len(picks) + first for (picks, _), first in zip(decoded, starts, strict=True)]
        prompt, completion = _shared_prompt(lengths, prompt, completion, where), None
    answers = []
    for choice, (picks, _), asked, place in zip(choices, decoded, starts, places, strict=True):
        own = _own_lengths(choice)
        prompt_tokens, completion_tokens = own if own[0] is not None else (prompt, completion)
        prefill, first = place_rows(
            len(picks), prompt=prompt_tokens, completion=completion_tokens, asked=asked, where=place, notes=notes
        )
        if prefill == UNKNOWN:
            notes[_UNKNOWN_PHASES] = None
        answers.append(EngineResponse(picks, prefill, first, model, place))
    return answers


def _routed(response: dict[str, Any], choice: dict[str, Any], *, alone: bool) -> Any:
    """A choice's own `routed_experts`, or Dynamo's beside a single choice."""
    extension = response.get("nvext")
    if choice.get("routed_experts") is None and alone and isinstance(extension, dict):
        return extension.get("routed_experts")
    return choice.get("routed_experts")


def _own_lengths(choice: dict[str, Any]) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens where the choice carries its token ids (`return_token_ids`)."""
    ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    prompt, completion = (len(item) if isinstance(item, list) else None for item in ids)
    return prompt, completion


def _shared_prompt(lengths: Sequence[int], prompt: int | None, completion: int | None, where: str) -> int | None:
    """The prompt's length when several choices answer one prompt; None when a batch of prompts was sent.

    `usage` counts a prompt once however many samples it has, but adds up the prompts of a batch.

    Args:
        lengths: tokens of each choice that were forwarded, rows before the start included.
    """
    if prompt is None or completion is None:
        return None
    prompts = sum(lengths) + len(lengths) - completion
    if prompts == prompt * len(lengths):
        return prompt
    if prompts == prompt:
        return None
    raise FormatError(
        f"{sum(lengths)} rows in {len(lengths)} choices fit neither one prompt of {prompt} tokens nor a batch of them",
        where=where,
        hint="if the request asked for a start length, give it with --start; else record it again",
    )
