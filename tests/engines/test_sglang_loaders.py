"""SGLang's own code, of the released wheel, takes our files and our plug-in, and means what we mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import environment
import jobs
import numpy as np
import pytest

from moeplan.cli.app import run as command_line
from moeplan.cluster import Cluster, ReplicaRule, routes
from moeplan.engines import sglang, vllm
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings
from moeplan.model.spec import ModelSpec, Moe
from moeplan.planning.balance import rebalance_experts
from moeplan.planning.expected_load import load_ratio, shared_gpu_load
from moeplan.planning.store import load_plan

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        not (environment.is_ready() and environment.has_wheels()), reason="not set up: `make test-engines` does it"
    ),
]

#: 6 hidden layers, of which 4 have experts, on 4 nodes x 2 GPUs.
LAYERS, MOE, EXPERTS, REDUNDANT, NODES, PER_NODE = 6, (1, 2, 4, 5), 32, 16, 4, 2
RANKS = NODES * PER_NODE
SERVER = {"ep_size": RANKS, "nodes": NODES, "layers": LAYERS, "experts": EXPERTS, "redundant": REDUNDANT}
#: The plug-in's servers are smaller: each rank is a process.
SMALL = {"ep_size": 4, "nodes": 2, "layers": LAYERS, "experts": 16, "redundant": 8, "do": "plugged"}
TRAPS = {
    "minus one": lambda rows: rows[1].__setitem__(3, -1),
    "a layer too few": lambda rows: rows.pop(),
    "a slot too many": lambda rows: [row.append(0) for row in rows],
}


def placed() -> dict[str, EnginePlacement]:
    """By our planner (copies on different nodes), and by DeepSeek's balancer, which does not look."""
    ours, use = jobs.planned(MOE, EXPERTS, REDUNDANT, NODES, PER_NODE)
    deep = rebalance_experts(use.sum(axis=1), EXPERTS + REDUNDANT, 1, 1, RANKS)
    return {"ours": ours, "deepseek": EnginePlacement(deep, MOE, EXPERTS, RANKS, NODES)}


def small() -> tuple[EnginePlacement, np.ndarray]:
    """What the plug-in's servers are given, and the counts [hidden layers, E] of another day."""
    ours, use = jobs.planned(MOE, 16, 8, 2, 2)
    counts = np.zeros((LAYERS, 16))
    counts[list(MOE)] = use.sum(axis=1)[:, ::-1]
    return ours, np.round(counts)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What SGLang makes of every job of this module, by one process that loads it once."""
    folder = tmp_path_factory.mktemp("sglang")
    job: dict[str, Any] = {}

    def initial(name: str, data: Any) -> None:
        path = folder / f"{name.replace(' ', '-')}.json"
        path.write_text(json.dumps(data))
        job[name] = {**SERVER, "do": "from_file", "init_expert_location": str(path)}

    for name, placement in placed().items():
        initial(name, sglang.content(placement, LAYERS))
    for name, spoil in TRAPS.items():
        data = sglang.content(placed()["ours"], LAYERS)
        spoil(data["physical_to_logical_map"])
        initial(name, data)
    by_command = ["plan", "embedded", "--nodes", "2", "--gpus-per-node", "2", "--redundant", "8"]
    exported, whole = folder / "exported.json", str(folder / "my-plan")
    assert command_line([*by_command, "-o", whole]) == 0
    assert command_line(["export", whole, "--engine", "sglang", "--config", "embedded", "-o", str(exported)]) == 0
    embedded = {"ep_size": 4, "nodes": 2, "layers": 8, "experts": 32, "redundant": 8}
    job["exported"] = {**embedded, "do": "from_file", "init_expert_location": str(exported)}
    job["folder"] = {**embedded, "do": "plugged", "environment": {"MOEPLAN_SGLANG_PLAN": whole}}
    ours, counts = small()
    plan = folder / "plan.json"
    plan.write_text(json.dumps(vllm.content(ours)))
    environ = {"MOEPLAN_SGLANG_PLAN": str(plan)}
    tokens = [[counts.tolist()]]
    plugged = {**SMALL, "environment": environ, "counts": tokens}
    job |= {
        "idle": {**plugged, "environment": {}},
        "plan": plugged,
        "online": {**plugged, "environment": {**environ, "MOEPLAN_SGLANG_MODE": "online"}},
        "not the same": {**plugged, "only": {"3": {"MOEPLAN_SGLANG_PLAN": str(folder / "missing")}}},
        "newer": {**plugged, "version": "0.5.24"},
        "balancer off": {**plugged, "enable_eplb": False, "counts": []},
        "other size": {**plugged, "redundant": 12},
        "hierarchical": {
            **SMALL, "do": "balanced", "counts": tokens[0], "groups": 4, "algorithm": "deepseek_hierarchical"
        },
        "global": {**SMALL, "do": "balanced", "counts": tokens[0], "groups": 1, "algorithm": "deepseek"},
    }  # fmt: skip
    return jobs.run("in_sglang", environment.SGLANG.folder, job, folder), folder


def copies_at(placement: EnginePlacement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [L, P, E]: one copy there is; a copy on the rank itself; copies on its node, and others elsewhere."""
    of = placement.placement
    gpu = np.where(of.replica_slots < 0, -1, of.replica_slots // of.slots_per_gpu)[None]  # [1, L, E, X]
    rank = np.arange(of.num_gpus)[:, None, None, None]
    per_node = of.gpus_per_node
    single = np.broadcast_to(of.replica_count == 1, (of.num_gpus, *of.replica_count.shape))
    own = (gpu == rank).any(axis=3)
    on_node = ((gpu >= 0) & (gpu // per_node == rank // per_node)).sum(axis=3)
    near = (on_node > 0) & (on_node < of.replica_count)
    return tuple(array.transpose(1, 0, 2) for array in (single, own, near))


def uneven(slots: np.ndarray, placement: EnginePlacement) -> int:
    """Over layers and experts: the most by which one copy serves more of the far ranks than another."""
    single, own, near = copies_at(placement)
    far, of = ~(single | own | near), placement.placement
    worst = 0
    for layer, expert in np.argwhere(far.sum(axis=1) > 1):
        served = slots[layer, far[layer, :, expert], expert]
        by_copy = [(served == slot).sum() for slot in of.replica_slots[layer, expert] if slot >= 0]
        worst = max(worst, max(by_copy) - min(by_copy))
    return worst


@pytest.mark.parametrize("name", ["ours", "deepseek"])
def test_every_rank_takes_the_copy_that_we_say(answers: Any, name: str) -> None:
    placement = placed()[name]
    ranks = answers[0][name]
    assert not any("error" in rank for rank in ranks)
    for rank in ranks:
        np.testing.assert_array_equal(rank["slots"][list(MOE)], placement.physical_to_logical)
    theirs = np.stack([rank["dispatch"][list(MOE)] for rank in ranks], axis=1)  # [L, P, E]
    rule = routes(placement.placement, Cluster(NODES, PER_NODE), ReplicaRule.NEAREST_STATIC)
    assert rule.slot is not None
    single, own, near = copies_at(placement)
    for at in (single, own, near):
        np.testing.assert_array_equal(theirs[at], rule.slot[at])
    # Elsewhere both choose by chance, ours evenly. SGLang deals evenly too, but each rank for itself (see `uneven`).
    far = ~(single | own | near)
    held = np.take_along_axis(placement.physical_to_logical, theirs.reshape(len(MOE), -1), axis=1).reshape(theirs.shape)
    np.testing.assert_array_equal(held, np.broadcast_to(np.arange(EXPERTS), held.shape))
    assert uneven(rule.slot, placement) <= 1 < uneven(theirs, placement)
    of = placement.placement
    layer, _, expert = np.nonzero(far)
    first = (theirs[far] == of.replica_slots[layer, expert, 0]).astype(float)
    expected = 1.0 / of.replica_count[layer, expert]
    noise = np.sqrt((expected * (1 - expected)).sum())
    assert abs((first - expected).sum()) < 3 * noise


def test_from_plan_to_server_by_our_commands(answers: Any) -> None:
    """`moeplan plan`, `moeplan export`, SGLang; and the plan's folder itself, by the plug-in."""
    made, folder = answers
    plan = load_plan(folder / "my-plan").placement
    rule = routes(plan, Cluster(2, 2), ReplicaRule.NEAREST_STATIC)
    assert rule.slot is not None
    for tables in (made["exported"], [rank["first"] for rank in made["folder"]]):
        theirs = np.stack([table["dispatch"] for table in tables], axis=1)
        for table in tables:
            np.testing.assert_array_equal(table["slots"], plan.slots)
        for where in copies_at(EnginePlacement.of(plan, tuple(range(8)))):
            np.testing.assert_array_equal(theirs[where], rule.slot[where])


def test_the_planner_leaves_no_rank_between_copies_of_one_node() -> None:
    """The one place where SGLang's rule is not ours: it deals where the own node has all copies, we take the first."""
    for name, some in (("ours", False), ("deepseek", True)):
        placement = placed()[name]
        single, own, near = copies_at(placement)
        of = placement.placement
        node = np.where(of.replica_slots < 0, -1, of.replica_slots // (of.slots_per_gpu * PER_NODE))
        at_home = ((node[None] == np.arange(NODES)[:, None, None, None]).any(axis=3)).repeat(PER_NODE, axis=0)
        assert (at_home.transpose(1, 0, 2) & ~(single | own | near)).any() == some


@pytest.mark.parametrize("name", list(TRAPS))
def test_what_sglang_does_not_notice_our_check_does(answers: Any, name: str) -> None:
    made, folder = answers
    assert not any("error" in rank for rank in made[name])
    if name == "minus one":  # becomes one more copy of the last expert
        assert made[name][0]["copies"][1, EXPERTS - 1] > made["ours"][0]["copies"][1, EXPERTS - 1] - 1
        assert 3 in {int(slot) for rank in made[name] for slot in rank["all"][1, EXPERTS - 1]}
    spec = ModelSpec(layers=LAYERS, moe=Moe(experts=EXPERTS, layers=MOE))
    report = sglang.examine(folder / f"{name.replace(' ', '-')}.json", spec, EpSettings(RANKS, NODES, REDUNDANT))
    assert not report.ok
    places = {"minus one": "layer 1), slot 3", "a layer too few": "physical_to_logical_map", "a slot too many": "row 0"}
    assert places[name] in report.errors[0].line(report.path)


@pytest.mark.parametrize("name", ["global", "hierarchical"])
def test_deepseeks_maps_are_plans(answers: Any, name: str, tmp_path: Path) -> None:
    """SGLang has DeepSeek's algorithm as published: its map is ours to the slot, and is read back as a placement."""
    _, counts = small()
    theirs = answers[0][name]["slots"]
    groups, nodes = (4, 2) if name == "hierarchical" else (1, 1)
    some = counts.any(axis=1)  # without load all packings are as good
    np.testing.assert_array_equal(theirs[some], rebalance_experts(counts, 24, groups, nodes, 4)[some])
    path = tmp_path / "deepseek.json"
    path.write_text(json.dumps({"physical_to_logical_map": theirs.tolist()}))
    spec = ModelSpec(layers=LAYERS, moe=Moe(experts=16, layers=MOE))
    placement = sglang.examine(path, spec, EpSettings(4, 2)).require_placement()
    np.testing.assert_array_equal(placement.physical_to_logical, theirs[list(MOE)])


def test_the_plug_in_is_idle_without_a_plan(answers: Any) -> None:
    idle = answers[0]["idle"][0]
    assert idle["log"] == []
    assert set(idle["loaded"]) == {
        "moeplan", "moeplan.engines", "moeplan.engines.plugins", "moeplan.engines.plugins.settings",
        "moeplan.engines.plugins.sglang", "moeplan.errors",
    }  # fmt: skip
    for name in ("newer", "not the same", "balancer off"):  # and what it stays out of is as without it
        for ours, theirs in zip(answers[0][name], answers[0]["idle"], strict=True):
            np.testing.assert_array_equal(ours["first"]["slots"], theirs["first"]["slots"])
            for a, b in zip(ours["after"], theirs["after"], strict=False):
                np.testing.assert_array_equal(a["slots"], b["slots"])


def test_the_plug_in_places_by_the_plan(answers: Any) -> None:
    placement, _ = small()
    ranks = answers[0]["plan"]
    for at in ("first", "after"):
        tables = [rank["first"] if at == "first" else rank["after"][0] for rank in ranks]
        for table in tables:
            np.testing.assert_array_equal(table["slots"][list(MOE)], placement.physical_to_logical)
        theirs = np.stack([table["dispatch"][list(MOE)] for table in tables], axis=1)
        rule = routes(placement.placement, Cluster(2, 2), ReplicaRule.NEAREST_STATIC)
        assert rule.slot is not None
        for where in copies_at(placement):
            np.testing.assert_array_equal(theirs[where], rule.slot[where])
        assert uneven(theirs, placement) <= 1  # the file's deal is not even; the plug-in's is
    print("\n".join(["", *ranks[0]["log"]]))  # docs/guides/plugins.md shows it
    assert "applied from the start, in 4 of 6 layers" in ranks[0]["log"][0]
    assert all(rank["log"] == [] for rank in ranks[1:])


def test_the_plug_in_plans_online(answers: Any) -> None:
    placement, counts = small()
    ranks = answers[0]["online"]
    after = [rank["after"][0]["slots"] for rank in ranks]
    for other in after[1:]:  # rank 0 decides for all
        np.testing.assert_array_equal(other, after[0])
    before, now = placement.physical_to_logical, after[0][list(MOE)].astype(np.int32)
    EnginePlacement(now, MOE, 16, 4, 2)  # a sound placement
    load = counts[list(MOE)]
    first, last = (load_ratio(shared_gpu_load(slots, load, 4)).mean() for slots in (before, now))
    assert last < 0.5 * (first - 1) + 1
    assert any("slots change" in line for line in ranks[0]["log"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("newer", "SGLang 0.5.24 is not one that the plug-in was tested with (0.5.23)"),
        ("not the same", "not all 4 ranks have the same plan and mode"),
        ("balancer off", "the balancer is off; start with --enable-eplb --ep-num-redundant-experts 8"),
        ("other size", "--ep-num-redundant-experts is 12 and the plan has 8"),
    ],
)
def test_what_rules_a_plan_out_is_said(answers: Any, name: str, says: str) -> None:
    ranks = answers[0][name]
    print(f"\n{ranks[0]['log'][0]}")
    assert says in ranks[0]["log"][0]
    if name == "not the same":  # and the rank that lacks it says what it lacks
        assert "missing: does not exist" in ranks[3]["log"][0]
