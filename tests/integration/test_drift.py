"""Drift detection: a stored plan is called stale if a new plan is better by more than noise, and only then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from helpers.command_line import refused
from moeplan.cli.app import run
from moeplan.cluster import Cluster, Dispatch
from moeplan.errors import MoeplanError, UsageError
from moeplan.planning import Plan, read_requests, solve
from moeplan.planning.plan import PlanningTask
from moeplan.replay.drift import FRESH, OLD, DriftReport, check_drift, detect_drift
from moeplan.replay.evaluator import check_shape
from moeplan.replay.settings import EvaluationSettings
from moeplan.synthetic.generator import WorkloadSettings, generate
from moeplan.trace import Trace, TraceWriter, open_trace
from moeplan.types import ModelShape

SETTINGS = EvaluationSettings()
WHERE = ["--nodes", "4", "--gpus-per-node", "2"]


def part(trace: Trace, keep: np.ndarray, out: Path) -> Path:
    """Some requests of a trace, as a trace of their own."""
    rows, requests = trace.load(), trace.requests
    with TraceWriter(out, trace.shape, source={}, synthetic=trace.synthetic) as writer:
        for i in np.flatnonzero(keep):
            picks = rows.experts[requests.offsets[i] : requests.offsets[i + 1]]
            writer.add(picks, prefill=int(requests.prefill[i]), domain=requests.domains[requests.domain[i]])
    return out


def planned(trace: Trace, strategy: str, seed: int = 0, dispatch: Dispatch = Dispatch.PICK) -> Plan:
    """A plan as `load_plan` would give it."""
    return solve(read_requests(trace).problem(PlanningTask(Cluster(4, 2), dispatch=dispatch)), strategy, seed)


def verdict(stored: Plan, new: Trace, seed: int = 0) -> DriftReport:
    return detect_drift(stored, new, EvaluationSettings(seed=seed, steps=100))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four layers of half of the embedded trace, cut by request number and by domain: enough to tell, soon planned."""
    folder, trace = tmp_path_factory.mktemp("parts"), open_trace("embedded", without_layers=(1, 3, 5, 7))
    number, domain = np.arange(len(trace.requests)), np.array(trace.requests.domains)[trace.requests.domain]
    half = number % 4 < 2
    cuts = {"even": number % 2 == 0, "odd": number % 2 == 1}
    cuts |= {"code-math": np.isin(domain, ["code", "math"]), "chat-prose": np.isin(domain, ["chat", "prose"])}
    return {name: part(trace, half & keep, folder / name) for name, keep in cuts.items()}


@pytest.mark.slow
def test_other_requests_of_the_same_kinds_leave_a_plan_good(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan", tmp_path / "drift.json"
    assert run(["plan", str(parts["even"]), "-o", str(plan), *WHERE]) == 0
    before = {path.name: path.read_bytes() for path in plan.iterdir()}
    capsys.readouterr()
    assert run(["drift", str(parts["odd"]), "--plan", str(plan), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "still good" in text and "next" not in text and "this trace" not in text
    assert before == {path.name: path.read_bytes() for path in plan.iterdir()}
    data = json.loads(out.read_text())
    assert not data["stale"] and not data["fitted_on_this_trace"] and data["key"] == "remote_share"
    low, high = data["change_by_replanning"]["ci95_of_planning"]
    assert low < data["change_by_replanning"]["value"] < high
    assert set(data["strategies"]) == {"linear", OLD, f"{OLD}/none", FRESH}


@pytest.mark.slow
def test_other_domains_make_a_plan_stale(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, found = tmp_path / "plan", []
    assert run(["plan", str(parts["code-math"]), "-o", str(plan), *WHERE, "--strategy", "paper"]) == 0
    for out in (tmp_path / "a.json", tmp_path / "b.json"):
        capsys.readouterr()
        arguments = ["drift", str(parts["chat-prose"]), "--plan", str(plan), "--json", str(out)]
        assert run(arguments) == 1
        text = capsys.readouterr().out
        assert "stale: a new plan lowers remote_share" in text and f"--plan {plan} --max-moves" in text
        found.append(json.loads(out.read_text()))
        for row in found[-1]["strategies"].values():
            del row["fit_seconds"]
    assert found[0] == found[1]
    change = found[0]["change_by_replanning"]
    assert change["value"] < -0.05 and change["ci95"][1] < 0 and change["ci95_of_planning"][1] < 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["moeplan", "paper"])
def test_nothing_changed_and_no_wolf_cried(strategy: str, tmp_path: Path) -> None:
    """Generated traffic of one and the same kind: intervals of 95 % leave room for one alarm in so many, not two."""
    alarms = []
    for seed in range(4):
        old = generate("demo", tmp_path / f"old{seed}", WorkloadSettings(requests=160, seed=2 * seed, layers=2))
        new = generate("demo", tmp_path / f"new{seed}", WorkloadSettings(requests=160, seed=2 * seed + 1, layers=2))
        alarms.append(verdict(planned(old, strategy, seed), new, seed).stale)
    assert sum(alarms) <= 1, alarms


def hot(experts: list[int], out: Path, seed: int) -> Trace:
    """Requests without a character of their own: most picks of all of them go to the hot experts."""
    rng = np.random.default_rng(seed)
    weight = np.ones(16)
    weight[experts] = 12.0
    with TraceWriter(out, ModelShape("m", 1, 16, 1), source={}) as writer:
        for _ in range(80):
            writer.add(rng.choice(16, (60, 1, 1), p=weight / weight.sum()), prefill=20)
    return open_trace(out)


def test_a_plan_that_overloads_a_node_is_stale_though_nothing_more_crosses(tmp_path: Path) -> None:
    was = hot([0, 4, 8, 12], tmp_path / "was", 0)
    stored = planned(was, "eplb")
    experts = stored.placement.slots.reshape(4, 4)[1].tolist()  # those that share a node get hot
    found = verdict(stored, hot(experts, tmp_path / "now", 1))
    assert found.overloaded and not found.helps and found.stale
    assert found.load[0] > 1.05 and (found.node_load(FRESH) or 9.0) <= 1.05
    assert not verdict(stored, hot([0, 4, 8, 12], tmp_path / "same", 2)).stale


@pytest.mark.slow
def test_each_mode_is_judged_by_what_it_sends(parts: dict[str, Path]) -> None:
    old, new = open_trace(parts["code-math"]), open_trace(parts["chat-prose"])
    for mode in (Dispatch.GPU, Dispatch.NODE):
        found = verdict(planned(old, "paper", dispatch=mode), new)
        assert found.key == "remote_nodes_per_token" and found.helps
    with pytest.raises(UsageError, match="allgather"):
        check_drift(planned(old, "linear", dispatch=Dispatch.ALLGATHER), SETTINGS)
    with pytest.raises(UsageError, match="unequal"):
        check_drift(planned(old, "paper-unbalanced"), SETTINGS)


@pytest.mark.slow
def test_signatures_are_those_of_the_plan(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan", tmp_path / "drift.json"
    head = ["plan", str(parts["even"]), "-o", str(plan), *WHERE, "--strategy", "paper", "--signature-tokens", "8"]
    assert run(head) == 0
    ask = ["drift", str(parts["odd"]), "--plan", str(plan), "--json", str(out)]
    assert run(ask) in (0, 1)
    assert json.loads(out.read_text())["signature_stands_in"] == "first 8 decode tokens"
    capsys.readouterr()
    assert run([*ask, "--signature-tokens", "4", "--block", "5"]) in (0, 1)
    assert "the plan was fitted on the first 8 decode tokens" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["setup"]["block"] == 5 and data["signature_stands_in"] == "first 4 decode tokens"
    text = (plan / "plan.json").read_text()
    (plan / "plan.json").write_text(text.replace('"tokens": 8', '"tokens": "some"'))
    assert "has a wrong 'tokens': 'some'" in refused(ask, capsys)


@pytest.mark.slow
def test_one_clear_line_for_wrong_use(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, even = tmp_path / "plan", parts["even"]
    assert run(["plan", str(even), "-o", str(plan), *WHERE, "--strategy", "linear"]) == 0
    ask = ["drift", even, "--plan", plan]
    capsys.readouterr()
    assert run([str(a) for a in ask]) == 0
    assert "fitted on this trace" in capsys.readouterr().out
    assert "layers: 3 and 4" in refused([*ask, "--without-layers", "2"], capsys)
    assert "Unknown option: --nodes" in refused([*ask, "--nodes", "4"], capsys)
    assert "--plan is missing" in refused(["drift", even], capsys)
    assert "--output is missing" in refused(["plan", even], capsys)
    assert "TRACE is missing" in refused(["plan", "-o", plan], capsys)
    assert "does not exist" in refused(["drift", even, "--plan", tmp_path / "no"], capsys)
    trace = open_trace(even)
    few = part(trace, np.arange(len(trace.requests)) < 12, tmp_path / "few")
    assert "a group" in refused(["drift", few, "--plan", plan], capsys)
    fewer = part(trace, np.arange(len(trace.requests)) < 4, tmp_path / "fewer")
    assert "collect more traffic" in refused(["drift", fewer, "--plan", plan], capsys)


def test_a_plan_is_for_one_shape() -> None:
    shape = ModelShape("m", 2, 8, 2)
    for other, what in ((ModelShape("m", 2, 9, 2), "experts"), (ModelShape("m", 2, 8, 3), "picks")):
        with pytest.raises(UsageError, match=what):
            check_shape(other, shape, "plan")
    with pytest.raises(UsageError, match="layer ids: 3-4 and 0-1"):
        check_shape(ModelShape("m", 2, 8, 2, layer_ids=(3, 4)), shape, "plan")
    check_shape(shape, shape, "plan")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"guard": "much"}, "plan.json: guard 'much' or objective 'bytes' is invalid"),
        ({"guard": [1]}, r"guard '\[1\]'"),
        ({"guard": 0.5}, "guard '0.5'"),
        ({"objective": "beauty"}, "objective 'beauty'"),
        ({"objective": "time"}, "made with --objective time"),
    ],
)
def test_a_head_that_cannot_be_planned_by(parts: dict[str, Path], head: dict[str, object], message: str) -> None:
    stored = planned(open_trace(parts["even"]), "linear")
    stored = dataclasses.replace(stored, strategy="moeplan")
    assert check_drift(dataclasses.replace(stored, params={"guard": None}), SETTINGS)[1].guard == float("inf")
    with pytest.raises(MoeplanError, match=message):
        check_drift(dataclasses.replace(stored, params=head), SETTINGS)


def test_one_fold_says_nothing_of_the_next_plan(parts: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="2 folds"):
        check_drift(planned(open_trace(parts["even"]), "linear"), EvaluationSettings(folds=1))


def test_a_deployed_placement_is_planned_anew_by_moeplan(tmp_path: Path) -> None:
    """`import placement` gives a plan whose strategy is none of ours."""
    stored = planned(hot([0, 4, 8, 12], tmp_path / "was", 0), "eplb")
    stored = dataclasses.replace(stored, strategy="deployed")
    assert check_drift(stored, SETTINGS)[1].name == "moeplan"
    experts = stored.placement.slots.reshape(4, 4)[1].tolist()
    found = verdict(stored, hot(experts, tmp_path / "now", 1))
    assert found.overloaded and found.stale
