"""vLLM 0.33.0: the file that moeplan's plug-in reads, and bare maps as vLLM's own policies return them.

vLLM 0.33.0 ships no placement file of its own; a policy plug-in can give it one (`vllm/distributed/eplb/policy/`,
`eplb_state.py`). So the format here is ours, and this module is where it is defined:

    {"format": "moeplan-vllm", "version": 1, "model": NAME, "layer_ids": [L model indices, rising],
     "num_experts": E, "num_redundant_experts": R, "ep_size": P, "nnodes": N,
     "physical_to_logical_map": [L lists of E + R experts]}

MoE layers only, in rising order, as vLLM's maps have them. Slot p is on rank p // ((E + R) / P).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.engines.map_rules import Row, check_rows, finish
from moeplan.engines.parsing import load_json, load_npy
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings, Report, other_engine_hint, show
from moeplan.model.spec import ModelSpec
from moeplan.types import MAX_EXPERTS, MAX_LAYERS

__all__ = ["FORMAT", "MAX_REDUNDANT", "VERSION", "content", "examine", "own_strategy", "read"]

FORMAT, VERSION = "moeplan-vllm", 1
#: `eplb_state.py`, MAX_EXPERT_REDUNDANCY.
MAX_REDUNDANT = 1023
MAP = "physical_to_logical_map"
_NUMBERS = {
    "num_experts": (1, MAX_EXPERTS),
    "num_redundant_experts": (0, 1 << 20),
    "ep_size": (1, 16384),
    "nnodes": (1, 16384),
}
_KEYS = ("format", "version", "model", "layer_ids", *_NUMBERS, MAP)


def content(placement: EnginePlacement, model: str = "") -> dict[str, Any]:
    """The file as plain values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "layer_ids": list(placement.layer_ids),
        "num_experts": placement.num_experts,
        "num_redundant_experts": placement.redundant,
        "ep_size": placement.ep_size,
        "nnodes": placement.nodes,
        MAP: placement.physical_to_logical.tolist(),
    }


def read(path: str | Path) -> EnginePlacement:
    """The placement in a file that `moeplan export --engine vllm` wrote.

    Raises:
        FormatError: a broken rule, with its location. UsageError: a bare map, which does not say its cluster.
    """
    return examine(Path(path), ModelSpec(), EpSettings()).require_placement()


def examine(path: Path, model: ModelSpec, layout: EpSettings) -> Report:
    """Check a file of the plug-in, or at a bare map [MoE layers, slots] (.json, .npy)."""
    report = Report(path, "vllm", model, layout)
    data = load_npy(report) if path.suffix == ".npy" else load_json(report)
    if not report.ok:
        return report
    if isinstance(data, list):
        return _examine_map(report, data)
    if not isinstance(data, dict):
        report.add_error("", f"is {show(data)}, not an object or a list of rows", "export the plan again")
        return report
    layers = _examine_head(report, data)
    rows = data.get(MAP)
    if not isinstance(rows, list):
        report.add_error(MAP, "is missing, or no list of rows", "export the plan again")
        return report
    if layers is not None and len(rows) != len(layers):
        report.add_error(MAP, f"has {len(rows)} rows for {len(layers)} layer_ids", "give one row per MoE layer")
    return finish(report, check_rows(report, _rows(rows, layers)), layers)


def _examine_map(report: Report, data: list[Any]) -> Report:
    """A bare map, whose layer ids only the model gives."""
    layers = report.model.moe_layers
    if layers is None:
        report.unchecked.append("that every MoE layer has its row: give --config")
    elif len(layers) != len(data):
        report.add_error("", f"has {len(data)} rows for {len(layers)} MoE layers", "give one row per MoE layer")
        layers = None
    table = check_rows(report, _rows(data, layers))
    _check_redundant(report)
    return finish(report, table, layers)


def _rows(rows: list[Any], layers: tuple[int, ...] | None) -> list[Row]:
    ids = layers if layers is not None and len(layers) == len(rows) else None
    return [
        Row(f"{MAP}, row {i}" + (f" (layer {ids[i]})" if ids else ""), ids[i] if ids else None, values)
        for i, values in enumerate(rows)
    ]


def _examine_head(report: Report, data: dict[str, Any]) -> tuple[int, ...] | None:
    """Check all but the map; returns the layer ids if they are valid."""
    version = data.get("version")
    if data.get("format") != FORMAT or version != VERSION or isinstance(version, bool):
        what = f"is {show(data.get('format'))}, version {show(version)}, not {FORMAT}, version {VERSION}"
        report.add_error("format", what, "export the plan again, or update moeplan" + other_engine_hint(data, "vllm"))
        return None
    for key in data:
        if key not in _KEYS:
            report.add_error(f"key {show(key)}", "is unknown", f"the keys are {', '.join(_KEYS)}")
    known = {
        "num_experts": "num_experts",
        "num_redundant_experts": "redundant",
        "ep_size": "ep_size",
        "nnodes": "nodes",
    }
    for key, (low, top) in _NUMBERS.items():
        value = data.get(key)
        if type(value) is not int or not low <= value <= top:
            report.add_error(key, f"is {show(value)}, not a whole number in {low}..{top}", "export the plan again")
            continue
        flag = {"num_experts": "the config", "num_redundant_experts": "--redundant"}.get(
            key, f"--{key.replace('_', '-')}"
        )
        report.record(key, flag, known[key], value)
    _check_redundant(report)
    ids = data.get("layer_ids")
    if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < MAX_LAYERS for i in ids):
        report.add_error("layer_ids", "is not a list of layer numbers", "export the plan again")
        return None
    for i, (a, b) in enumerate(itertools.pairwise(ids)):
        if b <= a:
            report.add_error(f"layer_ids, item {i + 1}", f"{b} after {a}: ids must increase", "export the plan again")
            return None
    if report.model.moe_layers is not None and report.model.moe_layers != tuple(ids):
        other = sorted(set(ids) ^ set(report.model.moe_layers))
        what = f"are not the layers that have experts: they differ in {', '.join(str(i) for i in other[:6])}"
        report.add_error("layer_ids", what, "export the plan of this model")
    return tuple(ids)


def _check_redundant(report: Report) -> None:
    redundant = report.layout.redundant
    if redundant is not None and redundant > MAX_REDUNDANT:
        report.add_error(
            "num_redundant_experts", f"{redundant} are more than vLLM's limit of {MAX_REDUNDANT}", "plan with fewer"
        )


def own_strategy(placement: EnginePlacement) -> str | None:
    """The `--expert-placement-strategy` of vLLM that gives this placement; None if none does.

    vLLM has `linear`, and `round_robin` (rank r holds the experts r, r + P, ..), which falls back to linear with
    redundant slots or EPLB.
    """
    if placement.has_replicas:
        return None
    experts = np.arange(placement.num_experts)
    for name, row in (("linear", experts), ("round_robin", experts.reshape(-1, placement.ep_size).T.reshape(-1))):
        if (placement.physical_to_logical == row).all():
            return name
    return None
