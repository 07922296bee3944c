"""Fit the time model's constants from measured kernel times, and write `src/moeplan/perf/data/constants.json`.

    python benchmarks/time_fit.py               # everything: kernels, then what an engine adds
    python benchmarks/time_fit.py engine        # these groups alone; the others stay as they are in the file

Each group of constants is fitted on the fit parts of its tables, H100 and H200 together (`time_tables.py` deals them);
`time_accuracy.py` prints both parts' errors. Physical limits bound the search: no share of a peak above 1.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from moeplan.perf.constants import FILE, FORMAT, Constants, load_constants
from moeplan.perf.hardware import load_hardware
from serving_tables import FIT_MODELS, served
from time_tables import (
    MACHINES,
    MEASURED,
    SEED,
    Table,
    cutlass_table,
    decode_table,
    deepgemm_table,
    gemm_table,
    low_latency_table,
    mla_layer_table,
    mla_table,
    normal_table,
    prefill_table,
)

SOURCE = "aiconfigurator-core 0.12.0 (PyPI, Apache-2.0)"
#: What the fitted shares and latencies refer to; a test holds the catalogue to what is recorded here.
USED = ("name", "flops", "memory_bytes_per_s", "scale_up", "scale_up_size", "scale_out")
#: Rows a fit uses at most of each table, drawn at random from the fit part.
MOST = 4000


@dataclass(frozen=True)
class Fit:
    """One group of constants: its tables, where the search starts, and what stays as it is."""

    group: str
    tables: Callable[[], list[Table]]
    start: dict[str, float]
    fixed: dict[str, float]
    file: str
    note: str = ""


def both(make: Callable[..., Table], *args: str) -> Callable[[], list[Table]]:
    return lambda: [make(machine, *args) for machine in MACHINES]


GEMM = {"launch_s": 3e-6, "compute": 0.7, "memory": 0.85, "throttle": 0.1, "overlap": 3.0}
#: A unit loads 64 bytes a clock from the L2 cache: 64 x 1.755 GHz over 989.4e12 / 132 (H100; fitted freely: 0.0150).
FEED = {"feed": 0.01499}
PREFILL = {"launch_s": 9e-6, "compute": 0.8, "softmax": 200.0, "memory": 0.8, "tile_s": 2e-6, "overlap": 3.0}
DECODE = {"launch_s": 8e-6, "memory": 0.9, "tile_s": 3e-6, "split_s": 2e-6}
#: Never compute-bound; keys and values are read as they are.
READS = {"compute": 0.6, "overlap": 2.0, "convert": 1.0, "convert_s": 0.0}
EXPERTS = {"launch_s": 3e-5, "compute": 0.5, "memory": 0.85}
LOW_LATENCY = {"launch_s": 8e-6, "hops": 4.0, "doubling": 1.0, "scale_up": 0.5, "scale_out": 0.95}
NORMAL = {"hops": 10.0, "scale_out": 0.9, "unit_bytes_per_s": 14e9}
#: Inside a node the copying units are the limit, not the links; the launch cannot be told from the latency.
NOT_SEEN = {"launch_s": 1e-5, "doubling": 0.0, "scale_up": 1.0, "overlap": 8.0}

FITS = (
    Fit(
        "gemm_bf16",
        both(gemm_table, "bf16"),
        {**GEMM, "split_s": 1e-6},
        {**FEED, "quantise": 1.0, "fill": 0.0},
        "gemm_{h100,h200}.parquet",
    ),
    Fit(
        "gemm_fp8",
        both(gemm_table, "fp8"),
        {**GEMM, "fill": 300.0, "quantise": 0.6},
        {**FEED, "split_s": 0.0},
        "gemm_{h100,h200}.parquet",
    ),
    Fit(
        "gemm_fp8_block",
        both(gemm_table, "fp8_block"),
        {**GEMM, "fill": 200.0, "quantise": 0.9},
        {**FEED, "split_s": 0.0},
        "gemm_{h100,h200}.parquet",
    ),
    Fit("prefill_bf16", both(prefill_table, "bf16"), PREFILL, {}, "context_attention_{h100,h200}.parquet"),
    Fit("prefill_fp8", both(prefill_table, "fp8"), PREFILL, {}, "context_attention_{h100,h200}.parquet"),
    Fit(
        "decode_bf16",
        both(decode_table, "bf16"),
        {**DECODE, "cache": 1.5},
        READS,
        "generation_attention_{h100,h200}.parquet",
    ),
    Fit(
        "decode_fp8",
        both(decode_table, "fp8"),
        {**DECODE, "cache": 1.5},
        READS,
        "generation_attention_{h100,h200}.parquet",
    ),
    Fit(
        "mla_decode",
        both(mla_table),
        {**DECODE, "compute": 0.6, "convert": 0.3, "convert_s": 5e-6},
        {"cache": 1.0, "overlap": 3.0},
        "generation_mla_{h100,h200}.parquet",
    ),
    Fit(
        "mla_layer",
        lambda: [mla_layer_table(m, p) for p in ("generation", "context") for m in MACHINES],
        {"decode_s": 5e-6, "host_s": 6e-4, "host_request_s": 1e-6},
        {"moves": 0.85},
        "wideep_{generation,context}_mla_{h100,h200}.parquet",
    ),
    Fit(
        "experts_deepgemm",
        both(deepgemm_table),
        EXPERTS,
        {"moves": 1.0, "rows": 32.0, "overlap": 3.0},
        "wideep_generation_moe_{h100,h200}.csv",
        "uniform loads only",
    ),
    Fit(
        "experts_cutlass",
        both(cutlass_table),
        {**EXPERTS, "moves": 0.7, "rows": 32.0, "overlap": 2.0},
        {},
        "wideep_moe_{h100,h200}.parquet",
    ),
    Fit(
        "low_latency_dispatch",
        lambda: [low_latency_table("dispatch")],
        {**LOW_LATENCY, "overlap": 4.0},
        {"unit_bytes_per_s": 0.0},
        "deepep_low_latency_h100.csv",
    ),
    Fit(
        "low_latency_combine",
        lambda: [low_latency_table("combine")],
        {**LOW_LATENCY, "overlap": 4.0},
        {"unit_bytes_per_s": 0.0},
        "deepep_low_latency_h100.csv",
    ),
    Fit(
        "normal_dispatch",
        lambda: [normal_table("dispatch")],
        NORMAL,
        NOT_SEEN,
        "deepep_normal_h100.csv",
        "1-4 nodes, 128 tokens or more",
    ),
    Fit(
        "normal_combine",
        lambda: [normal_table("combine")],
        NORMAL,
        NOT_SEEN,
        "deepep_normal_h100.csv",
        "1-4 nodes, 128 tokens or more",
    ),
)
#: What engines add, from time per output token. In this order: Blackwell's ratios stand on Hopper's constants.
FITS += (
    Fit(
        "engine",
        lambda: [served("h100_sxm", "dense"), served("h200_sxm", "dense"), served("h200_sxm", "moe")],
        {"step_s": 5e-4, "request_s": 3e-5, "expert_layer_s": 3e-5},
        {},
        "serving_points{,_dense}.csv",
        "H100 and H200, ep 1",
    ),
    Fit(
        "blackwell",
        lambda: [served("b200_sxm", "moe")],
        {"overhead": 0.7, "rates": 0.95},
        {},
        "serving_points.csv",
        "B200, ep 1",
    ),
)
#: Not measured here: stated shares, to be replaced by a measurement when there is one.
STATED = {"collective": ({"launch_s": 6e-6, "scale_up": 0.75, "scale_out": 0.9},
                         "no measured all-reduce in ../shared/measured: stated, not fitted")}  # fmt: skip


def solve(fit: Fit, known: dict[str, Any]) -> tuple[dict[str, float], list[Table]]:
    """Least squares of log(model / measured), soft at 5 %, over the logarithms of the constants."""
    tables = fit.tables()
    rng = np.random.default_rng([SEED, zlib.crc32(fit.group.encode())])
    parts = []
    for table in tables:
        mine = np.flatnonzero(table.fitted)
        mask = np.zeros(len(table.seconds), bool)
        mask[rng.permutation(mine)[:MOST]] = True
        parts.append(table.where(mask & np.isfinite(table.seconds)))
    names = list(fit.start)
    kind = Constants.groups()[fit.group]

    def with_values(x: np.ndarray) -> Constants:
        values = dict(zip(names, np.exp(x), strict=True)) | fit.fixed
        return Constants(**(known | {fit.group: kind(**values)}))

    def residuals(x: np.ndarray) -> np.ndarray:
        c = with_values(np.clip(x, -40, 40))
        return np.concatenate([np.log1p(np.clip(part.errors(c), -0.999, 1e3)) for part in parts])

    bounds = [_bounds(name) for name in names]
    start = np.log([fit.start[name] for name in names])
    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=0.05, diff_step=1e-3,
        bounds=(np.log([b[0] for b in bounds]), np.log([b[1] for b in bounds])),
    )  # fmt: skip
    return dict(zip(names, np.exp(found.x).tolist(), strict=True)) | fit.fixed, tables


def _bounds(name: str) -> tuple[float, float]:
    """Physical limits: no share above 1, overlaps between one after the other and full."""
    shares = ("compute", "memory", "quantise", "convert", "scale_up", "scale_out", "moves")
    if name in shares:
        return 1e-2, 1.0
    return {
        "overlap": (1.0, 8.0),
        "rows": (1.0, 128.0),
        "cache": (1.0, 5.0),
        "fill": (1.0, 2000.0),
        "throttle": (1e-3, 1.0),
        "overhead": (0.1, 2.0),
        "rates": (0.3, 1.0),
    }.get(name, (1e-9, 1e12))


def blank() -> dict[str, Any]:
    """Every group with its starting values."""
    out = {fit.group: Constants.groups()[fit.group](**fit.start, **fit.fixed) for fit in FITS}
    return out | {name: Constants.groups()[name](**values) for name, (values, _) in STATED.items()}


def main() -> None:
    if not MEASURED.is_dir():
        sys.exit(f"{MEASURED} is not there: the fit needs the measured times")
    known, groups, only = blank(), {}, sys.argv[1:]
    if unknown := set(only) - {fit.group for fit in FITS}:
        sys.exit(f"{', '.join(sorted(unknown))}: no such group to fit; there are {', '.join(f.group for f in FITS)}")
    if only:  # the rest as it is
        groups = json.loads(FILE.read_text(encoding="utf-8"))["groups"]
        kept = load_constants()
        known |= {name: getattr(kept, name) for name in known if name not in only}
    else:  # kernels are fitted as they are on Hopper
        known["blackwell"] = Constants.groups()["blackwell"](1.0, 1.0)
    for fit in FITS:
        if only and fit.group not in only:
            continue
        values, tables = solve(fit, known)
        kind = Constants.groups()[fit.group]
        known[fit.group] = kind(**values)
        c = Constants(**known)
        parts = {"fit": np.concatenate([t.errors(c)[t.fitted] for t in tables]),
                 "check": np.concatenate([t.errors(c)[~t.fitted] for t in tables])}  # fmt: skip
        error = {name: round(float(np.median(abs(e))), 4) for name, e in parts.items()}
        print(f"{fit.group:22s} fit {error['fit']:.3f} check {error['check']:.3f}  "
              + " ".join(f"{k}={v:.4g}" for k, v in values.items()), flush=True)  # fmt: skip
        split = f"half by {', '.join(tables[0].shape)}, seed {SEED}; "
        if fit.group in ("engine", "blackwell"):
            split = f"fitted on {', '.join(FIT_MODELS)}; "
        split += f"{len(parts['fit'])} rows fit, {len(parts['check'])} check"
        groups[fit.group] = {
            "file": fit.file, "split": split + (f"; {fit.note}" if fit.note else ""), "median_error": error,
            "values": _described(kind, values, fit.fixed),
        }  # fmt: skip
    for name, (values, note) in STATED.items():
        groups[name] = {"file": None, "split": note, "median_error": None,
                        "values": _described(Constants.groups()[name], values, values)}  # fmt: skip
    reference = {m: {k: v for k, v in dataclasses.asdict(load_hardware(m)).items() if k in USED} for m in MACHINES}
    FILE.parent.mkdir(exist_ok=True)
    unfinished = FILE.with_suffix(".part")
    unfinished.write_text(json.dumps({
        "format": FORMAT[0], "version": FORMAT[1], "attribution": f"Derived from the data base of {SOURCE}.",
        "command": "python benchmarks/time_fit.py", "hardware": reference, "groups": groups,
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    unfinished.replace(FILE)
    print(f"wrote {FILE}")


def _described(kind: type, values: dict[str, float], fixed: dict[str, float]) -> dict[str, Any]:
    return {
        f.name: {"value": float(f"{values[f.name]:.5g}"), **f.metadata, "fitted": f.name not in fixed}
        for f in dataclasses.fields(kind)
    }


if __name__ == "__main__":
    main()
