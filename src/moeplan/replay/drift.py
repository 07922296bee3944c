"""Is a plan stale? The stored plan and a new plan are compared on held-out requests of new traffic.

The new traffic is split as `compare` splits it. On each fit part a new plan is made with the old one's strategy and
cluster; on the other part both are measured, each with its own router into equal groups. What the old plan lacks is
judged by the interval of the paired difference (`moeplan.replay.statistics`), so a figure that is worse by chance does
not count. New plans are fitted on only half of the new requests: the verdict is about what a new plan would gain today.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from moeplan.arrays import FloatArray
from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.planning.plan import Plan
from moeplan.planning.problem import GUARD, Strategy
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import solve
from moeplan.planning.strategies import available, find
from moeplan.planning.strategies.moeplan import MoeplanStrategy
from moeplan.progress import Progress, silent
from moeplan.replay.evaluator import EvaluationRun, Measured, Row, check_inputs
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import least_requests
from moeplan.replay.statistics import change, significantly_below
from moeplan.replay.table import Comparison
from moeplan.replay.tabulate import tabulate
from moeplan.trace import Trace

if TYPE_CHECKING:
    import pandas

__all__ = ["FRESH", "OLD", "OLD_RANDOM", "DriftReport", "check_drift", "detect_drift"]

#: Names of the rows beside `linear`; the second shows how much of the old plan is its router.
OLD, OLD_RANDOM, FRESH = "stored plan", "stored plan/none", "planned anew"

#: What a plan of each dispatch mode is made to lower. Under allgather no plan changes what is sent.
_KEYS = {
    Dispatch.PICK: "remote_share",
    Dispatch.GPU: "remote_nodes_per_token",
    Dispatch.NODE: "remote_nodes_per_token",
}


@dataclass(frozen=True, repr=False)
class DriftReport:
    """The verdict, and what it rests on.

    Attributes:
        key: the figure that is judged: remote_share or remote_nodes_per_token.
        planner: the strategy of the new plans.
        table: rows linear, OLD, OLD_RANDOM and FRESH, with every figure of a comparison.
        change: relative change of `key` by a new plan: value; ci95, which requests came (bootstrap); and
            ci95_of_planning, how one plan differs from the next (folds). None where the old plan sends nothing.
        load: 95 % interval over folds of the old plan's node_load_ratio in multiples of linear's.
        helps: a new plan lowers `key`, beyond both.
        overloaded: `load` lies above the guard, and the new plans do not exceed it.
        fitted_on_this_trace: the plan was fitted on these very requests; it looks better than it is.
    """

    key: str
    planner: str
    table: Comparison
    change: dict[str, Any] | None
    load: list[float]
    helps: bool
    overloaded: bool
    fitted_on_this_trace: bool

    def __repr__(self) -> str:
        verdict = "stale" if self.stale else "still good"
        by = "" if self.change is None else f"; a new plan changes {self.key} by {100 * self.change['value']:+.1f} %"
        return f"{verdict}: {', '.join(self.reasons) or 'no change beyond noise'}{by}\n{self.table!r}"

    @property
    def stale(self) -> bool:
        """Whether a new plan would be better."""
        return self.helps or self.overloaded

    @property
    def reasons(self) -> list[str]:
        """Why it is stale; empty where it is not."""
        why = [f"a new plan lowers {self.key} by more than noise"] * self.helps
        return why + ["the stored plan exceeds the load guard while a new plan stays within it"] * self.overloaded

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
            "fitted_on_this_trace": self.fitted_on_this_trace,
        }
        return verdict | self.table.to_dict()

    def to_pandas(self) -> pandas.DataFrame:
        """The table behind the verdict, one line per row.

        Raises:
            MoeplanError: pandas is not installed.
        """
        return self.table.to_pandas()

    def plot(self, key: str | None = None) -> Any:
        """Bars of the judged figure, or of another one, as a `matplotlib.figure.Figure`."""
        return self.table.plot(key or self.key)


def detect_drift(
    plan: Plan,
    requests: Trace | RequestSet,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress = silent,
) -> DriftReport:
    """Whether new traffic has made a plan stale: would a new plan lower the plan's objective by more than noise?

    Args:
        requests: of the plan's model, and not those that it was fitted on.

    Raises:
        UsageError: requests of another model; nothing of this plan can go stale (allgather, unequal groups), or it was
            made for time, which is not what is judged here; less than two folds.
        PlanError: too few requests to split, plan and measure.
        FormatError: the plan's parameters are invalid.

    Examples:
        >>> moeplan.detect_drift(plan, new_trace).stale  # doctest: +SKIP
        False
    """
    check_inputs(plan, requests)
    key, strategy = check_drift(plan, settings)
    requests = read_requests(requests, signature_tokens=plan.signature.tokens)
    task = plan.task
    hint = f"collect more traffic first, {least_requests(task.cluster, settings.fit_share)} usable requests at least"
    few = f"{{}} requests for a new plan of {task.cluster.num_groups} groups"
    run = EvaluationRun.split(requests, task, dataclasses.replace(settings, timing=None), few, hint)
    rows = [
        Row("linear", "linear", "none"),
        Row(OLD, strategy.name, "prefill"),
        Row(OLD_RANDOM, strategy.name, "none"),
        Row(FRESH, strategy.name, "prefill"),
    ]
    measured: dict[str, list[Measured]] = {row.name: [] for row in rows}
    notes: dict[str, None] = {}
    for fold in run.folds():
        progress(fold.fold, settings.folds, f"fold {fold.fold + 1}")
        problem, seed = requests.problem(task, fold.fit), settings.seed + fold.fold
        fresh = solve(problem, strategy, seed)
        notes |= dict.fromkeys(fresh.provenance.notes)
        plans = {"linear": solve(problem, "linear", seed), FRESH: fresh}
        for row in rows:
            of = plans.get(row.name, plan)
            measured[row.name].append(fold.measure(of, fold.group(of, row.signature)))
    table = tabulate(run, rows, measured, tuple(notes))
    return _judge(key, strategy.name, table, requests.fitted(plan))


def check_drift(plan: Plan, settings: EvaluationSettings) -> tuple[str, Strategy]:
    """The figure by which a plan is judged, and the strategy that plans anew: the plan's own, or `moeplan` where that
    is none of ours (a deployed placement).

    Raises:
        UsageError, FormatError: as `detect_drift`, before any request is read.
    """
    if plan.dispatch not in _KEYS:
        raise UsageError(
            "a plan for allgather cannot go stale: no plan changes what allgather sends",
            hint="moeplan evaluate TRACE --plan PLAN shows its load",
        )
    if not plan.equal_groups:
        raise UsageError(
            f"the plan's strategy {plan.strategy} has unequal groups, whose figures are not eligible",
            hint="plan with paper or moeplan",
        )
    if plan.params.get("objective") == "time":
        raise UsageError(
            "the plan was made with --objective time, and drift is judged by what leaves a node",
            hint="moeplan evaluate TRACE --plan PLAN --hardware NAME, and the same for a new plan",
        )
    if settings.folds < 2:
        raise UsageError(f"{settings.folds} fold does not tell one plan from the next", hint="use at least 2 folds")
    params = MoeplanStrategy.of_plan(plan.params)
    name = plan.strategy if plan.strategy in available() else params.name
    return _KEYS[plan.dispatch], params if name == params.name else find(name)


def _judge(key: str, planner: str, table: Comparison, seen: bool) -> DriftReport:
    rows = {name: table.row(name) for name in ("linear", OLD, FRESH)}
    linear, old, fresh = (row.figures for row in rows.values())
    apart = _interval_of_folds(np.subtract(fresh[key].folds, old[key].folds))
    moved, today = change(fresh[key], old[key]), old[key].value
    if moved and today:
        moved["ci95_of_planning"] = [end / today for end in apart]
    load = _interval_of_folds(np.divide(old["node_load_ratio"].folds, linear["node_load_ratio"].folds))
    return DriftReport(
        key=key,
        planner=planner,
        table=table,
        change=moved,
        load=load,
        helps=significantly_below(fresh[key], old[key]) and apart[1] < 0.0,
        overloaded=load[0] > GUARD and rows[FRESH].within_guard,
        fitted_on_this_trace=seen,
    )


def _interval_of_folds(values: FloatArray) -> list[float]:
    """95 % interval [low, high] of a figure, given its values in the folds: for another plan, on other requests.

    Folds share requests, so their spread is too small for independent samples: the corrected resampled t-test takes
    the variance of the mean as (1 / F + test / fit) times theirs (Nadeau and Bengio, Inference for the generalization
    error, Machine Learning 52, 2003, section 3); here both parts are of the same size.
    """
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) * np.sqrt(1.0 / len(values) + 1.0))
    return [float(values.mean()) - half, float(values.mean()) + half]
