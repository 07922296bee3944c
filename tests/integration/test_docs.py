"""The tutorial and the guides: every console and Python block is run, and its output compared with the page.

`python tests/integration/test_docs.py [PAGE ..]` writes the outputs into the pages again. An output may leave lines out
with a line `...`. Blocks that need a server or another machine are marked `sh` or `shell-session` and are not run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from moeplan.cli.app import run

DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for folder in ("tutorials", "guides", "guides/engines", "concepts")
    for page in (DOCS / folder).glob("*.md")
    if re.search(r"^```(console|python)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
ELLIPSIS = "..."


class Terminal:
    """Runs a page's blocks in a folder of its own; a plan that was made before is copied, not made again."""

    made: dict[str, tuple[Path, str]]

    def __init__(self, folder: Path, made: dict[str, tuple[Path, str]]) -> None:
        self.folder, self.made = folder, made
        self.names: dict[str, Any] = {}

    def run(self, command: str) -> str:
        """What a command prints, errors included."""
        words = shlex.split(command)
        if words[:2] == ["moeplan", "plan"] and command in self.made:
            place, text = self.made[command]
            shutil.copytree(place, self.folder / place.name)
            return text
        if words[0] != "moeplan" or ("|" in words):
            done = subprocess.run(command, shell=True, cwd=self.folder, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr
        with self.printed() as out:
            run(words[1:])
        if words[:2] == ["moeplan", "plan"] and "-o" in words:
            self.made[command] = (self.folder / words[words.index("-o") + 1], out.getvalue())
        return out.getvalue()

    def execute(self, code: str) -> str:
        """What Python code prints; the names of a page's earlier blocks are still there."""
        with self.printed() as out:
            exec(compile(code, "<page>", "exec"), self.names)
        return out.getvalue()

    @contextlib.contextmanager
    def printed(self) -> Any:
        out, here = io.StringIO(), Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                yield out
        finally:
            os.chdir(here)

    def block(self, match: re.Match[str]) -> str:
        """A block with the outputs that its commands give now, shortened as on the page."""
        if match[1] == "python":
            self.execute(match[2])
            return match[0]
        shown = []
        for command, before in COMMAND.findall(match[2]):
            now = self.run(command.replace("\\\n", ""))
            now = now if now.endswith("\n") or not now else now + "\n"
            shown.append(f"$ {command}\n{before if shortened(before, now) else now}")
        return f"```console\n{''.join(shown)}```"


def shortened(before: str, now: str) -> bool:
    """Whether `before` is `now` with lines left out."""
    if ELLIPSIS not in before.splitlines():
        return False
    rest, gap = without_figures(now), False
    for line in without_figures(before):
        if line == ELLIPSIS:
            gap = True
        elif line in rest and (gap or rest[0] == line):
            rest, gap = rest[rest.index(line) + 1 :], False
        else:
            return False
    return gap or not rest


def written_anew(page: Path, terminal: Terminal) -> str:
    return BLOCK.sub(terminal.block, page.read_text(encoding="utf-8"))


def without_figures(text: str) -> list[str]:
    """Lines whose spaces and figures do not matter: plans get better, and times differ."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [re.sub(r"[-+]?\d+(\.\d+)?", "#", line) if re.search(r"\d\.\d", line) else line for line in lines]


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Path, str]]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_shows_what_the_commands_print(page: Path, made: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    assert without_figures(page.read_text(encoding="utf-8")) == without_figures(
        written_anew(page, Terminal(tmp_path, made))
    )


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, {})
    for language, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language == "python":
            terminal.execute(code)
    assert {"plan", "placement.json"} <= {path.name for path in tmp_path.iterdir()}


if __name__ == "__main__":
    plans: dict[str, tuple[Path, str]] = {}
    with tempfile.TemporaryDirectory() as top:
        for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
            folder = Path(top) / page.stem
            folder.mkdir()
            page.write_text(written_anew(page, Terminal(folder, plans)), encoding="utf-8")
            print(f"wrote {page}")
