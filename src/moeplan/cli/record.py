"""`moeplan record`: run prompts through a model and store which experts they use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from moeplan.cli import options as o
from moeplan.cli.prompt_flags import PromptTokenFlags
from moeplan.cli.terminal import progress
from moeplan.cli.text.made import show_trace

if TYPE_CHECKING:
    from moeplan.progress import Progress
    from moeplan.record.server import ServedOptions
    from moeplan.trace import Trace

__all__ = ["record"]

record = App(
    name="record",
    help="Run prompts through a model and write a trace. Prompts are stored only with --keep-prompt-tokens.",
    **o.SETTINGS,
)


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

    def values(self, keep: o.KeepFlags) -> dict[str, Any]:
        """The same by the names of the library's options."""
        return {name: value for name, value in vars(self).items() if name != "prompts"} | {"retention": keep.policy()}


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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServedFlags:
    """What a recording from a server is told."""

    requests: PromptFlags
    tokens: PromptTokenFlags = PromptTokenFlags()
    keep: o.KeepFlags = o.KeepFlags()
    server: ServerFlags = ServerFlags()
    model: o.LayeredModelFlags = o.LayeredModelFlags()

    @contextlib.contextmanager
    def options(self, output: Path) -> Iterator[ServedOptions]:
        """The same as the library's value, for a trace that is recorded in the block."""
        from moeplan.record.server import ServedOptions

        values = self.requests.values(self.keep) | vars(self.server)
        options = ServedOptions(**values, model=self.model.spec(), dense_layers=self.model.dense_layers)
        with self.tokens.added(options.retention, output) as retention:
            yield replace(options, retention=retention)


@Parameter(name="*")
@dataclass(frozen=True)
class RunFlags:
    """How a model runs in this process."""

    batch_size: o.Int = 8
    """Requests per batch."""
    dtype: str = "auto"
    """Numeric type of the model: float32, bfloat16, float16, or auto: as the model was saved."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, or auto: a GPU if there is one."""
    keep_gate_weights: bool = False
    """Store gate weights too."""
    allow_download: bool = False
    """Let --model be a name on the Hugging Face Hub."""


@record.command
def transformers(
    *,
    model: o.InputFile,
    output: o.TraceOut,
    requests: PromptFlags,
    tokens: PromptTokenFlags = PromptTokenFlags(),
    keep: o.KeepFlags = o.KeepFlags(),
    run: RunFlags = RunFlags(),
    json: o.Json = None,
) -> None:
    """Record any mixture-of-experts model that Transformers loads.

    Args:
        model: The model: a folder with config.json and safetensors.
    """
    from moeplan.record.transformers import TransformersOptions, record_transformers

    options = TransformersOptions(**requests.values(keep), **vars(run))
    with tokens.added(options.retention, output) as retention:
        kept = replace(options, retention=retention)
        _show(lambda tick: record_transformers(model, requests.prompts, output, kept, progress=tick), json)


@record.command
def vllm(*, output: o.TraceOut, how: ServedFlags, url: str = "http://127.0.0.1:8000", json: o.Json = None) -> None:
    """Record from a vLLM server that runs with --enable-return-routed-experts.

    Args:
        url: Address of the server.
    """
    from moeplan.record.vllm import record_vllm

    with how.options(output) as options:
        _show(lambda tick: record_vllm(how.requests.prompts, output, options, url=url, progress=tick), json)


@record.command
def sglang(
    *,
    output: o.TraceOut,
    how: ServedFlags,
    url: str = "http://127.0.0.1:30000",
    openai: bool = False,
    json: o.Json = None,
) -> None:
    """Record from an SGLang server that runs with --enable-return-routed-experts.

    Args:
        url: Address of the server.
        openai: Use /v1/completions instead of /generate, for a gateway without /generate.
    """
    from moeplan.record.sglang import record_sglang

    with how.options(output) as options:
        prompts = how.requests.prompts
        _show(lambda tick: record_sglang(prompts, output, options, url=url, openai=openai, progress=tick), json)


def _show(record: Callable[[Progress], Trace], json: Path | None) -> None:
    """Record with a progress bar, and show what was recorded and how long it took."""
    start = time.monotonic()
    with progress("recording") as tick:
        trace = record(tick)
    show_trace(trace, json, seconds=time.monotonic() - start)
