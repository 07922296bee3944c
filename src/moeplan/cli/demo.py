"""`moeplan demo`: the full pipeline on the trace that comes with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from moeplan.cli import options as o
from moeplan.cli.files import File
from moeplan.cli.terminal import echo, emit_json, progress
from moeplan.cli.text.plans import show_comparison
from moeplan.embedded import WORD

__all__ = ["demo"]

Folder = Annotated[Path, File("folder"), o.output("DIR", "the folder of the pages")]
STRATEGIES = ("linear", "eplb", "paper", "moeplan")
_WHERE = "--nodes 4 --gpus-per-node 4"


def demo(*, output: Folder = Path("moeplan-demo"), seed: o.Seed = 0, json: o.Json = None) -> None:
    """Run the full pipeline on the bundled trace: profile, plan, compare."""
    from moeplan.cluster import Cluster
    from moeplan.profile import profile_trace
    from moeplan.replay.compare import compare
    from moeplan.replay.settings import EvaluationSettings
    from moeplan.report.compare_page import compare_html
    from moeplan.report.page import write_page
    from moeplan.report.profile_page import profile_html
    from moeplan.trace import open_trace

    start, settings = time.perf_counter(), EvaluationSettings(steps=100, seed=seed)
    _make(output)
    compiler = _compile_ahead()
    trace = open_trace(WORD)
    echo("moeplan demo: 800 requests, recorded from the small trained model that comes with the package.")
    echo()
    with progress("profile") as tick:
        found = profile_trace(trace, seed=seed, progress=tick)
    write_page(output / "profile.html", profile_html(found))
    compiler.wait()
    began = time.perf_counter()
    with progress("compare") as tick:
        table = compare(trace, Cluster(4, 4), STRATEGIES, settings=settings, progress=tick)
    show_comparison(table, trace, time.perf_counter() - began)
    write_page(output / "compare.html", compare_html(table, trace))
    echo()
    echo(f"pages:  {output / 'profile.html'}  {output / 'compare.html'}")
    echo(f"next:   {_program()} compare {WORD} {_WHERE} --redundant 16  (a redundant slot a GPU)")
    echo(f"{time.perf_counter() - start:.1f} s in all")
    emit_json(json, table.to_dict())


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


def _make(folder: Path) -> None:
    from moeplan.io.files import cannot_write

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
