"""`moeplan evaluate`: the figures of one plan on a trace."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import echo, emit_json, progress
from moeplan.cli.text.plans import show_comparison
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.planning import Plan
    from moeplan.trace import Trace

__all__ = ["evaluate"]


def evaluate(
    trace: o.TraceIn,
    /,
    *,
    plan: o.PlanIn = None,
    placed: o.PlacementFlags = o.PlacementFlags(),
    dispatch: Annotated[o.DispatchMode | None, Parameter(group=o.CLUSTER)] = None,
    requests: o.TraceFlags = o.TraceFlags(),
    measure: o.MeasureFlags = o.MeasureFlags(),
    times: o.TimingFlags = o.TimingFlags(),
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Measure a plan, or the placement file of an engine, on a trace, compared with the linear placement.

    Give --plan, or --placement and --engine.

    Args:
        dispatch: Dispatch mode: what one message carries. Default: the plan's.
    """
    from moeplan.cluster import Dispatch
    from moeplan.replay import evaluate as replay

    opened = requests.open(trace)
    measured = _measured(opened, plan, placed)
    if dispatch is not None:
        measured = replace(measured, dispatch=Dispatch(dispatch))
    settings, start = measure.settings(times.timing(opened.shape, measured.task), seed), time.perf_counter()
    with progress("evaluate") as tick:
        found = replay.evaluate(measured, requests.read(opened, phase=measure.phase), settings, tick)
    show_comparison(found.table, opened, time.perf_counter() - start)
    if found.fitted_on_this_trace:
        echo("  - the plan was fitted on this trace: these are not figures on held-out requests")
    emit_json(json, {"plan": str(plan or placed.placement)} | found.to_dict())


def _measured(trace: Trace, plan: Path | None, placed: o.PlacementFlags) -> Plan:
    """The plan to measure, or an engine's file as a plan; what config and flags leave open, the trace says."""
    from moeplan.engines.from_placement import import_placement
    from moeplan.planning.store import load_plan
    from moeplan.replay.evaluator import check_shape

    if (plan is None) == (placed.placement is None):
        what = "evaluate needs a plan or a placement" if plan is None else "--plan and --placement are two placements"
        raise UsageError(what, hint="give one of the two: --plan PLAN, or --placement FILE --engine E")
    if plan is not None:
        if placed != o.PlacementFlags():
            raise UsageError(
                "--engine, --config, --num-layers, --ep-size, --nodes and --deployment go with --placement",
                hint="leave them out: the plan says how it is served",
            )
        stored = load_plan(o.refuse_trace(plan))
        check_shape(trace.shape, stored.model, str(plan))
        return stored
    assert placed.placement is not None
    o.refuse_plan(placed.placement)
    if placed.engine is None:
        raise UsageError("--placement needs --engine", where=str(placed.placement), hint="give --engine")
    spec = o.described(placed.config, num_experts=trace.shape.num_experts, num_layers=placed.num_layers)
    return import_placement(
        placed.placement,
        placed.engine,
        spec,
        placed.layout(),
        shape=trace.shape,
        deployment=placed.deployment or "nodes",
    )
