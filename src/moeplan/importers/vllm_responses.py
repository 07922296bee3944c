"""Importer of stored vLLM responses (0.33.0, `--enable-return-routed-experts`): completions and chat alike.

`choices[i].routed_experts` is base64 of a .npy file, uint8 or uint16 [tokens - 1 - start, hidden layers, k]
(vllm/utils/serial_utils.py). Through Dynamo 1.6 it is `nvext.routed_experts`, an object of base64 plain bytes with
`shape`, `dtype` and `start`. Text is not looked at. Token ids of prompts, which a response holds if its request asked
with `return_token_ids` (in the choice, or beside the choices of a chat), are stored only where that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions
from moeplan.importers.routed_experts import (
    EngineResponse,
    Picks,
    TokenCount,
    Usage,
    decode_npy,
    decode_raw,
    from_base64,
    import_responses,
    place_rows,
)
from moeplan.io.json import convert
from moeplan.progress import Progress, silent
from moeplan.trace.format import UNKNOWN
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.reader import Trace

__all__ = ["decode_routed_experts", "import_vllm", "read_response"]

_FLAG = "start the server with --enable-return-routed-experts and record again"
_UNKNOWN_PHASES = "some responses do not say how long a choice's prompt was: its phases are unknown"


def import_vllm(
    sources: Sequence[Path],
    out: Path,
    options: ImportOptions = ImportOptions(),
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
    read = partial(read_response, start=start)
    return import_responses("vllm", sources, read, out, options, progress)


class PlainPicks(msgspec.Struct):
    """Dynamo's form of `routed_experts`: base64 of plain bytes, with their shape."""

    data: str
    shape: list[int]
    dtype: Literal["uint8", "uint16", "int16", "int32", "int64"]
    start: TokenCount | None = None


class _Choice(msgspec.Struct):
    routed_experts: PlainPicks | str | None = None
    prompt_token_ids: list[Any] | None = None
    token_ids: list[Any] | None = None


class _Response(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: Usage | None = None
    model: str | None = None
    nvext: _Choice | None = None
    prompt_token_ids: list[Any] | None = None

    def __post_init__(self) -> None:
        """Dynamo's picks lie beside a single choice."""
        if len(self.choices) == 1 and self.choices[0].routed_experts is None and self.nvext:
            self.choices[0].routed_experts = self.nvext.routed_experts


def decode_routed_experts(value: PlainPicks | str | None, where: str) -> tuple[Picks, int | None]:
    """(picks [rows, hidden layers, k], start or None) of one `routed_experts`, in either of its two forms."""
    if value is None:
        raise FormatError("has no routed_experts", where=where, hint=_FLAG)
    if isinstance(value, str):
        return decode_npy(from_base64(value, where), where), None
    dtype = np.dtype(value.dtype).newbyteorder("<")
    return decode_raw(from_base64(value.data, where), value.shape, dtype, where), value.start


def read_response(response: dict[str, Any], start: int, where: str, notes: dict[str, None]) -> list[EngineResponse]:
    """Each choice of a response.

    Args:
        start: `routed_experts_prompt_start` of the request.
        notes: gains a line for what was odd but kept.

    Raises:
        FormatError: no choices or no picks in it, or rows that do not fit its own counts of tokens.
    """
    found: _Response = convert(response, _Response, where, "give responses of completions or chats as vLLM sent them")
    choices, usage = found.choices, found.usage or Usage()
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    places = [f"{where}, choice {number}" for number in range(len(choices))]
    decoded = [decode_routed_experts(c.routed_experts, place) for c, place in zip(choices, places, strict=True)]
    starts = [start if given is None else given for _, given in decoded]
    if len(choices) > 1:
        lengths = [len(picks) + first for (picks, _), first in zip(decoded, starts, strict=True)]
        prompt, completion = _shared_prompt(lengths, prompt, completion, where), None
    found_choices = []
    for choice, (picks, _), asked, place in zip(choices, decoded, starts, places, strict=True):
        prompt_tokens, completion_tokens = prompt, completion
        if choice.prompt_token_ids is not None:  # the request asked for `return_token_ids`
            prompt_tokens, completion_tokens = (
                None if ids is None else len(ids) for ids in (choice.prompt_token_ids, choice.token_ids)
            )
        prefill, first = place_rows(
            len(picks), prompt=prompt_tokens, completion=completion_tokens, asked=asked, where=place, notes=notes
        )
        if prefill == UNKNOWN:
            notes[_UNKNOWN_PHASES] = None
        ids = found.prompt_token_ids if choice.prompt_token_ids is None else choice.prompt_token_ids
        features = None if ids is None else prompt_features(ids, place)
        found_choices.append(EngineResponse(picks, prefill, first, found.model or "", place, prompt=features))
    return found_choices


def prompt_features(ids: list[Any], where: str) -> PromptFeatures:
    """The token ids of a prompt, as a response lists them.

    Raises:
        FormatError: something that is no token id.
    """
    if any(type(i) is not int or not 0 <= i < 2**32 for i in ids):
        raise FormatError("prompt_token_ids is not a list of token ids", where=where)
    return PromptFeatures.of_ids([np.array(ids, np.uint32)])


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
