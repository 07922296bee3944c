"""The measured tables of `../shared/measured`, and how the time model sees each row: for `time_fit`, `time_accuracy`.

Rows come from the data base of aiconfigurator-core 0.12.0 (Apache-2.0); none is shipped. Each table is dealt into a fit
part and a check part by shape (what `Table.shape` names), so that neighbouring sizes of one shape never stand on both
sides; H100 and H200 share the deal. The files' milliseconds and microseconds become seconds at once.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import pyarrow.csv
import pyarrow.parquet

from mla_blocks import mla_layer_decode, mla_layer_prefill
from moeplan.cluster import Dispatch
from moeplan.perf import attention, operators
from moeplan.perf.collectives import expert_exchange, uniform_messages
from moeplan.perf.constants import Constants
from moeplan.perf.hardware import load_hardware
from moeplan.perf.operators import Device

MEASURED = Path(__file__).parents[1].parent / "shared" / "measured"
SEED = 0
MACHINES = ("h100", "h200")

Columns = dict[str, np.ndarray]
Predict = Callable[[Device, Columns], np.ndarray]
Way = Literal["dispatch", "combine"]


@dataclass(frozen=True)
class Table:
    """Measured rows of one kernel family on one machine, and how the model sees them.

    Attributes:
        name, machine: which.
        rows: columns by name.
        seconds: measured.
        shape: the columns by which rows are dealt into fit and check.
        predict: the model's seconds.
        whole: fit on all rows, as when another machine or node count is the check.
    """

    name: str
    machine: str
    rows: Columns
    seconds: np.ndarray
    shape: tuple[str, ...]
    predict: Predict
    whole: bool = False

    @property
    def fitted(self) -> np.ndarray:
        """bool: the rows of the fit part; all of them where `whole`."""
        if self.whole:
            return np.ones(len(self.seconds), bool)
        keys = zip(*(self.rows[c].tolist() for c in self.shape), strict=True)
        return np.array([zlib.crc32(f"{SEED} {self.name} {key}".encode()) % 2 == 0 for key in keys], bool)

    def where(self, mask: np.ndarray) -> Table:
        return dataclasses.replace(
            self, rows={name: column[mask] for name, column in self.rows.items()}, seconds=self.seconds[mask]
        )

    def errors(self, constants: Constants) -> np.ndarray:
        """Relative errors, model over measurement less 1."""
        return self.predict(Device(load_hardware(self.machine), constants), self.rows) / self.seconds - 1


def read(name: str) -> Columns:
    path = MEASURED / name
    table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}


def _table(name: str, machine: str, file: str, shape: tuple[str, ...], predict: Predict, keep=None) -> Table:  # type: ignore[no-untyped-def]
    rows = read(file.format(machine))
    table = Table(name, machine, rows, rows["latency"].astype(float) * 1e-3, shape, predict)
    return table if keep is None else table.where(keep(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def gemm_table(machine: str, kind: str) -> Table:
    name = "bfloat16" if kind == "bf16" else kind

    def predict(device: Device, r: Columns) -> np.ndarray:
        return operators.gemm(device, r["m"], r["n"], r["k"], kind).seconds

    return _table(f"gemm {kind}", machine, "gemm_{}.parquet", ("n", "k"), predict, lambda r: r["gemm_dtype"] == name)


def _heads(r: Columns) -> attention.Heads:
    """The only model with keys of 192 in the files, MiMo-V2, has values of 128 (its config.json)."""
    values = np.where(r["head_dim"] == 192, 128, r["head_dim"])
    return attention.Heads(r["num_heads"], r["num_key_value_heads"], r["head_dim"], values, r["window_size"])


HEADS = ("num_heads", "num_key_value_heads", "head_dim", "window_size")


def prefill_table(machine: str, group: str) -> Table:
    def keep(r: Columns) -> np.ndarray:
        if group == "triton":
            return r["kernel_source"] == "triton"
        return (r["kernel_source"] == "fa3") & (r["attn_dtype"] == ("bfloat16" if group == "bf16" else group))

    def predict(device: Device, r: Columns) -> np.ndarray:
        kind = "fp8" if group == "fp8" else "bf16"
        return attention.attention_prefill(device, _heads(r), r["batch_size"], r["isl"], dtype=kind).seconds

    return _table(f"prefill {group}", machine, "context_attention_{}.parquet", HEADS, predict, keep)


def decode_table(machine: str, group: str) -> Table:
    def keep(r: Columns) -> np.ndarray:
        if group == "triton":
            return r["kernel_source"] == "triton"
        return (r["kernel_source"] == "fa3") & (r["kv_cache_dtype"] == ("bfloat16" if group == "bf16" else group))

    def predict(device: Device, r: Columns) -> np.ndarray:
        kind, held = "fp8" if group == "fp8" else "bf16", r["step"] + 1
        return attention.attention_decode(device, _heads(r), r["batch_size"], held, kv_dtype=kind, warm=True).seconds

    return _table(f"decode {group}", machine, "generation_attention_{}.parquet", HEADS, predict, keep)


def mla_table(machine: str) -> Table:
    def predict(device: Device, r: Columns) -> np.ndarray:
        out = np.empty(len(r["step"]))
        for kind in ("bf16", "fp8"):
            at = (r["kv_cache_dtype"] == "fp8") == (kind == "fp8")
            shape = attention.MlaShape(heads=r["num_heads"][at])
            out[at] = attention.attention_decode(
                device, shape, r["batch_size"][at], r["step"][at] + 1, kv_dtype=kind, warm=True
            ).seconds
        return out

    shape = ("num_heads", "batch_size", "kv_cache_dtype")
    return _table("mla decode", machine, "generation_mla_{}.parquet", shape, predict)


def mla_layer_table(machine: str, phase: str) -> Table:
    def predict(device: Device, r: Columns) -> np.ndarray:
        out = np.empty(len(r["isl"]))
        for heads in np.unique(r["num_heads"]):
            at = r["num_heads"] == heads
            shape = attention.MlaShape(heads=int(heads))
            size = r["batch_size"][at], r["isl"][at]
            out[at] = (
                mla_layer_decode(device, shape, *size, dtype="fp8_block", down=False, warm=True).seconds
                if phase == "generation"
                else mla_layer_prefill(device, shape, *size, dtype="fp8_block", down=False).seconds
            )
        return out

    shape = ("num_heads", "batch_size")
    return _table(f"mla layer {phase}", machine, f"wideep_{phase}_mla_{{}}.parquet", shape, predict)


MOE_SHAPE = ("hidden_size", "inter_size", "num_slots", "num_experts", "moe_ep_size")


def cutlass_table(machine: str) -> Table:
    table = _table("experts cutlass", machine, "wideep_moe_{}.parquet", MOE_SHAPE, partial(_experts, "cutlass"))
    rows = dict(table.rows)
    keys = ("num_tokens", "rank0_num_tokens", "num_experts", "num_slots", "moe_ep_size", "topk")
    alpha = np.array([float(d.split("_")[2]) for d in rows["distribution"]])
    balanced = np.char.endswith(rows["distribution"].astype(str), "eplb")
    work = [
        rank_work(*(int(v) for v in row), float(a), bool(b))
        for *row, a, b in zip(*(rows[k] for k in keys), alpha, balanced, strict=True)
    ]
    rows["picks"], rows["experts"] = np.array(work).T
    return dataclasses.replace(table, rows=rows)


def deepgemm_table(machine: str) -> Table:
    """Uniform loads only: the file does not say what the hottest rank of the others got."""

    def keep(r: Columns) -> np.ndarray:
        return r["distribution"] == "uniform"

    file, kernel = "wideep_generation_moe_{}.csv", partial(_experts, "deepgemm")
    shape = ("moe_ep_size", "num_tokens")
    table = _table("experts deepgemm", machine, file, shape, kernel, keep)
    rows = dict(table.rows)
    rows["picks"] = rows["num_tokens"] * rows["topk"] / rows["moe_ep_size"]
    rows["experts"] = np.minimum(rows["num_experts"] / rows["moe_ep_size"], rows["picks"])
    return dataclasses.replace(table, rows=rows)


def _experts(kernel: str, device: Device, r: Columns) -> np.ndarray:
    sizes = r["picks"], r["experts"], r["hidden_size"], r["inter_size"]
    return operators.expert_gemm(device, *sizes, kernel=kernel).seconds


def low_latency_table(direction: Way) -> Table:
    rows = read("deepep_low_latency_h100.csv")
    seconds = rows[f"{direction}_avg_t_us"] * 1e-6
    predict = partial(_exchange, Dispatch.PICK, direction)
    return Table(f"low latency {direction}", "h100", rows, seconds, ("node_num", "num_token"), predict)


def normal_table(direction: Way) -> Table:
    rows = read("deepep_normal_h100.csv")
    seconds = (rows[f"{direction}_transmit_us"] + rows[f"{direction}_notify_us"]) * 1e-6
    rows["units"] = rows[f"{direction}_sms"]
    predict = partial(_exchange, Dispatch.NODE, direction)
    table = Table(f"normal {direction}", "h100", rows, seconds, ("node_num", "num_token"), predict)
    return table.where((rows["node_num"] <= 4) & (rows["num_token"] >= 128))


def _exchange(mode: Dispatch, direction: Way, device: Device, r: Columns) -> np.ndarray:
    out = np.empty(len(r["num_token"]))
    for nodes in np.unique(r["node_num"]):
        at = r["node_num"] == nodes
        tokens = r["num_token"][at].astype(float)
        if mode is Dispatch.PICK:  # DeepEP's test masks 10 picks, drawn with replacement (tests/test_low_latency.py)
            tokens = tokens * (1 - 1 / (8 * tokens)) ** 10
        # its normal test lets a token's experts lie on at most 4 nodes (tests/test_internode.py)
        messages = uniform_messages(mode, int(nodes), 8, tokens, 8, 256, max_nodes=4 if mode is Dispatch.NODE else 0)
        units = r["units"][at].astype(float) if mode is Dispatch.NODE else 1.0
        out[at] = expert_exchange(device, mode, messages, 7168, 8, int(nodes), direction, units=units).seconds
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What the hottest rank of `wideep_moe` got. The file gives its distinct tokens; the picks behind them follow from how
# the measurement drew them (aiconfigurator `collector/helper.py`: loads from a power law, experts sorted by load and
# laid round and round over the tokens, the heaviest rank timed).


@cache
def rank_work(
    tokens: int, rank_tokens: int, experts: int, slots: int, ranks: int, k: int, alpha: float, balanced: bool
) -> tuple[float, float]:
    """(picks, distinct experts) of the hottest rank: the mean of the 4 draws of 24 nearest to its recorded tokens."""
    draws = _draws(tokens, experts, slots, ranks, k, alpha, balanced)
    near = np.argsort(abs(draws[:, 0] - rank_tokens), kind="stable")[:4]
    scale = rank_tokens / np.maximum(draws[near, 0], 1)
    return float((draws[near, 1] * scale).mean()), float(np.maximum(draws[near, 2], 1).mean())


@cache
def _draws(tokens: int, experts: int, slots: int, ranks: int, k: int, alpha: float, balanced: bool) -> np.ndarray:
    """float64 [24, 3]: distinct tokens, picks and touched experts of the hottest rank."""
    rng = np.random.default_rng([SEED, tokens, slots, ranks, round(100 * alpha), balanced])
    low, high = (1.0, tokens * 0.8) if tokens * k > experts else (0.01, 2.0)
    out = []
    for uniform in rng.random((24, experts)):
        load = ((high ** (1 - alpha) - low ** (1 - alpha)) * uniform + low ** (1 - alpha)) ** (1 / (1 - alpha))
        counts = _whole(np.minimum(load / load.sum() * tokens * k, tokens), tokens, k)
        rank = np.arange(experts) // (experts // ranks)
        if balanced:
            counts, rank = _replicate(counts, slots, ranks)
            counts = _whole(counts, tokens, k)
        hottest = np.argmax(np.bincount(rank, counts, ranks))
        order = np.argsort(-counts, kind="stable")
        mine = rank[order] == hottest
        seen = _covered(counts[order].astype(np.int64), mine, tokens)
        out.append((seen, counts[rank == hottest].sum(), (counts[rank == hottest] > 0).sum()))
    return np.array(out, np.float64)


def _whole(counts: np.ndarray, tokens: int, k: int) -> np.ndarray:
    """Rounded down, then topped up to tokens x k, largest remainders first and nowhere above `tokens`."""
    whole = np.floor(counts)
    while (lack := int(tokens * k - whole.sum())) > 0:
        room = np.flatnonzero(whole < tokens)
        whole[room[np.argsort(whole[room] - counts[room], kind="stable")[:lack]]] += 1
    return whole


def _replicate(counts: np.ndarray, slots: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads of the slots, hottest experts split, and each slot's rank, heaviest slot first to the lightest rank."""
    copies = np.ones(len(counts))
    for _ in range(slots - len(counts)):
        copies[np.argmax(counts / copies)] += 1
    load = np.repeat(counts / copies, copies.astype(int))
    return load, _lightest(np.argsort(-load, kind="stable"), load, ranks)


@numba.njit(cache=True)
def _lightest(order, load, ranks):  # type: ignore[no-untyped-def]
    total, held, rank = np.zeros(ranks), np.zeros(ranks), np.zeros(len(load), np.int64)
    for slot in order:
        best = -1
        for r in range(ranks):
            if held[r] < len(load) // ranks and (best < 0 or total[r] < total[best]):
                best = r
        rank[slot], total[best], held[best] = best, total[best] + load[slot], held[best] + 1
    return rank


@numba.njit(cache=True)
def _covered(counts, mine, tokens):  # type: ignore[no-untyped-def]
    seen, start = np.zeros(tokens, np.bool_), 0
    for e in range(len(counts)):
        if mine[e]:
            for j in range(start, start + counts[e]):
                seen[j % tokens] = True
        start += counts[e]
    return seen.sum()
