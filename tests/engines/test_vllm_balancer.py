"""vLLM's own balancer, of the released wheel, takes our plug-in: it asks it for maps and moves weights by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import environment
import jobs
import numpy as np
import pytest

from moeplan.engines import vllm
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings
from moeplan.model.spec import ModelSpec, Moe
from moeplan.planning.balance import rebalance_experts
from moeplan.planning.expected_load import load_ratio, shared_gpu_load

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        not (environment.is_ready() and environment.has_wheels()), reason="not set up: `make test-engines` does it"
    ),
]

MOE, EXPERTS, REDUNDANT, NODES, RANKS = (1, 2, 4), 16, 8, 2, 4
SLOTS = EXPERTS + REDUNDANT
SERVER = {"do": "serve", "ranks": RANKS, "nodes": NODES, "layers": len(MOE), "experts": EXPERTS, "redundant": REDUNDANT}


def planned() -> tuple[EnginePlacement, list[np.ndarray]]:
    """A plan, and the counts [L, E] of the day that it was made for and of another."""
    placement, use = jobs.planned(MOE, EXPERTS, REDUNDANT, NODES, RANKS // NODES)
    counts = np.round(use.sum(axis=1))
    return placement, [counts, counts[:, ::-1].copy()]


def jobs_in(folder: Path) -> dict[str, Any]:
    placement, counts = planned()
    plan = folder / "plan.json"
    plan.write_text(json.dumps(vllm.content(placement)))
    environ = {"MOEPLAN_VLLM_PLAN": str(plan)}
    served = {**SERVER, "environment": environ, "counts": [day.tolist() for day in counts]}
    return {
        "plan": served,
        "online": {**served, "environment": {**environ, "MOEPLAN_VLLM_MODE": "online"}},
        "idle": {**served, "environment": {}},
        "no file": {**served, "environment": {"MOEPLAN_VLLM_PLAN": str(folder / "missing")}},
        "no mode": {**served, "environment": {**environ, "MOEPLAN_VLLM_MODE": "often"}},
        "not the same": {**served, "only": {"3": {"MOEPLAN_VLLM_MODE": "online"}}},
        "newer": {**served, "version": "0.34.0"},
        "draft model": {**served, "layers": 1, "counts": [day[:1].tolist() for day in counts]},
        "global": {**SERVER, "do": "default", "counts": counts[0].tolist(), "groups": 1, "nodes": 2},
        "hierarchical": {**SERVER, "do": "default", "counts": counts[0].tolist(), "groups": 4, "nodes": 2},
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM 0.33.0 makes of every job of this module, by one process that loads it once."""
    folder = tmp_path_factory.mktemp("vllm")
    return dict(jobs.run("in_vllm", environment.VLLM.folder, jobs_in(folder), folder))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM 0.30.0, as the CPU build has it, makes of some."""
    folder = tmp_path_factory.mktemp("vllm-0.30")
    some = {name: job for name, job in jobs_in(folder).items() if name in ("plan", "online", "idle")}
    return dict(jobs.run("in_vllm", environment.SITE, some, folder))


@pytest.fixture(params=["answers", "older"], ids=["0.33.0", "0.30.0"])
def served(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of each version that the plug-in takes."""
    return dict(request.getfixturevalue(request.param))


def test_the_policy_is_found_where_vllm_looks(served: dict[str, Any]) -> None:
    assert {rank["policy"] for rank in served["plan"]} == {"MoeplanPolicy"}
    assert {rank["policy"] for rank in served["idle"]} == {"DefaultEplbPolicy"}
    assert set(served["idle"][0]["loaded"]) == {
        "moeplan", "moeplan.engines", "moeplan.engines.plugins", "moeplan.engines.plugins.settings",
        "moeplan.engines.plugins.vllm", "moeplan.errors",
    }  # fmt: skip
    assert served["idle"][0]["log"] == []


def test_vllm_moves_weights_to_where_the_plan_has_them(served: dict[str, Any]) -> None:
    """After a quarter of the interval, and again after a whole one, when nothing is left to move."""
    placement, _ = planned()
    for rank in served["plan"]:
        assert rank["passes"] == [2, 8]
        assert not np.array_equal(rank["first"], placement.physical_to_logical)
        for slots in rank["slots"]:
            np.testing.assert_array_equal(slots, placement.physical_to_logical)
        assert rank["weights"] == [True, True]
    print("\n".join(["", *served["plan"][0]["log"]]))  # docs/guides/plugins.md shows it
    assert "0 of 72 slots change" in served["plan"][0]["log"][-1]
    assert all(rank["log"] == [] for rank in served["plan"][1:])


def test_online_all_ranks_take_what_one_plans(served: dict[str, Any]) -> None:
    placement, counts = planned()
    ranks = served["online"]
    for day in (0, 1):
        for rank in ranks:
            np.testing.assert_array_equal(rank["slots"][day], ranks[0]["slots"][day])
            assert rank["weights"][day]
    first, second = (ranks[0]["slots"][day].astype(np.int32) for day in (0, 1))
    EnginePlacement(second, MOE, EXPERTS, RANKS, NODES)
    stale, now = (load_ratio(shared_gpu_load(of, counts[1], RANKS)).mean() - 1 for of in (first, second))
    assert now < 0.5 * stale
    # An expert leaves its node less often than vLLM's own map for the same counts has it.
    theirs = served["idle"][0]["slots"][1]
    assert moved(first, second) < moved(placement.physical_to_logical, theirs)


def moved(old: np.ndarray, new: np.ndarray) -> int:
    """Copies that are on a node that did not hold them."""
    by_node = [of.reshape(len(of), NODES, -1) for of in (old, new)]
    return sum(
        len(set(b.tolist()) - set(a.tolist())) for one in zip(*by_node, strict=True) for a, b in zip(*one, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no file", "missing: does not exist; check the path"),
        ("no mode", "MOEPLAN_VLLM_MODE is 'often'; set it to plan or online"),
        ("not the same", "not all 4 ranks have the same plan and mode; set MOEPLAN_VLLM_PLAN, and MOEPLAN_VLLM_MODE"),
        ("newer", "vLLM 0.34.0 is not one that the plug-in was tested with (0.30.0, 0.33.0)"),
        ("draft model", "does not fit a model of 1 layers x 16 experts in 24 slots on 4 ranks"),
    ],
)
def test_else_vllms_own_policy_goes_on_and_the_log_says_why(answers: dict[str, Any], name: str, says: str) -> None:
    print(f"\n{answers[name][0]['log'][0]}")
    assert says in answers[name][0]["log"][0] and "\n" not in answers[name][0]["log"][0]
    for rank, plain in zip(answers[name], answers["idle"], strict=True):
        assert all(rank["weights"])
        for ours, theirs in zip(rank["slots"], plain["slots"], strict=True):
            if name != "draft model":
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["global", "hierarchical"])
def test_vllms_maps_are_plans(answers: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Its default policy is DeepSeek's algorithm; its map, saved as it is, is read back as a placement."""
    _, counts = planned()
    theirs = answers[name]["slots"]
    groups, nodes = (4, NODES) if name == "hierarchical" else (1, 1)
    ours = rebalance_experts(counts[0], SLOTS, groups, nodes, RANKS)  # but for ties, which they break otherwise
    loads = [load_ratio(shared_gpu_load(of.astype(np.int32), counts[0], RANKS)) for of in (ours, theirs)]
    np.testing.assert_allclose(loads[0], loads[1], rtol=1e-6)
    path = tmp_path / "vllm.npy"
    np.save(path, theirs)
    spec = ModelSpec(layers=6, moe=Moe(experts=EXPERTS, layers=MOE))
    np.testing.assert_array_equal(
        vllm.examine(path, spec, EpSettings(RANKS, NODES)).require_placement().physical_to_logical, theirs
    )
