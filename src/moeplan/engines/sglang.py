"""SGLang 0.5.23: the file of `--init-expert-location` (`srt/eplb/expert_location.py`).

    {"physical_to_logical_map": [one row of E + R experts for EVERY hidden layer]}

Rows of layers without experts are read like the others, but not used: they get a placeholder. The map must be the only
key. The argument must end in .json or .pt; otherwise SGLang takes the text itself for the JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeplan.engines.map_rules import Row, check_rows, finish
from moeplan.engines.parsing import load_json, load_tensors
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings, Report, other_engine_hint, show
from moeplan.model.spec import ModelSpec

__all__ = ["MAP", "content", "examine"]

MAP, COUNTS = "physical_to_logical_map", "logical_count"


def content(placement: EnginePlacement, num_layers: int) -> dict[str, Any]:
    """The file as plain values.

    Args:
        num_layers: all hidden layers; those without a placement have no experts, and get a linear placement.
    """
    dummy = np.arange(placement.num_slots) % placement.num_experts
    rows = np.tile(dummy, (num_layers, 1))
    rows[list(placement.layer_ids)] = placement.physical_to_logical
    return {MAP: rows.tolist()}


def examine(path: Path, model: ModelSpec, layout: EpSettings) -> Report:
    """Check a .json or .pt file."""
    report = Report(path, "sglang", model, layout)
    if path.suffix not in (".json", ".pt"):
        report.add_error("", "SGLang reads files whose names end in .json or .pt only", "rename it")
    rows = _load(report)
    if rows is None:
        return report
    moe = model.moe_layers
    if model.layers is None:
        report.unchecked.append("that there is a row for every hidden layer: give --config")
    elif len(rows) != model.layers:
        what = f"has {len(rows)} rows for {model.layers} hidden layers"
        if moe is not None and len(rows) == len(moe):
            what += ": layers without experts need a row too"
        report.add_error(MAP, what, "give one row per hidden layer")
    if moe is not None and model.layers is None and moe[-1] >= len(rows):
        report.add_error(MAP, f"has {len(rows)} rows, but layer {moe[-1]} has experts", "give one row per hidden layer")
    table = check_rows(report, [_row(i, values, moe) for i, values in enumerate(rows)], wraps=True)
    if moe is not None and model.layers is None and table is not None and moe[-1] + 1 < len(rows):
        report.unchecked.append(f"which rows the layers with experts are: the last is {moe[-1]} of {len(rows)} rows")
        return report
    return finish(report, table, moe, None if moe is None else np.array(moe, np.intp))


def _row(i: int, values: Any, moe: tuple[int, ...] | None) -> Row:
    dense = ", which has no experts" if moe is not None and i not in moe else ""
    return Row(f"{MAP}, row {i} (layer {i}{dense})", i, values)


def _load(report: Report) -> list[Any] | None:
    """The unchecked rows; None with an error."""
    if report.path.suffix == ".pt":
        loaded = load_tensors(report, MAP)
        if loaded is None:
            return None
        data: Any = dict.fromkeys(loaded[0])
        data |= {MAP: loaded[1]} if MAP in data else {}
    else:
        data = load_json(report)
    if not report.ok and data is None:
        return None
    if not isinstance(data, dict):
        report.add_error("", f"is {show(data)}, not an object", f'write {{"{MAP}": [[..], ..]}}')
        return None
    if MAP not in data:
        if COUNTS in data:
            what = "holds counts, of which SGLang makes a placement itself when it starts; there is none to check"
            report.add_error(f"key {COUNTS}", what, "moeplan export FILE --engine sglang makes one of counts")
        else:
            keys = ", ".join(show(key) for key in list(data)[:4]) or "none"
            report.add_error(
                f"key {MAP}",
                f"is missing (keys: {keys})",
                f'write {{"{MAP}": [[..], ..]}}' + other_engine_hint(data, "sglang"),
            )
        return None
    for key in data:
        if key != MAP:
            hint = "leave it out" + (other_engine_hint(data, "sglang") if key == "format" else "")
            report.add_error(f"key {show(key)}", f"is more than SGLang takes beside {MAP} (TypeError)", hint)
    if not isinstance(data[MAP], list):
        report.add_error(MAP, f"is {show(data[MAP])}, not a list of rows", "give one row per hidden layer")
        return None
    return list(data[MAP])
