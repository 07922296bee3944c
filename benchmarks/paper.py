"""Reprint the published experiment: all-to-all volume of `paper` and `eplb` against `linear` (arXiv 2604.23150).

8 nodes x 8 GPUs, no redundant slots, 500 global batches of 8 x 128 decoding requests (fewer live requests where a set
is too small for 128; the table says how many), plans fitted on half of the requests and measured on the other half. The
figure of a seed is the median volume over the batches divided by linear's; printed are mean and range over seeds 0-3.

    python benchmarks/paper.py

Published: DeepSeek-V3, layer 42: paper 0.94, EPLB 1.00. Maverick: down to 0.80 (and their kernel pads to the largest).
The generator's presets are set to imbalance, domain similarity and prefill-decode correlation only, never to these.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeplan.cluster import Cluster
from moeplan.planning import RequestSet, read_requests, solve
from moeplan.planning.assignment import random_groups
from moeplan.planning.plan import Plan, PlanningTask
from moeplan.planning.requests import blocks, split
from moeplan.planning.strategies import find
from moeplan.planning.strategies.paper import PaperStrategy
from moeplan.replay.evaluator import FoldEvaluator
from moeplan.replay.measure import StepFigures, sample_steps
from moeplan.replay.split import MAX_LIVE, draw_steps

SEEDS, BATCHES, REQUESTS, SMALLEST = range(4), 500, 2400, 8
REAL = Path(__file__).parents[1].parent / "shared" / "traces" / "maverick-mmlu.npz"
#: (row, strategy): paper at K = D = 8 on equal groups, the original with its own groups, and EPLB on random groups.
ROWS = (("paper", "paper"), ("paper, unequal groups", "paper-unbalanced"), ("eplb", "eplb"))
KINDS = (
    ("unpadded", "messages"),
    ("padded to the largest node pair", "node_padded"),
    ("to the busiest rank", "rank_padded"),
)


def volumes(requests: RequestSet, seed: int) -> tuple[dict[tuple[str, str], float], int, dict[str, int]]:
    """{(row, kind): median volume / linear's} of one seed, live requests a group, and those of unequal rows."""
    chosen = split(requests.domain, blocks(requests.index, 1), 0.5, np.random.default_rng([seed, 0]))
    fit, test = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    draws = draw_steps(requests.spans.measured[:, test], BATCHES, np.random.default_rng([seed, 2]))
    problem = requests.problem(PlanningTask(Cluster(8, 8)), fit)
    linear = solve(problem, "linear", seed)
    even = random_groups(len(test), 8, np.random.default_rng([seed, 1]))
    fold = FoldEvaluator(requests, fit, test, live=1, steps=1, seed=seed)

    def replay(plan: Plan, group, live: int) -> StepFigures:  # type: ignore[no-untyped-def]
        return sample_steps(requests, draws, group, live, plan).figures()

    live = min(MAX_LIVE, len(test) // 8 - 2)
    base = {live: replay(linear, even, live)}
    out, fewer = {}, {}
    for row, name in ROWS:
        strategy = find(name)
        if isinstance(strategy, PaperStrategy):
            strategy = dataclasses.replace(strategy, clusters=8)
        result = solve(problem, strategy, seed)
        group = fold.group(result, "prefill").group if strategy.routed else even
        size = min(live, int(np.bincount(group, minlength=8).min()))
        if size < SMALLEST:  # the original left a group (nearly) empty: there are no batches to speak of
            continue
        if size != live:
            fewer[row] = size
        base.setdefault(size, replay(linear, even, size))
        found = replay(result, group, size)
        for kind, field in KINDS:
            out[row, kind] = float(np.median(getattr(found, field)) / np.median(getattr(base[size], field)))
    return out, live, fewer


def workloads() -> Iterator[tuple[str, str, RequestSet]]:
    """(label, published, requests); the real set only where it is."""
    from moeplan.importers.arrays import import_arrays
    from moeplan.importers.options import ImportOptions
    from moeplan.synthetic.generator import WorkloadSettings, generate

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trace = generate("deepseek-v3", root / "v3", WorkloadSettings(requests=REQUESTS, layers=[42], seed=0))
        yield "DeepSeek-V3 preset, layer 42 (synthetic)", "paper 0.94, eplb 1.00", read_requests(trace)
        trace = generate("llama-4-maverick", root / "maverick", WorkloadSettings(requests=REQUESTS, seed=0))
        yield "Maverick preset, 24 layers (synthetic)", "paper down to 0.80", read_requests(trace)
        if REAL.is_file():
            trace = import_arrays(REAL, root / "real", ImportOptions(without_layers=(45,)))
            yield "maverick-mmlu, 23 layers (real)", "paper down to 0.80", read_requests(trace)


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs, one per workload, row and kind of volume."""
    lines = (
        [] if REAL.is_file() else [("maverick-mmlu (real)", "left out: ../shared/traces/maverick-mmlu.npz is absent")]
    )
    for label, published, requests in workloads():
        runs = [volumes(requests, seed) for seed in SEEDS]
        live = runs[0][1]
        lines.append((label, f"published: {published}; {BATCHES} batches of 8 x {live}"))
        for row, _ in ROWS:
            sizes = [fewer[row] for _, _, fewer in runs if row in fewer]
            note = f" (batches of 8 x {min(sizes)} and more: its smallest group)" if sizes else ""
            for kind, _ in KINDS:
                values = [found[row, kind] for found, _, _ in runs if (row, kind) in found]
                if not values:
                    text = f"none: its smallest group had fewer than {SMALLEST} requests in every seed"
                else:
                    text = f"{np.mean(values):.3f}  ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)"
                lines.append((f"  {row}, {kind}", text + note))
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for name, text in bench():
        print(f"{name:58s} {text}", flush=True)
