"""Errors of the time model against measured kernel times: fit, check, misses. Writes `docs/results/accuracy.md`.

    python benchmarks/time_accuracy.py

Reads `../shared/measured` and the shipped constants; fits nothing, but for the transfers of section 2, whose fits are
thrown away. A section is a title, a note, and a function that returns rows: append to SECTIONS to add one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import serving_accuracy
import time_fit as fits
import time_tables as tf
from moeplan.cluster import Dispatch
from moeplan.perf.collectives import expert_exchange, uniform_messages
from moeplan.perf.constants import FILE, Constants, load_constants
from moeplan.perf.hardware import load_hardware
from moeplan.perf.operators import Device
from time_report import SCORES, Row, percent, scores, signed

PAGE = Path(__file__).parents[1] / "docs" / "results" / "accuracy.md"
Mask = Callable[[tf.Columns], np.ndarray]

BIG = 4096


def everything(r: tf.Columns) -> np.ndarray:
    return np.ones(len(next(iter(r.values()))), bool)


def big(r: tf.Columns) -> np.ndarray:
    return (r["m"] >= BIG) & (r["n"] >= BIG) & (r["k"] >= BIG)


def nodes(low: int, least: int, most: int) -> Mask:
    return lambda r: (r["node_num"] >= low) & (r["num_token"] >= least) & (r["num_token"] <= most)


def busy_ranks(r: tf.Columns) -> np.ndarray:
    return (r["num_tokens"] >= 512) & (r["moe_ep_size"] >= 8) & (r["moe_ep_size"] <= 128)


#: (what, its tables, which rows, target on the median, target on every row)
Target = tuple[str, Callable[[], list[tf.Table]], Mask, float | None, float | None]


def both(
    what: str, make: Callable[..., tf.Table], *args: str, mask: Mask = everything, target: float | None = 0.15
) -> list[Target]:
    return [(f"{what}, {m.upper()}", lambda m=m: [make(m, *args)], mask, target, None) for m in tf.MACHINES]  # type: ignore[misc]


def targets() -> Iterator[Target]:
    for way in ("dispatch", "combine"):
        yield (f"DeepEP low latency {way}, 2-8 nodes, 8-256 tokens",
               lambda way=way: [tf.low_latency_table(way)], nodes(2, 8, 256), 0.08, 0.20)  # type: ignore[misc]  # fmt: skip
        yield (f"the same {way}, 1 node", lambda way=way: [tf.low_latency_table(way)],  # type: ignore[misc]
               lambda r: r["node_num"] == 1, None, None)  # fmt: skip
    for way in ("dispatch", "combine"):
        yield (f"DeepEP normal {way}, 1-4 nodes, 512 tokens or more, all SM counts",
               lambda way=way: [tf.normal_table(way)], nodes(1, 512, 10**9), 0.15, None)  # type: ignore[misc]  # fmt: skip
    yield from both("experts of the hottest rank (`wideep_moe`), 512 tokens or more, EP 8-128", tf.cutlass_table,
                    mask=busy_ranks, target=0.12)  # fmt: skip
    yield from both("the same, all rows", tf.cutlass_table, target=None)
    yield from both("experts, DeepGEMM, uniform loads (`wideep_generation_moe`)", tf.deepgemm_table, target=None)
    for kind in ("bf16", "fp8", "fp8_block"):
        yield from both(f"GEMM {kind}", tf.gemm_table, kind)
        yield from both(f"GEMM {kind}, 4096^3 or more", tf.gemm_table, kind, mask=big, target=0.08)
    for kind in ("bf16", "fp8"):
        yield from both(f"attention, prefill, {kind}", tf.prefill_table, kind)
        yield from both(f"attention, decode, {kind} keys and values", tf.decode_table, kind)
    yield from both("attention, prefill, Triton, heads of 256 and 512 (not modelled)", tf.prefill_table, "triton")
    yield from both("attention, decode, Triton, heads of 256 and 512 (not modelled)", tf.decode_table, "triton")
    yield from both("MLA kernel, decode", tf.mla_table)
    yield from both("MLA block, decode (`wideep_generation_mla`)", tf.mla_layer_table, "generation")
    yield from both("MLA block, prefill (`wideep_context_mla`)", tf.mla_layer_table, "context")


HEAD = ("against", "part", *SCORES)


def kernels() -> list[Row]:
    """One row per target and part."""
    c, out = load_constants(), [HEAD]
    for what, tables, mask, median_target, worst_target in targets():
        part = {"fit": [], "check": []}  # type: ignore[var-annotated]
        for table in tables():
            chosen, error = mask(table.rows), table.errors(c)
            part["fit"].append(error[chosen & table.fitted])
            part["check"].append(error[chosen & ~table.fitted])
        for name, errors in part.items():
            out.append((what, name, *scores(np.concatenate(errors), median_target, worst_target)))
    return out


def transfers() -> list[Row]:
    """Fits on one machine or some node counts, checked on the others."""
    out: list[Row] = [("constants", "fitted on", "checked on", "rows", "median error", "worst")]
    for fit in fits.FITS:
        tables = fit.tables()
        if fit.group.startswith(("low", "normal")):
            for left in (4, 8) if fit.group.startswith("low") else (4,):
                away = tables[0].rows["node_num"] == left
                out.append(
                    _transfer(fit, [tables[0].where(~away)], [tables[0].where(away)], "other nodes", f"{left} nodes")
                )
        elif fit.group not in ("mla_layer", "engine", "blackwell"):
            out.append(_transfer(fit, tables[:1], tables[1:], "H100", "H200"))
    return out


def _transfer(fit: fits.Fit, near: list[tf.Table], far: list[tf.Table], on: str, at: str) -> Row:
    import dataclasses

    alone = dataclasses.replace(fit, tables=lambda: [dataclasses.replace(t, whole=True) for t in near])
    values, _ = fits.solve(alone, fits.blank())
    known = fits.blank() | {fit.group: Constants.groups()[fit.group](**values)}
    error = abs(np.concatenate([t.errors(Constants(**known)) for t in far]))
    return f"`{fit.group}`", on, at, str(len(error)), percent(float(np.median(error))), percent(float(error.max()))


def published() -> list[Row]:
    """DeepEP's README (V1, H800 with 400 Gb/s a GPU), 128 tokens, hidden 7168, top-8, 256 experts: never fitted."""
    out: list[Row] = [("GPUs", "direction", "published, us", "model, us", "error")]
    rows = tf.read("published_targets.csv")
    h800 = Device(load_hardware("h800"))
    for name, value in zip(rows["id"], rows["value"], strict=True):
        if not str(name).startswith("deepep-ll-ep"):
            continue
        gpus = int(str(name).removeprefix("deepep-ll-ep"))
        messages = uniform_messages(Dispatch.PICK, gpus // 8, 8, 128, 8, 256)
        for way, text in zip(("dispatch", "combine"), str(value).split(";"), strict=True):
            model = 1e6 * float(expert_exchange(h800, Dispatch.PICK, messages, 7168, 8, gpus // 8, way).seconds)  # type: ignore[arg-type]
            out.append((str(gpus), way, text, f"{model:.0f}", signed(model / float(text) - 1)))
    return out


def misses() -> list[Row]:
    """The shapes behind the largest errors of each table's check part: bands of one size, worst median first."""
    bands = {"gemm": ("m", (1, 64, 128, 512, 2048, 8192)), "prefill": ("isl", (1, 64, 512, 2048)),
             "decode": ("step", (1, 128, 1024, 8192, 65536)), "mla decode": ("step", (1, 128, 1024, 8192)),
             "mla layer": ("isl", (1, 64, 1024, 4096)), "experts": ("num_tokens", (1, 64, 512, 4096)),
             "normal": ("num_token", (128, 512, 4096, 32768))}  # fmt: skip
    c, found = load_constants(), []
    for fit in fits.FITS:
        for table in fit.tables():
            key = max((k for k in bands if table.name.startswith(k)), key=len, default=None)
            if key is None:
                continue
            column, edges = bands[key]
            error, size = table.errors(c)[~table.fitted], table.rows[column][~table.fitted]
            for low, high in zip(edges, (*edges[1:], np.inf), strict=True):
                inside = error[(size >= low) & (size < high)]
                if len(inside) >= 10:
                    found.append(
                        (float(np.median(abs(inside))), float(np.median(inside)), table, column, low, high, len(inside))
                    )
    found.sort(key=lambda row: -row[0])
    out: list[Row] = [("table", "machine", "band", "rows", "median error", "bias")]
    for median, bias, table, column, low, high, count in found[:12]:
        band = f"{column} {low} and more" if np.isinf(high) else f"{column} {low} to {high - 1}"
        out.append((table.name, table.machine.upper(), band, str(count), percent(median), signed(bias)))
    return out


def shipped() -> list[Row]:
    """Every constant with its origin and error."""
    out: list[Row] = [("group", "constant", "value", "unit", "meaning", "fitted")]
    for name, group in json.loads(FILE.read_text(encoding="utf-8"))["groups"].items():
        for key, entry in group["values"].items():
            fitted = "yes" if entry["fitted"] else "no"
            out.append((name, key, f"{entry['value']:.4g}", entry["unit"], entry["meaning"], fitted))
    return out


def origins() -> list[Row]:
    out: list[Row] = [("group", "file", "split", "median error, fit", "check")]
    for name, group in json.loads(FILE.read_text(encoding="utf-8"))["groups"].items():
        error = group["median_error"]
        shown = (percent(error["fit"]), percent(error["check"])) if error else ("-", "-")
        out.append((name, group["file"] or "-", group["split"], *shown))
    return out


#: (title, note, rows).
SECTIONS: list[tuple[str, str, Callable[[], list[Row]]]] = [
    (
        "Kernels",
        "Error is model / measurement - 1; `bias` is its median with sign. Half of the shapes of each table were "
        "used to fit the constants (`fit`), the other half not (`check`). The decode tables time a kernel "
        "repeatedly, with keys and values up to 40 MB still in the L2 cache: `warm=True` here, and nowhere else. The "
        "measured MLA blocks are assumed to begin after the projection to latent vectors (`down=False`): otherwise "
        "their long prefills would exceed the peak rate. GEMM times in fp8 include the conversion of the inputs. "
        "`wideep_moe` has the tokens of the hottest rank; its picks and experts are drawn again in the way of the "
        "measurement. Triton's attention is not modelled: SGLang uses it for heads of 256 and 512, in a model that "
        "is not in the catalogue; its rows are shown with the constants of FlashAttention-3.",
        kernels,
    ),
    *serving_accuracy.SECTIONS,
    ("Where the check part of the kernels misses most", "Ranges of one size parameter, worst first.", misses),
    (
        "Transfer",
        "Constants fitted on one machine, or without one number of nodes, and checked on the other. For this table "
        "only.",
        transfers,
    ),
    (
        "DeepEP as published",
        "Low latency on H800, 128 tokens per GPU, from DeepEP's README (V1); not fitted. The constants are fitted on "
        "another machine.",
        published,
    ),
    ("Origins of the constants", "Data: aiconfigurator-core 0.12.0 (PyPI, Apache-2.0).", origins),
    (
        "The constants",
        "As in `src/moeplan/perf/data/constants.json`; `no`: set by a datasheet or by reasoning.",
        shipped,
    ),
]


def table_text(rows: list[Row]) -> str:
    """Markdown."""
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bench() -> list[tuple[str, str]]:
    """For `make bench`: the check part's median errors."""
    if not tf.MEASURED.is_dir():
        return [("time accuracy", "skipped: ../shared/measured is not on this machine")]
    rows = [*kernels()[1:], *serving_accuracy.points()[1:]]
    return [(row[0], f"{row[3]} of {row[2]} rows, target {row[7]}") for row in rows if row[1] == "check"]


def main() -> None:
    if not tf.MEASURED.is_dir():
        sys.exit(f"{tf.MEASURED} is not there: the page needs the measured times")
    page = [
        "# Accuracy of the time model",
        "Written by `python benchmarks/time_accuracy.py`; the constants by `python benchmarks/time_fit.py`.",
    ]
    for title, note, rows in SECTIONS:
        page += [f"## {title}", note, table_text(rows())]
        print(f"\n{title}\n{page[-1]}", flush=True)
    PAGE.write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
