"""`moeplan simulate` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.cli.app import run

FEW = ["simulate", "embedded", "--instances", "2", "--live", "4", "--requests", "90", "--seeds", "2"]


def test_table_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "page.html", tmp_path / "out.json"
    assert run([*FEW, "--policies", "experts,oracle", "-o", str(page), "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "experts against least-loaded: " in text and "each step takes one unit of time" in text
    found = json.loads(file.read_text())
    assert [row["policy"] for row in found["rows"]] == ["least-loaded", "experts", "oracle"]
    assert found["validated"] is False and "tpot_p99_ms" not in found["rows"][0]["figures"]
    html = page.read_text()
    assert "<img" in html and "Experts read per step" in html


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--load", "0.8"], "--slots"),
        (["--live", "64"], "too few"),
        (["--policies", "best"], "no policy"),
        (["--arrivals", "recorded"], "does not say when"),
        (["--hardware", "H101"], "unknown hardware"),
        (["--hardware", "H100", "--model", "gpt-oss-20b"], "differ in"),
        (["--look-ahead", "0"], "look_ahead"),
    ],
)
def test_bad_input_is_one_line(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = [*FEW[:4], "--requests", "90", "--seeds", "1"]
    base += [] if {"--load", "--live", "--arrivals"} & set(more) else ["--live", "4"]
    assert run([*base, *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
