"""TensorRT-LLM: the YAML of `moe_config.load_balancer`, static expert-parallel load balancing.

    num_slots: S
    initial_global_assignments:
      LAYER: [the expert of every slot]      # LAYER: the model's own index of each MoE layer
    layer_updates_per_iter: 0                # above 0 the engine moves experts by itself

moeplan cannot run the engine's code, so the rules follow its source, read at these commits:
`MoeLoadBalancerConfig` (a strict pydantic model: other keys are refused); `moe_load_balancer.py` 000a01de (an entry for
every MoE layer, else KeyError; slots that divide by the EP size, else ValueError; as many experts in a list as slots);
the README of wide_ep, 2a595f81.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeplan.engines.map_rules import Row, check_rows, finish
from moeplan.engines.parsing import load_yaml
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings, Report, other_engine_hint, show
from moeplan.model.spec import ModelSpec
from moeplan.types import MAX_LAYERS

__all__ = ["content", "examine"]

MAP = "initial_global_assignments"
_KEYS = ("num_slots", MAP, "layer_updates_per_iter")


def content(placement: EnginePlacement) -> str:
    """The file's text."""
    lines = [f"num_slots: {placement.num_slots}", f"{MAP}:"]
    rows = zip(placement.layer_ids, placement.physical_to_logical.tolist(), strict=True)
    lines += [f"  {layer}: {row}" for layer, row in rows]
    return "\n".join([*lines, "layer_updates_per_iter: 0", ""])


def examine(path: Path, model: ModelSpec, layout: EpSettings) -> Report:
    """Check a file."""
    report = Report(path, "tensorrt-llm", model, layout)
    data = load_yaml(report)
    if data is None and not report.ok:
        return report
    if not isinstance(data, dict):
        report.add_error("", f"is {show(data)}, not a map of {', '.join(_KEYS)}", "write these keys")
        return report
    for key in data:
        if key not in _KEYS:
            report.add_error(f"key {show(key)}", "is unknown, and refused", f"the keys are {', '.join(_KEYS)}")
    slots = data.get("num_slots")
    if type(slots) is not int or slots < 1:
        report.add_error("num_slots", f"is {show(slots)}, not a number of slots", "write experts + redundant slots")
        slots = None
    updates = data.get("layer_updates_per_iter", 0)
    if type(updates) is not int or updates < 0:
        what = f"is {show(updates)}, not a number of layers"
        report.add_error("layer_updates_per_iter", what, "write 0 for a static placement")
    elif updates:
        what = f"is {updates}: the engine moves experts itself and does not keep this placement"
        report.add_warning("layer_updates_per_iter", what, "write 0 for a static one")
    else:
        if "layer_updates_per_iter" not in data:
            report.add_warning("layer_updates_per_iter", "is missing: the default is 0, a static placement")
    rows = data.get(MAP)
    if not isinstance(rows, dict) or not rows:
        hint = "write an entry for every MoE layer" + other_engine_hint(data, "tensorrt-llm")
        report.add_error(MAP, f"is {show(rows)}, not a map from layers to lists", hint)
        return report
    bad = [key for key in rows if type(key) is not int or not 0 <= key < MAX_LAYERS]
    if bad:
        report.add_error(
            f"{MAP}, key {show(bad[0])}", "is not a layer's number", "write the model's own index of the layer"
        )
        return report
    layers = tuple(sorted(rows))
    wanted = _check_layers(report, layers)
    table = check_rows(report, [Row(f"{MAP}, layer {i}", i, rows[i]) for i in layers], slots=slots)
    keep = np.array([i for i, layer in enumerate(layers) if layer in wanted], np.intp)
    return finish(report, table, wanted if len(keep) == len(wanted) else None, keep)


def _check_layers(report: Report, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The layers to use: the model's if known, else the file's own."""
    model = report.model
    if model.moe_layers is None:
        report.unchecked.append("that every MoE layer has an entry (the engine fails without one): give --config")
        return layers
    for layer in sorted(set(model.moe_layers) - set(layers)):
        report.add_error(f"{MAP}, layer {layer}", "is missing: the engine fails (KeyError)", "add its entry")
    for layer in sorted(set(layers) - set(model.moe_layers)):
        place = f"{MAP}, layer {layer}"
        if model.layers is not None and layer >= model.layers:
            report.add_warning(place, f"exceeds the {model.layers} hidden layers", "valid only for the MTP head")
        elif model.layers is not None:
            report.add_error(place, "is a layer without experts", "leave it out")
    return model.moe_layers
