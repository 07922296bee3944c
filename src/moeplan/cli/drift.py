"""`moeplan drift`: has a plan gone stale on new traffic?"""

from __future__ import annotations

from moeplan.cli import options as o
from moeplan.cli.terminal import progress, show
from moeplan.cli.text.plans import drift_lines

__all__ = ["drift"]


def drift(
    trace: o.TraceIn,
    /,
    *,
    plan: o.NeededPlan,
    requests: o.TraceFlags = o.TraceFlags(),
    block: o.Block = 1,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> int:
    """Test whether a new plan for the traffic of a trace would be better than the stored plan.

    Exit status 0: the plan is still good. 1: it is stale.
    """
    from moeplan.planning.store import load_plan
    from moeplan.replay.drift import check_drift, detect_drift
    from moeplan.replay.evaluator import check_shape
    from moeplan.replay.settings import EvaluationSettings

    stored, opened = load_plan(o.refuse_trace(plan)), requests.open(trace)
    settings = EvaluationSettings(seed=seed, block=block)
    check_drift(stored, settings)  # before a large trace is read
    check_shape(opened.shape, stored.model, str(plan))
    with progress("drift") as tick:
        read = requests.read(opened, stored)
        found = detect_drift(stored, read, settings, tick)
    show(drift_lines(found, stored, read, trace, plan), json, {"plan": str(plan)} | found.to_dict())
    return 1 if found.stale else 0
