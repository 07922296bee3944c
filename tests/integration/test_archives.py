"""Files written by released versions are read by every later one, and mean the same.

tests/data/archives/VERSION holds the files and says how each was made; its `expected.json` has the figures that VERSION
itself read from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.fake_server import Fake, serve
from moeplan import load_plan, open_trace
from moeplan.cli.app import run
from moeplan.engines.plugins.settings import PluginSettings
from moeplan.trace.counts import read_counts

OLD = Path(__file__).parents[1] / "data" / "archives" / "0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
MODEL = ["--num-layers", "5", "--dense-layers", "0"]
PLACEMENTS = {"sglang": "json", "vllm": "json", "vllm-ascend": "json", "tensorrt-llm": "yaml"}


def answered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The JSON that a command prints."""
    assert run([*map(str, arguments), "--json", "-"]) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out))


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def facts_of(path: Path) -> dict[str, Any]:
    """All that a trace holds, as expected.json has it."""
    trace = open_trace(path)
    requests = trace.requests
    facts: dict[str, Any] = {
        "model": trace.shape.to_dict(),
        "checksum": trace.checksum,
        "complete": trace.complete,
        "synthetic": trace.synthetic,
        "aggregate": trace.aggregate,
        "dropped": trace.dropped,
        "left_over": trace.left_over,
        "source": trace.source,
        "rows": requests.rows.tolist(),
        "prefill": requests.prefill.tolist(),
        "domains": [requests.domains[i] for i in requests.domain],
        "arrival": [None if np.isnan(seconds) else seconds for seconds in requests.arrival.tolist()],
        "dp_rank": requests.dp_rank.tolist(),
    }
    if trace.aggregate > 1:
        return {**facts, "counts_sha256": digest(*(part.counts.astype("<u4") for part in trace.sums()))}
    parts = list(trace.parts(weights=trace.has_weights, positions=True))
    facts["experts_sha256"] = digest(*(part.experts.astype("<u2") for part in parts))
    facts["positions_sha256"] = digest(*(part.positions.astype("<u4") for part in parts if part.positions is not None))
    if trace.has_weights:
        facts["weights_sha256"] = digest(*(part.weights.astype("<f2") for part in parts if part.weights is not None))
    return facts


@pytest.mark.parametrize("name", EXPECTED["traces"])
def test_a_trace(name: str) -> None:
    facts, expected = facts_of(OLD / name), EXPECTED["traces"][name]
    assert {**facts, "model": None} == {**expected, "model": None}
    assert {key: facts["model"][key] for key in expected["model"]} == expected["model"]  # later versions may know more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trace-sums", "trace-columns", "trace-cut-off"])
def test_a_trace_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ["-o", tmp_path / "page.html"]
    shown, expected = answered(capsys, "profile", OLD / name, *page)["trace"], EXPECTED["traces"][name]
    assert (shown["requests"], shown["tokens"]) == (len(expected["rows"]), sum(expected["rows"]))
    assert shown["checksum"] == expected["checksum"] and shown["complete"] == expected["complete"]


@pytest.mark.parametrize("name", ["trace-cut-off", "trace-cut-off-sums"])
def test_a_recording_goes_on(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OLD / name, tmp_path / "t")
    flags = ["--aggregate", "2"] if name.endswith("sums") else []
    files = ["--prompts", OLD / "prompts.jsonl", "--config", OLD / "server-config.json", "-o", tmp_path / "t"]
    with serve(Fake(engine="sglang")) as fake:
        answered(capsys, "record", "sglang", "--url", fake.url, *files, "--max-new-tokens", "6", "--resume", *flags)
    whole = EXPECTED["traces"][name.replace("cut-off", "recorded")]
    assert {**facts_of(tmp_path / "t"), "checksum": None} == {**whole, "checksum": None}  # bytes depend on pyarrow


def test_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered(capsys, "import", "arrays", OLD / "arrays.npz", "-o", tmp_path / "t")
    expected = EXPECTED["traces"]["trace-arrays"]
    assert {**facts_of(tmp_path / "t"), "checksum": None} == {**expected, "checksum": None}


@pytest.mark.parametrize("name", EXPECTED["plans"])
def test_a_plan_scores_what_it_scored(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, plan = EXPECTED["plans"][name], load_plan(OLD / name)
    assert digest(plan.placement.slots.astype("<i4")) == expected["slots_sha256"]
    assert [
        plan.cluster.nodes,
        plan.cluster.gpus_per_node,
        plan.cluster.deployment.value.removesuffix("s"),
    ] == expected["cluster"]
    assert (plan.replica_rule.value, plan.dispatch.value) == (expected["replica_rule"], expected["dispatch"])
    rows = answered(capsys, "evaluate", OLD / "trace", "--plan", OLD / name, "--steps", "10")["strategies"]
    for row, figures in ((expected["strategy"], expected["replay"]), ("linear", expected["linear"])):
        assert {key: rows[row][key]["value"] for key in figures} == pytest.approx(figures, rel=1e-6)


@pytest.mark.slow
def test_a_plan_made_from_first_tokens_is_held_to_new_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    """Its signature is stored as text for people; drift must understand it."""
    status = run(["drift", str(OLD / "trace"), "--plan", str(OLD / "plan-first-tokens"), "--json", "-"])
    assert status in (0, 1), capsys.readouterr().err


def test_a_plan_is_improved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["rebalance", OLD / "trace", "--plan", OLD / "plan-moved", "--max-moves", "1", "-o", tmp_path / "p"]
    assert answered(capsys, *start)["moved"]["most_in_a_layer"] <= 1


def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts, expected = read_counts(OLD / "counts"), EXPECTED["counts"]
    assert digest(counts.counts.astype("<u8")) == expected["sha256"]
    assert (int(counts.counts.sum()), list(counts.layer_ids)) == (expected["picks"], expected["layer_ids"])
    assert (counts.name, counts.top_k, counts.phase) == ("small", 4, "decode")
    place = ["--nodes", "2", "--gpus-per-node", "4", "--redundant", "8"]
    for source in ("counts", "logical-count.json"):
        out = ["--engine", "sglang", *MODEL, "-o", tmp_path / f"{Path(source).stem}.json"]
        made = answered(capsys, "export", OLD / source, *place, *out)
        assert made["load_ratio"]["linear"] == pytest.approx(EXPECTED["linear_load_ratio"], rel=1e-6)


@pytest.mark.parametrize("engine", PLACEMENTS)
def test_a_placement_file(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plan = OLD / f"{engine}.{PLACEMENTS[engine]}", OLD / "plan-moeplan"
    about = ["--engine", engine, *MODEL, "--num-experts", "32", "--ep-size", "8", "--nodes", "2"]
    assert run(["check", str(file), *about, "--plan", str(plan)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    answered(capsys, "import", "placement", file, *about, "--top-k", "4", "-o", tmp_path / "p")
    read, stored = load_plan(tmp_path / "p").placement, load_plan(plan).placement
    assert np.array_equal(read.slots, stored.slots)


@pytest.mark.parametrize("file", ["vllm.json", "plan-moeplan"])
def test_the_plug_in_reads(file: str) -> None:
    placement = PluginSettings(str(OLD / file), "plan", "MOEPLAN_VLLM").placement
    assert placement is not None
    assert np.array_equal(placement.physical_to_logical, load_plan(OLD / "plan-moeplan").placement.slots)


def test_hardware_and_model_files(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--hardware-file", OLD / "hardware.json", "--model", OLD / "model.json"]
    shown, expected = answered(capsys, "estimate", "--hardware", "Mine", *files), EXPECTED["estimate"]
    assert shown["memory"]["weights_gb"] == pytest.approx(expected["weights_gb"], rel=1e-6)
    assert shown["usd_per_gpu_hour"] == expected["usd_per_gpu_hour"] and shown["parallel"]["gpus"] == expected["gpus"]
    assert answered(capsys, "estimate", "--hardware", "H100", *files)["usd_per_gpu_hour"] == 1.8
