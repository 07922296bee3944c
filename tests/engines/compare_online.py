"""Planning online against vLLM's own policy, on drawn (synthetic) loads: `python tests/engines/compare_online.py`.

A model as large as DeepSeek-V3's experts (58 x 256) with 32 redundant slots on 4 nodes x 8 GPUs. Nodes ask for experts
unlike (Dirichlet, 0.7); a plan is made for one day, and on another each expert is asked for more or less (log-normal,
0.5), by the same nodes. Both balancers are told the other day's totals and the map in place, as vLLM tells them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import environment
import jobs
import numpy as np

from moeplan.cluster import Cluster
from moeplan.engines.plugins import online
from moeplan.planning.expected_load import ExpectedLoad
from moeplan.planning.initial_placement import place_quickly
from moeplan.types import Placement

LAYERS, EXPERTS, REDUNDANT, NODES, PER_NODE, GROUPS = 58, 256, 32, 4, 8, 8
GPUS, SLOTS = NODES * PER_NODE, EXPERTS + REDUNDANT


def drawn() -> tuple[Placement, np.ndarray]:
    """The plan of one day, and the use [L, N, E] of another."""
    rng = np.random.default_rng(0)
    by_node = rng.dirichlet(np.full(NODES, 0.7), size=(LAYERS, EXPERTS)).transpose(0, 2, 1)
    use = np.ascontiguousarray(rng.gamma(1.0, size=(LAYERS, 1, EXPERTS)) * 1e5 * by_node)
    slots = place_quickly(use, SLOTS // NODES, PER_NODE, 0.2).astype(np.int32)
    return Placement(slots, EXPERTS, NODES, PER_NODE), rng.lognormal(0.0, 0.5, size=(LAYERS, 1, EXPERTS)) * use


def changed(old: np.ndarray, new: np.ndarray, units: int) -> int:
    """Copies on a GPU, or a node, that did not hold them."""
    pairs = zip(old.reshape(-1, old.shape[1] // units), new.reshape(-1, old.shape[1] // units), strict=True)
    return sum(len(set(b.tolist()) - set(a.tolist())) for a, b in pairs)


def line(name: str, plan: Placement, slots: np.ndarray, use: np.ndarray, seconds: float) -> None:
    """One row of the table."""
    served = ExpectedLoad(Cluster(NODES, PER_NODE), slots.astype(np.int64), EXPERTS, False)
    gpu = served.loads(use)[1]
    kept = (use.transpose(1, 0, 2) * served.local_share).sum() / use.sum()
    load = (gpu.max(axis=1) / gpu.mean(axis=1)).mean()
    moves = changed(plan.slots, slots, GPUS), changed(plan.slots, slots, NODES)
    print(f"{name:22}{kept:14.3f}{load:12.3f}{moves[0]:13d}{moves[1]:14d}{seconds:10.2f}")


def main() -> None:
    plan, use = drawn()
    counts = np.round(use.sum(axis=1))
    job = {"do": "default", "experts": EXPERTS, "redundant": REDUNDANT, "groups": GROUPS, "nodes": NODES, "ranks": GPUS,
           "counts": counts.tolist(), "old": plan.slots.tolist()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        own = jobs.run("in_vllm", environment.VLLM.folder, {"own": job}, Path(folder))["own"]
    online.warm_up()
    start = time.perf_counter()
    made = online.rebalance(plan, counts, plan.slots, nearest=False)
    seconds = time.perf_counter() - start
    print("synthetic; replicas selected by vLLM's rule; on this machine")
    print(f"{'':22}{'kept at home':>14}{'GPU load':>12}{'to new GPU':>13}{'to new node':>14}{'seconds':>10}")
    line("the plan, kept", plan, plan.slots, use, 0.0)
    line("vLLM 0.33.0's policy", plan, own["slots"].astype(np.int32), use, own["seconds"])
    line("online", plan, made, use, seconds)
    print(f"of {LAYERS * SLOTS} replicas")


if __name__ == "__main__":
    main()
