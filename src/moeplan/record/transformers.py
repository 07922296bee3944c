"""Recording any mixture-of-experts model that Transformers loads.

Batches are planned from the list of prompts before anything runs, so that a recording which was cut off goes on with
the same batches and ends in the same trace. Per batch: tokenise with padding on the left, generate, take the picks of
every pass from the routers' hooks, drop padding and what follows a request's own end, add the requests in their order.
The last sampled token never goes through the model, so a request of n prompt and m sampled tokens has n + m - 1 rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.progress import Progress, silent
from moeplan.record.prompts import Prompt
from moeplan.record.recording import Prompts, Recording, RecordOptions, new_tokens, seed_of
from moeplan.record.transformers_model import LoadedModel, load_model, pad_token, stop_tokens
from moeplan.record.transformers_routers import PickTap
from moeplan.trace.format import Request
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.reader import Trace

__all__ = ["TransformersOptions", "record_transformers"]


@dataclass(frozen=True)
class TransformersOptions(RecordOptions):
    """How prompts are run in this process; see also `RecordOptions`.

    Attributes:
        batch_size: requests that run together.
        keep_gate_weights: store gate weights as well.
        dtype, device, allow_download: how a model that is not in memory is loaded; see `load_model`.
    """

    batch_size: int = 8
    keep_gate_weights: bool = False
    dtype: str = "auto"
    device: str = "auto"
    allow_download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} is not positive")


def record_transformers(
    model: str | Path | LoadedModel,
    prompts: Prompts,
    out: str | Path,
    options: TransformersOptions = TransformersOptions(),
    *,
    progress: Progress = silent,
) -> Trace:
    """Run prompts through a model in this process, and store which experts they use.

    Args:
        model: a folder with config.json and safetensors, the word `embedded`, or a model that is in memory
            (`LoadedModel.of`).
        prompts: a file or folder of prompts, or `Prompt` values.
        progress: called after each request that was written.

    Raises:
        FormatError: a prompt without tokens, with unknown token ids, or too long for the model.
        UsageError: Transformers is not installed or cannot load the model; gate weights were asked of a router that
            gives none; another recording is at `out`.
        OutputError: `out` exists (without `resume`) or cannot be written.

    Examples:
        >>> import moeplan
        >>> trace = moeplan.record_transformers("embedded", "prompts.jsonl", "my-trace")  # doctest: +SKIP
    """
    weights = options.keep_gate_weights
    recording = Recording(prompts, out, options, weights=weights)
    loaded = model if isinstance(model, LoadedModel) else _loaded(str(model), recording.prompts, options)
    mute = next((router for router in loaded.routers if not router.has_weights), None)
    if weights and mute is not None:
        raise UsageError(f"{mute.name} ({mute.kind}) gives no gate weights", hint="record without --keep-gate-weights")
    requests = [_tokenised(prompt, loaded, options) for prompt in recording.prompts]

    def record(numbers: list[int]) -> Generator[Request, None, None]:
        missing, size = set(numbers), options.batch_size
        with _Generator(loaded, options) as generator:
            for start in range(0, len(requests), size):
                batch = range(start, min(start + size, len(requests)))
                if not missing.isdisjoint(batch):
                    made = generator.run(requests[start : batch.stop], start)
                    yield from (request for number, request in zip(batch, made, strict=True) if number in missing)

    source = _source(loaded, {**recording.source(), "batch_size": options.batch_size})
    return recording.write(loaded.shape, source, record, progress)


def _loaded(model: str, prompts: Sequence[Prompt], options: TransformersOptions) -> LoadedModel:
    how: Any = {"dtype": options.dtype, "device": options.device, "allow_download": options.allow_download}
    return load_model(model, tokenizer=any(prompt.token_ids is None for prompt in prompts), **how)


@dataclass(frozen=True)
class _Request:
    """A prompt in tokens, and how many may be sampled."""

    prompt: Prompt
    ids: tuple[int, ...]
    new: int


class _Generator:
    """Generates batch after batch while the tap listens."""

    def __init__(self, loaded: LoadedModel, options: TransformersOptions) -> None:
        from transformers import GenerationConfig

        self._model, self._options = loaded.model, options
        self._tap = PickTap(loaded.model, loaded.routers, weights=options.keep_gate_weights)
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

    def run(self, batch: Sequence[_Request], start: int) -> list[Request]:
        """The requests of a batch, as a trace stores them; `start` is the number of its first one."""
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
    ) -> Request:
        """One request's own rows: from its first prompt token to the last sampled token that went through the model."""
        stops = np.flatnonzero(np.isin(sampled, list(self._stops)))
        count = min(request.new, int(stops[0]) + 1 if len(stops) else len(sampled))
        rows, prompt = slice(length - len(request.ids), length + count - 1), request.prompt
        gate = None if weights is None else weights[rows]
        more: dict[str, Any] = {"where": prompt.where, "prompt": PromptFeatures.of_ids([request.ids])}
        return Request(picks[rows], len(request.ids), prompt.domain, prompt.arrival, weights=gate, **more)


def _tokenised(prompt: Prompt, loaded: LoadedModel, options: TransformersOptions) -> _Request:
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
    try:
        return tuple(tokenizer.apply_chat_template(prompt.chat, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program of the model's maker and raises what it likes
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FormatError(f"does not fit the model's chat template ({why})", where=prompt.where) from None


def _source(loaded: LoadedModel, prompts: dict[str, Any]) -> dict[str, Any]:
    """How the trace comes about: what must be the same for a recording to go on. No paths."""
    import torch
    import transformers

    config = {k: v for k, v in loaded.model.config.to_dict().items() if k != "_name_or_path"}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "record": "transformers",
        "model": loaded.name,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **prompts,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
