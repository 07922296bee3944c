"""Compiled loops where nothing can be cached, and after an upgrade."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan._kernels import compiled


@pytest.fixture
def locked(tmp_path: Path) -> dict[str, str]:
    """The environment of a copy of the package that, like home, takes no folder: files stand where folders would be.

    That holds for root as well, who may write to what is read-only.
    """
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for place in (tmp_path / "src" / "moeplan" / "_kernels" / "__pycache__", tmp_path / "home"):
        place.touch()
    home = str(tmp_path / "home")
    named = {"PYTHONPATH": str(tmp_path / "src"), "HOME": home, "XDG_CACHE_HOME": home}
    return {**{key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}, **named}


@pytest.mark.slow
def test_a_read_only_installation_and_home_compile_in_memory_and_say_so_once(
    locked: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "moeplan", "generate", "demo", "--requests", "4", "-o", str(tmp_path / "t")]
    done = subprocess.run(command, env=locked, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t" / "trace.json").is_file()
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("moeplan: ") and "NUMBA_CACHE_DIR" in lines[0]


def test_a_cache_that_is_older_than_the_sources_is_dropped(tmp_path: Path) -> None:
    def loop() -> None:
        """Something to name."""

    line = loop.__code__.co_firstlineno
    old, new, other = (
        tmp_path / f"{Path(__file__).stem}.{name}.py311.nbi"
        for name in (f"loop-{line}", f"loop-{line}.x", f"loop-{line + 1}")
    )
    for index in (old, new, other):
        index.touch()
        os.utime(index, (0, 0))
    os.utime(new, (time.time() + 60, time.time() + 60))
    compiled._drop_stale(tmp_path, loop)
    assert not old.exists() and new.exists() and other.exists()
