"""Which outputs are refused because they would be written over an input."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.errors import UsageError
from moeplan.io.paths import check_outputs

FILES = ROOT / "tests" / "data" / "archives" / "0.1.0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trace, a plan and files, and links to them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FILES / "trace", "T")
    shutil.copytree(FILES / "plan-eplb", "P")
    Path("model").mkdir()
    for name in ("config.json", "h.json", "model/config.json", "other.json"):
        Path(name).write_text("{}")
    Path("link").symlink_to("T")
    Path("soft.json").symlink_to("h.json")
    os.link("h.json", "hard.json")
    os.link("T/part-00000.parquet", "hard.parquet")
    Path("loop").symlink_to("loop")
    Path("gone.json").symlink_to("nowhere/at/all.json")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("h.json", "h.json"),
        ("./model/../h.json", "h.json"),
        ("soft.json", "h.json"),
        ("h.json", "soft.json"),
        ("hard.json", "h.json"),
        ("T", "T"),
        ("T/trace.json", "T"),
        ("T/part-00000.parquet", "T"),
        ("T/new.json", "T"),  # nothing is put into a trace
        ("link/new.json", "T"),
        ("T/new.json", "link"),
        ("hard.parquet", "T"),
        ("P/new/deep.json", "P"),
        ("model/config.json", "model"),
        ("model", "model/config.json"),  # a directory that holds the input
        (".", "h.json"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_an_input_is_not_written_over(here: Path, output: str, source: str, absolute: bool) -> None:
    place = here / output if absolute else output
    with pytest.raises(
        UsageError, match=r"^--json .* would be written over .*, which is read; give it a path of its own$"
    ):
        check_outputs({"-o": None, "--json": place}, [None, "H100", "other.json", source])


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("new.json", "T"),
        ("other.json", "h.json"),  # an old result is written over, as always
        ("model/new.json", "model"),
        ("T2/new.json", "T"),
        ("Tx", "T"),
        ("-", "h.json"),
        ("h.json", "missing.json"),
        ("embedded", "embedded"),  # the word, where no such path is there
        ("gone.json", "h.json"),
        ("loop", "h.json"),
        ("h.json", "loop"),
    ],
)
def test_other_places_are_free(here: Path, output: str, source: str) -> None:
    check_outputs({"--json": output}, [source])


@pytest.mark.parametrize(
    ("first", "second"), [("x.json", "./x.json"), ("h.json", "hard.json"), ("soft.json", "h.json")]
)
def test_two_results_are_not_written_to_one_file(here: Path, first: str, second: str) -> None:
    with pytest.raises(UsageError, match=r"^-o and --json are the same file"):
        check_outputs({"-o": first, "--json": second}, [])
    check_outputs({"-o": "-", "--json": "-"}, [])
