"""Independent instances: tables of what grouping and ordering saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeplan
from helpers.command_line import refused
from moeplan.cli.app import run
from moeplan.replay.instances import InstanceTask, compare_instances

SETTINGS = moeplan.EvaluationSettings(folds=2, steps=60)


def test_the_more_is_known_the_fewer_experts_are_read() -> None:
    table = compare_instances(moeplan.open_trace("embedded"), InstanceTask(4, 8), SETTINGS)
    assert table.live == 8 and table.rows[0].signature == "none"
    values = [table.row(name).experts_per_step.value for name in ("none", "domain", "prefill", "oracle")]
    assert values == sorted(values, key=lambda value: -(value or 0.0))
    assert (table.row("prefill").ordered.value or 0.0) < 0.9 * (table.row("none").ordered.value or 0.0)
    again = compare_instances(moeplan.open_trace("embedded"), InstanceTask(4, 8), SETTINGS)
    assert again.to_dict() == table.to_dict()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["compare", "embedded", "--deployment", "instances", "--folds", "1", "--steps", "20"]
    assert run([*asked, "--instances", "4", "--batch", "200", "--json", str(tmp_path / "j")]) == 0
    found = json.loads((tmp_path / "j").read_text())
    assert found["live"] < 200 and found["rows"][-1]["change"]["value"] < -0.05
    assert "requests, so steps have" in capsys.readouterr().out
    assert "use fewer --instances" in refused([*asked, "--instances", 300], capsys)
    assert "--batch 1 is outside" in refused([*asked, "--batch", 1], capsys)
    page = tmp_path / "page.html"
    assert "does not take --hardware, --model or --context" in refused([*asked, "--hardware", "H100"], capsys)
    assert "does not take --output" in refused([*asked, "-o", page], capsys) and not page.exists()
    assert "go with --deployment instances" in refused(["compare", "embedded", "--instances", 4], capsys)
    plan = ["plan", "embedded", "--deployment", "instances", "-o", tmp_path / "plan"]
    assert "no placement to plan" in refused(plan, capsys)
