"""Check a placement file, also against the plan that it should hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeplan.engines.placement_files import examine
from moeplan.engines.report import ExpertLayout, Report
from moeplan.engines.unsupported_models import without_placement
from moeplan.errors import UsageError, expect
from moeplan.model.spec import ModelSpec
from moeplan.planning.plan import Plan

__all__ = ["check"]


def check(
    path: str | Path,
    engine: str,
    model: ModelSpec | None = None,
    layout: ExpertLayout | None = None,
    *,
    plan: Plan | None = None,
    plan_path: str = "",
) -> Report:
    """Check an engine's placement file against the rules of the engine, including those that it does not check itself.

    Args:
        model: `load_model` of its name or config.json. layout: what the engine is started with.
        plan: also compare with this plan, slot by slot.
        plan_path: path of the plan, for messages.

    Raises:
        FormatError: the file cannot be read. UsageError: no such engine; `model` or `layout` contradicts the plan.
    """
    model, layout = model or ModelSpec(), layout or ExpertLayout()
    ignored = without_placement(engine, model.architectures)
    if plan is not None:
        expect(plan, Plan, 'moeplan.load_plan("PATH")')
        model, layout = _with_plan(model, layout, plan, plan_path)
    report = examine(path, engine, model, layout)
    if plan is not None:
        _compare(report, plan, plan_path)
    if ignored is not None:
        report.add_warning("", ignored, "the file would have no effect")
    return report


def _with_plan(model: ModelSpec, layout: ExpertLayout, plan: Plan, where: str) -> tuple[ModelSpec, ExpertLayout]:
    """What the plan says, where nothing else does; a contradiction is the reader's to correct."""
    for key, given, value in (
        ("num_experts", model.num_experts, plan.model.num_experts),
        ("moe_layers", model.moe_layers, plan.model.layer_ids),
        ("ep_size", layout.ep_size, plan.cluster.num_gpus),
        ("nodes", layout.nodes, plan.cluster.nodes),
        ("redundant", layout.redundant, plan.redundant),
    ):
        if given not in (None, value):
            raise UsageError(
                f"{key.replace('_', ' ')} {given} is not the plan's {value}"[:200],
                where=where,
                hint="leave the flag out, or give the file's own plan",
            )
    spec = model.override(num_experts=plan.model.num_experts, moe_layers=plan.model.layer_ids)
    return spec, ExpertLayout(plan.cluster.num_gpus, plan.cluster.nodes, plan.redundant)


def _compare(report: Report, plan: Plan, where: str) -> None:
    """An error for the first slot that differs from the plan's."""
    if report.placement is None:
        return
    ours, theirs = report.placement.physical_to_logical, plan.placement.slots
    differ = np.argwhere(ours != theirs)
    if len(differ):
        row, slot = (int(i) for i in differ[0])
        report.add_error(
            f"layer {plan.model.layer_ids[row]}, slot {slot}",
            f"holds expert {ours[row, slot]}, the plan {where} has {theirs[row, slot]} "
            f"({len(differ)} of {ours.size} slots differ)",
            "export the plan again, or check against the plan that is served",
        )
