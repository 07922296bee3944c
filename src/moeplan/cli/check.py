"""`moeplan check`: does a placement file keep the rules that the engine itself does not check?"""

from __future__ import annotations

from moeplan.cli import options as o
from moeplan.cli.terminal import show
from moeplan.cli.text.engines import check_facts, check_lines

__all__ = ["check"]


def check(
    file: o.PlacementIn,
    /,
    *,
    engine: o.Engine,
    plan: o.PlanIn = None,
    model: o.PlacedModelFlags = o.PlacedModelFlags(),
    served: o.ServedFlags = o.ServedFlags(),
    redundant: o.ServedRedundant = None,
    json: o.Json = None,
) -> int:
    """Check a placement file against the rules of its engine, including those that the engine does not check.

    Each finding comes with its location and a suggested fix. Exit status 0: valid. 1: invalid. With --plan, the file is
    also compared with that plan, slot by slot.
    """
    from moeplan.engines.placement_files import check as examined
    from moeplan.planning.store import load_plan

    o.refuse_plan(file)
    stored = None if plan is None else load_plan(o.refuse_trace(plan))
    report = examined(file, engine, model.spec(), served.layout(redundant), plan=stored, plan_path=str(plan))
    show(check_lines(report), json, check_facts(report))
    return 0 if report.ok else 1
