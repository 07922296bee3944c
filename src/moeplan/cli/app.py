"""The verbs, and how a command line ends: its exit status, and one clear line where something is wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from inspect import BoundArguments
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnusedCliTokensError

from moeplan import __version__
from moeplan.cli.files import check_files
from moeplan.cli.old_names import refuse_old_names
from moeplan.cli.options import SETTINGS
from moeplan.cli.terminal import claim_stdout, printable
from moeplan.errors import MoeplanError

__all__ = ["app", "commands", "run"]

#: Each is the function of that name in the module of that name, in the order of the data. Adding a verb is adding a
#: file and its name here; `record` and `import` have sub-commands.
VERBS = ["demo", "record", "import", "generate", "profile", "plan", "evaluate", "compare", "order", "rebalance"]
VERBS += ["drift", "estimate", "sweep", "size", "simulate", "export", "check"]

_INTERRUPTED = "stopped; of a trace that was being written, what was finished is kept"


app = App(
    name="moeplan",
    help="Plan which requests of a mixture-of-experts model decode together and where each expert is placed, and "
    "measure the plan on held-out requests.",
    version=f"moeplan {__version__}",
    **SETTINGS,
)
app.register_install_completion_command(help="Install completion for bash, zsh or fish.")
for _place, _verb in enumerate(VERBS):
    _module = "import_" if _verb == "import" else _verb
    app.command(f"moeplan.cli.{_module}:{_module}", name=_verb, sort_key=_place)


def commands(parent: App = app, words: tuple[str, ...] = ()) -> Iterator[tuple[str, App]]:
    """Every command with its name, such as `import vllm`, in the order of --help; its parameters are in
    `command.assemble_argument_collection(parse_docstring=True)`.
    """
    for word in VERBS if parent is app else parent:
        if word.startswith("-"):
            continue
        child = parent[word]
        if child.default_command is not None:
            yield " ".join((*words, word)), child
        else:
            yield from commands(child, (*words, word))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status: 0, 1 (the answer is no), 2 (wrong use or bad input)."""
    try:
        return _run(arguments)
    except MoeplanError as error:
        return _end(2, error.line())
    except CycloptsError as error:
        return _end(2, _usage(error))
    except KeyboardInterrupt:
        return _end(130, _INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _end(2, "not enough memory for this input; leave layers out or use fewer requests")
    except Exception:
        traceback.print_exc()  # a defect: never 1, which answers a question
        return _end(70, "internal error; please report it with the command line")


def _run(arguments: list[str]) -> int:
    refuse_old_names(arguments)
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if command == app.help_print:
        for verb in VERBS:  # modules are loaded when they are asked for, and their help with them
            _ = app[verb]
    if command == app.help_print and not {"--help", "-h"} & set(arguments):
        app.help_print(arguments, console=app.error_console)  # a verb is missing
        return 2
    status = _call(command, bound)
    return status if isinstance(status, int) else 0


def _call(command: Callable[..., Any], bound: BoundArguments) -> Any:
    if command.__module__.startswith("moeplan."):
        claim_stdout(bound.arguments.get("json"))
        check_files(command, bound.arguments)
    return command(*bound.args, **bound.kwargs)


def _usage(error: CycloptsError) -> str:
    """A usage error in one line."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        return f"{name} needs a value" if error.keyword else f"{name} is missing; see --help"
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {' '.join(map(repr, error.unused_tokens or []))}; see --help"
    return " ".join(str(error).split())


def _end(status: int, line: str) -> int:
    print(f"moeplan: {printable(line)}", file=sys.stderr)
    return status
