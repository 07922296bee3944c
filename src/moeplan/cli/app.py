"""The verbs, and what becomes of their errors: one clear line and exit status 2."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated

import typer

from moeplan import __version__
from moeplan.errors import MoeplanError

__all__ = ["app", "run"]

app = typer.Typer(
    name="moeplan",
    help="Plan which requests decode together and where each expert lives, and prove the plan on unseen requests.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

#: One module each, in the order of the way of the data. Adding a verb is adding a file and its name here.
VERBS = (
    "demo",
    "record",
    "import_",
    "generate",
    "profile",
    "plan",
    "compare",
    "replay",
    "export",
    "check",
    "estimate",
    "sweep",
    "size",
)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"moeplan {__version__}")
        raise typer.Exit


for _verb in VERBS:
    importlib.import_module(f"moeplan.cli.{_verb}").register(app)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status: 0, 1 (the answer is no), 2 (wrong use or bad input)."""
    try:
        code = app(args=arguments, prog_name="moeplan", standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this status without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MoeplanError as error:
        print(f"moeplan: {error.line()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeplan: stopped; of a trace that was being written, what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print("moeplan: not enough memory for this input; leave layers out or use fewer requests", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):  # click's usage errors
            line = " ".join(str(error.format_message()).split()).replace("Value error, ", "")
            print(f"moeplan: {line}", file=sys.stderr)
            return 2
        if type(error).__name__ == "Abort":
            print("moeplan: stopped", file=sys.stderr)
            return 130
        traceback.print_exc()  # a fault of ours: never 1, which answers a question
        print("moeplan: a fault of its own; please report it with the command line", file=sys.stderr)
        return 70
