"""`moeplan check`: does a placement file keep the rules that the engine itself does not check?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import placement_options as p
from moeplan.cli.common import JsonOption, claim_stdout, echo, emit_json

if TYPE_CHECKING:
    from moeplan.engines.files import ExpertLayout, Report
    from moeplan.model.spec import ModelSpec
    from moeplan.planning import Plan

#: Findings that are printed; all of them are in the JSON.
SHOWN = 40


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(
        help="Check an engine's placement file, from wherever it is: every rule that the engine does not check "
        "itself, with its place and mend (exit status 0: good, 1: not)."
    )
    def check(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="A placement file.")],
        engine: p.Engine,
        config: p.Config = None,
        num_experts: p.Experts = None,
        num_layers: p.Layers = None,
        dense_layers: p.DenseLayers = None,
        ep_size: p.EpSize = None,
        nnodes: p.Nnodes = None,
        redundant: Annotated[
            int | None,
            typer.Option("--redundant", metavar="R", help="Redundant slots that the engine is started with."),
        ] = None,
        plan: Annotated[
            str | None, typer.Option("--plan", metavar="PLAN", help="Also compare with this plan, slot by slot.")
        ] = None,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        p.keep_inputs(json, file, plan, config)
        p.refuse_plan(file)
        from moeplan.engines.files import ExpertLayout, examine
        from moeplan.engines.unsupported_models import without_placement

        model = p.model_from(config, num_experts, num_layers, dense_layers)
        layout = ExpertLayout(ep_size, nnodes, redundant)
        stored = None
        if plan is not None:
            from moeplan.planning.store import load_plan

            p.refuse_trace(plan)
            stored = load_plan(plan)
            model, layout = _with_plan(model, layout, stored, plan)
        report = examine(file, engine.value, model, layout)
        if stored is not None and plan is not None:
            _compare(report, stored, plan)
        ignored = without_placement(engine.value, model.architectures)
        if ignored is not None:
            report.warn("", ignored, "the file would have no effect")
        _say(report)
        emit_json(json, _facts(report))
        raise typer.Exit(0 if report.good else 1)


def _with_plan(model: ModelSpec, layout: ExpertLayout, plan: Plan, where: str) -> tuple[ModelSpec, ExpertLayout]:
    """What the plan says, where the flags do not; a contradiction is the reader's to mend."""
    from moeplan.engines.files import ExpertLayout
    from moeplan.errors import UsageError

    for key, given, value in (
        ("num_experts", model.num_experts, plan.shape.num_experts),
        ("moe_layers", model.moe_layers, plan.shape.layer_ids),
        ("ep_size", layout.ep_size, plan.cluster.num_gpus),
        ("nodes", layout.nodes, plan.cluster.nodes),
        ("redundant", layout.redundant, plan.redundant),
    ):
        if given not in (None, value):
            raise UsageError(
                f"{key.replace('_', ' ')} {given} of the flags is not the plan's {value}"[:200],
                where=where,
                hint="leave the flag out, or give the file's own plan",
            )
    spec = model.override(num_experts=plan.shape.num_experts, moe_layers=plan.shape.layer_ids)
    return spec, ExpertLayout(plan.cluster.num_gpus, plan.cluster.nodes, plan.redundant)


def _compare(report: Report, plan: Plan, where: str) -> None:
    """A fault for the first slot that differs from the plan's."""
    import numpy as np

    if report.placement is None:
        return
    ours, theirs = report.placement.physical_to_logical, plan.placement.slots
    differ = np.argwhere(ours != theirs)
    if len(differ):
        row, slot = (int(i) for i in differ[0])
        report.fault(
            f"layer {plan.shape.layer_ids[row]}, slot {slot}",
            f"holds expert {ours[row, slot]}, the plan {where} has {theirs[row, slot]} "
            f"({len(differ)} of {ours.size} slots differ)",
            "export the plan again, or check against the plan that is served",
        )


def _say(report: Report) -> None:
    shape = "" if report.rows is None else f": {report.rows} layers of {report.slots} slots"
    echo(f"{report.path}, {report.engine}{shape}")
    for finding in report.findings[:SHOWN]:
        echo(f"{'warning' if finding.legal else 'wrong'}: {finding.line(report.path)}")
    if len(report.findings) > SHOWN:
        echo(f".. and {len(report.findings) - SHOWN} more findings (--json has them all)")
    if report.good:
        for line in dict.fromkeys(report.unchecked):
            echo(f"not checked: {line}")
        echo("good" + (", as far as it could be checked" if report.unchecked else ""))
    else:
        count = len(report.faults)
        echo(f"not good: {count} fault{'s' * (count > 1)}")


def _facts(report: Report) -> dict[str, Any]:
    return {
        "file": str(report.path),
        "engine": report.engine,
        "good": report.good,
        "layers": report.rows,
        "slots": report.slots,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "not_checked": list(dict.fromkeys(report.unchecked)),
    }
