"""What verbs print: lines of text, tables, JSON, a progress bar. Light to import."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moeplan.progress import Progress, silent

__all__ = ["aligned", "claim_stdout", "echo", "emit_json", "plural", "printable", "progress", "show"]

#: Control characters, and marks that turn the direction of text: a file must not be able to steer a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_json_on_stdout = False


def printable(text: str) -> str:
    """The text with control characters written out, such as `\\x1b`: names in files may hold any character."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def echo(text: str = "") -> None:
    """One line for the reader: standard output, or standard error while standard output carries JSON."""
    print(printable(text), file=sys.stderr if _json_on_stdout else sys.stdout)


def claim_stdout(target: Path | None) -> None:
    """Send text to standard error where `--json -` gives standard output to JSON."""
    global _json_on_stdout
    _json_on_stdout = str(target) == "-"


def emit_json(target: Path | None, data: Any) -> None:
    """Write `data` where `--json` asked for it; no target, nothing."""
    if target is None:
        return
    if str(target) == "-":
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    from moeplan.io.json import write_json

    write_json(target, data)


def show(lines: Iterable[str], json: Path | None, facts: Any) -> None:
    """What a verb has found: lines for the reader, and the same where `--json` asked for it."""
    for line in lines:
        echo(line)
    emit_json(json, facts)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A progress bar on a terminal, silence in a pipe."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), note, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=printable(note))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """A table as lines; the columns of `left` are set to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        put = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(put).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(line(row) for row in rows)]


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
