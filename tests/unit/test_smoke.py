"""Seconds, before every commit: from a workload to a checked placement file, and a step's time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.cli.app import run


def test_from_a_workload_to_a_placement_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plan, file = (str(tmp_path / name) for name in ("trace", "plan", "placement.json"))
    cluster = ["--nodes", "2", "--gpus-per-node", "2"]
    dense = ["--num-layers", "3", "--dense-layers", "0"]
    steps = [
        ["generate", "demo", "--requests", "32", "--layer-ids", "1,2", "--decode", "12", "-o", trace],
        ["plan", trace, *cluster, "--redundant", "4", "-o", plan],
        ["export", plan, "--engine", "sglang", *dense, "-o", file],
        ["check", file, "--engine", "sglang", *dense, "--num-experts", "32", "--plan", plan],
        ["estimate", "--hardware", "H100", "--model", "deepseek-v3", "--nodes", "4", "--json", "-"],
        ["evaluate", trace, "--plan", plan, "--steps", "5", "--json", "-"],
    ]
    for step in steps:
        capsys.readouterr()
        assert run(step) == 0, capsys.readouterr().err
    rows = json.loads(capsys.readouterr().out)["strategies"]
    assert rows["moeplan"]["remote_share"]["value"] < rows["linear"]["remote_share"]["value"]
