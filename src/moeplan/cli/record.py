"""`moeplan record`: run prompts through a model and write down which experts they use."""

from __future__ import annotations

from typing import Annotated

import typer

from moeplan.cli.common import Aggregate, JsonOption, MinTokens, claim_stdout, progress
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

__all__ = ["register"]

_app = typer.Typer(help="Run prompts through a model and write a trace.", no_args_is_help=True, rich_markup_mode=None)


@_app.callback()
def _record() -> None:
    """Run prompts through a model and write a trace."""


@_app.command("transformers")
def transformers(
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="Folder with config.json and safetensors.")],
    prompts: Prompts,
    output: Output,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    max_prompt_tokens: MaxPromptTokens = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="B", help="Requests that run together.")] = 8,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: as the model was saved.")
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:1 .., or auto: a GPU if there is one.")
    ] = "auto",
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    weights: Annotated[bool, typer.Option("--weights", help="Keep gate weights as well.")] = False,
    min_tokens: MinTokens = 1,
    aggregate: Aggregate = None,
    resume: Resume = False,
    domain: Label = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Let --model be a name on the Hugging Face Hub.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Record any mixture-of-experts model that Transformers loads. No prompt text and no token ids are stored."""
    import time

    from moeplan.record.prompts import read_prompts
    from moeplan.record.recording import check_out
    from moeplan.record.transformers import RecordOptions, record_model
    from moeplan.record.transformers_model import load_model
    from moeplan.trace.retention import RetentionPolicy

    claim_stdout(json)
    keep = RetentionPolicy(min_tokens, aggregate)
    options = RecordOptions(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_prompt_tokens=max_prompt_tokens,
        temperature=temperature,
        seed=seed,
        weights=weights,
    )
    check_out(output, resume=resume)
    rows = read_prompts(prompts, domain=domain, limit=limit)
    keep.check([row.domain for row in rows], weights=weights)
    needs_tokenizer = any(row.token_ids is None for row in rows)
    loaded = load_model(model, dtype=dtype, device=device, allow_download=allow_download, tokenizer=needs_tokenizer)
    start = time.monotonic()
    with progress("recording") as tick:
        trace = record_model(loaded, rows, output, options, keep=keep, resume=resume, progress=tick)
    report(trace, time.monotonic() - start, json)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    from moeplan.cli.record_servers import register_servers

    register_servers(_app)
    app.add_typer(_app, name="record")
