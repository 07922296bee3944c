"""Recording any mixture-of-experts model that Transformers loads.

Batches are planned from the list of prompts before anything runs, so that a recording which was cut off goes on with
the same batches and ends in the same trace. Per batch: tokenise with padding on the left, generate, take the picks of
every pass from the routers' hooks, drop padding and what follows a request's own end, add the requests in their order.
The last sampled token never goes through the model, so a request of n prompt and m sampled tokens has n + m - 1 rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.progress import Progress, silent
from moeplan.record.prompts import Prompt, prompts_digest
from moeplan.record.recording import (
    Meter,
    SamplingOptions,
    check_out,
    finished,
    new_tokens,
    part_picks,
    seed_of,
    sweep,
)
from moeplan.record.transformers_model import LoadedModel, pad_token, stop_tokens
from moeplan.record.transformers_routers import PickTap
from moeplan.trace.format import JSON_NAME
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.trace.writer import TraceWriter

__all__ = ["RecordOptions", "record_model"]


@dataclass(frozen=True)
class RecordOptions(SamplingOptions):
    """How prompts are run in this process.

    Attributes:
        batch_size: requests that run together.
        weights: keep gate weights.
    """

    batch_size: int = 8
    weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} is not positive")


def record_model(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    out: Path,
    options: RecordOptions | None = None,
    *,
    keep: RetentionPolicy | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Trace:
    """Run the prompts through the model and write the trace.

    Args:
        keep: what is stored; all requests, row by row, when not given.
        resume: go on with a recording at `out`, if there is one; it must have been begun with the same arguments.
        progress: called after each batch with the requests done.

    Raises:
        FormatError: a prompt without tokens, with unknown token ids, or too long for the model.
        UsageError: gate weights were asked of a router that gives none; another recording is at `out`.
        OutputError: `out` exists (without `resume`) or cannot be written.
    """
    options, keep = options or RecordOptions(), keep or RetentionPolicy()
    domains = [prompt.domain for prompt in prompts]
    keep.check(domains, weights=options.weights)
    check_out(out, resume=resume)
    mute = next((router for router in loaded.routers if not router.has_weights), None)
    if options.weights and mute is not None:
        raise UsageError(f"{mute.name} ({mute.kind}) gives no gate weights", hint="record without --keep-gate-weights")
    requests = [_tokenised(prompt, loaded, options) for prompt in prompts]
    source = {**_source(loaded, prompts, options), **keep.source()}
    begun = resume and (out / JSON_NAME).exists()
    if begun and finished(out, source, loaded.shape, weights=options.weights):
        return open_trace(out)
    if resume:
        sweep(out, begun=begun)
    meter = Meter(progress, len(requests))
    with (
        TraceWriter(
            out,
            loaded.shape,
            source=source,
            weights=options.weights,
            part_picks=part_picks(loaded.shape),
            retention=keep,
            mode="resume" if begun else "record",
        ) as writer,
        _Generator(loaded, options) as generator,
    ):
        pending = writer.pending(domains)
        for start in range(0, len(requests), options.batch_size):
            batch = slice(start, start + options.batch_size)
            if not pending[batch].any():
                continue
            for request, new in zip(generator.run(requests[batch], start), pending[batch], strict=True):
                if new:
                    writer.add(**request)
                    meter.rows += len(request["experts"])
            meter.tell(min(batch.stop, len(requests)))
    return open_trace(out)


@dataclass(frozen=True)
class _Request:
    """A prompt in tokens, and how many may be sampled."""

    prompt: Prompt
    ids: tuple[int, ...]
    new: int


class _Generator:
    """Generates batch after batch while the tap listens."""

    def __init__(self, loaded: LoadedModel, options: RecordOptions) -> None:
        from transformers import GenerationConfig

        self._model, self._options = loaded.model, options
        self._tap = PickTap(loaded.model, loaded.routers, weights=options.weights)
        self._listening = self._tap.listening()
        self._stops = stop_tokens(loaded)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        self._config = GenerationConfig(
            eos_token_id=sorted(self._stops) or None,
            pad_token_id=pad_token(loaded),
            use_cache=True,
            **(sampling if options.temperature else {"do_sample": False}),
        )
        self._stored = loaded.model.generation_config

    def __enter__(self) -> _Generator:
        self._model.generation_config = self._config  # the model's own may hold penalties and limits of a chat product
        self._listening.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._listening.__exit__(*error)
        self._model.generation_config = self._stored

    def run(self, batch: Sequence[_Request], start: int) -> list[dict[str, Any]]:
        """Arguments of `TraceWriter.add` for each request of a batch; `start` is the number of its first one."""
        import torch

        length = max(len(request.ids) for request in batch)
        ids = torch.full((len(batch), length), int(self._config.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, length - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, length - len(request.ids) :] = 1
        try:
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(seed_of(self._options.seed, start))
                tokens = self._model.generate(
                    input_ids=ids.to(self._model.device),
                    attention_mask=mask.to(self._model.device),
                    max_new_tokens=max(request.new for request in batch),
                )
        except torch.OutOfMemoryError:
            raise MoeplanError("the device has not enough memory", hint="use a smaller --batch-size") from None
        sampled = tokens[:, length:].cpu().numpy()
        picks, weights = self._tap.take(len(batch), length, sampled.shape[1])
        return [
            self._request(request, picks[row], None if weights is None else weights[row], sampled[row], length)
            for row, request in enumerate(batch)
        ]

    def _request(
        self,
        request: _Request,
        picks: npt.NDArray[Any],
        weights: npt.NDArray[Any] | None,
        sampled: npt.NDArray[Any],
        length: int,
    ) -> dict[str, Any]:
        """One request's own rows: from its first prompt token to the last sampled token that went through the model."""
        stops = np.flatnonzero(np.isin(sampled, list(self._stops)))
        count = min(request.new, int(stops[0]) + 1 if len(stops) else len(sampled))
        rows = slice(length - len(request.ids), length + count - 1)
        return {
            "experts": picks[rows],
            "prefill": len(request.ids),
            "domain": request.prompt.domain,
            "arrival": request.prompt.arrival,
            "weights": None if weights is None else weights[rows],
            "where": request.prompt.where,
        }


def _tokenised(prompt: Prompt, loaded: LoadedModel, options: RecordOptions) -> _Request:
    """A prompt's token ids, checked against the model's vocabulary and positions."""
    ids = prompt.token_ids if prompt.token_ids is not None else _encode(prompt, loaded.tokenizer)
    if options.max_prompt_tokens is not None:
        ids = ids[: options.max_prompt_tokens]
    if not ids:
        raise FormatError("gives no token", where=prompt.where, hint="leave the row out")
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    if max(ids) >= vocabulary:
        raise FormatError(f"token id {max(ids)} is outside the model's {vocabulary}", where=prompt.where)
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    new = new_tokens(prompt, len(ids), limit if type(limit) is int else None, options)
    return _Request(prompt, ids, new)


def _encode(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a text or a chat; a tokenizer without a chat template gets the messages' contents, line by line."""
    if tokenizer is None:
        raise FormatError("is text, but the model has no tokenizer", where=prompt.where)
    if prompt.messages is None:
        return tuple(tokenizer(prompt.text)["input_ids"])
    if not tokenizer.chat_template:
        return tuple(tokenizer("\n".join(content for _, content in prompt.messages))["input_ids"])
    chat = [{"role": role, "content": content} for role, content in prompt.messages]
    try:
        return tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program of the model's maker and raises what it likes
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FormatError(f"does not fit the model's chat template ({why})", where=prompt.where) from None


def _source(loaded: LoadedModel, prompts: Sequence[Prompt], options: RecordOptions) -> dict[str, Any]:
    """How the trace comes about: what must be the same for a recording to go on. No prompt text, no paths."""
    import torch
    import transformers

    config = {k: v for k, v in loaded.model.config.to_dict().items() if k != "_name_or_path"}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "record": "transformers",
        "model": loaded.name,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "prompts_sha256": prompts_digest(list(prompts)),
        "requests": len(prompts),
        **{k: v for k, v in dataclasses.asdict(options).items() if k != "weights"},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
