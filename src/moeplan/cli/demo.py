"""`moeplan demo`: the whole way on the trace that comes with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from moeplan.cli.common import JsonOption, claim_stdout, echo, emit_json, progress
from moeplan.embedded import WORD

STRATEGIES = ("linear", "eplb", "paper", "moeplan")
CLUSTER = (4, 4)
_WHERE = "--nodes {} --gpus-per-node {}".format(*CLUSTER)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="The whole way on the embedded model's own trace.")
    def demo(
        output: Annotated[
            str, typer.Option("-o", "--output", metavar="DIR", help="Where the pages go.")
        ] = "moeplan-demo",
        seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of everything that chance decides.")] = 0,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        from moeplan.cli.compare import show
        from moeplan.cluster import Cluster
        from moeplan.planning import read_requests
        from moeplan.profile import profile
        from moeplan.replay import Setup, compare
        from moeplan.report.compare_page import write_compare_page
        from moeplan.report.page import write_page
        from moeplan.report.profile_page import profile_html
        from moeplan.trace import open_trace

        start = time.perf_counter()
        root = _folder(output)
        compiler = _compile_ahead()
        trace = open_trace(WORD)
        echo("moeplan demo: 800 requests, recorded from the small trained model that comes with the package.")
        echo()
        with progress("profile") as report:
            found = profile(trace, seed=seed, progress=report)
        write_page(root / "profile.html", profile_html(found))
        compiler.wait()
        with progress("compare") as report:
            requests = read_requests(trace)
            setup = Setup(Cluster(*CLUSTER), STRATEGIES, seed=seed, steps=100)
            began = time.perf_counter()
            table = compare(requests, setup, report)
        show(table, trace, time.perf_counter() - began)
        write_compare_page(root / "compare.html", table, trace)
        echo()
        echo(f"pages:  {root / 'profile.html'}  {root / 'compare.html'}")
        echo(f"next:   {_program()} compare {WORD} {_WHERE} --redundant 16  (a spare slot a GPU)")
        echo(f"{time.perf_counter() - start:.1f} s in all")
        emit_json(json, {"trace": trace.label, "synthetic": trace.synthetic, **table.to_dict()})


def _compile_ahead() -> subprocess.Popen[bytes]:
    """Compile the loops of `compare` in a second process, while this one makes the profile.

    They are kept for every later run; where they are already, the process ends within a few seconds.
    """
    arguments = ["compare", WORD, *_WHERE.split(), "--strategies", ",".join(STRATEGIES), "--folds", "1", "--steps", "1"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "moeplan", *arguments], stdin=quiet, stdout=quiet, stderr=quiet)


def _program() -> str:
    """How to call this program again: by name where the shell finds it, else by path."""
    name = Path(sys.argv[0])
    if shutil.which("moeplan") or name.name != "moeplan":
        return "moeplan"
    return os.path.relpath(name) if name.is_absolute() else str(name)


def _folder(name: str) -> Path:
    """The demo's folder, made if need be."""
    from moeplan.io.files import cannot_write

    root = Path(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(root, error) from None
    return root
