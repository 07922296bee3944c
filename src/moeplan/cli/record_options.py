"""Flags that every kind of recording has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli.common import echo, emit_json
from moeplan.cli.import_ import say_summary, trace_summary

if TYPE_CHECKING:
    from moeplan.trace.reader import Trace

Prompts = Annotated[
    Path, typer.Option("--prompts", metavar="FILE", help="JSONL, CSV or text file, or a folder with one per domain.")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="The trace directory to make.")]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="At most N prompts, dealt to the domains in turn.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Sampled per request, at most [default: the row's, or 128]."),
]
MaxPromptTokens = Annotated[
    int | None, typer.Option("--max-prompt-tokens", metavar="N", help="Cut prompts to their first N tokens.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token; above it, draws.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a recording that was cut off (same flags as before).")
]
Label = Annotated[
    str | None, typer.Option("--domain", help="Label of every request [default: the row's, folder's or file's].")
]


def report(trace: Trace, seconds: float, json: str | None) -> None:
    """What was recorded, for people and as JSON."""
    facts = {**trace_summary(trace), "seconds": seconds}
    say_summary(facts)
    echo(f"wrote {trace.path} in {seconds:.1f} s; next: moeplan profile {trace.path}")
    emit_json(json, facts)
