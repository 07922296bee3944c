"""`moeplan demo`: the whole way on a small generated workload."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli.common import JsonOption, check_places, claim_stdout, emit_json, progress, say
from moeplan.errors import MoeplanError, OutputError

if TYPE_CHECKING:
    from moeplan.trace import Trace


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="The whole way on a small generated workload.")
    def demo(
        output: Annotated[
            str, typer.Option("-o", "--output", metavar="DIR", help="Where the trace and the pages go.")
        ] = "moeplan-demo",
        seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of everything that chance decides.")] = 0,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        check_places(json)
        from moeplan.cli.compare import show
        from moeplan.cluster import Cluster
        from moeplan.plan import read_requests
        from moeplan.profile import profile
        from moeplan.replay import Setup, compare
        from moeplan.report.compare_page import write_compare_page
        from moeplan.report.page import write_page
        from moeplan.report.profile_page import profile_html

        start = time.perf_counter()
        root = Path(output)
        say("moeplan demo: a synthetic workload stands in for a real trace; its figures are about no real model.")
        say()
        trace = _trace(root, seed)
        with progress("profile") as report:
            found = profile(trace, seed=seed, progress=report)
        write_page(root / "profile.html", profile_html(found))
        with progress("compare") as report:
            requests = read_requests(trace)
            setup = Setup(Cluster(4, 4), ("random", "linear", "eplb", "affinity", "paper"), seed=seed, steps=200)
            began = time.perf_counter()
            table = compare(requests, setup, report)
        show(table, trace, time.perf_counter() - began)
        write_compare_page(root / "compare.html", table, trace)
        say()
        say(f"pages:  {root / 'profile.html'}  {root / 'compare.html'}")
        say(
            f"next:   {_program()} compare {root / 'trace'} --nodes 4 --gpus-per-node 4 --redundant 16"
            "  (a spare slot a GPU)"
        )
        say(f"{time.perf_counter() - start:.1f} s in all")
        emit_json(json, {"trace": trace.label, "synthetic": True, **table.to_dict()})


def _program() -> str:
    """How to call this program again: by name where the shell finds it, else by path."""
    name = Path(sys.argv[0])
    if shutil.which("moeplan") or name.name != "moeplan":
        return "moeplan"
    return os.path.relpath(name) if name.is_absolute() else str(name)


def _trace(root: Path, seed: int) -> Trace:
    """The demo's trace in `root`: made, or found from the last time."""
    from moeplan.capture.synthetic import generate
    from moeplan.trace import open_trace

    place = root / "trace"
    if place.exists():
        try:
            found = open_trace(place)
        except MoeplanError:
            found = None
        if found is None or found.source.get("generate") != "demo" or found.source.get("seed") != seed:
            raise OutputError("is not this demo's trace", where=str(place), mend="choose another place with -o")
        return found
    with progress("generate") as report:
        return generate("demo", place, seed=seed, progress=report)
