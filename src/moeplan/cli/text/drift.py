"""The verdict on a stored plan as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeplan.planning import Plan, RequestSet
    from moeplan.replay.drift import DriftReport

__all__ = ["drift_lines"]


def drift_lines(found: DriftReport, stored: Plan, requests: RequestSet, trace: Path, plan: Path) -> Iterator[str]:
    """What was measured, the figures, the verdict, and what follows."""
    opened = requests.trace
    assert opened is not None
    count, setup = found.table.head["requests"], found.table.head["setup"]
    by = "" if found.planner == stored.strategy else f" (new plans by {found.planner})"
    yield (
        f"{opened.label}: {count['fit'][0]} requests for new plans, {count['test'][0]} held out to measure on, "
        f"{setup['folds']} folds; {stored.strategy}{by} on {setup['nodes']} nodes x "
        f"{setup['gpus_per_node']} GPUs, {setup['redundant']} redundant slots, dispatch per {setup['dispatch']}"
    )
    yield from _figures(found)
    yield from _verdict(found, trace, plan)
    for note in requests.notes:
        yield f"  - {note}"
    if requests.known != stored.signature:
        yield f"  - signatures are taken from the {requests.known}; the plan was fitted on the {stored.signature}"
    if found.fitted_on_this_trace:
        yield "  - the plan was fitted on this trace, including the held-out requests: results are optimistic"


def _figures(found: DriftReport) -> Iterator[str]:
    from moeplan.planning.problem import GUARD
    from moeplan.replay.drift import FRESH, OLD, OLD_RANDOM

    yield f"{'':30s} {found.key + ' [95 %]':>30s}  node load  GPU load"
    names = {"linear": "linear, random groups", OLD_RANDOM: f"{OLD}, random groups", OLD: OLD, FRESH: "new plan"}
    for name, row in names.items():
        figures = found.table.row(name).figures
        low, high = figures[found.key].interval() or (0.0, 0.0)
        yield (
            f"{row:30s} {figures[found.key].value:13.3f} [{low:.3f}, {high:.3f}]"
            f"  {figures['node_load_ratio'].value:9.2f}  {figures['gpu_load_ratio'].value:8.2f}"
        )
    if found.change is not None:
        (a, b), (c, d) = found.change["ci95"], found.change["ci95_of_planning"]
        yield (
            f"a new plan changes {found.key} by {100 * found.change['value']:+.1f} %: [{100 * a:+.1f}, "
            f"{100 * b:+.1f}] over requests, [{100 * c:+.1f}, {100 * d:+.1f}] from plan to plan"
        )
    low, high = found.load
    too = ", which new plans exceed too" if low > GUARD and not found.overloaded else ""
    yield f"node load is {found.node_load(OLD):.2f} x linear's [{low:.2f}, {high:.2f}]; the guard is {GUARD:g}{too}"


def _verdict(found: DriftReport, trace: Path, plan: Path) -> Iterator[str]:
    if found.stale:
        yield f"stale: {', and '.join(found.reasons)}"
        yield f"next: moeplan rebalance {trace} --plan {plan} --max-moves M -o NEW, or a new plan: moeplan plan {trace}"
    else:
        yield "still good: a new plan would change no more than noise"
