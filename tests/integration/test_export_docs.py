"""docs/guides/export.md and docs/guides/engines/: every console block is run, and its output compared with the page.

`python tests/test_export_docs.py` writes the blocks' outputs into the pages again.
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

import pytest

from helpers import ROOT
from moeplan.cli.app import run

DOCS = ROOT / "docs"
PAGES = [DOCS / "guides" / "export.md", *sorted((DOCS / "guides" / "engines").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Terminal:
    """Runs commands in a folder of its own; a plan that was made before is copied rather than made again."""

    made: dict[str, tuple[Path, str]]

    def __init__(self, folder: Path, made: dict[str, tuple[Path, str]]) -> None:
        self.folder, self.made = folder, made

    def run(self, command: str) -> str:
        words = shlex.split(command)
        if words[:2] == ["moeplan", "plan"] and command in self.made:
            place, text = self.made[command]
            shutil.copytree(place, self.folder / place.name)
            return text
        if words[0] != "moeplan":
            done = subprocess.run(command, shell=True, cwd=self.folder, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr
        out, here = io.StringIO(), Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                run(words[1:])
        finally:
            os.chdir(here)
        if words[:2] == ["moeplan", "plan"]:
            self.made[command] = (self.folder / words[words.index("-o") + 1], out.getvalue())
        return out.getvalue()

    def replay(self, block: str) -> str:
        """A block with the outputs that its commands give now."""
        commands = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE)
        shown = [f"$ {command}\n{self.run(command.replace(chr(92) + chr(10), ''))}" for command in commands]
        return "".join(text if text.endswith("\n") else text + "\n" for text in shown)


def written_anew(page: Path, terminal: Terminal) -> str:
    return BLOCK.sub(lambda match: f"```console\n{terminal.replay(match[1])}```", page.read_text(encoding="utf-8"))


def same_but_for_figures(text: str) -> list[str]:
    """Lines whose spaces and figures do not count: plans get better, and times differ."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [re.sub(r"[-+]?\d+(\.\d+)?", "#", line) if re.search(r"\d\.\d", line) else line for line in lines]


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Path, str]]:
    return {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_shows_what_the_commands_print(page: Path, made: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    assert same_but_for_figures(page.read_text(encoding="utf-8")) == same_but_for_figures(
        written_anew(page, Terminal(tmp_path, made))
    )


if __name__ == "__main__":
    plans: dict[str, tuple[Path, str]] = {}
    with tempfile.TemporaryDirectory() as top:
        for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
            folder = Path(top) / page.stem
            folder.mkdir()
            page.write_text(written_anew(page, Terminal(folder, plans)), encoding="utf-8")
            print(f"wrote {page}")
