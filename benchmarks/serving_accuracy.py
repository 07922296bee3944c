"""Sections of `docs/results/accuracy.md` on steps and serving: published figures, serving points, EPLB's gains, speed.

Nothing here is fitted. `time_accuracy.py` prints these sections with its own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator

import numpy as np

import serving_tables as st
import time_tables as tf
from moeplan.cluster import Dispatch
from moeplan.errors import MoeplanError
from moeplan.model.catalogue import load_model
from moeplan.model.parameters import parameters
from moeplan.perf.constants import Constants, EngineFit, GenerationFit, load_constants
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.routing import ExpertRanks, routing_from_counts
from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.planning.balance import rebalance_experts
from time_report import SCORES, Row, percent, scores, signed

DEEPSEEK = load_model("DeepSeek-V3")
FP8 = Precision(weights="fp8")
COUNTS = tf.MEASURED.parent / "traces" / "sglang_logical_count"


# ---------------------------------------------------------------------------------------------------------------------
# Published figures

#: id in published_targets.csv: (accelerators, expert slots beyond 256, absolutely balanced, has a target).
#: `deepseek-online-decode` states 14,800 tokens/s a node at 20-22 a user: 14800 / 8 / 21 = 88 requests a GPU.
TARGETS = {
    "deepseek-profile-decode": ("h800", 128, 0, True, True),
    "sglang-ep72-decode": ("h100", 72, 32, False, True),
    "sglang-ep72-decode-mtp": ("h100", 72, 32, False, True),
    "deepseek-profile-prefill": ("h800", 32, 0, True, True),
    "deepseek-online-decode": ("h800", 144, 32, False, False),
    "sglang-ep32-prefill-1k": ("h100", 32, 32, False, False),
    "sglang-ep32-prefill-2k": ("h100", 32, 32, False, False),
    "sglang-ep32-prefill-4k": ("h100", 32, 32, False, False),
    "sglang-ep32-prefill-4k, balanced": ("h100", 32, 32, True, False),
}
ONLINE_BATCH, PREFILL_TOKENS = 88, 16384


def target_step(name: str, row: dict[str, str], c: Constants | None = None) -> tuple[Step, float]:
    """(the model's step, tokens of it on one GPU) for a published set-up."""
    machine, gpus, redundant, balanced, _ = TARGETS[name]
    options = StepOptions(overlap=True, gpus_per_node=8, balanced=balanced, constants=c)
    at = StepModel(
        DEEPSEEK, load_hardware(machine), ParallelLayout(dp=gpus, ep=gpus, redundant=redundant), FP8, options
    )
    context = int(float(row["context"]))
    if row["phase"] == "prefill":
        return at.prefill(PREFILL_TOKENS / context, context), PREFILL_TOKENS
    batch = ONLINE_BATCH if name == "deepseek-online-decode" else int(float(row["tokens_per_gpu_step"]))
    return at.decode(batch, context), batch


def published() -> list[Row]:
    rows = {row["id"]: row for row in st.each(st.strings("published_targets.csv"))}
    name = "sglang-ep32-prefill-4k"  # its note gives the figure with perfectly balanced experts
    rows[f"{name}, balanced"] = rows[name] | {"value": "59337"}
    bare = dataclasses.replace(load_constants(), engine=EngineFit(0.0, 0.0, 0.0))
    out: list[Row] = [
        ("published result", "tokens a GPU", "published, tokens/s/node", "model", "error", "target", "met",
         "step, ms (published)", "idle share", "error without the engine's constants")
    ]  # fmt: skip
    for name, (*_, target) in TARGETS.items():
        step, tokens = target_step(name, rows[name])
        plain, _ = target_step(name, rows[name], bare)
        said, seconds = float(rows[name]["value"]), float(step.seconds)
        error = 8 * tokens / seconds / said - 1
        met = ("yes" if abs(error) <= 0.15 else "**no**") if target else "-"
        out.append((
            name, f"{tokens:g}", f"{said:,.0f}", f"{8 * tokens / seconds:,.0f}", signed(error),
            "15 %" if target else "-", met,
            f"{1e3 * seconds:.1f} ({8e3 * tokens / said:.1f})", percent(float(step.idle_share)),
            signed(8 * tokens / float(plain.seconds) / said - 1),
        ))  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Serving points


@dataclasses.dataclass(frozen=True)
class Group:
    """Serving points under one target: (system, kind, ep > 1) tables, and the target on the median."""

    what: str
    tables: tuple[tuple[str, str, bool], ...]
    target: float | None
    c: Constants | None = None


def hopper() -> Constants:
    """As fitted on Hopper, for every machine."""
    return dataclasses.replace(load_constants(), blackwell=GenerationFit(1.0, 1.0))


def groups() -> tuple[Group, ...]:
    dense = tuple((system, "dense", False) for system in ("h100_sxm", "h200_sxm", "b200_sxm"))
    return (
        Group("MoE, H200, ep 1", (("h200_sxm", "moe", False),), 0.15),
        Group("MoE, H200, ep > 1", (("h200_sxm", "moe", True),), None),
        Group("MoE, B200, ep 1, Hopper's constants", (("b200_sxm", "moe", False),), 0.25, hopper()),
        Group("MoE, B200, ep 1, two ratios fitted", (("b200_sxm", "moe", False),), 0.15),
        Group("MoE, B200, ep > 1", (("b200_sxm", "moe", True),), None),
        Group("MoE, B300, ep 1", (("b300_sxm", "moe", False),), None),
        Group("MoE, B300, ep > 1", (("b300_sxm", "moe", True),), None),
        Group("MoE, GB200 and GB300, ep 1", (("gb200", "moe", False), ("gb300", "moe", False)), None),
        Group("MoE, GB200 and GB300, ep > 1", (("gb200", "moe", True), ("gb300", "moe", True)), None),
        Group("dense, H100, H200 and B200", dense, 0.12),
        Group("dense, H100", dense[:1], None),
        Group("dense, H200", dense[1:2], None),
        Group("dense, B200", dense[2:], None),
    )


def points() -> list[Row]:
    """One row per target and part."""
    out: list[Row] = [("TPOT against", "part", *SCORES)]
    for group in groups():
        tables = [st.served(*table) for table in group.tables]
        errors = [table.errors(group.c or load_constants()) for table in tables]
        error, fitted = np.concatenate(errors), np.concatenate([table.fitted for table in tables])
        for part, chosen in (("fit", fitted), ("check", ~fitted), ("all", fitted | ~fitted)):
            if chosen.any() and not (part == "all" and (fitted.all() or not fitted.any())):
                out.append((group.what, part, *scores(error[chosen], group.target)))
    return out


def small_kernels() -> list[Row]:
    """Data-parallel rows of the fit part, with `engine.expert_layer_s` and without."""
    c = load_constants()
    without = dataclasses.replace(c, engine=dataclasses.replace(c.engine, expert_layer_s=0.0))
    out: list[Row] = [("machine", "rows", "median error", "bias", "median error without", "bias without")]
    for system in ("b200_sxm", "b300_sxm"):
        table = st.served(system, "moe", True)
        parallel = np.array([st.layout(row)[1] > 1 for row in st.each(table.rows)])
        table = table.where(parallel & table.fitted)
        scores: list[str] = []
        for used in (c, without):
            error = table.errors(used)
            scores += [percent(float(np.median(abs(error)))), signed(float(np.median(error)))]
        out.append((system.split("_")[0].upper(), str(len(table.seconds)), *scores))
    return out


def by_engine() -> list[Row]:
    """The same errors by model and engine, worst first, and what share of the peak rate their requests would take."""
    found: dict[Row, list[tuple[float, float]]] = {}
    for row, error in _all_points():
        split = "ep > 1" if st.layout(row)[3] > 1 else "ep 1"
        key = (row["system"].split("_")[0].upper(), row["model"], row["backend"], row["mode"], split)
        found.setdefault(key, []).append((error, implied_share(row)))
    ranked = sorted(((key, np.array(v)) for key, v in found.items()), key=lambda item: -np.median(abs(item[1][:, 0])))
    out: list[Row] = [
        ("machine", "model", "engine", "mode", "experts", "rows", "median error", "bias", "of peak, most")
    ]
    for key, values in ranked:
        error, share = values.T
        most = "-" if np.isnan(share).any() else f"{100 * share.max():.0f} %"
        median = percent(float(np.median(abs(error))))
        out.append((*key, str(len(error)), median, signed(float(np.median(error))), most))
    return out


#: Requests at a time, of one data-parallel rank, by which TTFT is told apart.
BANDS = ((1, 4), (5, 16), (17, 64), (65, 10**6))


def first_tokens() -> list[Row]:
    """TTFT measured, as a multiple of a prompt's own prefill, which is what the model gives; and between which bounds.

    The lower bound is the model's (a request finds a place at once), the upper one that all requests come at once, so
    that a prompt waits for half of the others'.
    """
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in _rows():
        place = load_hardware(row["system"].split("_")[0])
        try:
            serving = st.serving(row, place, load_constants())
        except MoeplanError:
            continue
        batch = st.layout(row)[4]
        if serving.running < batch:  # some wait for memory: another thing
            continue
        band = next(i for i, (_, most) in enumerate(BANDS) if batch <= most)
        burst = (serving.ttft_s - float(serving.decode.seconds) / 2) * (batch + 1) / 2
        measured = float(row["silicon_ttft_ms"]) * 1e-3
        found.setdefault((f"{row['backend']}, {row['mode']}", band), []).append(
            (measured / serving.ttft_s, measured / burst)
        )
    out: list[Row] = [
        ("engine", "requests at a time", "rows", "measured / model, median", "9 in 10 within", "model's error, median",
         "below both", "between", "above both")
    ]  # fmt: skip
    for (engine, band), pairs in sorted(found.items()):
        times, over = np.array(pairs).T
        low, high = BANDS[band]
        above, below = (times > 1) & (over > 1), (times < 1) & (over < 1)
        out.append((
            engine, f"{low} to {high}" if band < len(BANDS) - 1 else f"{low} and more", str(len(times)),
            f"{np.median(times):.1f}", f"{np.quantile(times, 0.9):.1f}", percent(float(np.median(abs(1 / times - 1)))),
            *(str(part.sum()) if engine.endswith(" agg") else "-" for part in (below, ~above & ~below, above)),
        ))  # fmt: skip
    return out


def implied_share(row: dict[str, str]) -> float:
    """Share of the accelerators' peak rate that a row's requests would take at its TTFT and TPOT, if no prompt came
    from a cache: 2 operations per active parameter and token. NaN where prefill runs elsewhere."""
    if row["mode"] == "disagg":
        return float("nan")
    tp, _, _, _, batch = st.layout(row)  # a rank's own requests, and all of it works on them
    prompt, output = int(row["isl"]), int(row["osl"])
    life = (float(row["silicon_ttft_ms"]) + output * float(row["silicon_tpot_ms"])) * 1e-3
    rate = load_hardware(row["system"]).flops[st.dtype(row)] * tp
    return batch * (prompt + output) * 2 * parameters(load_model(row["model"])).active / life / rate


def _tables() -> Iterator[st.ServingTable]:
    for system in ("h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300"):
        for kind, split in (("moe", False), ("moe", True), ("dense", False)):
            table = st.served(system, kind, split)
            if len(table.seconds):
                yield table


def _rows() -> Iterator[dict[str, str]]:
    for table in _tables():
        yield from st.each(table.rows)


def _all_points() -> Iterator[tuple[dict[str, str], float]]:
    for table in _tables():
        yield from zip(st.each(table.rows), table.errors(load_constants()).tolist(), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# EPLB


def counts(name: str) -> np.ndarray:
    """float64 [58, 256]: picks of each expert in SGLang's recorded runs of DeepSeek-V3, MoE layers only."""
    data = np.array(json.loads((COUNTS / name).read_text(encoding="utf-8"))["logical_count"], float)
    return data.reshape(-1, *data.shape[-2:]).sum(axis=0)[list(DEEPSEEK.moe.layers)]  # type: ignore[union-attr]


def eplb_step(name: str, slots: str, overlap: bool, scale: float = 1.0) -> tuple[float, float]:
    """(seconds, load ratio) of a step with `linear` at 256 slots, or `eplb` at 288; `scale` that of the differences
    between experts' loads."""
    load, decode = counts(name), name.startswith("decode")
    mean = load.mean(axis=1, keepdims=True)
    load = np.maximum(mean + scale * (load - mean), 0.0)
    gpus, nodes, mode = (72, 9, Dispatch.PICK) if decode else (32, 4, Dispatch.NODE)
    context = 2000 if decode else int(name.removeprefix("prefill_in").removesuffix(".json"))
    tokens = 256 if decode else PREFILL_TOKENS
    if slots == "linear":
        held = np.full(gpus, 256 // gpus) + (np.arange(gpus) < 256 % gpus)
        place = np.tile(np.arange(256), (len(load), 1))
    else:
        held, place = np.full(gpus, 288 // gpus), rebalance_experts(load, 288, 1, 1, gpus)
    assert DEEPSEEK.moe is not None
    ranks = ExpertRanks(gpus, nodes, dispatch=mode)
    routing = routing_from_counts(DEEPSEEK.moe, load, place, tokens * gpus, ranks, slots_per_gpu=held)
    parallel = ParallelLayout(dp=gpus, ep=gpus, redundant=32)  # as to memory and slots; the loads are those given
    at = StepModel(DEEPSEEK, load_hardware("h100"), parallel, FP8, StepOptions(overlap=overlap))
    step = at.decode(256, 2000, routing=routing) if decode else at.prefill(tokens / context, context, routing=routing)
    return float(np.mean(step.seconds)), routing.load_ratio


def needed_ratio(name: str, gain: float) -> float:
    """Load ratio of `linear` at which `eplb` gains so much: bisection of the scale."""
    low, high = 0.0, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        slow, fast = (eplb_step(name, slots, True, middle)[0] for slots in ("linear", "eplb"))
        low, high = (middle, high) if slow / fast < gain else (low, middle)
    return eplb_step(name, "linear", True, low)[1]


def eplb() -> list[Row]:
    out: list[Row] = [
        ("counts", "load ratio, linear 256", "eplb 288", "step, ms", "with eplb", "gain", "published", "error",
         "target", "met", "needed", "gain without overlap")
    ]  # fmt: skip
    names = ("decode_in2000out100", "prefill_in1024", "prefill_in2048", "prefill_in4096")
    for name in (f"{n}.json" for n in names):
        said = 2.54 if name.startswith("decode") else 1.49
        (slow, high), (fast, low) = eplb_step(name, "linear", True), eplb_step(name, "eplb", True)
        plain = eplb_step(name, "linear", False)[0] / eplb_step(name, "eplb", False)[0]
        error, needed = slow / fast / said - 1, f"{needed_ratio(name, said):.2f}"
        out.append((
            name, f"{high:.2f}", f"{low:.2f}", f"{1e3 * slow:.1f}", f"{1e3 * fast:.1f}", f"{slow / fast:.2f}",
            f"{said:.2f}", signed(error), "25 %", "yes" if abs(error) <= 0.25 else f"**no**: at {needed}", needed,
            f"{plain:.2f}",
        ))  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def speed() -> list[Row]:
    """One warm estimate: the best of 5 means of 20."""
    parallel, overlap = ParallelLayout(dp=72, ep=72, redundant=32), StepOptions(overlap=True)
    decode = StepModel(DEEPSEEK, load_hardware("h100"), parallel, FP8, overlap)
    llama = StepModel(load_model("Llama-3.1-70B"), load_hardware("h100"), ParallelLayout(tp=8), FP8)
    cases = {
        "DeepSeek-V3 decode, EP 72, two-batch overlap": lambda: decode.decode(128, 4000),
        "DeepSeek-V3 prefill, EP 72, two-batch overlap": lambda: decode.prefill(4, 4096),
        "Llama-3.1-70B decode, TP 8": lambda: llama.decode(64, 2000),
    }  # fmt: skip
    out: list[Row] = [("one estimate, warm", "ms", "target", "met")]
    for what, call in cases.items():
        best = min(_mean_seconds(call) for _ in range(5))
        out.append((what, f"{1e3 * best:.2f}", "2 ms", "yes" if best <= 2e-3 else "**no**"))
    return out


def _mean_seconds(call) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    for _ in range(20):
        call()
    return (time.perf_counter() - start) / 20


SECTIONS = [
    (
        "Steps as published",
        "DeepSeek-V3, fp8, two-batch overlap. No constant is fitted to these results, and one set of constants is "
        "used for all; but three choices were made with these errors in view: the grouped products of prefill have "
        "the rate of dense products, the send and receive kernels do not overlap, and `engine` is included. Routing "
        "is uniform (with the noise floor as load imbalance), or balanced where the source says so. EP144 online: 88 "
        "requests per GPU, from 14,800 tokens/s per node at 20-22 tokens/s per user; its TPOT is the step. SGLang's "
        "prefill results do not state their batch; 16,384 tokens per GPU are assumed, so they have no target. The "
        "last column leaves out `engine`, which is fitted on servers of other models without dispatch; see the next "
        "section.",
        published,
    ),
    (
        "Small kernels around the experts",
        "`engine.expert_layer_s` is fitted on servers without dispatch. This table tests whether it also applies "
        "with dispatch: TPOT of the data-parallel rows of the fit part, with and without it. It is therefore "
        "included everywhere.",
        small_kernels,
    ),
    (
        "Time per output token of servers",
        "InferenceX and others, from the database of aiconfigurator. `fit`: rows of Llama-3.1-8B, MiniMax-M2.5 and "
        "Qwen3.5-397B; `check`: all other models. `engine` is fitted on the Hopper rows of the fit part with ep 1, "
        "the two ratios of `blackwell` on those of B200; nothing is fitted on B300, GB200, GB300 or ep > 1. No "
        "constant was fitted on a check row, but some choices of structure were made with all rows in view: "
        "DeepGEMM's constants for the fused experts of tensor parallelism, shared experts in parallel with the "
        "routed ones, fp8 keys and values with TensorRT-LLM. Routing is uniform. How a row is read, and which typing "
        "errors are corrected: `benchmarks/serving_tables.py`.",
        points,
    ),
    (
        "The same by engine",
        "Worst first. `of peak`: the share of the peak rate that the prompts and answers of a row would need. In "
        "some rows of Llama-3.1-8B on vLLM it is 100 %: their prompts must have come from a cache, but the model "
        "computes their prefill. TensorRT-LLM's dense kernels on H200 are faster than the SGLang kernels that the "
        "constants are from.",
        by_engine,
    ),
    (
        "Time to first token of servers",
        "The model gives the time of a prompt without queueing: its own prefill and half a step. Nothing is fitted "
        "to these rows, and there is no target. Measured TTFT is of servers under full load, where a prompt waits "
        "for others; the waiting time depends on the arrival of requests, which the rows do not state. If all "
        "requests arrive at once, a prompt waits for half of the others: `below both`, `between` and `above both` "
        "compare rows with these two times (not for disaggregated prefill). The model's TTFT is therefore a lower "
        "bound, not an estimate for a busy server: even with 1 to 4 requests in flight, servers take 2 to 6 times as "
        "long. Rows whose requests wait for memory are left out.",
        first_tokens,
    ),
    (
        "EPLB's gains",
        "Loads from SGLang's recorded counts, `linear` with 256 slots and `eplb` with 288, two-batch overlap, 256 "
        "(decode) and 16,384 (prefill) tokens per GPU; 32 seeded steps drawn from the counts, on which `eplb` is "
        "also fitted. Published by SGLang: 2.54x decode, EP 72; 1.49x prefill, EP 32, whose prompt length is not "
        "stated. `needed`: the load ratio of `linear` at which the model gives the published gain (differences "
        "between counts are scaled); a gain that misses the target is `no: at` that ratio.",
        eplb,
    ),
    ("Speed", "On the machine that wrote this page.", speed),
]
