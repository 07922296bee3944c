"""The pages of results: what is run, what is kept, and what the documents say of the method."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import results_settings
import strategies
from helpers import ROOT
from moeplan.planning.strategies.moeplan import PARTS
from results_page import CSV_HEAD
from results_settings import cannot, gpus_per_node, present

SMALL = ["--sets", "embedded", "--nodes", "4", "--redundant", "1", "--modes", "pick", "--folds", "2", "--steps", "5"]


@pytest.mark.parametrize(("nodes", "redundant", "gpus"), [(8, 0, 4), (8, 8, 5), (8, 16, 6), (4, 0, 8), (4, 12, 1)])
def test_the_most_gpus_that_divide(nodes: int, redundant: int, gpus: int) -> None:
    assert gpus_per_node("embedded", nodes, redundant) == gpus


@pytest.mark.slow
def test_a_part_of_the_page_and_its_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategies.main([*SMALL, "--cache", str(tmp_path)])
    first = capsys.readouterr()
    assert first.err.count("\n") == 2  # guarded and not
    assert "| 4 | 4 |" in first.out and "## Signatures" not in first.out and "gpt-oss" not in first.out

    kept = sorted(tmp_path.iterdir())
    assert [file.suffix for file in kept] == [".json"] * 2
    kept[0].write_text(kept[0].read_text()[:100])  # cut off: that one alone is run again
    strategies.main([*SMALL, "--cache", str(tmp_path)])
    again = capsys.readouterr()
    assert again.err.count("\n") == 1
    assert again.out == first.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sets", "gpt-5"], "set 'gpt-5' is not one of gpt-oss-20b"),
        (["--modes", "pick,gpu"], "mode 'gpu' is not one of pick, node"),
        (["--nodes", "eight"], "'eight' is not a list of numbers"),
        (["--sets", "embedded", "--write"], "--write is for all pages"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        strategies.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_page_is_not_written_without_the_real_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_settings, "REAL", tmp_path)
    monkeypatch.setattr(strategies, "PAGES", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        strategies.main(["--write"])
    assert stopped.value.code == 2
    assert "maverick-mmlu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_few_requests_are_said() -> None:
    if not present(["mixtral-8x7b-long-context"]):
        pytest.skip("../shared/traces is not here")
    assert cannot("mixtral-8x7b-long-context", 8) == "4 usable requests, and 8 groups need 48"


def test_the_documents_name_every_part_and_have_their_picture() -> None:
    text = (ROOT / "docs" / "concepts" / "method.md").read_text(encoding="utf-8")
    for part in PARTS:
        assert f"| `{part}` |" in text
    assert (ROOT / "docs" / "images" / "method.png").stat().st_size < 300_000


def test_the_stored_table_has_every_setting_of_the_pages() -> None:
    with (ROOT / "docs" / "results" / "strategies.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_HEAD
    page = (ROOT / "docs" / "results" / "strategies.md").read_text(encoding="utf-8")
    ours = [
        row for row in rows if row["row"] == "moeplan" and row["load_guard"] == "on" and row["planned_for"] == "pick"
    ]
    assert len(ours) == 32  # 4 traces, 8 settings each
    for row in ours:
        assert f"{row['remote_share_change_pct']} % [{row['remote_share_low']}, {row['remote_share_high']}]" in page
