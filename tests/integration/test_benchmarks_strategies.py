"""The page of results: what is run, what is kept, how a bar is judged, and what the documents say of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import results_bars
import results_settings
import strategies
from helpers import ROOT
from moeplan.planning.strategies.moeplan import PARTS
from results_settings import SOURCES, Setting, cannot, gpus_per_node, present

SMALL = ["--sets", "embedded", "--nodes", "4", "--redundant", "1", "--modes", "pick", "--folds", "2", "--steps", "5"]


@pytest.mark.parametrize(("nodes", "redundant", "gpus"), [(8, 0, 4), (8, 8, 5), (8, 16, 6), (4, 0, 8), (4, 12, 1)])
def test_the_most_gpus_that_divide(nodes: int, redundant: int, gpus: int) -> None:
    assert gpus_per_node("embedded", nodes, redundant) == gpus


def test_a_part_of_the_page_and_its_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategies.main([*SMALL, "--cache", str(tmp_path)])
    first = capsys.readouterr()
    assert first.err.count("\n") == 2  # guarded and not
    assert (
        "| 4 | 4 |" in first.out and "`moeplan` for `pick`, unguarded" in first.out and "## Signatures" not in first.out
    )
    assert "## The bars" not in first.out and "gpt-oss" not in first.out

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
        (["--sets", "embedded", "--write"], "--write is for the whole page"),
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
    monkeypatch.setattr(strategies, "PAGE", tmp_path / "results.md")
    with pytest.raises(SystemExit) as stopped:
        strategies.main(["--write"])
    assert stopped.value.code == 2
    assert "maverick-mmlu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def figure(value: float, change: float = 0.0, width: float = 0.01) -> dict[str, Any]:
    versus = {"value": change, "ci95": [change - width, change + width]}
    return {"value": value, "vs_linear": versus, "vs_eplb": versus}


def found(share: float, change: float, *, guarded: bool = True, load: float = 1.0) -> dict[str, Any]:
    row = {"remote_share": figure(share, change), "guarded": guarded, "node_load_ratio": figure(load)}
    row |= {"gpu_load_total": figure(1.0, 0.02), "gpu_load_ratio": figure(1.0, 0.2)}
    linear = {"remote_share": figure(0.8), "node_load_ratio": figure(1.0)}
    return {"strategies": {"moeplan": row, "moeplan/oracle": row, "linear": linear}}


@pytest.mark.parametrize(
    ("change", "share", "guarded", "verdict"),
    [
        (-0.20, 0.60, True, "**yes**"),
        (-0.165, 0.70, True, "no, by 0.5 points (within the interval)"),
        (-0.15, 0.70, True, "no, by 2.0 points"),
        (-0.15, 0.60, True, "no, by 2.0 points; yes against linear without copies"),
        (-0.20, 0.60, False, "no: node load 1.10 x linear's"),
    ],
)
def test_how_a_bar_is_judged(change: float, share: float, guarded: bool, verdict: str) -> None:
    setting = Setting("embedded", 8, 5, 8, "pick")
    bare = Setting("embedded", 8, 4, 0, "pick")
    of = found(share, change, guarded=guarded, load=1.0 if guarded else 1.1)
    results = {setting: of, Setting("embedded", 8, 5, 8, "pick", guarded=False): of, bare: found(0.8, 0.0)}
    assert results_bars.bar_row(results_bars.Bar(setting, -0.17), results)[5] == verdict


def test_a_bar_on_load_names_what_misses() -> None:
    setting = Setting("embedded", 8, 5, 8, "pick")
    row = results_bars.load_row(results_bars.LoadBar(setting, 0.87), {setting: found(0.6, -0.2)})
    assert row[1] == "0.80 [0.79, 0.81] of 0.87"
    assert row[-1] == "no: `gpu_load_ratio`"


def test_too_few_requests_are_said() -> None:
    if not present(["mixtral-8x7b-long-context"]):
        pytest.skip("../shared/traces is not here")
    assert cannot("mixtral-8x7b-long-context", 8) == "4 usable requests, and 8 groups need 48"


def test_every_set_and_bar_is_known() -> None:
    assert {source for source, *_ in results_bars._BARS} <= set(SOURCES)
    slots = {"maverick-mmlu": 128, "gpt-oss-20b": 32}
    for source, gpus, redundant, _ in results_bars._LOAD_BARS:
        assert (slots[source] + redundant) % (8 * gpus) == 0


def test_the_documents_name_every_part_and_have_their_picture() -> None:
    text = (ROOT / "docs" / "concepts" / "method.md").read_text(encoding="utf-8")
    for part in PARTS:
        assert f"| `{part}` |" in text
    assert (ROOT / "docs" / "images" / "method.png").stat().st_size < 300_000
