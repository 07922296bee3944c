"""The page: self-contained, escaped, one sentence a section; and the verb that writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moeplan.cli.app import run
from moeplan.errors import OutputError
from moeplan.io.files import check_place
from moeplan.profile import profile_trace
from moeplan.report.figures import canvas, heat_map, lines, to_image
from moeplan.report.page import Section, Table, render, write_page
from moeplan.report.profile_page import profile_html, sentences
from moeplan.trace import TraceWriter, open_trace
from moeplan.types import ModelShape


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "toy"
    rng = np.random.default_rng(0)
    weights = rng.gamma(0.6, size=(2, 3, 16)) + 0.02
    with TraceWriter(path, ModelShape("toy <b>", 3, 16, 2), source={}, synthetic=True) as writer:
        for i in range(30):
            score = np.log(weights[i % 2])[None] + rng.gumbel(size=(30, 3, 16))
            writer.add(np.argsort(-score, axis=2)[:, :, :2], prefill=10, domain=("code", "<script>x</script>")[i % 2])
    return path


@pytest.fixture(scope="module")
def html(trace: Path) -> str:
    return profile_html(profile_trace(open_trace(trace)))


@pytest.mark.slow
def test_the_page_loads_nothing_and_escapes_labels(html: str):
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "http" not in re.sub(r"http-equiv", "", re.sub(r'src="data:[^"]*"', "", html))


def test_a_synthetic_trace_is_labelled_in_title_and_notices(html: str):
    assert "<title>Expert use of toy &lt;b&gt; (synthetic)</title>" in html
    assert "<li>Synthetic: this workload was generated" in html


def test_every_section_has_a_sentence_with_numbers_and_a_figure(html: str):
    sections = re.findall(r"<section>(.*?)</section>", html, re.S)
    assert len(sections) == 9
    for section in sections:
        sentence = re.search(r'<p class="sentence[^"]*">(.*?)</p>', section, re.S)
        assert sentence and re.search(r"\d", sentence[1])
        assert "nan" not in sentence[1].lower()
    assert sum(section.count("<img") for section in sections) == 9
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall(r"<img[^>]*>", html))


@pytest.mark.slow
def test_the_same_profile_gives_the_same_page(trace: Path, html: str):
    assert profile_html(profile_trace(open_trace(trace))) == html


def test_what_cannot_be_shown_says_why(tmp_path: Path):
    with TraceWriter(tmp_path / "t", ModelShape("top-1", 2, 4, 1), source={}) as writer:
        writer.add(np.arange(8).reshape(4, 2, 1) % 4, prefill=4, domain="a")
    found = profile_trace(open_trace(tmp_path / "t"))
    said = sentences(found)
    assert "top-1" in said["Co-activation of experts"]
    assert sum(text.startswith("Not shown") for text in said.values()) == 6
    assert profile_html(found).count("skipped") >= 6


def test_render_is_generic():
    table = Table(["name", "value"], [["a", "1.0"], ["b", "-"]], strong=[1])
    assert table.numeric == [False, True]
    page = render(
        "T", "s", ["n"], [Section("H", "One & two.", table=table, note="how"), Section("S", "No.", skipped=True)]
    )
    assert "One &amp; two." in page and '<td class="number">1.0</td>' in page and "sentence skipped" in page


def test_figures_survive_gaps_and_many_names():
    with canvas() as (figure, axes):
        heat_map(figure, axes, np.full((20, 20), np.nan), [f"d{i}" for i in range(20)], low=0, high=1, label="x")
        assert to_image(figure, "empty").source.startswith("data:image/svg+xml;base64,")
    with canvas() as (figure, axes):
        lines(axes, [1, 2], [("a", [np.nan, 1.0]), ("b", [1.0, 2.0])], ("x", "y"), "b")
        assert to_image(figure, "gap").width == 461


def test_an_unwritable_report_is_one_line(tmp_path: Path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(tmp_path / "none" / "x.html", "x")
    for place in (tmp_path / "none" / "x.html", tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            check_place(place)
    check_place(tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
def test_the_verb(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert run(["profile", str(trace), "--json", "p.json", "--without-layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "wrote toy-profile.html" in out and (tmp_path / "toy-profile.html").is_file()
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["trace"]["without_layers"] == [1] and data["trace"]["model"]["num_layers"] == 2
    assert len(out.splitlines()) < 45


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--signature-tokens", "40"], "needs requests of 80 decode tokens"),
        (["-o", "none/x.html"], "cannot be written"),
        (["--without-layers", "9"], "no such layer"),
    ],
)
def test_bad_use_is_one_line_and_status_2(
    trace: Path,
    flags: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert run(["profile", str(trace), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
