"""`moeplan plan`: fit a plan on a whole trace and store it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import emit_json, progress
from moeplan.cli.text.plans import plan_facts, show_plan
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeplan.planning import Strategy

__all__ = ["plan"]


def plan(
    trace: o.TraceIn,
    /,
    *,
    output: o.PlanOut,
    strategy: Annotated[str, Parameter(group=o.PLANNING)] = "moeplan",
    paper: o.PaperFlags = o.PaperFlags(),
    objective: o.ObjectiveFlags = o.ObjectiveFlags(),
    cluster: o.ClusterFlags = o.ClusterFlags(),
    requests: o.TraceFlags = o.TraceFlags(),
    block: o.Block = 1,
    times: o.TimingFlags = o.TimingFlags(),
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Fit a plan on all usable requests of a trace: request groups, expert placement and request router.

    Args:
        strategy: The planning strategy: moeplan, eplb, eplb-global, eplb-hierarchical, affinity, paper,
            paper-unbalanced, linear or random.
    """
    from moeplan.api import HELD_OUT, plan_task

    task, named, opened = cluster.task(), paper.strategies(strategy), requests.open(trace)
    task.check(opened.shape.num_experts)  # before a large trace is read
    timing = times.timing(opened.shape, task)
    chosen = _strategy(strategy, named, objective.values(timing, task))
    with progress("plan") as tick:
        read = requests.read(opened, rows=False)
        made = plan_task(read, task, chosen, replace(HELD_OUT, seed=seed, block=block, timing=timing), tick)
    made.save(output)
    show_plan(made, read, output)
    emit_json(json, plan_facts(made, output))


def _strategy(name: str, named: Sequence[str | Strategy], values: dict[str, Any]) -> str | Strategy:
    """The strategy of a name, with its parameters; those of another one are refused."""
    from moeplan.planning.strategies.moeplan import MoeplanStrategy

    chosen, *more = named
    if more:
        raise UsageError(f"--strategy {name} names several", hint="give one, or compare them with moeplan compare")
    given = {key: value for key, value in values.items() if value is not None}
    if chosen == "moeplan":
        return MoeplanStrategy(**given)
    for key, flag in (("guard", "--guard"), ("objective", "--objective"), ("step_cost", "--hardware")):
        if key in given:
            raise UsageError(f"{flag} is for the strategy moeplan", hint=f"leave it out with {name}")
    return chosen
