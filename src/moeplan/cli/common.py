"""What every verb shares: JSON output, a progress bar, sections of text. Light to import."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moeplan.errors import UsageError
from moeplan.progress import Progress

__all__ = [
    "Aggregate",
    "JsonOption",
    "MinTokens",
    "Progress",
    "WithoutLayers",
    "check_places",
    "echo",
    "emit_json",
    "given",
    "parse_layers",
    "progress",
]

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON to FILE, or to - (standard output)."),
]
WithoutLayers = Annotated[
    str, typer.Option("--without-layers", metavar="IDS", help="Leave out these layers, e.g. 45 or 0,1,45.")
]
MinTokens = Annotated[
    int,
    typer.Option("--min-tokens", metavar="M", help="Store no request of fewer tokens, prefill and decode together."),
]
Aggregate = Annotated[
    int | None,
    typer.Option("--aggregate", metavar="N", help="Store no token rows, only sums over N requests of a domain."),
]


def echo(text: str = "") -> None:
    """One line for the reader: standard output, or standard error while standard output carries JSON."""
    print(text, file=sys.stderr if _json_on_stdout else sys.stdout)


_json_on_stdout = False


def claim_stdout(json_target: str | None) -> None:
    """Call first in a verb with `--json`: a file needs a place; with `-`, text goes to standard error."""
    global _json_on_stdout
    _json_on_stdout = json_target == "-"
    check_places(json_target)


def given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was written on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_places(*targets: str | Path | None) -> None:
    """Refuse, before any work, files that cannot be written in the end."""
    for target in targets:
        if target is not None and str(target) != "-":
            from moeplan.io.files import check_place

            check_place(target)


def emit_json(target: str | None, data: Any) -> None:
    """Write `data` where `--json` asked for it; no target, nothing."""
    if target is None:
        return
    if target == "-":
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    from moeplan.io.json import write_json

    write_json(Path(target), data)


def parse_layers(text: str) -> tuple[int, ...]:
    """'45' or '0,1,45' as integers."""
    if not text.strip():
        return ()
    try:
        return tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        raise UsageError(
            f"--without-layers {text!r} is not a list of layer numbers", hint="e.g. 45 or 0,1,45"
        ) from None


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A progress bar on a terminal, silence in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)
