"""`moeplan check`: no broken file gets by, each fault is named by its place, and no good file is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moeplan.cli.app import run
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.placement_files import ENGINES, examine, write
from moeplan.engines.report import EpSettings, Report
from moeplan.errors import FormatError, UsageError
from moeplan.model.spec import ModelSpec, Moe

MAP, ASSIGNMENTS = "physical_to_logical_map", "initial_global_assignments"
SUFFIX = {"sglang": ".json", "vllm": ".json", "tensorrt-llm": ".yaml", "vllm-ascend": ".json"}
LAYERS = 7  # hidden layers of the small model; the first has no experts


def placement(
    rng: np.random.Generator, experts: int, nodes: int, gpus_per_node: int, redundant: int,
    layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6), *, apart: bool = True,
) -> EnginePlacement:  # fmt: skip
    """At random; `apart`: no GPU holds an expert twice."""
    gpus = nodes * gpus_per_node
    rows = []
    for _ in layers:
        count = np.ones(experts, int)
        for _ in range(redundant):
            count[rng.choice(np.flatnonzero(count < gpus) if apart else np.arange(experts))] += 1
        hands: list[list[int]] = [[] for _ in range(gpus)]
        order = rng.permutation(experts)
        for expert in order[np.argsort(-count[order], kind="stable")]:
            emptiest = sorted(range(gpus), key=lambda g: (len(hands[g]), rng.random()))
            for copy_ in range(count[expert]):
                hands[emptiest[copy_ % gpus]].append(int(expert))
        row = [expert for hand in hands for expert in hand]
        rows.append(row if apart else rng.permutation(row).tolist())
    return EnginePlacement(np.array(rows, np.int32), layers, experts, gpus, nodes)


def known(
    experts: int, layers: int, moe: tuple[int, ...], ep_size: int, nodes: int, redundant: int | None = None
) -> tuple[ModelSpec, EpSettings]:
    spec = ModelSpec(layers=layers, moe=Moe(experts=experts, layers=moe))
    return spec, EpSettings(ep_size, nodes, redundant)


def known_of(made: EnginePlacement, layers: int = LAYERS) -> tuple[ModelSpec, EpSettings]:
    return known(made.num_experts, layers, made.layer_ids, made.ep_size, made.nodes, made.redundant)


def written(folder: Path, engine: str, made: EnginePlacement, layers: int = LAYERS) -> Path:
    path = folder / f"good{SUFFIX[engine]}"
    path.unlink(missing_ok=True)
    write(path, engine, made, num_layers=layers)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Good files


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    nodes=st.integers(1, 5),
    gpus_per_node=st.integers(1, 4),
    per_gpu=st.integers(1, 6),
    spare=st.integers(0, 12),
    layers=st.sets(st.integers(0, LAYERS - 1), min_size=1),
)
@example(seed=0, nodes=7, gpus_per_node=1, per_gpu=14, spare=2, layers={1, 2})  # 96 experts, 2 redundant, 7 GPUs
@example(seed=0, nodes=9, gpus_per_node=8, per_gpu=6, spare=48, layers={3, 6})  # 384 experts, 48 redundant, 72 GPUs
def test_no_good_file_is_refused_and_it_comes_back_the_same(
    tmp_path: Path, seed: int, nodes: int, gpus_per_node: int, per_gpu: int, spare: int, layers: set[int]
) -> None:
    slots = nodes * gpus_per_node * per_gpu
    experts = max(slots - spare, per_gpu, -(-slots // (nodes * gpus_per_node)))
    rng = np.random.default_rng(seed)
    for engine in ENGINES:
        if nodes * gpus_per_node == 1 and engine in ("sglang", "vllm"):
            continue
        apart = engine == "vllm-ascend" or bool(rng.integers(2))
        made = placement(rng, experts, nodes, gpus_per_node, slots - experts, tuple(sorted(layers)), apart=apart)
        path = written(tmp_path, engine, made)
        report = examine(path, engine, *known_of(made))
        assert report.ok and not report.unchecked, [finding.line(path) for finding in report.findings]
        assert report.require_placement().same_as(made)
        assert examine(path, engine).ok  # as far as it can be told without a config
        if apart:
            assert not report.findings


def test_the_engines_own_examples_come_in(engines: Path) -> None:
    small = known(4, 2, (0, 1), 2, 2, 2)
    for engine, name, said in (
        ("sglang", "sglang_init_expert_location.json", small),
        ("vllm-ascend", "vllm_ascend_expert_map.json", small),
        ("tensorrt-llm", "trtllm_moe_load_balancer.yaml", known(4, 3, (1, 2), 2, 2, 2)),
    ):
        read = examine(engines / name, engine, *said).require_placement()
        assert read.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1], [3, 2, 0, 0, 1, 2]]


# --------------------------------------------------------------------------------------------------------------------
# Mutations


def lists_of(engine: str, data: Any) -> list[tuple[list[Any], str, Callable[[int], str]]]:
    """Every list of experts in a file, the place of its row, and the place of a slot in it."""
    if engine == "vllm-ascend":
        slot = "device_list, item {}, device_expert, item {}"
        return [
            (device["device_expert"], f"layer_list, item {i}", lambda s, d=d: slot.format(d, s))
            for i, layer in enumerate(data["layer_list"])
            for d, device in enumerate(layer["device_list"])
        ]  # fmt: skip
    rows = data[ASSIGNMENTS].items() if engine == "tensorrt-llm" else enumerate(data[MAP])
    key = f"{ASSIGNMENTS}, layer" if engine == "tensorrt-llm" else f"{MAP}, row"
    return [(row, f"{key} {i}", lambda s: f"slot {s}") for i, row in rows]


def row_set(engine: str, data: Any) -> Any:
    return {"tensorrt-llm": data.get(ASSIGNMENTS), "vllm-ascend": data.get("layer_list")}.get(engine, data.get(MAP))


class Broken:
    """A corruption: the text, and what the first fault must name."""

    def __init__(self, kind: str, text: str, *places: str) -> None:
        self.kind, self.text, self.places = kind, text, places


def corrupt(engine: str, text: str, made: EnginePlacement, rng: np.random.Generator) -> Broken:
    """One random corruption of a good file."""
    load, dump = (yaml.safe_load, yaml.safe_dump) if engine == "tensorrt-llm" else (json.loads, json.dumps)
    data = load(text)
    lists = lists_of(engine, data)
    held, place, slot_place = lists[rng.integers(len(lists))]
    slot = int(rng.integers(len(held)))
    kind = str(rng.choice(["drop", "duplicate", "overwrite", "shift", "-1", "range", "float", "layers", "cut", "key"]))
    places: tuple[str, ...] = (place, slot_place(slot))
    if kind == "drop":
        del held[slot]
        places = (place,)
    elif kind == "duplicate":
        held.insert(slot, held[slot])
        places = (place,)
    elif kind == "overwrite":  # the only copy of an expert becomes another's
        whole = [e for other, at, _ in lists if at == place for e in other]
        only = [s for s, e in enumerate(held) if whole.count(e) == 1]
        if not only:
            return corrupt(engine, text, made, rng)
        lost = held[only[0]]
        held[only[0]] = (lost + 1) % made.num_experts
        places = (place, f"expert {lost} has no slot") if engine != "vllm-ascend" else (place,)
    elif kind == "shift":  # ids counted from 1
        for other, at, _ in lists:
            if at == place:
                other[:] = [e + 1 for e in other]
        places = (place, f"expert {made.num_experts} is outside")
    elif kind == "-1":
        held[slot] = -1
    elif kind == "range":
        held[slot] = made.num_experts + int(rng.integers(1000))
    elif kind == "float":
        held[slot] = held[slot] + float(rng.choice([0.0, 0.5]))
    elif kind == "layers":
        return Broken(kind, dump(_other_layers(engine, data, rng)), _layers_place(engine))
    elif kind == "cut":
        end = text.rindex("layer_updates") - 1 if engine == "tensorrt-llm" else len(text.rstrip())
        return Broken(kind, text[: int(rng.integers(1, end))])
    else:
        keys = {
            "sglang": [MAP],
            "vllm": list(data),
            "tensorrt-llm": ["num_slots", ASSIGNMENTS],
            "vllm-ascend": ["layer_list", "moe_layer_count"],
        }[engine]
        key = str(rng.choice([k for k in keys if k != "model"]))
        data[f"{key}_"] = data.pop(key)
        return Broken(kind, dump(data), key)
    return Broken(kind, dump(data), *places)


def _other_layers(engine: str, data: Any, rng: np.random.Generator) -> Any:
    rows = row_set(engine, data)
    if engine == "tensorrt-llm":
        gone = int(rng.choice(list(rows)))
        rows[0 if rng.integers(2) else 99] = rows.pop(gone)
    elif rng.integers(2):
        del rows[int(rng.integers(len(rows)))]
    else:
        rows.append(copy.deepcopy(rows[-1]))
    return data


def _layers_place(engine: str) -> str:
    return {"tensorrt-llm": f"{ASSIGNMENTS}, layer", "vllm-ascend": "layer_"}.get(engine, MAP)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_hundred_corruptions_are_caught_where_they_are(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    kinds: dict[str, int] = {}
    for trial in range(200):
        redundant = int(rng.integers(0, 13))
        made = placement(rng, 8 * int(rng.integers(3, 9)) - redundant, 2, 4, redundant)
        good = written(tmp_path, engine, made)
        broken = corrupt(engine, good.read_text(), made, rng)
        path = tmp_path / f"broken{SUFFIX[engine]}"
        path.write_text(broken.text)
        report = examine(path, engine, *known_of(made))
        assert report.errors, f"{trial}: {broken.kind} got by"
        line = report.errors[0].line(path)
        assert all(place in line for place in broken.places), f"{broken.kind} at {broken.places}: {line}"
        assert report.placement is None
        kinds[broken.kind] = kinds.get(broken.kind, 0) + 1
    assert len(kinds) == 10


# --------------------------------------------------------------------------------------------------------------------
# Files from anywhere


def look(tmp_path: Path, engine: str, text: str | bytes, *given: Any, name: str = "") -> Report:
    path = tmp_path / (name or f"file{SUFFIX[engine]}")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return examine(path, engine, *given)


@pytest.mark.parametrize(
    ("engine", "text", "place", "what"),
    [
        ("sglang", '{"physical_to_logical_map": [[0, true]]}', "row 0 (layer 0), slot 1", "true is not a whole number"),
        ("sglang", '{"physical_to_logical_map": [[0, "1"]]}', "slot 1", "not a whole number"),
        ("sglang", '{"physical_to_logical_map": [[0, null]]}', "slot 1", "null is not a whole number"),
        ("sglang", '{"physical_to_logical_map": [[0, NaN]]}', "", "NaN"),
        ("sglang", '{"physical_to_logical_map": [0, 1]}', "row 0", "not a list"),
        ("sglang", '{"physical_to_logical_map": [[0], []]}', "row 1", "is empty"),
        ("sglang", '{"physical_to_logical_map": []}', "", "0 rows"),
        ("sglang", '{"physical_to_logical_map": {}}', MAP, "not a list of rows"),
        ("sglang", '{"physical_to_logical_map": [[0, 1]], "note": 1}', "key 'note'", "TypeError"),
        ("sglang", '{"physical_to_logical_map": [[0]], "physical_to_logical_map": [[0]]}', f"key '{MAP}'", "duplicate"),
        ("sglang", '{"logical_count": [[1, 2]]}', "logical_count", "counts"),
        ("sglang", '[[0, 1]]', "", "not an object"),
        ("sglang", "[" * 100_000, "", "nested too deeply"),
        ("sglang", '{"physical_to_logical_map": [[' + "9" * 5000 + "]]}", "", "Exceeds the limit"),
        ("sglang", b"\xff\xfe", "byte 0", "UTF-8"),
        ("sglang", "", "line 1", "invalid or truncated JSON"),
        ("sglang", '{"physical_to_logical_map": [[' + str(10**30) + ", 0]]}", "slot 0", "outside"),
        ("vllm", '{"format": "moeplan-vllm", "version": 2}', "format", "version 2"),
        ("vllm", '{"expert_to_ep_rank": [0]}', "format", "null"),
        ("vllm", "7", "", "not an object"),
        ("vllm-ascend", '{"moe_layer_count": 1, "layer_list": [{"layer_id": 0}]}', "key device_list", "missing"),
        ("vllm-ascend", '{"moe_layer_count": 1, "layer_list": [3]}', "item 0", "not an object"),
        ("tensorrt-llm", "num_slots: 2\ninitial_global_assignments: {0: [0, 1]}\nmore: 1\n", "key 'more'", "refused"),
        ("tensorrt-llm", "a: &a [1]\nb: [*a, *a]\n", "line 2", "alias"),
        ("tensorrt-llm", "a: !!python/object/apply:os.system ['true']\n", "line 1", "constructor"),
        ("tensorrt-llm", "num_slots: 2\nnum_slots: 2\n", "num_slots", "duplicate"),
        ("tensorrt-llm", "? [1]\n: 2\n", "", "key"),
        ("tensorrt-llm", "num_slots: 2\ninitial_global_assignments: {x: [0, 1]}\n", "key 'x'", "not a layer"),
        ("tensorrt-llm", "num_slots: 3\ninitial_global_assignments: {0: [0, 1]}\n", "layer 0", "has 2 slots, not 3"),
        ("tensorrt-llm", "num_slots: true\ninitial_global_assignments: {0: [0]}\n", "num_slots", "true"),
        ("tensorrt-llm", "num_slots: 1\nlayer_updates_per_iter: 2\n", ASSIGNMENTS, "null"),
        ("tensorrt-llm", "a: " + "[" * 50, "line 1", "nested"),
    ],
)  # fmt: skip
def test_each_kind_of_bad_file_is_one_finding(
    tmp_path: Path, engine: str, text: str | bytes, place: str, what: str
) -> None:
    report = look(tmp_path, engine, text)
    assert not report.ok
    line = report.errors[0].line(report.path)
    assert place in line and what in line and "\n" not in line, line


def test_what_each_engine_makes_of_a_file_that_it_accepts(tmp_path: Path) -> None:
    """engines.md, 2.4 and 4: the inputs that the engines took without a word."""
    good = known(4, 2, (0, 1), 2, 2, 2)
    rows = [[0, 1, 2, 3, 0, 1], [3, 2, 0, 0, 1, 2]]
    minus = [rows[0], [3, 2, 0, -1, 1, 2]]
    line = look(tmp_path, "sglang", json.dumps({MAP: minus}), *good).errors[0].line(Path("f"))
    assert "row 1 (layer 1), slot 3" in line and "takes it for expert 3" in line
    for wrong, what in (
        ([row[:5] for row in rows], "5 slots, not 6 (4 experts + 2 redundant)"),
        ([[*row, 0, 1] for row in rows], "8 slots, not 6 (4 experts + 2 redundant)"),
        ([rows[0]], "1 rows for 2 hidden layers"),
    ):
        faults = look(tmp_path, "sglang", json.dumps({MAP: wrong}), *good).errors
        assert any(what in finding.what for finding in faults), faults
    twice = look(tmp_path, "sglang", json.dumps({MAP: [rows[0], [0, 0, 1, 2, 3, 1]]}), *good)
    assert twice.ok and twice.findings[0].legal
    assert twice.findings[0].place == f"{MAP}, row 1 (layer 1), slot 0 and slot 1"
    same = {"device_id": 0, "device_expert": [0, 0, 1]}, {"device_id": 1, "device_expert": [2, 3, 1]}
    layer = {"layer_id": 0, "device_count": 2, "device_list": list(same)}
    report = look(tmp_path, "vllm-ascend", json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    assert "rank 0 holds expert 0 2 times" in report.errors[0].what
    uneven = copy.deepcopy(layer)
    uneven["device_list"][1]["device_expert"] = [2, 3]  # type: ignore[index]
    report = look(tmp_path, "vllm-ascend", json.dumps({"moe_layer_count": 1, "layer_list": [uneven]}))
    assert "item 1, device_expert" in report.errors[0].place


def test_the_order_of_vllm_ascends_lists_is_what_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = placement(rng, 8, 2, 2, 4)
    data = json.loads(written(tmp_path, "vllm-ascend", made).read_text())
    data["layer_list"][0], data["layer_list"][1] = data["layer_list"][1], data["layer_list"][0]
    faults = look(tmp_path, "vllm-ascend", json.dumps(data)).errors
    assert faults[0].place == "layer_list, item 0, layer_id" and "uses the position" in faults[0].what


def test_the_numbers_of_the_plug_ins_file_agree_with_its_map(tmp_path: Path) -> None:
    made = placement(np.random.default_rng(0), 20, 2, 2, 4)
    good = json.loads(written(tmp_path, "vllm", made).read_text())
    for key, value, place, what in (
        ("nnodes", 3, "nnodes", "does not divide"),
        ("ep_size", 5, "nnodes", "does not divide"),
        ("ep_size", 0, "ep_size", "not a whole number in 1.."),
        ("num_experts", 21, MAP, "24 slots, not 25"),
        ("num_redundant_experts", 5, MAP, "24 slots, not 25"),
        ("num_redundant_experts", True, "num_redundant_experts", "true"),
        ("layer_ids", [1, 2, 3, 4, 6, 5], "layer_ids, item 5", "ids must increase"),
        ("layer_ids", [1, 2], MAP, "6 rows for 2 layer_ids"),
        ("layer_ids", [0.5], "layer_ids", "not a list of layer numbers"),
        ("version", True, "format", "version true"),
        ("spare", 1, "key 'spare'", "unknown"),
    ):
        report = look(tmp_path, "vllm", json.dumps({**good, key: value}))
        line = report.errors[0].line(report.path)
        assert place in line and what in line, line
    report = look(tmp_path, "vllm", json.dumps(good), ModelSpec(moe=Moe(layers=(1, 2))), EpSettings(8))
    assert "is 4, but --ep-size says 8" in report.errors[0].what
    assert any("differ in 3, 4, 5, 6" in finding.what for finding in report.errors)


def test_files_are_bounded_and_named_as_the_engine_wants(tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    assert "more than any placement" in examine(big, "sglang").errors[0].what
    assert "names end in .json or .pt" in look(tmp_path, "sglang", "{}", name="x.txt").errors[0].what
    with pytest.raises(FormatError, match="cannot be read"):
        examine(tmp_path / "none.json", "sglang")
    with pytest.raises(UsageError, match="not known"):
        examine(big, "triton")


@pytest.mark.slow
def test_pt_files_are_tensors_and_nothing_else(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rows = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 0, 1, 1, 0]])
    path = tmp_path / "map.pt"
    given = known(4, 2, (0, 1), 2, 2, 2)
    torch.save({MAP: rows}, path)
    assert examine(path, "sglang", *given).require_placement().physical_to_logical.tolist() == rows.tolist()
    torch.save({MAP: rows.int()}, path)
    report = examine(path, "sglang", *given)
    assert report.ok and "int32" in report.findings[0].what
    for bad, what in (
        ({MAP: rows.float()}, "not whole numbers"),
        ({MAP: rows, "more": 1}, "TypeError"),
        ({MAP: rows - 1}, "expert -1"),
        ({"logical_count": rows}, "counts"),
        ({MAP: torch.zeros(1, dtype=torch.int64).expand(1 << 20, 1 << 20)}, "declares more than it stores"),
        ({MAP: rows, "f": Broken}, "not a whole .pt file"),
    ):
        torch.save(bad, path)
        assert what in examine(path, "sglang", *given).errors[0].what
    path.write_bytes(path.read_bytes()[:100])
    assert "not a whole .pt file" in examine(path, "sglang").errors[0].what


def test_bare_maps_as_vllm_and_deepseek_return_them(tmp_path: Path) -> None:
    made = placement(np.random.default_rng(1), 12, 2, 2, 4)
    given = known(12, LAYERS, made.layer_ids, 4, 2)
    text = look(tmp_path, "vllm", json.dumps(made.physical_to_logical.tolist()), *given)
    assert text.require_placement().same_as(made)
    path = tmp_path / "map.npy"
    np.save(path, made.physical_to_logical)
    assert examine(path, "vllm", *given).require_placement().same_as(made)
    with pytest.raises(UsageError, match="does not say the number of experts, which layers"):
        examine(path, "vllm").require_placement()
    np.save(path, made.physical_to_logical.astype(float))
    assert "holds float64" in examine(path, "vllm", *given).errors[0].what
    np.save(path, made.physical_to_logical)
    path.write_bytes(path.read_bytes()[:-4])
    assert "invalid or truncated .npy" in examine(path, "vllm", *given).errors[0].what


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_all_and_ends_with_0_or_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = placement(np.random.default_rng(2), 8, 2, 2, 4, tuple(range(1, 4)))
    good = written(tmp_path, "sglang", made, 4)
    assert run(["check", str(good), "--engine", "sglang"]) == 0
    out = capsys.readouterr().out
    assert "not checked: that there are 8 experts" in out and "\nvalid, as far as" in out
    flags = ["--engine", "sglang", "--num-layers", "4", "--num-experts", "8", "--dense-layers", "0"]
    whole = [*flags, "--ep-size", "4", "--nodes", "2", "--redundant", "4"]
    assert run(["check", str(good), *whole]) == 0
    assert capsys.readouterr().out.endswith("valid\n")
    data = json.loads(good.read_text())
    data[MAP][2][5] = -1
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(data))
    assert run(["check", str(bad), *whole, "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert f"{MAP}, row 2 (layer 2), slot 5: expert -1 is outside 0..7" in out and "invalid: 1 error" in out
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["good"] is False and facts["findings"][0]["place"].endswith("slot 5")


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = placement(np.random.default_rng(2), 8, 2, 2, 4, tuple(range(1, 4)))
    good = str(written(tmp_path, "vllm", made, 4))
    for arguments, what in (
        (["check", good, "--engine", "triton"], "--engine"),
        (["check", str(tmp_path / "none.json"), "--engine", "vllm"], "cannot be read"),
        (["check", good, "--engine", "vllm", "--ep-size", "0"], "--ep-size 0"),
        (["check", good, "--engine", "vllm", "--ep-size", "5", "--nodes", "2"], "does not divide"),
        (["check", good, "--engine", "vllm", "--plan", str(tmp_path)], "plan.json"),
        (["check", good], "--engine"),
    ):
        status = run(arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and len(lines) == 1 and what in lines[0], lines


def test_a_file_of_another_engine_is_known_by_its_keys(tmp_path: Path) -> None:
    made = placement(np.random.default_rng(2), 8, 2, 2, 4, tuple(range(1, 4)))
    for folder in ENGINES:
        (tmp_path / folder).mkdir()
    files = {engine: written(tmp_path / engine, engine, made, 4) for engine in ENGINES}
    for engine, other in (
        ("sglang", "vllm"),
        ("vllm", "sglang"),
        ("sglang", "vllm-ascend"),
        ("vllm", "vllm-ascend"),
        ("vllm-ascend", "vllm"),
        ("vllm-ascend", "sglang"),
    ):
        report = examine(files[other], engine)
        assert any(f"? use --engine {other}" in finding.hint for finding in report.errors), (engine, other)


def test_a_plan_is_not_a_placement_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan").mkdir()
    for what in ("is a directory", "moeplan export"):
        assert run(["check", str(tmp_path / "plan"), "--engine", "sglang"]) == 2
        assert what in capsys.readouterr().err
        (tmp_path / "plan" / "plan.json").write_text("{}")
