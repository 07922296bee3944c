"""The Plan value: it carries all it was made for, is written and read back whole, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import moeplan
from moeplan.errors import FormatError, PlanError, UsageError
from moeplan.planning.plan import Moves, Provenance, Signature

ROOT = Path(__file__).parents[1] / "data" / "archives" / "0.1.0"


@pytest.fixture(scope="module")
def trace() -> moeplan.Trace:
    return moeplan.open_trace("embedded", without_layers=(1, 2, 3, 5, 6, 7))


@pytest.fixture(scope="module")
def made(trace: moeplan.Trace) -> moeplan.Plan:
    return moeplan.plan(trace, moeplan.Cluster(2, 4), "paper", redundant=8, seed=3)


SETTINGS = moeplan.EvaluationSettings(steps=5, bootstrap_draws=20)


def head(plan: Path) -> dict[str, object]:
    return json.loads((plan / "plan.json").read_text())


def rewrite(plan: Path, **fields: object) -> None:
    (plan / "plan.json").write_text(json.dumps(head(plan) | fields))


def test_round_trip(made: moeplan.Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "a")
    back = moeplan.load_plan(tmp_path / "a")
    for field in dataclasses.fields(moeplan.Plan):
        if field.name not in ("placement", "router", "prediction"):
            assert getattr(back, field.name) == getattr(made, field.name), field.name
    np.testing.assert_array_equal(back.placement.slots, made.placement.slots)
    np.testing.assert_array_equal(back.routes.slot, made.routes.slot)
    assert made.prediction is not None and back.prediction is not None
    stored, again = made.prediction.arrays(), back.prediction.arrays()
    assert all(np.array_equal(stored[name], again[name]) for name in stored) and stored.keys() == again.keys()
    assert back.to_dict() == made.to_dict() and head(tmp_path / "a")["version"] == 2
    back.save(tmp_path / "b")
    assert head(tmp_path / "a") == head(tmp_path / "b")


def test_it_says_what_it_was_made_for(made: moeplan.Plan, trace: moeplan.Trace) -> None:
    assert (made.redundant, made.seed, made.strategy, made.signature) == (8, 3, "paper", Signature())
    assert made.provenance.trace_checksum == trace.checksum and made.provenance.fit_requests == 779
    assert made.expected is not None and 0 < made.expected["remote_share"]["value"] < 1
    assert made.moves_from(made) == Moves(0, 80, 0, 0)
    lines = repr(made).splitlines()
    assert len(lines) == 3 and "paper for embedded" in lines[0] and all(len(line) < 200 for line in lines)


def test_evaluate_cannot_be_given_another_cluster(made: moeplan.Plan, trace: moeplan.Trace) -> None:
    """A plan for 2 x 4 GPUs cannot be scored as if it were for 4 x 2."""
    assert not {"cluster", "redundant", "dispatch", "replica_rule"} & set(
        inspect.signature(moeplan.evaluate).parameters
    )
    assert "cluster" not in {field.name for field in dataclasses.fields(moeplan.EvaluationSettings)}
    with pytest.raises(PlanError, match=r"placement is for 2 nodes x 4 GPUs, the cluster has 4 x 2"):
        dataclasses.replace(made, cluster=moeplan.Cluster(4, 2))
    table = moeplan.evaluate(made, trace, SETTINGS).table
    assert (table.head["setup"]["nodes"], table.head["setup"]["gpus_per_node"]) == (2, 4)
    assert table.head["setup"]["redundant"] == 8
    other = moeplan.open_trace("embedded", without_layers=(0,))
    with pytest.raises(UsageError, match="layers"):
        moeplan.evaluate(made, other)


def test_results_are_for_people_and_for_programs(made: moeplan.Plan, trace: moeplan.Trace) -> None:
    found = moeplan.evaluate(made, trace, SETTINGS)
    assert found.fitted_on_this_trace and repr(found).endswith("results are optimistic")
    assert (
        repr(found).startswith("paper on 779 requests of embedded\n")
        and "\nstrategy" in repr(found)
        and "array" not in repr(found)
    )
    assert json.dumps(found.to_dict(), allow_nan=False) and found.to_dict()["trace"] == "embedded"
    figure = found.figures["remote_share"]
    assert repr(figure).startswith(f"MeasuredValue({figure.value:.4g}, 95 % ") and len(repr(figure)) < 80
    assert repr(moeplan.MeasuredValue(None)) == "MeasuredValue(unknown)"
    assert repr(found.row).startswith("paper: load guard ok\n  remote_share ")
    low, high = figure.interval() or (1.0, 0.0)
    assert low < figure.value < high
    with pytest.raises(UsageError, match="no row 'eplb'; choose among linear, paper, paper/none"):
        found.table.row("eplb")


def test_to_pandas(made: moeplan.Plan, trace: moeplan.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = moeplan.evaluate(made, trace, SETTINGS)
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in (found, found.row, found.table):
        with pytest.raises(moeplan.MoeplanError, match="pandas, which is not installed; pip install pandas"):
            result.to_pandas()
    monkeypatch.undo()
    pytest.importorskip("pandas")
    frame, table = found.to_pandas(), found.table.to_pandas()
    assert (
        frame.loc["remote_share", "value"] == found.figures["remote_share"].value == table.loc["paper", "remote_share"]
    )
    assert list(table.index) == ["linear", "paper", "paper/none", "paper/prompt-tokens"]
    assert list(frame) == ["value", "low", "high", "vs_linear"]


def test_plot(made: moeplan.Plan, trace: moeplan.Trace) -> None:
    found = moeplan.evaluate(made, trace, SETTINGS)
    assert len(found.plot().axes) == 1
    with pytest.raises(UsageError, match="no figure 'modelled_step_ms' to plot; choose among remote_share"):
        found.plot("modelled_step_ms")


def test_rebalance_moves_few(made: moeplan.Plan, trace: moeplan.Trace) -> None:
    new = moeplan.rebalance(made, trace, max_moves=2)
    assert new.strategy == "moeplan" and new.moves_from(made).most_in_a_layer <= 2
    assert (new.cluster, new.redundant) == (made.cluster, made.redundant)


def test_newer_versions_and_unknown_requirements_are_refused_by_name(made: moeplan.Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "p")
    rewrite(tmp_path / "p", something_optional=1)
    moeplan.load_plan(tmp_path / "p")
    for fields, said in (
        ({"version": 3}, "is of version 3, this moeplan reads up to 2"),
        ({"version": True}, "is of version True"),
        ({"version": 2, "requires": ["half-experts"]}, "requires 'half-experts', which this moeplan does not know"),
        ({"requires": "x"}, "has a wrong 'requires'"),
    ):
        rewrite(tmp_path / "p", **fields)
        with pytest.raises(FormatError, match=said):
            moeplan.load_plan(tmp_path / "p")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cluster": {"nodes": 2, "gpus_per_node": 4}}, "has no 'deployment' in 'cluster'"),
        ({"cluster": {"nodes": 2, "gpus_per_node": 4, "deployment": "rows"}}, "has a wrong 'deployment': 'rows'"),
        ({"cluster": {"nodes": 0, "gpus_per_node": 4, "deployment": "nodes"}}, "0 nodes x 4 GPUs"),
        ({"cluster": {"nodes": 4, "gpus_per_node": 2, "deployment": "nodes"}}, "router's arrays do not fit"),
        ({"signature": {"source": "decode", "tokens": 0}}, "has a wrong 'tokens': '0'"),
        ({"signature": {"source": "decode", "tokens": None}}, "a signature of None decode tokens"),
        ({"signature": None}, "has a wrong 'signature'"),
        ({"notes": [1]}, "has a wrong 'notes"),
        ({"model": []}, "has a wrong 'model'"),
        ({"expected": "good"}, "has a wrong 'expected': 'good'"),
    ],
)
def test_wrong_fields_are_named(made: moeplan.Plan, tmp_path: Path, fields: dict[str, object], said: str) -> None:
    made.save(tmp_path / "p")
    rewrite(tmp_path / "p", **fields)
    with pytest.raises(FormatError, match=said) as error:
        moeplan.load_plan(tmp_path / "p")
    assert str(tmp_path / "p") in str(error.value)


def test_a_plan_of_version_1_is_read(tmp_path: Path) -> None:
    plan = moeplan.load_plan(ROOT / "plan-first-tokens")
    assert plan.signature == Signature("decode", 4) and str(plan.signature) == "first 4 decode tokens"
    gpus = moeplan.load_plan(ROOT / "plan-gpu")
    assert gpus.cluster.deployment is moeplan.Deployment.GPUS and gpus.params["guard"] == 1.05
    gpus.save(tmp_path / "new")
    assert moeplan.load_plan(tmp_path / "new").to_dict() == gpus.to_dict()


def test_signatures() -> None:
    assert [str(Signature()), str(Signature("rows", 3))] == ["prefill", "first 3 recorded tokens"]
    for source, tokens in (("prefill", 3), ("decode", None), ("decode", 0), ("luck", 3)):
        with pytest.raises(UsageError):
            Signature(source, tokens)  # type: ignore[arg-type]
    assert Provenance().notes == ()


def test_balance_needs_counts_only() -> None:
    counts = np.arange(1, 17).reshape(2, 8)
    placement = moeplan.balance(counts, moeplan.Cluster(2, 2), redundant=4)
    assert placement.slots.shape == (2, 12) and placement.slots_per_gpu == 3
    with pytest.raises(UsageError, match=r"expected \[layers, experts\]"):
        moeplan.balance(counts[0], moeplan.Cluster(2, 2))
