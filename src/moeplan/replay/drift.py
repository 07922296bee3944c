"""Has a plan gone stale? The stored plan beside one planned anew, both on new requests that neither has seen.

The new traffic is split as `compare` splits it. On each fit part a fresh plan is made with the old one's strategy and
cluster; on the other part both are measured, each with its own router into equal groups. What the old plan lacks is
judged by the interval of the paired difference (`moeplan.replay.statistics`), so a figure that is worse by chance does
not count. Fresh plans see only half of the new requests: the verdict is about what planning anew would bring today.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from moeplan.cluster import Dispatch
from moeplan.errors import FormatError, PlanError, UsageError
from moeplan.planning import Plan, RequestSet, solve
from moeplan.planning.problem import GUARD, StepCost
from moeplan.planning.strategies import available
from moeplan.planning.strategies.moeplan import MoeplanParams
from moeplan.progress import Progress
from moeplan.replay.comparison import Row, Setup, fit_problem, folds_of, group_test, measure, rng_of
from moeplan.replay.split import blocks, draw_steps, least_requests, live_requests
from moeplan.replay.statistics import change, less_than
from moeplan.replay.table import Comparison, Measured, tabulate

__all__ = ["FRESH", "OLD", "OLD_RANDOM", "DriftReport", "drift", "drift_setup", "params_of"]

FloatArray = npt.NDArray[np.float64]

#: Names of the rows beside `linear`; the second shows how much of the old plan is its router.
OLD, OLD_RANDOM, FRESH = "stored plan", "stored plan/none", "planned anew"

#: What a plan of each dispatch mode is made to lower. Under allgather no plan changes what is sent.
_KEYS = {
    Dispatch.PICK: "remote_share",
    Dispatch.GPU: "remote_nodes_per_token",
    Dispatch.NODE: "remote_nodes_per_token",
}


@dataclass(frozen=True)
class DriftReport:
    """The verdict, and what it rests on.

    Attributes:
        key: the figure that is judged: remote_share or remote_nodes_per_token.
        table: rows linear, OLD, OLD_RANDOM and FRESH, with every figure of a comparison.
        change: relative change of `key` by planning anew: value; ci95, which requests came (bootstrap); and
            ci95_of_planning, how one plan differs from the next (folds). None where the old plan sends nothing.
        load: 95 % interval over folds of the old plan's node_load_ratio in multiples of linear's.
        helps: planning anew lowers `key`, beyond both.
        overloaded: `load` lies above the guard, and the fresh plans keep it.
    """

    key: str
    table: Comparison
    change: dict[str, Any] | None
    load: list[float]
    helps: bool
    overloaded: bool

    @property
    def stale(self) -> bool:
        return self.helps or self.overloaded

    def node_load(self, name: str) -> float | None:
        """A row's node_load_ratio in multiples of linear's."""
        against = change(*(self.table.row(row).figures["node_load_ratio"] for row in (name, "linear")))
        return None if against is None else 1.0 + float(against["value"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the verdict, then the table's head, notes and rows."""
        verdict = {
            "stale": self.stale,
            "replanning_helps": self.helps,
            "overloaded": self.overloaded,
            "key": self.key,
            "change_by_replanning": self.change,
            "node_load_vs_linear": {"value": self.node_load(OLD), "ci95_of_folds": self.load, "guard": GUARD},
        }
        return verdict | self.table.to_dict()


def drift_setup(plan: Plan, *, seed: int = 0, block: int = 1, steps: int = 500, folds: int = 4) -> Setup:
    """How the verdict is reached: half of the requests to fit, as often as `folds` says, the plan's own problem.

    Raises:
        UsageError: nothing of this plan can go stale (allgather, unequal groups), it was made for time, which is not
            what is judged here, or a value out of range.
        FormatError: the plan's guard or objective is none.
    """
    if plan.dispatch not in _KEYS:
        raise UsageError(
            "a plan for allgather cannot go stale: no plan changes what allgather sends",
            hint="moeplan evaluate TRACE --plan PLAN shows its load",
        )
    if not plan.equal_groups:
        raise UsageError(
            f"the plan's strategy {plan.strategy} has unequal groups, whose figures do not count",
            hint="plan with paper or moeplan",
        )
    if plan.params.get("objective") == "time":
        raise UsageError(
            "the plan was made with --objective time, and drift is judged by what leaves a node",
            hint="moeplan evaluate TRACE --plan PLAN --hardware NAME, beside the same of a plan made anew",
        )
    if folds < 2:
        raise UsageError(f"{folds} fold does not tell one plan from the next", hint="use at least 2 folds")
    params = params_of(plan)
    strategy = params if anew(plan) == params.name else anew(plan)
    return Setup(
        plan.cluster, (strategy,), plan.redundant, plan.replica_rule, plan.dispatch,
        fit=0.5, folds=folds, seed=seed, block=block, steps=steps,
    )  # fmt: skip


def anew(plan: Plan) -> str:
    """The strategy that plans anew: the plan's own; `moeplan` where that is none of ours (a deployed placement)."""
    return plan.strategy if plan.strategy in available() else "moeplan"


def params_of(
    plan: Plan, *, guard: float | None = None, objective: str | None = None, step_cost: StepCost | None = None
) -> MoeplanParams:
    """The parameters that the plan was made with, as far as it says; what is given goes before them.

    Args:
        step_cost: for the objective time, which a plan does not keep.

    Raises:
        FormatError: the plan's guard or objective is invalid. UsageError: a given one is; the plan was made for time,
            and neither another objective nor `step_cost` is given.
    """
    stored, limit = plan.params.get("objective") or "bytes", plan.params.get("guard", GUARD)
    try:
        limit = float("inf") if limit is None else float(limit)
        made = MoeplanParams(limit, "bytes" if stored == "time" else stored)
    except (TypeError, ValueError, UsageError):
        raise FormatError(
            f"guard {str(limit)[:20]!r} or objective {str(stored)[:20]!r} is invalid",
            where="plan.json",
            hint="plan again",
        ) from None
    if stored == "time" and objective is None and step_cost is None:
        raise UsageError(
            "the plan was made with --objective time", hint="give --hardware and --model again, or --objective bytes"
        )
    return replace(made, guard=limit if guard is None else guard, objective=objective or stored, step_cost=step_cost)


def drift(requests: RequestSet, plan: Plan, setup: Setup, progress: Progress | None = None) -> DriftReport:
    """Measure the stored plan and fresh ones on requests that the fresh ones have not seen.

    Raises:
        PlanError: too few requests to split, plan and replay.
    """
    block = blocks(requests.index, setup.block)
    folds = folds_of(requests, setup, block)
    more = f"collect more traffic first, {least_requests(setup.cluster, setup.fit)} usable requests at least"
    least = min(len(fit) for fit, _ in folds)
    if least < setup.cluster.num_groups:
        raise PlanError(f"{least} requests to plan anew for {setup.cluster.num_groups} groups", hint=more)
    live = live_requests([len(test) for _, test in folds], setup.cluster, more)
    rows = [
        Row("linear", "linear", "none"),
        Row(OLD, anew(plan), "prefill"),
        Row(OLD_RANDOM, anew(plan), "none"),
        Row(FRESH, anew(plan), "prefill"),
    ]
    measured: dict[str, list[Measured]] = {row.name: [] for row in rows}
    notes: dict[str, None] = {}
    for fold, (fit, test) in enumerate(folds):
        if progress:
            progress(fold, setup.folds, f"fold {fold + 1}")
        problem = fit_problem(requests, setup, fit)
        fresh = solve(problem, setup.strategies[0], setup.seed + fold)
        notes |= dict.fromkeys(fresh.notes)
        of = {"linear": solve(problem, "linear", setup.seed + fold), FRESH: fresh}
        draws = draw_steps(requests.measured_span[test], setup.steps, rng_of(setup, fold, 2))
        for row in rows:
            result = of.get(row.name, plan)
            group = group_test(requests, fit, test, result, row.signature, rng_of(setup, fold, 1))
            measured[row.name].append(measure(requests, setup, row, test, group, draws, live, result))
    return _judge(tabulate(requests, setup, rows, measured, block, live, tuple(notes)), _KEYS[setup.dispatch])


def _judge(table: Comparison, key: str) -> DriftReport:
    rows = {name: table.row(name) for name in ("linear", OLD, FRESH)}
    linear, old, fresh = (row.figures for row in rows.values())
    apart = _interval_of_folds(np.subtract(fresh[key].folds, old[key].folds))
    moved, today = change(fresh[key], old[key]), old[key].value
    if moved and today:
        moved["ci95_of_planning"] = [end / today for end in apart]
    load = _interval_of_folds(np.divide(old["node_load_ratio"].folds, linear["node_load_ratio"].folds))
    return DriftReport(
        key, table, moved, load,
        helps=less_than(fresh[key], old[key]) and apart[1] < 0.0,
        overloaded=load[0] > GUARD and rows[FRESH].guarded,
    )  # fmt: skip


def _interval_of_folds(values: FloatArray) -> list[float]:
    """95 % interval [low, high] of a figure, given its values in the folds: for another plan, on other requests.

    Folds share requests, so their spread is too small for independent samples: the corrected resampled t-test takes
    the variance of the mean as (1 / F + test / fit) times theirs (Nadeau and Bengio, Inference for the generalization
    error, Machine Learning 52, 2003, section 3); here both parts are of the same size.
    """
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) * np.sqrt(1.0 / len(values) + 1.0))
    return [float(values.mean()) - half, float(values.mean()) + half]
