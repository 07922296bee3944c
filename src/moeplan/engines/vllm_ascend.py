"""vLLM-Ascend (main, 182b75ea): the file of `eplb_config.expert_map_path` (`vllm_ascend/eplb/core/eplb_utils.py`).

    {"moe_layer_count": L, "layer_list": [{"layer_id": 0, "device_count": P, "device_list": [
        {"device_id": 0, "device_expert": [experts of its slots]}, ..]}, ..]}

MoE layers only, in their order: the loader uses the position in the lists and ignores the ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeplan.engines.map_rules import Row, check_rows, finish
from moeplan.engines.parsing import load_json
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings, Report, other_engine_hint, show
from moeplan.model.spec import ModelSpec

__all__ = ["content", "examine"]

_TOP, _LAYER, _DEVICE = (
    ("moe_layer_count", "layer_list"),
    ("layer_id", "device_count", "device_list"),
    ("device_id", "device_expert"),
)


def content(placement: EnginePlacement) -> dict[str, Any]:
    """The file as plain values."""
    layers, ranks = placement.physical_to_logical, placement.ep_size
    return {
        "moe_layer_count": len(layers),
        "layer_list": [
            {
                "layer_id": i,
                "device_count": ranks,
                "device_list": [
                    {"device_id": d, "device_expert": held} for d, held in enumerate(row.reshape(ranks, -1).tolist())
                ],
            }
            for i, row in enumerate(layers)
        ],
    }


def examine(path: Path, model: ModelSpec, layout: EpSettings) -> Report:
    """Check a file."""
    report = Report(path, "vllm-ascend", model, layout)
    if path.suffix != ".json":
        report.add_error("", "vLLM-Ascend reads files whose names end in .json only", "rename it")
    data = load_json(report)
    if data is None and not report.ok:
        return report
    layers = _member(report, "", data, _TOP, "layer_list")
    if layers is None:
        return report
    _equal(report, "moe_layer_count", data.get("moe_layer_count"), len(layers), f"there are {len(layers)} layers")
    moe = model.moe_layers
    if moe is None:
        report.unchecked.append("that every MoE layer is present, in the model's order: give --config")
    elif len(moe) != len(layers):
        report.add_error("layer_list", f"has {len(layers)} layers for {len(moe)} MoE layers", "give each layer once")
        moe = None
    rows = [_row(report, i, layer, moe) for i, layer in enumerate(layers)]
    if any(row is None for row in rows):
        return report
    table = check_rows(report, [row for row in rows if row is not None], unique=True, wraps=True)
    return finish(report, table, moe)


def _row(report: Report, i: int, layer: Any, moe: tuple[int, ...] | None) -> Row | None:
    """One layer's devices concatenated; None with an error where they are not lists of the same length."""
    place = f"layer_list, item {i}"
    devices = _member(report, place, layer, _LAYER, "device_list")
    if devices is None:
        return None
    _equal(report, f"{place}, layer_id", layer.get("layer_id"), i, "the loader uses the position in the list")
    count, ok = len(devices), True
    _equal(report, f"{place}, device_count", layer.get("device_count"), count, f"there are {count} devices")
    held: list[list[Any]] = []
    for d, device in enumerate(devices):
        here = f"{place}, device_list, item {d}"
        experts = _member(report, here, device, _DEVICE, "device_expert")
        if experts is None:
            return None
        _equal(report, f"{here}, device_id", device.get("device_id"), d, "the loader uses the position in the list")
        if held and len(experts) != len(held[0]):
            what = f"has {len(experts)} experts, device 0 has {len(held[0])}"
            report.add_error(f"{here}, device_expert", what, "give every device the same number")
            ok = False
        held.append(experts)
    if not count:
        report.add_error(f"{place}, device_list", "is empty", "give every device its experts")
        return None
    if report.layout.ep_size is None or report.layout.ep_size != count:
        report.record(f"{place}, device_list", "--ep-size (or the layer before)", "ep_size", count)
    per = max(len(held[0]), 1)

    def slot(s: int) -> str:
        return f"device_list, item {s // per}, device_expert, item {s % per}"

    model = f" (layer {moe[i]})" if moe else ""
    return Row(place + model, moe[i] if moe else None, [e for one in held for e in one], slot) if ok else None


def _member(report: Report, place: str, data: Any, keys: tuple[str, ...], wanted: str) -> list[Any] | None:
    """The list `wanted` of an object; None with an error. A warning for keys that the loader never reads."""
    at = f"{place}, " if place else ""
    if not isinstance(data, dict):
        report.add_error(place, f"is {show(data)}, not an object", f"write {', '.join(keys)}")
        return None
    if wanted not in data:
        found = ", ".join(show(key) for key in list(data)[:4]) or "none"
        report.add_error(
            f"{at}key {wanted}",
            f"is missing (keys: {found})",
            f"write {', '.join(keys)}" + other_engine_hint(data, "vllm-ascend"),
        )
        return None
    for key in data:
        if key not in keys:
            report.add_warning(f"{at}key {show(key)}", "is never read", "leave it out")
    if not isinstance(data[wanted], list):
        report.add_error(f"{at}{wanted}", f"is {show(data[wanted])}, not a list", "write a list")
        return None
    return list(data[wanted])


def _equal(report: Report, place: str, value: Any, expected: int, why: str) -> None:
    if type(value) is not int or value != expected:
        report.add_error(place, f"is {show(value)}, but {why}", f"write {expected}")
