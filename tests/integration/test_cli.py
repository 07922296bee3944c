"""The command line as a user meets it: the whole way, and one clear line with status 2 for everything that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.command_line import refused
from moeplan.cli.app import run
from moeplan.synthetic.generator import WorkloadSettings, generate
from moeplan.trace import TraceWriter
from moeplan.types import ModelShape

FAST = ["--folds", "1", "--steps", "5"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli") / "trace"
    generate("demo", place, WorkloadSettings(requests=80, seed=2))
    return place


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefill-only trace."""
    place = tmp_path_factory.mktemp("prompts") / "trace"
    rng = np.random.default_rng(0)
    with TraceWriter(place, ModelShape("m", 1, 4, 1), source={}) as writer:
        for _ in range(40):
            writer.add(rng.integers(0, 4, (20, 1, 1)), prefill=20)
    return place


@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run(["demo", "-o", str(out), "--json", str(tmp_path / "demo.json")]) == 0
    text = capsys.readouterr().out
    assert "synthetic" not in text and "paper" in text and "noise floor" in text
    for page in ("profile.html", "compare.html"):
        html = (out / page).read_text()
        assert "<script" not in html and "http" not in html.split("<main>")[1]
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["synthetic"] is False and "paper" in data["strategies"]
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["demo", "-o", tmp_path / "file"], capsys)


@pytest.mark.slow
def test_plan_and_replay(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--nodes", "4", "--gpus-per-node", "2"]
    plan = tmp_path / "plan"
    assert run(["plan", str(trace), "-o", str(plan), *where, "--redundant", "8"]) == 0
    assert "expected on held-out requests" in capsys.readouterr().out
    assert {p.name for p in plan.iterdir()} == {"plan.json", "slots.npy", "weights.npy", "intercept.npy"}
    assert run(["evaluate", str(trace), "--plan", str(plan), "--json", "-", "--steps", "5"]) == 0
    streams = capsys.readouterr()
    data = json.loads(streams.out)
    assert data["fitted_on_this_trace"] and "fitted on this trace" in streams.err
    assert "already exists" in refused(["plan", trace, "-o", plan, *where], capsys)
    unequal = tmp_path / "unequal"
    assert run(["plan", str(trace), "-o", str(unequal), *where, "--strategy", "paper-unbalanced"]) == 0
    assert "groups of equal size" in capsys.readouterr().out
    assert run(["evaluate", str(trace), "--plan", str(unequal), "--json", "-", "--steps", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)["strategies"]
    assert rows["paper-unbalanced/none"]["equal_groups"] and not rows["paper-unbalanced"]["equal_groups"]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "json", "version", "expert"])
def test_a_damaged_plan(trace: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan"
    where = ["--nodes", "2", "--gpus-per-node", "2", "--strategy", "eplb"]
    assert run(["plan", str(trace), "-o", str(plan), *where]) == 0
    slots, head = plan / "slots.npy", plan / "plan.json"
    if damage == "cut":
        slots.write_bytes(slots.read_bytes()[:-40])
    elif damage == "missing":
        slots.unlink()
    elif damage in ("changed", "expert"):
        array = np.load(slots)
        array[0, 0] = 99 if damage == "expert" else array[0, 1]
        np.save(slots, array)
    elif damage == "json":
        head.write_text(head.read_text()[:-100])
    else:
        head.write_text(head.read_text().replace('"version": 2', '"version": 9'))
    line = refused(["evaluate", trace, "--plan", plan], capsys)
    assert ("plan.json" if damage in ("json", "version") else "slots.npy") in line


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", '"one"'), ("equal_groups", '"no"'), ("fit_seconds", '"long"'), ("nodes", "2.5"), ("dispatch", '"post"')],
)
def test_a_wrong_field_of_a_plan_is_named(
    trace: Path, tmp_path: Path, field: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan"
    assert run(["plan", str(trace), "-o", str(plan), "--nodes", "2", "--gpus-per-node", "2", "--strategy", "eplb"]) == 0
    head = plan / "plan.json"
    head.write_text(re.sub(rf'("{field}": )[^,}}\n]+', rf"\g<1>{value}", head.read_text(), count=1))
    assert f"has a wrong '{field}'" in refused(["evaluate", trace, "--plan", plan], capsys)
    head.write_text(head.read_text().replace(f'"{field}"', '"other"', 1))
    assert f"has no '{field}'" in refused(["evaluate", trace, "--plan", plan], capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--strategy", "eplb", "--objective", "balance"], "--objective is for the strategy moeplan"),
        (["--strategy", "paper", "--guard", "2"], "--guard is for the strategy moeplan"),
        (["--strategy", "eplb", "--clusters", "4"], "--clusters is for the strategies paper and paper-unbalanced"),
        (["--clusters", "4"], "--clusters is for the strategies paper and paper-unbalanced"),
        (["--strategy", "eplb,paper"], "--strategy eplb,paper names several"),
        (["--block", "9" * 20], "--block 99999999999999999999 is more than any trace has"),
    ],
)
def test_flags_that_would_be_ignored_or_break(
    trace: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--nodes", "2", "--gpus-per-node", "2", "-o", str(tmp_path / "plan")]
    assert said in refused(["plan", trace, *where, *flags], capsys)
    assert not (tmp_path / "plan").exists()


def test_an_older_plan_hands_on_what_it_was_made_for(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    where = ["--nodes", "2", "--gpus-per-node", "2", "--objective", "balance", "--guard", "1.2"]
    assert run(["plan", str(trace), "-o", str(old), *where]) == 0
    assert run(["rebalance", str(trace), "--plan", str(old), "--max-moves", "1", "-o", str(new)]) == 0
    head = json.loads((new / "plan.json").read_text())
    assert (head["params"]["objective"], head["params"]["guard"]) == ("balance", 1.2)
    assert "is outside 0..1000000" in refused(
        ["rebalance", trace, "--plan", old, "--max-moves", "9" * 20, "-o", tmp_path / "x"], capsys
    )
    whole = (old / "plan.json").read_text()
    (old / "plan.json").write_text(whole.replace('"guard": 1.2', '"guard": "much"'))
    line = refused(["rebalance", trace, "--plan", old, "--max-moves", "1", "-o", tmp_path / "x"], capsys)
    assert "guard 'much'" in line
    (old / "plan.json").write_text(whole.replace('"balance"', '"time"'))
    line = refused(["rebalance", trace, "--plan", old, "--max-moves", "1", "-o", tmp_path / "x"], capsys)
    assert "made with --objective time" in line and "--hardware" in line


def test_json_is_strict_and_repeatable(trace: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        assert run(["compare", str(trace), "--nodes", "2", "--gpus-per-node", "2", *FAST, "--json", str(out)]) == 0
        data = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
        for row in data["strategies"].values():
            del row["fit_seconds"]
        found.append(data)
    assert found[0] == found[1]


def test_slots_that_do_not_divide(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["compare", trace, "--nodes", "8", "--gpus-per-node", "8"], capsys)
    assert "--redundant 32" in line and "--gpus-per-node 4" in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nodes", "0"], "at least 1"),
        (["--nodes", "32", "--gpus-per-node", "1"], "too few to replay|replaying steps needs"),
        (["--nodes", "4", "--gpus-per-node", "4", "--deployment", "gpus"], "--deployment nodes"),
        (["--nodes", "4", "--gpus-per-node", "2", "--redundant", "-8"], "negative"),
        (["--strategies", "linear,best"], "no strategy 'best'"),
        (["--fit", "1.5"], "between 0 and 1"),
        (["--folds", "0"], "outside 1.."),
        (["--seed", "-1"], "negative"),
        (["--block", "0"], "not positive"),
        (["--clusters", "0"], "not positive"),
        (["--clusters", "1000", "--nodes", "2", "--gpus-per-node", "2"], "1000 clusters for"),
        (["--clusters", "4", "--strategies", "linear,eplb"], "--clusters is for the strategies paper"),
        (["--hidden", "0"], "not positive"),
        (["--signature-tokens", "0"], "not positive"),
        (["--signature-tokens", "10000"], "smaller --signature-tokens"),
        (["--without-layers", "77"], "no such layer"),
        (["--without-layers", "x"], "not a list"),
        (["--dispatch", "carrier-pigeon"], "carrier-pigeon"),
        (["--strategies", "eplb-hierarchical", "--nodes", "4", "--gpus-per-node", "2"], "expert groups"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_wrong_flags(trace: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    where = [] if "--nodes" in flags else ["--nodes", "4", "--gpus-per-node", "2"]
    folds = [] if "--folds" in flags else FAST
    assert re.search(says, refused(["compare", trace, *where, *folds, *flags], capsys))


def test_more_groups_than_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "few"
    generate("demo", place, WorkloadSettings(requests=6, seed=2))
    assert "groups for" in refused(["compare", place, "--nodes", "4", "--gpus-per-node", "2"], capsys)
    assert "groups for" in refused(
        ["plan", place, "--nodes", "8", "--gpus-per-node", "2", "-o", tmp_path / "p"], capsys
    )
    assert not (tmp_path / "p").exists()


def test_a_prefill_only_trace_says_what_to_do(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--nodes", "2", "--gpus-per-node", "1"]
    for verb in (["compare"], ["plan", "-o", "nowhere"]):
        line = refused([verb[0], prompts, *verb[1:], *where], capsys)
        assert "no decode rows" in line and "--signature-tokens" in line
    assert not Path("nowhere").exists()
    assert run(["compare", str(prompts), *where, *FAST, "--signature-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert "rest of prompt" in text and "first 5 prompt tokens stand in" in text


def test_outputs_that_cannot_be_written(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    where = ["--nodes", "2", "--gpus-per-node", "2", *FAST]
    for flag in ("--json", "-o"):
        line = refused(["compare", trace, *where, flag, blocked / "x"], capsys)
        assert "cannot be written" in line
    assert "cannot be made" in refused(["plan", trace, *where[:4], "-o", blocked / "x"], capsys)
    assert list(tmp_path.iterdir()) == [blocked]


def test_what_is_no_trace(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "moeplan import" in refused(["compare", tmp_path], capsys)
    assert "moeplan import arrays" in refused(["compare", shared / "traces" / "gpt-oss-20b.npz"], capsys)


def test_a_plan_for_another_model(
    trace: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan"
    assert (
        run(["plan", str(trace), "-o", str(plan), "--nodes", "2", "--gpus-per-node", "2", "--strategy", "linear"]) == 0
    )
    assert "differ in experts" in refused(["evaluate", prompts, "--plan", plan], capsys)
    assert "is a trace, not a plan" in refused(["evaluate", trace, "--plan", trace], capsys)


@pytest.mark.slow
def test_help_and_version() -> None:
    for arguments, says in ((["--help"], "compare"), (["--version"], "moeplan 0."), (["compare", "--help"], "--nodes")):
        out = subprocess.run([sys.executable, "-m", "moeplan", *arguments], capture_output=True, text=True)
        assert out.returncode == 0 and says in out.stdout


def test_bare_commands_show_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["import"]):
        assert run(arguments) == 2
        text = capsys.readouterr().err
        assert text.startswith("Usage: moeplan") and "Commands" in text


def test_outputs_are_checked_before_the_work(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["compare", trace, "-o", tmp_path / "no" / "x.html", "--nodes", "8", "--gpus-per-node", "8"], capsys)
    assert "does not exist" in line  # and not: slots do not divide
    assert "it is a folder" in refused(["compare", trace, "--json", tmp_path], capsys)
    assert "names none" in refused(["compare", trace, "--strategies", " , "], capsys)
    assert "does not exist" in refused(["compare", tmp_path / "nothing"], capsys)
