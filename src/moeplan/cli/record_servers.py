"""`moeplan record vllm` and `record sglang`: prompts through a running server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli.common import Aggregate, JsonOption, MinTokens, claim_stdout, progress
from moeplan.cli.import_ import ExpertBytes, Hidden, KvBytes, Name, RoutingGroups
from moeplan.cli.import_engines import DenseLayers, Experts, Layers, TopK, dense_layers_of
from moeplan.cli.record_options import (
    Label,
    Limit,
    MaxNewTokens,
    MaxPromptTokens,
    Output,
    Prompts,
    Resume,
    Seed,
    Temperature,
    report,
)
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.record.http_client import Server
    from moeplan.record.server import Engine

__all__ = ["register_servers"]

#: Where a key is looked for when no flag names another place.
KEY_VARIABLE = "MOEPLAN_API_KEY"

Url = Annotated[str, typer.Option("--url", metavar="URL", help="Where the server listens.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Its name on the server, if that serves several.")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="DIR", help="The model's folder or config.json: experts, k, dense layers."),
]
Concurrency = Annotated[int, typer.Option("--concurrency", metavar="N", help="Requests under way at a time.")]
Retries = Annotated[
    int,
    typer.Option("--retries", metavar="N", help="Further tries of a request after 429, 5xx or a broken connection."),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds for one request, answer included.")]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env", metavar="NAME", help=f"Environment variable that holds the server's key [{KEY_VARIABLE}]."
    ),
]


def vllm(
    prompts: Prompts,
    output: Output,
    url: Url = "http://127.0.0.1:8000",
    model: Model = None,
    config: Config = None,
    num_experts: Experts = None,
    dense_layers: DenseLayers = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    max_prompt_tokens: MaxPromptTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    retries: Retries = 5,
    timeout: Timeout = 600.0,
    api_key_env: ApiKeyEnv = None,
    min_tokens: MinTokens = 1,
    aggregate: Aggregate = None,
    resume: Resume = False,
    domain: Label = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    json: JsonOption = None,
) -> None:
    """Record from a vLLM server that runs with --enable-return-routed-experts. No prompt text is stored."""
    from moeplan.model.config import described
    from moeplan.record.server import ServingOptions
    from moeplan.record.vllm import VllmEngine
    from moeplan.trace.retention import RetentionPolicy

    claim_stdout(json)
    dense = dense_layers_of(dense_layers)
    _record(
        _server(url, api_key_env, timeout, retries),
        model,
        VllmEngine.of,
        prompts=prompts,
        domain=domain,
        limit=limit,
        output=output,
        options=ServingOptions(max_new_tokens, max_prompt_tokens, temperature, seed, concurrency),
        spec=described(
            config,
            num_experts=num_experts,
            dense_layers=dense,
            name=name,
            hidden=hidden,
            expert_bytes=expert_bytes,
            kv_bytes_per_token=kv_bytes_per_token,
            routing_groups=routing_groups,
        ),
        dense_layers=dense,
        keep=RetentionPolicy(min_tokens, aggregate),
        resume=resume,
        json=json,
    )


def sglang(
    prompts: Prompts,
    output: Output,
    url: Url = "http://127.0.0.1:30000",
    model: Model = None,
    openai: Annotated[
        bool, typer.Option("--openai", help="Use /v1/completions in place of /generate, for a gateway without it.")
    ] = False,
    config: Config = None,
    num_experts: Experts = None,
    num_layers: Layers = None,
    top_k: TopK = None,
    dense_layers: DenseLayers = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    max_prompt_tokens: MaxPromptTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    retries: Retries = 5,
    timeout: Timeout = 600.0,
    api_key_env: ApiKeyEnv = None,
    min_tokens: MinTokens = 1,
    aggregate: Aggregate = None,
    resume: Resume = False,
    domain: Label = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    json: JsonOption = None,
) -> None:
    """Record from an SGLang server that runs with --enable-return-routed-experts. No prompt text is stored."""
    from moeplan.model.config import described
    from moeplan.record.server import ServingOptions
    from moeplan.record.sglang import SglangEngine
    from moeplan.trace.retention import RetentionPolicy

    claim_stdout(json)
    dense = dense_layers_of(dense_layers)
    spec = described(
        config,
        num_experts=num_experts,
        num_layers=num_layers,
        top_k=top_k,
        dense_layers=dense,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    _record(
        _server(url, api_key_env, timeout, retries),
        model,
        lambda server, served: SglangEngine.of(server, served, spec, openai=openai),
        prompts=prompts,
        domain=domain,
        limit=limit,
        output=output,
        options=ServingOptions(max_new_tokens, max_prompt_tokens, temperature, seed, concurrency),
        spec=spec,
        dense_layers=dense,
        keep=RetentionPolicy(min_tokens, aggregate),
        resume=resume,
        json=json,
    )


def _record(
    server: Server,
    model: str | None,
    engine_of: Callable[[Server, str], Engine],
    *,
    prompts: Path,
    domain: str | None,
    limit: int | None,
    output: Path,
    resume: bool,
    json: str | None,
    **how: Any,
) -> None:
    """Read the prompts, find the model, record; what needs no server is checked before one is asked."""
    from moeplan.record.prompts import read_prompts
    from moeplan.record.recording import check_out
    from moeplan.record.server import record_served, served_model

    check_out(output, resume=resume)
    rows = read_prompts(prompts, domain=domain, limit=limit)
    how["spec"].need_experts(server.url)
    served, positions = served_model(server, model)
    start = time.monotonic()
    with progress("recording") as tick:
        engine = engine_of(server, served)
        trace = record_served(server, engine, served, positions, rows, output, resume=resume, progress=tick, **how)
    report(trace, time.monotonic() - start, json)


def _server(url: str, variable: str | None, timeout: float, retries: int) -> Server:
    """The server, with a key if the environment has one: command lines are seen by others and kept in histories."""
    from moeplan.record.http_client import Server, ServerOptions

    if variable is not None and variable not in os.environ:
        raise UsageError(f"--api-key-env {variable}: the environment has no such variable")
    name = variable or KEY_VARIABLE
    return Server(url, key=os.environ.get(name), key_name=name, options=ServerOptions(timeout, retries))


def register_servers(app: typer.Typer) -> None:
    """Add the sub-verbs to `record`."""
    app.command("vllm")(vllm)
    app.command("sglang")(sglang)
