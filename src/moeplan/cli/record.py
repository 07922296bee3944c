"""`moeplan record`: run prompts through a model and store which experts they use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import progress
from moeplan.cli.text.made import show_trace
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.record.http_client import Server
    from moeplan.record.prompts import Prompt
    from moeplan.record.server import Engine
    from moeplan.trace import Trace

__all__ = ["record"]

record = App(
    name="record", help="Run prompts through a model and write a trace. No prompt text is stored.", **o.SETTINGS
)
#: Where a key is looked for when no flag names another place.
KEY_VARIABLE = "MOEPLAN_API_KEY"


@Parameter(name="*", group=o.REQUESTS)
@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """Prompts, and what is sampled."""

    prompts: Annotated[o.InputFile, Parameter(metavar="FILE")]
    """Prompts: a JSONL, CSV or text file, or a folder with one file per domain."""
    limit: o.Int | None = None
    """Use at most N prompts, taken from the domains in turn."""
    domain: str | None = None
    """Domain label of every request. Default: the prompt's, the folder's or the file's."""
    max_new_tokens: o.Int | None = None
    """Maximum number of sampled tokens per request. Default: the prompt's own limit, or 128."""
    max_prompt_tokens: o.Int | None = None
    """Truncate prompts to their first N tokens."""
    temperature: float = 0.0
    """Sampling temperature: 0 takes the most likely token."""
    seed: o.Seed = 0
    """Random seed."""
    resume: bool = False
    """Continue a recording that was interrupted (same flags as before)."""

    def sampling(self) -> dict[str, Any]:
        """What is sampled, by the names of the library's options."""
        names = ("max_new_tokens", "max_prompt_tokens", "temperature", "seed")
        return {name: getattr(self, name) for name in names}

    def read(self, output: Path) -> list[Prompt]:
        """The prompts, once the place of the trace is known to be good."""
        from moeplan.record.prompts import read_prompts
        from moeplan.record.recording import check_out

        check_out(output, resume=self.resume)
        return read_prompts(self.prompts, domain=self.domain, limit=self.limit)


@Parameter(name="*", group=Group("Server", sort_key=2))
@dataclass(frozen=True)
class ServerFlags:
    """How the server is asked."""

    served_model: str | None = None
    """Name of the model on the server. Required if the server has several."""
    concurrency: o.Int = 8
    """Requests in flight at the same time."""
    retries: o.Int = 5
    """Number of retries after status 408, 429 or 5xx, or a broken connection."""
    timeout: float = 600.0
    """Time-out of one request in seconds, including the answer."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key. Default: MOEPLAN_API_KEY."""

    def connect(self, url: str) -> Server:
        """The server, with a key if the environment has one: command lines are seen by others and kept in histories."""
        from moeplan.record.http_client import Server, ServerOptions

        if self.api_key_env is not None and self.api_key_env not in os.environ:
            raise UsageError(f"--api-key-env {self.api_key_env}: the environment has no such variable")
        name = self.api_key_env or KEY_VARIABLE
        options = ServerOptions(self.timeout, self.retries)
        return Server(url, key=os.environ.get(name), key_name=name, options=options)


@record.command
def transformers(
    *,
    model: o.InputFile,
    output: o.TraceOut,
    requests: PromptFlags,
    keep: o.KeepFlags = o.KeepFlags(),
    batch_size: o.Int = 8,
    dtype: str = "auto",
    device: str = "auto",
    keep_gate_weights: bool = False,
    allow_download: bool = False,
    json: o.Json = None,
) -> None:
    """Record any mixture-of-experts model that Transformers loads.

    Args:
        model: The model: a folder with config.json and safetensors.
        batch_size: Requests per batch.
        dtype: Numeric type of the model: float32, bfloat16, float16, or auto: as the model was saved.
        device: Device: cpu, cuda, cuda:1, or auto: a GPU if there is one.
        keep_gate_weights: Store gate weights too.
        allow_download: Let --model be a name on the Hugging Face Hub.
    """
    from moeplan.record.transformers import RecordOptions, record_model
    from moeplan.record.transformers_model import load_model

    policy, resume = keep.policy(), requests.resume
    options = RecordOptions(**requests.sampling(), batch_size=batch_size, weights=keep_gate_weights)
    prompts = requests.read(output)
    policy.check([prompt.domain for prompt in prompts], weights=keep_gate_weights)
    needs_tokenizer = any(prompt.token_ids is None for prompt in prompts)
    loaded = load_model(
        str(model), dtype=dtype, device=device, allow_download=allow_download, tokenizer=needs_tokenizer
    )
    start = time.monotonic()
    with progress("recording") as tick:
        trace = record_model(loaded, prompts, output, options, keep=policy, resume=resume, progress=tick)
    show_trace(trace, json, seconds=time.monotonic() - start)


@record.command
def vllm(
    *,
    output: o.TraceOut,
    requests: PromptFlags,
    keep: o.KeepFlags = o.KeepFlags(),
    url: str = "http://127.0.0.1:8000",
    server: ServerFlags = ServerFlags(),
    model: o.LayeredModelFlags = o.LayeredModelFlags(),
    json: o.Json = None,
) -> None:
    """Record from a vLLM server that runs with --enable-return-routed-experts.

    Args:
        url: Address of the server.
    """
    from moeplan.record.vllm import VllmEngine

    start = time.monotonic()
    trace = _record(server.connect(url), server, VllmEngine.of, requests, keep, model, output)
    show_trace(trace, json, seconds=time.monotonic() - start)


@record.command
def sglang(
    *,
    output: o.TraceOut,
    requests: PromptFlags,
    keep: o.KeepFlags = o.KeepFlags(),
    url: str = "http://127.0.0.1:30000",
    openai: bool = False,
    server: ServerFlags = ServerFlags(),
    model: o.LayeredModelFlags = o.LayeredModelFlags(),
    json: o.Json = None,
) -> None:
    """Record from an SGLang server that runs with --enable-return-routed-experts.

    Args:
        url: Address of the server.
        openai: Use /v1/completions instead of /generate, for a gateway without /generate.
    """
    from moeplan.record.sglang import SglangEngine

    spec, start = model.spec(), time.monotonic()
    trace = _record(
        server.connect(url),
        server,
        lambda at, served: SglangEngine.of(at, served, spec, openai=openai),
        requests,
        keep,
        model,
        output,
    )
    show_trace(trace, json, seconds=time.monotonic() - start)


def _record(
    server: Server,
    flags: ServerFlags,
    engine_of: Callable[[Server, str], Engine],
    requests: PromptFlags,
    keep: o.KeepFlags,
    model: o.LayeredModelFlags,
    output: Path,
) -> Trace:
    """Read the prompts, find the model, record; what needs no server is checked before one is asked."""
    from moeplan.record.server import ServingOptions, record_served, served_model

    spec, policy = model.spec(), keep.policy()
    options = ServingOptions(**requests.sampling(), concurrency=flags.concurrency)
    prompts = requests.read(output)
    spec.need_experts(server.url)
    served, positions = served_model(server, flags.served_model)
    with progress("recording") as tick:
        return record_served(
            server,
            engine_of(server, served),
            served,
            positions,
            prompts,
            output,
            spec=spec,
            options=options,
            dense_layers=model.dense_layers,
            keep=policy,
            resume=requests.resume,
            progress=tick,
        )
