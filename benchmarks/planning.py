"""How long planning takes: whole plans, re-plans of a grouping, and routing a request (`make bench`).

Inputs are drawn, seeded: requests of 12 kinds with gamma-distributed use, as large as DeepSeek-V3 (58 x 256) and a
model of 60 x 1024. DeepSeek's EPLB runs on the same input as SGLang ships it (where `make test-engines` has unpacked
its wheel). SGLang's copy works on lists; DeepSeek's own writes tensors element by element and takes 3.4 and 9.9 s (two
cores, measured elsewhere). `eplb` is our arrays-at-once version of the same rule.
"""

from __future__ import annotations

import importlib.util
import resource
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster, Dispatch
from moeplan.planning import PlanningProblem, solve
from moeplan.planning.expected_load import ExpectedLoad
from moeplan.planning.initial_placement import place_quickly
from moeplan.planning.problem import TokenRows
from moeplan.types import ModelShape

#: DeepSeek's file, as SGLang ships it.
PUBLISHED = Path(__file__).parents[1] / ".venv-vllm-wheels"
PUBLISHED_FILE = "sglang-*/sglang/srt/eplb/eplb_algorithms/deepseek.py"


def published_eplb(use: npt.NDArray[np.float64], redundant: int) -> str:
    """How long EPLB takes for the totals of use [L, N, E], on 64 GPUs in 8 nodes, by groups of experts and without."""
    found = sorted(PUBLISHED.glob(PUBLISHED_FILE))
    try:
        import torch
    except ImportError:
        found = []
    if not found:
        return "EPLB in SGLang not here: make test-engines"
    spec = importlib.util.spec_from_file_location("published_eplb", found[-1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load, experts = torch.from_numpy(use.sum(axis=1)), use.shape[2]
    took = []
    for hierarchical in (True, False):
        start = time.perf_counter()
        module.rebalance_experts(load, experts + redundant, 8, 8, 64, enable_hierarchical=hierarchical)
        took.append(time.perf_counter() - start)
    return f"EPLB in SGLang {took[0]:.2f} s hierarchical, {took[1]:.2f} s global"


def drawn(n: int, layers: int, experts: int, top_k: int, rows: int, redundant: int, mode: Dispatch) -> PlanningProblem:
    """A problem of n requests of 12 kinds, and `rows` token rows (whose picks are drawn by the same use)."""
    rng = np.random.default_rng(0)
    kinds = rng.gamma(0.5, size=(12, layers, experts)).astype(np.float32)
    kinds /= kinds.sum(axis=2, keepdims=True)
    kind = rng.integers(0, 12, n)
    use = np.empty((n, layers, experts), np.uint32)
    signature = np.empty_like(use)
    for i in range(n):
        expected = kinds[kind[i]] * rng.gamma(2.0, 0.5, size=(layers, experts)).astype(np.float32)
        expected /= expected.sum(axis=1, keepdims=True)
        use[i], signature[i] = rng.poisson(expected * top_k * 200), rng.poisson(expected * top_k * 100)
    each = rows // n
    picked = np.empty((each * n, layers, top_k), np.uint8 if experts <= 256 else np.uint16)
    for i in range(n):
        keys = rng.exponential(size=(each, layers, experts)) / np.maximum(kinds[kind[i]], 1e-9)
        picked[i * each : (i + 1) * each] = np.argpartition(keys, top_k, axis=2)[:, :, :top_k]
    start = np.arange(n) * each
    return PlanningProblem(
        ModelShape("drawn", layers, experts, top_k), Cluster(8, 8), redundant, use, signature,
        TokenRows(picked, start, start + each), dispatch=mode,
    )  # fmt: skip


def replan(use: npt.NDArray[np.float64], redundant: int) -> tuple[float, list[float], list[float]]:
    """Seconds of a placement with replicas for a given grouping; then share of picks that leave their node, and load of
    the busiest GPU over the mean, by it and by our `eplb`'s rule (which is told the totals alone)."""
    layers, _, experts = use.shape
    cluster, shape = Cluster(8, 8), ModelShape("drawn", layers, experts, 8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        slots = place_quickly(use, (experts + redundant) // 8, 8, 0.02)
        seconds.append(time.perf_counter() - start)
    counts = np.round(use.transpose(1, 0, 2) * 1000).astype(np.uint32)
    none = TokenRows(np.zeros((0, layers, 8), np.uint16), np.zeros(8, np.int64), np.zeros(8, np.int64))
    balanced = solve(PlanningProblem(shape, cluster, redundant, counts, counts, none), "eplb")
    remote, load = [], []
    for of in (slots, balanced.placement.slots.astype(np.int64)):
        served = ExpectedLoad(cluster, of, experts, True)
        gpu = served.loads(use)[1]
        remote.append(1.0 - float((use.transpose(1, 0, 2) * served.local_share).sum() / use.sum()))
        load.append(float((gpu.max(axis=1) / gpu.mean(axis=1)).mean()))
    return min(seconds), remote, load


def bench() -> list[tuple[str, str]]:
    """Label and result of each timing."""
    solve(drawn(64, 2, 256, 8, 640, 64, Dispatch.NODE), "moeplan")  # compiles
    solve(drawn(64, 2, 256, 8, 640, 64, Dispatch.PICK), "moeplan")
    out = []
    for name, layers, experts, target in (("58 x 256", 58, 256, 0.5), ("60 x 1024", 60, 1024, 1.0)):
        rng = np.random.default_rng(1)
        use = rng.gamma(0.5, size=(layers, 1, experts)) * rng.gamma(1.0, size=(layers, 8, experts))
        seconds, remote, load = replan(use, 64)
        out.append(
            (
                f"re-plan of a grouping, {name}, 64 GPUs, 64 redundant",
                f"{seconds:.2f} s (target {target:g}; {published_eplb(use, 64)}); remote {remote[0]:.3f}, GPU "
                f"load {load[0]:.2f} (eplb {remote[1]:.3f}, {load[1]:.2f})",
            )
        )
    task = drawn(10_000, 58, 256, 8, 50_000, 64, Dispatch.PICK)
    for mode, target in ((Dispatch.PICK, 10), (Dispatch.NODE, 30)):
        start = time.perf_counter()
        result = solve(PlanningProblem(**{**vars(task), "dispatch": mode}), "moeplan")
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        out.append(
            (f"plan {mode.value}, 58 x 256, 10,000 requests", f"{seconds:.1f} s (target {target}), {memory:.1f} GB")
        )
    start = time.perf_counter()
    solve(task, "eplb")
    out.append(("our eplb on the same", f"{time.perf_counter() - start:.2f} s"))
    one = task.signature[:1]
    times = []
    for _ in range(300):
        start = time.perf_counter()
        result.router.scores(one)
        times.append(time.perf_counter() - start)
    out.append(("route one request, 58 x 256, 8 groups", f"{1e6 * float(np.median(times)):.0f} us (target 50)"))
    return out


if __name__ == "__main__":
    for label, text in bench():
        print(f"{label:60s} {text}")
