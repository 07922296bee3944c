"""From plans and counts to engines' files and back, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import moeplan
from helpers.command_line import refused
from moeplan import embedded
from moeplan.cli.app import run
from moeplan.cluster import Cluster, Dispatch, ReplicaRule
from moeplan.engines.from_placement import plan_from_placement
from moeplan.engines.launch import Serving, launch
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.placement_files import ENGINES, write
from moeplan.engines.vllm import own_strategy, read
from moeplan.errors import OutputError, PlanError, UsageError
from moeplan.planning import read_requests
from moeplan.planning.balance import balance, candidates, gpu_load, gpu_load_ratio, spread_slots
from moeplan.planning.expected_load import remote_share
from moeplan.planning.store import load_plan
from moeplan.replay.measure import measure_requests
from moeplan.trace import open_trace
from moeplan.types import ModelShape, Placement

CONFIG = str(embedded.MODEL / "config.json")
SUFFIX = {"sglang": "json", "vllm": "json", "tensorrt-llm": "yaml", "vllm-ascend": "json"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with copies, for all 8 layers of the embedded model on 2 nodes x 4 GPUs."""
    place = tmp_path_factory.mktemp("export") / "plan"
    flags = ["--nodes", "2", "--gpus-per-node", "4", "--redundant", "8", "--strategy", "affinity"]
    assert run(["plan", "embedded", *flags, "-o", str(place)]) == 0
    return place


def stored(place: Path, slots: list[list[int]], layers: tuple[int, ...], nodes: int = 2, gpus: int = 1) -> Path:
    """A plan of these slots."""
    rows = np.array(slots, np.int32)
    made = EnginePlacement(rows, layers, int(rows.max()) + 1, nodes * gpus, nodes)
    shape = ModelShape("m", len(layers), made.num_experts, 1, layers)
    plan_from_placement(made, shape, "sglang").save(place)
    return place


# --------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_goes_out_is_good_and_comes_back(
    engine: str, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / f"file.{SUFFIX[engine]}", tmp_path / "back"
    facts = tmp_path / "facts.json"
    export = ["export", str(plan), "--engine", engine, "--config", CONFIG, "-o", str(file), "--json", str(facts)]
    assert run(export) == 0
    said = capsys.readouterr().out
    assert "40 slots a layer (32 experts + 8 redundant), 5 on each of 8 GPUs, 2 nodes" in said
    data = json.loads(facts.read_text())
    assert data["flags"]["ep_size"] == 8 and data["flags"]["redundant"] == 8
    served = ["--engine", engine, "--config", CONFIG, "--ep-size", "8", "--nodes", "2"]
    assert run(["check", str(file), *served, "--redundant", "8", "--plan", str(plan)]) == 0
    assert run(["import", "placement", str(file), *served, "-o", str(back)]) == 0
    ours, theirs = load_plan(plan), load_plan(back)
    assert (theirs.placement.slots == ours.placement.slots).all()
    assert theirs.model.layer_ids == ours.model.layer_ids and theirs.redundant == 8
    assert theirs.cluster == ours.cluster
    assert theirs.replica_rule is (ReplicaRule.NEAREST_STATIC if engine == "sglang" else ReplicaRule.HASH)


def test_check_names_the_slot_that_is_not_the_plans(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    assert run(["export", str(plan), "--engine", "sglang", "--config", CONFIG, "-o", str(file)]) == 0
    data = json.loads(file.read_text())
    row = data["physical_to_logical_map"][3]
    row[0], row[39] = row[39], row[0]  # a legal file that says something else
    file.write_text(json.dumps(data))
    flags = ["--engine", "sglang", "--config", CONFIG]
    assert run(["check", str(file), *flags]) == 0
    capsys.readouterr()
    assert run(["check", str(file), *flags, "--plan", str(plan)]) == 1
    assert "layer 3, slot 0" in capsys.readouterr().out


def test_a_deployment_is_measured_like_its_plan(plan: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    assert run(["export", str(plan), "--engine", "sglang", "--config", CONFIG, "-o", str(file)]) == 0
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    fast = ["evaluate", "embedded", "--steps", "20"]
    assert run([*fast, "--plan", str(plan), "--json", str(ours)]) == 0
    served = ["--placement", str(file), "--engine", "sglang", "--ep-size", "8", "--nodes", "2"]
    assert run([*fast, *served, "--json", str(theirs)]) == 0
    a = json.loads(ours.read_text())["strategies"]["affinity"]
    b = json.loads(theirs.read_text())["strategies"]["deployed"]
    for key in ("remote_share", "gpu_load_ratio", "padded_ratio"):
        assert a[key]["value"] == b[key]["value"]


def test_replay_asks_for_what_a_file_does_not_say(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    assert run(["export", str(plan), "--engine", "sglang", "--config", CONFIG, "-o", str(file)]) == 0
    replay = ["evaluate", "embedded", "--placement", file]
    assert "give --engine" in refused(replay, capsys)
    line = refused([*replay, "--engine", "sglang"], capsys)
    assert (
        "does not say how many GPUs share the experts, how many nodes these GPUs fill; give --ep-size, --nodes" in line
    )
    assert "give one of the two" in refused(["evaluate", "embedded"], capsys)
    assert "give one of the two" in refused([*replay, "--engine", "sglang", "--plan", plan], capsys)
    assert "is a trace, not a plan" in refused(["evaluate", "embedded", "--plan", "embedded"], capsys)
    assert "is a plan" in refused(["evaluate", "embedded", "--placement", plan, "--engine", "sglang"], capsys)
    assert "go with --placement" in refused(["evaluate", "embedded", "--plan", plan, "--nodes", "2"], capsys)
    file.write_text('{"physical_to_logical_map": [[0, 1]]}')
    served = ["--engine", "sglang", "--ep-size", "2", "--nodes", "2"]
    assert "has 1 rows, but layer 7 has experts" in refused([*replay, *served], capsys)


# --------------------------------------------------------------------------------------------------------------------
# Layer axes


def test_each_engine_gets_its_own_layer_axis(tmp_path: Path) -> None:
    made = EnginePlacement(np.array([[0, 1, 2, 3, 0, 1], [3, 2, 0, 0, 1, 2]], np.int32), (1, 3), 4, 2, 2)
    for engine in ENGINES:
        write(tmp_path / f"{engine}.{SUFFIX[engine]}", engine, made, num_layers=5)
    rows = json.loads((tmp_path / "sglang.json").read_text())
    dummy = [0, 1, 2, 3, 0, 1]
    assert rows == {"physical_to_logical_map": [dummy, [0, 1, 2, 3, 0, 1], dummy, [3, 2, 0, 0, 1, 2], dummy]}
    ours = json.loads((tmp_path / "vllm.json").read_text())
    assert ours["physical_to_logical_map"] == made.physical_to_logical.tolist() and ours["layer_ids"] == [1, 3]
    assert read(tmp_path / "vllm.json").same_as(made)
    text = yaml.safe_load((tmp_path / "tensorrt-llm.yaml").read_text())
    assert text == {
        "num_slots": 6,
        "initial_global_assignments": {1: [0, 1, 2, 3, 0, 1], 3: [3, 2, 0, 0, 1, 2]},
        "layer_updates_per_iter": 0,
    }
    ascend = json.loads((tmp_path / "vllm-ascend.json").read_text())
    assert [layer["layer_id"] for layer in ascend["layer_list"]] == [0, 1]
    assert ascend["layer_list"][1]["device_list"][1] == {"device_id": 1, "device_expert": [0, 1, 2]}


def test_the_layers_are_taken_from_the_config_and_never_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = stored(tmp_path / "plan", [[0, 1, 2, 3], [3, 2, 1, 0]], (1, 2))
    out = tmp_path / "out.json"
    export = ["export", place, "--engine", "sglang", "-o", out]
    assert "a row for every hidden layer" in refused(export, capsys)
    line = refused([*export, "--num-layers", 4], capsys)
    assert "2 of 4 layers" in line and "--dense-layers" in line
    line = refused([*export, "--num-layers", 4, "--dense-layers", "0"], capsys)
    assert "no experts in layer 3, which has experts" in line
    line = refused([*export, "--num-layers", 3, "--dense-layers", "0,1"], capsys)
    assert "experts in layer 1, which has none" in line
    line = refused([*export, "--num-layers", 2], capsys)
    assert "places layer 2, but the model given has 2 hidden layers" in line
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 3, "n_routed_experts": 8, "first_k_dense_replace": 1}))
    assert "for 4 experts, the model given has 8" in refused([*export, "--config", config], capsys)
    config.write_text(json.dumps({"num_hidden_layers": 3, "n_routed_experts": 4, "first_k_dense_replace": 1}))
    assert run([str(a) for a in [*export, "--config", config]]) == 0
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 3


def test_rows_of_a_bare_placement_are_the_moe_layers_of_the_model(tmp_path: Path) -> None:
    """DeepSeek-V3: 58 MoE layers of 61, the first three dense."""
    counts, cluster = np.random.default_rng(0).integers(1, 100, (58, 256)), Cluster(4, 8)
    model, placement = moeplan.load_model("deepseek-v3"), balance(counts, cluster, redundant=32)
    written = []
    for number, rows in enumerate((placement.slots, np.vstack((placement.slots[:3], placement.slots)))):
        place, file = Placement(rows, 256, 4, 8), str(tmp_path / f"{number}.json")
        report = moeplan.export(place, "sglang", file, model=model)
        assert report.placement.layer_ids == tuple(range(3, 61)) and report.hidden_layers == 61
        assert repr(moeplan.check(file, "sglang", model)).startswith(
            f"{file}, sglang: valid\nnot checked: that the eng"
        )
        written.append(json.loads(Path(file).read_text())["physical_to_logical_map"])
    assert written[0] == written[1] and written[0][3:] == placement.slots.tolist() and len(written[0]) == 61
    with pytest.raises(UsageError, match="40 rows, the model given 58 MoE layers of 61"):
        moeplan.export(Placement(placement.slots[:40], 256, 4, 8), "sglang", tmp_path / "no.json", model=model)
    with pytest.warns(UserWarning, match="assumed that every hidden layer is one of the 58 MoE layers"):
        report = moeplan.export(placement, "sglang", tmp_path / "all.json")
    assert "assumed" in repr(report) and not moeplan.check(report.path, "sglang", model).ok
    with pytest.raises(UsageError, match=r"row 0 of the counts has no pick.*moe_layers"):
        balance(np.vstack((np.zeros((3, 256)), counts)), cluster, redundant=32)
    back = moeplan.import_placement(tmp_path / "0.json", "sglang", model, moeplan.EpSettings(32, 4), dispatch="node")
    assert (back.placement.slots == placement.slots).all() and back.dispatch is Dispatch.NODE


def test_families_whose_config_has_no_rule_are_known_by_name(tmp_path: Path) -> None:
    from moeplan.model.config import read_config

    config = tmp_path / "config.json"
    mixtral = {
        "model_type": "mixtral", "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2,
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100,
    }  # fmt: skip
    config.write_text(json.dumps(mixtral))
    assert read_config(config).moe_layers == (0, 1, 2)
    config.write_text(json.dumps(mixtral | {"model_type": "unheard-of"}))
    assert read_config(config).moe_layers is None


# --------------------------------------------------------------------------------------------------------------------
# What engines cannot do


def test_refusals_name_the_engine_and_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = stored(tmp_path / "copies", [[0, 1, 2, 3, 0, 1]], (0,))
    striped = stored(tmp_path / "striped", [[0, 2, 1, 3]], (0,))
    out = tmp_path / "out.json"
    own = ["--engine", "vllm", "-o", out, "--expert-placement-strategy"]
    assert "no round_robin with redundant slots" in refused(["export", copies, *own, "round_robin"], capsys)
    assert "not vLLM's linear layout" in refused(["export", striped, *own, "linear"], capsys)
    assert 'Invalid value "zigzag"' in refused(["export", striped, *own, "zigzag"], capsys)
    assert not out.exists()
    assert run(["export", str(striped), *map(str, own), "round_robin"]) == 0
    assert "--expert-placement-strategy round_robin" in capsys.readouterr().out
    assert "already exists" in refused(["export", striped, "--engine", "vllm", "-o", out], capsys)
    assert "needs .yaml or .yml" in refused(
        ["export", striped, "--engine", "tensorrt-llm", "-o", tmp_path / "x.json"], capsys
    )
    twice = stored(tmp_path / "twice", [[0, 0, 1, 2, 3, 1]], (0,))
    line = refused(["export", twice, "--engine", "vllm-ascend", "-o", tmp_path / "x.json"], capsys)
    assert "layer 0: device 0 has an expert twice" in line
    assert not (tmp_path / "x.json").exists()
    assert "--nodes does not go with a plan" in refused(
        ["export", copies, "--engine", "vllm", "-o", tmp_path / "x.json", "--nodes", 2], capsys
    )


def test_limits_of_slots_and_gpus(tmp_path: Path) -> None:
    many = EnginePlacement(np.tile(np.arange(2, dtype=np.int32), (1, 514)), (0,), 2, 514, 1)
    with pytest.raises(UsageError, match="limit of 1023"):
        write(tmp_path / "v.json", "vllm", many)
    with pytest.raises(UsageError, match="at least 2 GPUs"):
        write(tmp_path / "s.json", "sglang", EnginePlacement(np.array([[0, 1]], np.int32), (0,), 2, 1, 1), num_layers=1)
    with pytest.raises(PlanError, match="3 ranks do not divide over 2 nodes"):
        EnginePlacement(np.array([[0, 1, 2]], np.int32), (0,), 3, 3, 2)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "none" / "v.json", "vllm", EnginePlacement(np.array([[0, 1]], np.int32), (0,), 2, 2, 1))


def test_vllms_own_layouts_are_known() -> None:
    def strategy(row: list[int], ranks: int) -> str | None:
        return own_strategy(EnginePlacement(np.array([row], np.int32), (0,), max(row) + 1, ranks, 1))

    assert strategy([0, 1, 2, 3, 4, 5, 6, 7], 2) == "linear"
    assert strategy([0, 2, 4, 6, 1, 3, 5, 7], 2) == "round_robin"  # engines.md 3.2, as vLLM 0.33.0 gave it
    assert strategy([0, 2, 4, 6, 1, 3, 7, 5], 2) is None
    assert strategy([0, 1, 0, 1], 2) is None


def test_a_model_that_the_engine_serves_without_placement_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = stored(tmp_path / "plan", [[0, 1, 2, 3]], (0,))
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"num_hidden_layers": 1, "num_local_experts": 4, "architectures": ["MixtralForCausalLM"]})
    )
    export = ["export", str(place), "--config", str(config)]
    assert run([*export, "--engine", "sglang", "-o", str(tmp_path / "s.json")]) == 0
    assert "warning: SGLang 0.5.23 silently serves MixtralForCausalLM without any placement" in capsys.readouterr().out
    assert run([*export, "--engine", "tensorrt-llm", "-o", str(tmp_path / "t.yaml")]) == 0
    assert "warning: TensorRT" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------
# Flags, and what copies are worth


def test_launch_flags_follow_the_plan() -> None:
    made = EnginePlacement(np.tile(np.arange(8, dtype=np.int32), (1, 2)), (0,), 8, 8, 2)
    pick = launch("sglang", made, "f.json", Serving(8, Dispatch.PICK))
    for flag in (
        "--tp-size 8 --ep-size 8", "--attn-dp-size 8", "--nnodes 2", "--deepep-mode low_latency",
        "--init-expert-location f.json", "--ep-num-redundant-experts 8 --ep-dispatch-algorithm static",
    ):  # fmt: skip
        assert flag in pick.text()
    none = launch("sglang", made, "f.json", Serving(2, Dispatch.ALLGATHER))
    assert "--moe-a2a-backend none" in none.text() and "--ep-dispatch-algorithm dynamic" in none.text()
    assert none.rule is ReplicaRule.HASH  # rows take replicas in turn
    vllm = launch("vllm", made, "f.json", Serving(2, Dispatch.NODE))
    assert "MOEPLAN_VLLM_PLAN=f.json" in vllm.text() and '"num_redundant_experts": 8' in vllm.text()
    assert "--tensor-parallel-size 4 --data-parallel-size 2" in vllm.text()
    assert "deepep_high_throughput" in vllm.text() and vllm.rule is ReplicaRule.HASH
    tensorrt = launch("tensorrt-llm", made, "f.yaml", Serving(8, Dispatch.PICK))
    assert tensorrt.extra is not None
    assert yaml.safe_load(tensorrt.extra[1])["moe_config"]["load_balancer"] == "f.yaml"
    ascend = launch("vllm-ascend", made, "f.json")
    assert '"expert_map_path": "f.json", "num_redundant_experts": 8' in ascend.text()


def test_what_copies_are_worth_is_said(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "v.json"
    facts = tmp_path / "facts.json"
    export = ["export", str(plan), "--engine", "vllm", "-o", str(file), "--trace", "embedded", "--json", str(facts)]
    assert run(export) == 0
    out = capsys.readouterr().out
    assert "warning: this engine does not prefer a near replica" in out and "fitted on this trace" in out
    share = json.loads(facts.read_text())["remote_share"]
    assert share["nearest-static"] < share["hash"] and share["scattered"] == 0.5


def test_the_share_is_that_of_the_replay(plan: Path) -> None:
    loaded, requests = load_plan(plan), read_requests(open_trace("embedded"))
    groups = np.random.default_rng(0).integers(0, 2, len(requests))
    for rule in (ReplicaRule.NEAREST_STATIC, ReplicaRule.HASH):
        served = dataclasses.replace(loaded, replica_rule=rule)
        figures = measure_requests(requests, np.arange(len(requests)), groups, served)
        ours = remote_share(served.routes, requests.measured, groups)
        assert ours == pytest.approx(figures.remote.sum() / figures.picks.sum(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """SGLang's logical_count of 4 hidden layers, the first dense, with skewed experts."""
    rng = np.random.default_rng(3)
    rows = np.vstack([np.zeros((1, 16)), rng.zipf(1.6, (3, 16)).clip(1, 400) * 100]).astype(int)
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": rows.tolist()}))
    return path


def test_counts_become_a_balanced_file_in_one_command(
    counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, facts = tmp_path / "out.json", tmp_path / "facts.json"
    cluster = ["--nodes", "2", "--gpus-per-node", "2", "--redundant", "4"]
    export = ["export", str(counts), "--engine", "sglang", *cluster, "-o", str(file)]
    assert run([*export, "--measure", str(counts), "--json", str(facts)]) == 0
    out = capsys.readouterr().out
    assert "request-level trace" in out and "<- written" in out and "all 4 hidden layers, 3 of them" in out
    data = json.loads(facts.read_text())
    ratio = data["load_ratio"]
    assert ratio[data["strategy"]] == min(ratio.values()) < ratio["linear"]
    assert data["load_ratio_measured"] == ratio
    flags = ["--num-layers", "4", "--dense-layers", "0", "--num-experts", "16", "--ep-size", "4", "--redundant", "4"]
    assert run(["check", str(file), "--engine", "sglang", *flags]) == 0
    rows = json.loads(file.read_text())["physical_to_logical_map"]
    assert len(rows) == 4 and rows[0] == [*range(16), *range(4)]


def test_a_counts_profile_does_as_well_and_other_engines_take_it(counts: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    assert run(["import", "logical-count", str(counts), "--phase", "decode", "-o", str(profile)]) == 0
    cluster = ["--nodes", "1", "--gpus-per-node", "4", "--redundant", "4"]
    for engine in ENGINES:
        file = tmp_path / f"{engine}.{SUFFIX[engine]}"
        assert run(["export", str(profile), "--engine", engine, *cluster, "-o", str(file)]) == 0


def test_what_counts_leave_open_is_asked(counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    export = ["export", counts, "--engine", "sglang", "-o", out]
    assert "give --nodes and --gpus-per-node" in refused(export, capsys)
    two = ["--nodes", 2, "--gpus-per-node", 2]
    assert "do not divide" in refused([*export, *two, "--redundant", 3], capsys)
    assert "does not go with counts" in refused([*export, *two, "--trace", "embedded"], capsys)
    assert "give --hardware too" in refused([*export, *two, "--context", 100], capsys)
    assert "need the model" in refused([*export, *two, "--hardware", "H100"], capsys)
    line = refused([*export, *two, "--hardware", "H100", "--model", "deepseek-v3"], capsys)
    assert "does not have 3 MoE layers of 16 experts" in line
    assert "no experts in layer 0" in refused([*export, *two, "--num-layers", 4, "--dense-layers", "none"], capsys)
    (tmp_path / "empty").mkdir()
    assert "neither a plan" in refused(["export", tmp_path / "empty", "--engine", "sglang", "-o", out, *two], capsys)
    assert "does not exist" in refused(["export", tmp_path / "x", "--engine", "sglang", "-o", out, *two], capsys)
    other = tmp_path / "other.json"
    other.write_text('{"logical_count": [[1, 2]]}')
    assert "other layers or experts" in refused([*export, *two, "--measure", other], capsys)
    assert not out.exists()


def test_counts_say_nothing_before_all_is_checked(
    counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", counts, "--engine", "sglang", "--nodes", 2, "--gpus-per-node", 2, "-o", tmp_path / "out.json"]
    model = ["--hardware", "H100"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 3, "n_routed_experts": 8, "first_k_dense_replace": 1}))
    for flags in (model, [*model, "--model", "deepseek-v3"], ["--config", config]):
        capsys.readouterr()
        assert run([str(a) for a in [*export, *flags]]) == 2
        assert capsys.readouterr().out == ""
    assert "are more than all 4 GPUs holding all 16 experts" in refused([*export, "--redundant", 10**12], capsys)
    placed = tmp_path / "placed.json"
    placed.write_text('{"physical_to_logical_map": [[0, 1]]}')
    assert "moeplan import placement reads it" in refused(["export", placed, *export[2:]], capsys)
    assert not (tmp_path / "out.json").exists()


def test_copies_far_apart_are_even_where_the_nearest_is_taken() -> None:
    rng = np.random.default_rng(1)
    load, cluster = rng.zipf(1.5, (6, 64)).clip(1, 300).astype(float), Cluster(4, 4)
    slots = spread_slots(load, 96, cluster)
    for row in slots.reshape(6, 4, 24):
        assert all(len(set(node.tolist())) == 24 for node in row)  # no node holds an expert twice
    assert (np.sort(np.unique(slots)) == np.arange(64)).all()
    found = {way.name: way for way in candidates(load, cluster, 32, ReplicaRule.NEAREST_STATIC)}
    one = {way.name: way for way in candidates(load, Cluster(1, 16), 32, ReplicaRule.HASH, distinct=True)}
    assert one["spread"].ratio < one["linear"].ratio
    assert set(found) == {"linear", "eplb-global", "spread"}
    assert found["spread"].ratio <= found["eplb-global"].ratio < found["linear"].ratio


def test_load_follows_the_replica_rule() -> None:
    place = Placement(np.array([[0, 1, 0, 2]], np.int32), 3, 2, 1)
    cluster = Cluster(2, 1)
    for rule in (ReplicaRule.NEAREST_STATIC, ReplicaRule.HASH):
        assert gpu_load([[6, 4, 2]], place, cluster, rule).tolist() == [[7.0, 5.0]]
    assert gpu_load_ratio([[6, 4, 2]], place, cluster, ReplicaRule.HASH) == pytest.approx(7 / 6)
    with pytest.raises(UsageError, match="no pick"):
        gpu_load_ratio([[0, 0, 0]], place, cluster, ReplicaRule.HASH)


def test_balance_takes_counts_alone() -> None:
    """The most even of the ways to balance; the same counts in any unit give the same slots."""
    load, cluster = np.random.default_rng(2).zipf(1.5, (3, 16)).clip(1, 50), Cluster(2, 2)
    placement = balance(load, cluster, redundant=4)
    best = candidates(load, cluster, 4, ReplicaRule.NEAREST_STATIC)[1]
    np.testing.assert_array_equal(placement.slots, best.placement.slots)
    np.testing.assert_array_equal(balance(load / 8, cluster, redundant=4).slots, placement.slots)
    for wrong in ([[1.0, -1.0]], [[1.0, np.nan]]):
        with pytest.raises(UsageError, match="finite"):
            balance(wrong, cluster)
    with pytest.raises(PlanError, match="divide"):
        balance(load, cluster, redundant=1)


def test_real_counts_are_balanced_on_counts_of_another_run(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared / "traces" / "sglang_logical_count"
    file, facts = tmp_path / "out.json", tmp_path / "facts.json"
    cluster = ["--nodes", "4", "--gpus-per-node", "8", "--redundant", "32"]
    model = ["--hardware", "H100", "--model", "deepseek-v3", "--measure", str(folder / "decode_in500out1500.json")]
    source = str(folder / "decode_in1000out1000.json")
    export = ["export", source, "--engine", "sglang", *cluster, *model, "-o", str(file), "--json", str(facts)]
    assert run(export) == 0
    data = json.loads(facts.read_text())
    assert data["load_ratio_measured"]["spread"] < 1.1 < 2.0 < data["load_ratio_measured"]["linear"]
    assert data["modelled_step"]["ms"]["spread"] < data["modelled_step"]["ms"]["linear"]
    assert data["hidden_layers"] == 61 and len(data["layer_ids"]) == 58


def test_ranks_that_deal_by_themselves_are_a_little_less_even(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/guides/export.md: SGLang's ranks deal far copies each by itself; here every one draws by chance."""
    folder = shared / "traces" / "sglang_logical_count"
    fit, other = (
        np.array(json.loads((folder / f"decode_{name}.json").read_text())["logical_count"])[3:]
        for name in ("in1000out1000", "in500out1500")
    )
    cluster, rule = Cluster(4, 8), ReplicaRule.NEAREST_STATIC
    ways = {way.name: way.placement for way in candidates(fit, cluster, 32, rule)}
    even = {name: gpu_load_ratio(other, place, cluster, rule) for name, place in ways.items()}
    monkeypatch.setattr(
        "moeplan.cluster._even_deal", lambda needs, count, rng: rng.integers(0, 720720, needs.shape) % count
    )
    drawn = {name: gpu_load_ratio(other, place, cluster, rule) for name, place in ways.items()}
    assert (even["spread"], drawn["spread"]) == (pytest.approx(1.060, abs=2e-3), pytest.approx(1.083, abs=0.012))
    assert (even["eplb-global"], drawn["eplb-global"]) == (
        pytest.approx(1.136, abs=2e-3), pytest.approx(1.167, abs=0.012)
    )  # fmt: skip


def test_deepseeks_map_becomes_a_plan(tmp_path: Path) -> None:
    """The example of DeepSeek EPLB's README (d52c72d5): phy2log [2, 16] for 8 GPUs on 2 nodes."""
    rows = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    np.save(tmp_path / "phy2log.npy", np.array(rows))
    model = ["--num-experts", "12", "--num-layers", "3", "--dense-layers", "0", "--top-k", "2"]
    cluster = ["--ep-size", "8", "--nodes", "2"]
    source = str(tmp_path / "phy2log.npy")
    assert run(["check", source, "--engine", "vllm", *model[:-2], *cluster, "--redundant", "4"]) == 0
    assert run(["import", "placement", source, "--engine", "vllm", *model, *cluster, "-o", str(tmp_path / "p")]) == 0
    made = load_plan(tmp_path / "p")
    assert made.placement.slots.tolist() == rows and made.model.layer_ids == (1, 2) and made.redundant == 4


def test_json_goes_to_standard_output_alone(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "v.json"
    assert run(["export", str(plan), "--engine", "vllm", "-o", str(file), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(file)
    assert run(["check", str(file), "--engine", "vllm", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["good"] is True


def test_json_is_never_written_over_a_file_of_the_command(
    plan: Path, counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, link = tmp_path / "file.json", tmp_path / "link.json"
    config = ["--engine", "sglang", "--config", CONFIG]
    export = ["export", plan, *config, "-o", file]
    cluster = ["--engine", "sglang", "--nodes", 2, "--gpus-per-node", 2, "-o", file]
    link.symlink_to(counts)
    for arguments in (
        [*export, "--json", plan / "plan.json"],
        ["export", counts, *cluster, "--json", counts],
        ["export", counts, *cluster, "--json", link],
    ):
        assert "would be written over" in refused(arguments, capsys)
    same = tmp_path / "." / ".." / tmp_path.name / "file.json"
    assert "are the same file" in refused([*export, "--json", same], capsys)
    assert not file.exists()
    assert run([str(a) for a in export]) == 0
    before = file.read_bytes()
    served = [*config, "--ep-size", "8", "--nodes", "2"]
    for arguments in (
        ["check", file, *config],
        ["import", "placement", file, *served, "-o", tmp_path / "back"],
        ["evaluate", "embedded", "--placement", file, *served],
    ):
        assert "would be written over" in refused([*arguments, "--json", file], capsys)
    assert file.read_bytes() == before


def test_a_trace_that_is_not_there_leaves_no_file(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--engine", "sglang", "--config", CONFIG, "-o", out]
    refused(["export", plan, *flags, "--trace", tmp_path / "nope"], capsys)
    assert "make a plan of it: moeplan plan embedded" in refused(["export", "embedded", *flags], capsys)
    assert not out.exists()


def test_a_layer_that_the_plan_skips_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moeplan.engines.exporting import left_out

    assert left_out((1, 3, 5, 9)) == (7,) and left_out((3, 4, 5)) == () and left_out((2,)) == ()
    assert left_out((0, 1, 2, 3, 7, 8)) == (4, 5, 6)
    place = stored(tmp_path / "plan", [[0, 1, 2, 3]] * 4, (1, 3, 5, 9))
    export = ["export", str(place), "--engine", "vllm", "-o", str(tmp_path / "out.json")]
    assert run(export) == 0
    assert "skips layer 7: if the model has experts there, the engine will not start" in capsys.readouterr().out


def test_an_import_without_the_model_names_every_flag(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    assert run(["export", str(plan), "--engine", "sglang", "--config", CONFIG, "-o", str(file)]) == 0
    line = refused(["import", "placement", file, "--engine", "sglang", "-o", tmp_path / "back"], capsys)
    assert (
        "give model (--config), or all of --num-experts, --num-layers, --dense-layers and --top-k; and --ep-size"
        in line
    )
