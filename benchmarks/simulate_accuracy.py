"""The simulator against measured serving points, closed loop at their concurrency: TTFT and TPOT.

    python benchmarks/simulate_accuracy.py [--rows 60] [--seed 0]

Needs `../shared/measured`. Rows of aggregated serving (one server prefills and decodes) are simulated with uniform
routing: all requests of the first batch come at once, each end is followed by the next request, ten requests for each
place. The rows do not say how much lengths differ, and TTFT hangs on it: where all are equal, answers end together and
their successors' prompts wait for one another. So each row is simulated twice: with lengths between 0.8 and 1 of the
row's, and with equal ones. Nothing is fitted here. Disaggregated rows are left out: the simulator has
no prefill workers of their own.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

import numpy as np

import serving_tables as st
from moeplan._kernels.serving import Limits
from moeplan.errors import MoeplanError
from moeplan.gateway.fleet import Fleet, Request
from moeplan.gateway.policies import LeastLoaded
from moeplan.model.catalogue import load_model
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import MemoryModel, ParallelLayout, Precision
from moeplan.perf.step_model import StepModel
from moeplan.simulation.clock import Span, step_clock
from moeplan.simulation.engine import Engine
from moeplan.simulation.loop import serve
from moeplan.simulation.stream import Stream

#: Tokens of a step: the engines' defaults at these batch sizes.
BUDGET = 8192
#: Requests of a run for each place.
PER_PLACE = 10
#: How much shorter than the row's the shortest prompt and answer are.
SPREADS = (0.2, 0.0)


def step_model(row: dict[str, str]) -> StepModel:
    """A row's step model, as `serving_tables.serving` reads it."""
    spec = load_model(row["model"])
    tp, dp, _, ep, _ = st.layout(row)
    wide = st.dtype(row)
    matrices = "bf16" if wide == "fp4" and spec.attention.kind == "mla" else wide
    kv = "fp8" if row["backend"] == "trtllm" and wide != "bf16" and spec.moe is None else "bf16"
    layout = ParallelLayout(tp=tp, dp=dp, ep=ep if spec.moe else 1)
    return StepModel(spec, load_hardware(row["system"].split("_")[0]), layout, Precision(matrices, wide, kv))


def simulated(row: dict[str, str], spread: float, seed: int) -> tuple[float, float]:
    """(TTFT, TPOT) seconds, means over the requests of one data-parallel rank."""
    model, batch = step_model(row), st.layout(row)[4]
    prompt, answer, count = int(row["isl"]), int(row["osl"]), max(PER_PLACE * batch, 20)
    rng = np.random.default_rng(seed)
    lengths = [np.ceil(n * rng.uniform(1 - spread, 1, count)).astype(np.int64) for n in (prompt, answer)]
    none = np.full(count, -1)
    stream = Stream(np.arange(count), np.zeros(count), *lengths, none, min(batch, count // 2))
    memory = MemoryModel(model.spec, model.hardware, model.parallel, model.precision, usable=st.USABLE)
    cache = memory.largest_batch(prompt + answer, min(BUDGET, prompt)) * (prompt + answer)
    if cache < prompt + answer:
        raise MoeplanError("does not fit")
    clock = step_clock(model, Span(batch, prompt + answer, BUDGET))
    engine = Engine(stream, 1, Limits(batch, max(BUDGET, batch), cache, row["backend"] != "sglang"), clock)
    events = serve(stream, engine, LeastLoaded(Fleet(1)), [Request(i) for i in range(count)])
    ttft, tpot = events.first - events.arrived, (events.end - events.first) / np.maximum(stream.answer - 1, 1)
    return float(ttft.mean()), float(tpot.mean())


def rows(most: int, seed: int) -> list[dict[str, str]]:
    """Aggregated rows of all systems, at most so many, drawn at random."""
    found = []
    for system in ("h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300"):
        for kind, split in (("moe", False), ("moe", True), ("dense", False)):
            found += [row for row in st.each(st.served(system, kind, split).rows) if row["mode"] != "disagg"]
    order = np.random.default_rng(seed).permutation(len(found))[:most]
    return [found[i] for i in sorted(order)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for row in rows(given.rows, given.seed):
        try:
            (spread, tpot), (equal, tpot_equal) = (simulated(row, spread, given.seed) for spread in SPREADS)
        except MoeplanError:
            continue
        ttft, token = (1e-3 * float(row[f"silicon_{name}_ms"]) for name in ("ttft", "tpot"))
        ratios = tpot / token, tpot_equal / token, spread / ttft, equal / ttft
        for part in ("all", row["backend"], row["system"].split("_")[0], _band(st.layout(row)[4])):
            found[part].append(ratios)
    print("simulated over measured: median error (bias); lengths drawn from 0.8 to 1 of the row's, or equal")
    print(f"{'part':22s} rows  {'TPOT':20s} {'TPOT, equal':20s} {'TTFT':20s} {'TTFT, equal':20s} TTFT between the two")
    for part, values in found.items():
        ratio = np.array(values)
        cells = [f"{100 * np.median(abs(x - 1)):.1f} % ({100 * (np.median(x) - 1):+.1f} %)" for x in ratio.T]
        between = (ratio[:, 2:].min(axis=1) <= 1) & (ratio[:, 2:].max(axis=1) >= 1)
        print(f"{part:22s} {len(ratio):4d}  {' '.join(f'{c:20s}' for c in cells)} {100 * between.mean():.0f} %")


def _band(batch: int) -> str:
    power = 4 ** math.ceil(math.log(max(batch, 1), 4))
    return f"{power // 4 + 1}-{power} at a time" if power > 1 else "1 at a time"


if __name__ == "__main__":
    main()
