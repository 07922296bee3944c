"""`moeplan rebalance`: improve a plan by few moves."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import emit_json, progress
from moeplan.cli.text.plans import plan_facts, show_moves

__all__ = ["rebalance"]


def rebalance(
    trace: o.TraceIn,
    /,
    *,
    plan: o.NeededPlan,
    max_moves: Annotated[o.Int, Parameter(group=o.PLANNING)],
    output: o.PlanOut,
    objective: o.ObjectiveFlags = o.ObjectiveFlags(),
    requests: o.TraceFlags = o.TraceFlags(),
    times: o.TimingFlags = o.TimingFlags(),
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Improve a stored plan for the traffic of a trace by moving a few expert replicas.

    Cluster, dispatch mode, replica rule, guard and objective are the plan's.

    Args:
        max_moves: Move at most M expert replicas of each layer.
    """
    from moeplan import api
    from moeplan.planning.store import load_plan
    from moeplan.planning.strategies.moeplan import MoeplanStrategy
    from moeplan.replay.evaluator import check_shape

    old, opened = load_plan(o.refuse_trace(plan)), requests.open(trace)
    check_shape(opened.shape, old.model, str(plan))
    timing = times.timing(opened.shape, old.task)
    chosen = MoeplanStrategy.of_plan(old.params, **objective.values(timing, old.task))
    with progress("rebalance") as tick:
        read = requests.read(opened, old, rows=False)
        made = api.rebalance(old, read, max_moves=max_moves, strategy=chosen, seed=seed, progress=tick)
    made.save(output)
    moves = made.moves_from(old)
    show_moves(made, read, moves, plan, output)
    emit_json(json, plan_facts(made, output, moves))
