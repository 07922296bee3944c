"""`moeplan generate`: a synthetic trace from a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.cli.common import JsonOption, claim_stdout, echo, emit_json, progress
from moeplan.cli.import_ import say_summary, trace_summary
from moeplan.errors import UsageError

__all__ = ["register"]


def generate(
    preset: Annotated[str, typer.Argument(help="demo, deepseek-v3, llama-4-maverick or qwen3-235b.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="The trace directory to make.")],
    requests: Annotated[int | None, typer.Option("--requests", help="How many [default: the preset's].")] = None,
    prefill: Annotated[int | None, typer.Option("--prefill", help="Mean prefill tokens per request.")] = None,
    decode: Annotated[int | None, typer.Option("--decode", help="Mean decode tokens per request.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Give every request exactly these lengths.")] = False,
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", help="Only the first N MoE layers.")] = None,
    layer_ids: Annotated[
        str, typer.Option("--layer-ids", metavar="IDS", help="Only these layers of the model, e.g. 42 or 3,42.")
    ] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the requests; the model is the preset's own.")] = 0,
    json: JsonOption = None,
) -> None:
    """Write a synthetic workload: domains, phases, hot experts. Every figure from it is labelled synthetic."""
    from moeplan.synthetic.generator import generate as generate_trace

    claim_stdout(json)
    with progress("generating requests") as tick:
        trace = generate_trace(
            preset,
            output,
            requests=requests,
            prefill=prefill,
            decode=decode,
            seed=seed,
            layers=_which_layers(layers, layer_ids),
            exact=exact,
            progress=tick,
        )
    facts = trace_summary(trace)
    say_summary(facts)
    echo(f"wrote {trace.path}; next: moeplan profile {trace.path}")
    emit_json(json, facts)


def _which_layers(first: int | None, ids: str) -> int | list[int] | None:
    """The first n layers, or those listed; None for all."""
    if not ids.strip():
        return first
    if first is not None:
        raise UsageError("--layers and --layer-ids exclude each other")
    try:
        return [int(item) for item in ids.split(",")]
    except ValueError:
        raise UsageError(f"--layer-ids {ids!r} is not a list of layer numbers", hint="e.g. 42 or 3,42") from None


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("generate")(generate)
