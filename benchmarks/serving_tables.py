"""Measured serving points of `../shared/measured` as tables, and how the model sees each row.

Rows are dealt by model, never one by one: a model is in the fit part or in the check part, with all its rows.

How a row is read. A batch size is the requests at a time of one data-parallel rank. The disaggregated rows' layout is
that of their `decode_` columns. Some rows give tp x dp as the product of the expert layout (tp 64 with expert tp 8 and
ep 8): read as one worker of ep accelerators; some vLLM rows give tp 4 and dp 4 for 4 accelerators: read as dp 4.
Keys and values: fp8 where TensorRT-LLM runs a quantised dense model, as its checkpoints say; else bf16. DeepSeek's and
Kimi's fp4 checkpoints keep attention in bf16. Chunks share steps with decoding requests, but for SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moeplan.errors import MoeplanError
from moeplan.model.catalogue import load_model
from moeplan.perf.constants import Constants
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.operators import Device
from moeplan.perf.serving import ServingFigures, aggregated, disaggregated
from moeplan.perf.step_model import StepModel, StepOptions, Workload
from time_tables import Columns, Table, read

FILES = ("serving_points.csv", "serving_points_dense.csv")
#: Models whose rows may be fitted; all others are for checking.
FIT_MODELS = ("Llama-3.1-8B", "MiniMax-M2.5", "Qwen3.5-397B-A17B")
NAMES = {"nvidia/Llama-3.1-8B-Instruct-FP8": "Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B"}
DTYPES = {"nvfp4": "fp4", "fp8": "fp8", "fp8_block": "fp8", "": "bf16"}
#: Engines are told to use more of the memory than vLLM's default share.
USABLE = 0.97


@dataclass(frozen=True)
class ServingTable(Table):
    """Serving points of one accelerator; `seconds` is the measured time per output token."""

    @property
    def fitted(self) -> np.ndarray:
        return self.whole | np.isin(self.rows["model"], FIT_MODELS)


@cache
def served(system: str, kind: str, experts_split: bool = False) -> ServingTable:
    """Points of a system (as the files call it), `moe` or `dense`; those with ep > 1 where `experts_split`."""
    file = FILES[kind == "dense"]
    rows = {name: np.array(["" if v is None else v for v in column.tolist()]) for name, column in strings(file).items()}
    rows["model"] = np.array([NAMES.get(path, path.split("/")[1]) for path in rows["model_path"]])
    ep = np.array([layout(row)[3] for row in each(rows)])
    table = ServingTable(
        "serving", system.split("_")[0], rows, _number(rows["silicon_tpot_ms"]) * 1e-3, ("model",), predict
    )
    return table.where((rows["system"] == system) & ((ep > 1) == experts_split))  # type: ignore[return-value]


def strings(file: str) -> Columns:
    """A file's columns, all as text."""
    return {name: column.astype(str) if column.dtype != object else column for name, column in read(file).items()}


def _number(column: np.ndarray) -> np.ndarray:
    return column.astype(float)


def each(rows: Columns) -> list[dict[str, str]]:
    """Row by row."""
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def layout(row: dict[str, str]) -> tuple[int, int, int, int, int]:
    """(tp, dp, expert tp, ep, batch) of a row's decode workers."""
    way = "decode_" if row["mode"] == "disagg" else ""

    def whole(name: str) -> int:
        text = row[way + name]
        return 1 if text in ("", "nan") else int(float(text))

    tp, dp, expert_tp, ep = (whole(f"{n}_size") for n in ("tp", "attention_dp", "moe_tp", "moe_ep"))
    if expert_tp == ep > 1 and max(tp, dp) == ep * expert_tp:
        tp, dp, expert_tp = (ep, 1, 1) if tp > dp else (1, ep, 1)
    elif tp == dp > 1:
        tp, expert_tp, ep = 1, 1, dp
    return tp, dp, expert_tp, ep, whole("batch_size")


def dtype(row: dict[str, str]) -> str:
    """Of a row's weights."""
    mode = "" if row["gemm_quant_mode"] == "nan" else row["gemm_quant_mode"]
    return "bf16" if row["precision"] == "bf16" else DTYPES[mode]


def serving(row: dict[str, str], hardware: Hardware, constants: Constants) -> ServingFigures:
    """What the model says about a row."""
    spec = load_model(row["model"])
    tp, dp, _, ep, batch = layout(row)
    wide = dtype(row)
    matrices = "bf16" if wide == "fp4" and spec.attention.kind == "mla" else wide
    kv = "fp8" if row["backend"] == "trtllm" and wide != "bf16" and spec.moe is None else "bf16"
    parallel = ParallelLayout(tp=tp, dp=dp, ep=ep if spec.moe else 1)
    at = StepModel(spec, hardware, parallel, Precision(matrices, wide, kv), StepOptions(constants=constants))
    load = Workload(int(row["isl"]), int(row["osl"]))
    if row["mode"] == "disagg":
        return disaggregated(at, at, load, batch, usable=USABLE)
    return aggregated(at, load, batch, mixed=row["backend"] != "sglang", usable=USABLE)


def predict(device: Device, rows: Columns) -> np.ndarray:
    """Time per output token of each row, in seconds; NaN where the model says that it cannot be."""
    out = []
    for row in each(rows):
        try:
            out.append(serving(row, device.hardware, device.constants).tpot_s)
        except MoeplanError:
            out.append(np.nan)
    return np.array(out)
