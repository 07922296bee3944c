"""`moeplan record`: run prompts through a model and write down which experts they use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.cli.common import Aggregate, JsonOption, MinTokens, claim_stdout, emit_json, progress, say
from moeplan.cli.import_ import say_summary, trace_summary

__all__ = ["register"]

_app = typer.Typer(help="Run prompts through a model and write a trace.", no_args_is_help=True, rich_markup_mode=None)


@_app.callback()
def _record() -> None:
    """Run prompts through a model and write a trace."""


@_app.command("transformers")
def transformers(
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="Folder with config.json and safetensors.")],
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="JSONL, CSV or text file, or a folder with one per domain."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="The trace directory to make.")],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="At most N prompts, dealt to the domains in turn.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", metavar="N", help="Sampled per request, at most [default: the row's, or 128]."
        ),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", metavar="N", help="Cut prompts to their first N tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="B", help="Requests that run together.")] = 8,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: as the model was saved.")
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:1 .., or auto: a GPU if there is one.")
    ] = "auto",
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token; above it, draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    weights: Annotated[bool, typer.Option("--weights", help="Keep gate weights as well.")] = False,
    min_tokens: MinTokens = 1,
    aggregate: Aggregate = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a recording that was cut off (same flags as before).")
    ] = False,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Label of every request [default: the row's, folder's or file's].")
    ] = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Let --model be a name on the Hugging Face Hub.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Record any mixture-of-experts model that Transformers loads. No prompt text and no token ids are stored."""
    import time

    from moeplan.capture.hf import RecordOptions, check_out, record_model
    from moeplan.capture.hf_model import load_model
    from moeplan.capture.prompts import read_prompts
    from moeplan.trace.keep import Keep

    claim_stdout(json)
    keep = Keep(min_tokens, aggregate)
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
    seconds = time.monotonic() - start
    facts = {**trace_summary(trace), "seconds": seconds}
    say_summary(facts)
    say(f"wrote {trace.path} in {seconds:.1f} s; next: moeplan profile {trace.path}")
    emit_json(json, facts)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.add_typer(_app, name="record")
