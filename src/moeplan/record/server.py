"""Recording through a running inference server: prompts go out several at a time, answers come in, in prompt order.

Before anything is recorded, every prompt is tokenised by the server, so that one it cannot hold is named at once, and
one short request shows whether the server sends picks and how its layers look. Then the prompts are asked, a bounded
number ahead of the one that is written next: the trace's order is that of the prompts, whatever order the answers have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

from moeplan.errors import FormatError, ServerError, UsageError
from moeplan.importers.options import ImportOptions
from moeplan.importers.routed_experts import EngineResponse, ResponseLayout
from moeplan.model.spec import ModelSpec
from moeplan.progress import Progress
from moeplan.record.http_client import Server, ServerOptions, connect
from moeplan.record.prompts import Prompt
from moeplan.record.recording import Prompts, Recording, RecordOptions, new_tokens, seed_of
from moeplan.trace.format import UNKNOWN, Request
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.reader import Trace

__all__ = [
    "NEUTRAL",
    "Engine",
    "ServedOptions",
    "in_order",
    "openai_request",
    "record_served",
    "served_model",
    "served_version",
    "sole_answer",
]

#: Requests that are begun and not yet written, for each one that runs: more of them keep a server busy behind one long
#: answer, fewer of them take less memory.
AHEAD = 4
#: No server is helped by more connections from one client than this.
MAX_CONCURRENCY = 1024
#: Given in every request, since a model's generation_config.json could change them: only temperature and seed count.
NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

_NO_TOKENS = "leave out --keep-prompt-tokens, give prompts as token ids, or ask a server that has /tokenize"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedOptions(RecordOptions, ServerOptions):
    """What a recording from a server is told beside its prompts; see also `RecordOptions` and `ServerOptions`.

    Attributes:
        model: what is known of the model: the number of experts at least. SGLang needs hidden layers and k as well.
        dense_layers: hidden layers without experts; needed for top-1 where the model does not say it.
        served_model: the name under which the server serves the model; needed where it serves several.
        concurrency: requests under way at a time; what is recorded does not depend on it.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    dense_layers: tuple[int, ...] | None = None
    served_model: str | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        RecordOptions.__post_init__(self)
        ServerOptions.__post_init__(self)
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise UsageError(f"--concurrency {self.concurrency} is outside 1 to {MAX_CONCURRENCY}")


class Engine(Protocol):
    """What differs between servers."""

    @property
    def source(self) -> dict[str, Any]:
        """What a trace says about the server: engine, version, interface."""

    def request(self, prompt: Prompt, new: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
        """(path, body) that asks for a prompt's continuation with the picks of all its tokens."""

    def read(self, response: dict[str, Any], where: str) -> EngineResponse:
        """The one answer of a response."""


@dataclass(frozen=True)
class _Request:
    """A prompt, cut if it was too long, and how many tokens may be sampled.

    `features` are its token ids as the server sees them; None where only the server's answer can tell them.
    """

    prompt: Prompt
    new: int
    features: PromptFeatures | None = None


def record_served(
    url: str,
    engine_of: Callable[[Server, str], Engine],
    prompts: Prompts,
    out: str | Path,
    options: ServedOptions,
    progress: Progress,
) -> Trace:
    """Have a server continue the prompts and write the trace.

    Args:
        engine_of: the engine of a server that serves a model under a name.
        progress: called after each prompt that was checked, then after each request that was written.

    Raises:
        UsageError: something about the model is not known or contradicts; another recording is at `out`.
        FormatError: a prompt that the server cannot hold; an answer without picks, or with impossible ones; prompt
            tokens are to be kept, and the server has no `/tokenize` and does not return them either.
        ServerError: the server refuses or keeps failing. What was written stays, and can be resumed.
        OutputError: `out` exists (without `resume`) or cannot be written.
    """
    server, spec = connect(url, options), options.model
    recording = Recording(prompts, out, options)
    spec.need_experts(server.url)
    model, positions = served_model(server, options.served_model)
    engine = engine_of(server, model)
    requests = _fit(server, model, positions, recording.prompts, options, progress)

    keeps_prompts = options.retention.prompts is not None

    def ask(number: int, new: int | None = None) -> EngineResponse:
        request = requests[number]
        seed = seed_of(options.seed, number)
        path, body = engine.request(request.prompt, new or request.new, options.temperature, seed)
        if keeps_prompts and request.features is None and path.startswith("/v1/"):
            body["return_token_ids"] = True
        where = request.prompt.where
        return engine.read(server.post(path, body, where=where), where)

    named = replace(spec, name=_plain_name(model) if spec.name is None else spec.name)
    layout = ResponseLayout.infer(ask(0, new=1), ImportOptions(named, options.dense_layers))

    def record(numbers: list[int]) -> Generator[Request, None, None]:
        with closing(in_order(ask, numbers, options.concurrency, server.stop)) as answers:
            for number, answer in zip(numbers, answers, strict=True):
                prompt, picks, rank = recording.prompts[number], layout.moe_picks(answer), answer.dp_rank
                where, features = prompt.where, requests[number].features or answer.prompt
                if keeps_prompts and features is None:
                    raise FormatError("the server does not tell its token ids", where=where, hint=_NO_TOKENS)
                of_prompt = (prompt.domain, prompt.arrival)
                yield Request(picks, answer.prefill, *of_prompt, dp_rank=rank, where=where, prompt=features)

    source = {**engine.source, "model": _plain_name(model), **recording.source()}
    return recording.write(layout.shape, source, record, progress)


def in_order(
    ask: Callable[[Item], Result], items: Sequence[Item], workers: int, stop: Callable[[], None]
) -> Generator[Result, None, None]:
    """`ask(item)` of each item, in order, `workers` at a time and at most `AHEAD` times as many before the one due.

    Args:
        stop: called to break off what is under way when the results are not wanted any more.
    """
    rest, waiting = iter(items), deque[Future[Result]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in rest:
                waiting.append(pool.submit(ask, item))
                if len(waiting) == workers * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            for future in waiting:
                future.cancel()
            stop()
            raise


def served_model(server: Server, asked: str | None) -> tuple[str, int | None]:
    """(name, positions or None) of the model that a server serves, from `/v1/models`.

    Args:
        asked: the one that is wanted, if the server has several.

    Raises:
        ServerError: no list of models.
        UsageError: it serves several, or not the one that is wanted.
    """
    entries = server.get("/v1/models", retry=False).get("data")
    entries = entries if isinstance(entries, list) else []
    entries = [e for e in entries if isinstance(e, dict) and _is_name(e.get("id"))]
    names = [e["id"] for e in entries]
    bases = [e["id"] for e in entries if e.get("parent") is None]  # no adapters
    if not names:
        raise ServerError("lists no model", where=f"{server.url}/v1/models", hint="check --url")
    hint = f"choose one with --served-model: {', '.join(name[:100] for name in names[:8])}"
    if asked is None and len(bases) != 1:
        raise UsageError("serves several models", where=server.url, hint=hint)
    if asked is not None and asked not in names:
        raise UsageError(f"does not serve {asked[:100]}", where=server.url, hint=hint)
    name = bases[0] if asked is None else asked
    positions = next(e.get("max_model_len") for e in entries if e.get("id") == name)
    return name, positions if type(positions) is int and positions > 0 else None


def served_version(server: Server, path: str) -> str | None:
    """What a server calls its version at a path; None where it does not say, or a gateway before it hides the path."""
    try:
        version = server.get(path).get("version")
    except ServerError:
        return None
    return version if _is_name(version) else None


def _is_name(value: Any) -> TypeGuard[str]:
    """Whether it can stand in a message and in a trace."""
    return isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()


def sole_answer(answers: Sequence[EngineResponse], where: str) -> EngineResponse:
    """The only answer, whose phases the server's counts of tokens must tell."""
    if len(answers) != 1:
        raise FormatError(f"got {len(answers)} answers to one request", where=where)
    if answers[0].prefill == UNKNOWN:
        raise FormatError("the answer does not count its tokens (usage)", where=where, hint="ask the server directly")
    return answers[0]


def openai_request(model: str, prompt: Prompt, new: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a completion, or of a chat completion for messages."""
    body = {"model": model, "max_tokens": new, "temperature": temperature, "seed": seed, **NEUTRAL}
    if prompt.messages is not None:
        return "/v1/chat/completions", {**body, "messages": prompt.chat}
    return "/v1/completions", {**body, "prompt": prompt.text if prompt.token_ids is None else list(prompt.token_ids)}


def _fit(
    server: Server,
    model: str,
    positions: int | None,
    prompts: Sequence[Prompt],
    options: ServedOptions,
    progress: Progress,
) -> list[_Request]:
    """Every prompt with its new tokens, checked against the model's positions, and cut where that was asked for."""
    tokenised = _tokeniser(server, model, prompts)
    if tokenised is None and options.max_prompt_tokens is not None:
        what, hint = "has no /tokenize, so prompts cannot be cut", "leave out --max-prompt-tokens"
        raise UsageError(what, where=server.url, hint=hint)

    def fit(prompt: Prompt) -> _Request:
        if tokenised is None:
            given = None if prompt.token_ids is None else PromptFeatures.of_ids([prompt.token_ids])
            return _Request(prompt, new_tokens(prompt, 0, None, options), given)
        ids = tokenised(prompt)
        if not ids:
            raise FormatError("gives no token", where=prompt.where, hint="leave the row out")
        most = options.max_prompt_tokens or len(ids)
        if len(ids) > most:
            prompt = replace(prompt, text=None, messages=None, token_ids=ids[:most])
        new = new_tokens(prompt, min(len(ids), most), positions, options)
        return _Request(prompt, new, PromptFeatures.of_ids([ids[:most]]))

    fitted = []
    with closing(in_order(fit, prompts, options.concurrency, server.stop)) as requests:
        for request in requests:
            fitted.append(request)
            # None of the requests is done yet: a bar that was full once no longer estimates the time left.
            progress(0, len(prompts), f"{len(fitted)}/{len(prompts)} prompts checked")
    return fitted


def _tokeniser(server: Server, model: str, prompts: Sequence[Prompt]) -> Callable[[Prompt], tuple[int, ...]] | None:
    """Gives a prompt's token ids as the server will see them (vLLM and SGLang: POST /tokenize); None if it cannot."""

    def tokenised(prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        what = {"prompt": prompt.text} if prompt.messages is None else {"messages": prompt.chat}
        ids = server.post("/tokenize", {"model": model, **what}, where=prompt.where).get("tokens")
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise ServerError("answers with no list of tokens", where=f"{prompt.where}: {server.url}/tokenize")
        return tuple(ids)

    sample = next((prompt for prompt in prompts if prompt.token_ids is None), None)
    if sample is not None:
        try:
            tokenised(sample)
        except ServerError as error:
            if error.status not in (404, 405):
                raise
            return None
    return tokenised


def _plain_name(model: str) -> str:
    """A model's name without the folder that a server was started from."""
    path = model.startswith(("/", ".", "~")) or "\\" in model
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2] if path else model
