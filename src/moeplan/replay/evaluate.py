"""`evaluate`: one finished plan on the requests of a trace, beside `linear` on the same cluster and slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeplan.planning.plan import Plan
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import solve
from moeplan.progress import Progress, silent
from moeplan.replay.evaluator import EvaluationRun, Row, check_inputs
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.statistics import MeasuredValue
from moeplan.replay.table import Comparison, TableRow
from moeplan.replay.tabulate import tabulate
from moeplan.trace import Trace

if TYPE_CHECKING:
    import pandas

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A plan's figures on a trace.

    Attributes:
        row: the plan with its own router. table: the same beside `linear` and the plan with random groups.
        fitted_on_this_trace: the plan was fitted on these very requests; its figures are optimistic.
    """

    row: TableRow
    table: Comparison
    fitted_on_this_trace: bool

    def __repr__(self) -> str:
        head = self.table.head
        optimistic = "\nthe plan was fitted on this trace: results are optimistic" * self.fitted_on_this_trace
        what = f"{self.row.strategy} on {head['requests']['usable']} requests of {head['trace']}"
        return f"{what}\n{self.table!r}{optimistic}"

    @property
    def figures(self) -> dict[str, MeasuredValue]:
        """The plan's figures by key."""
        return self.row.figures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as a comparison's."""
        return {"fitted_on_this_trace": self.fitted_on_this_trace} | self.table.to_dict()

    def to_pandas(self) -> pandas.DataFrame:
        """One line per figure of the plan: value, low and high of its interval, change against linear.

        Raises:
            MoeplanError: pandas is not installed.
        """
        return self.row.to_pandas()

    def plot(self, key: str = "remote_share") -> Any:
        """Bars of one figure beside linear's, as a `matplotlib.figure.Figure`."""
        return self.table.plot(key)


def evaluate(
    plan: Plan,
    requests: Trace | RequestSet,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress = silent,
) -> Evaluation:
    """A plan's figures on all usable requests of a trace, beside those of `linear` on the same cluster and slots.

    Args:
        requests: of the plan's model; other requests than it was fitted on (`RequestSet.split`), or its
            figures are optimistic.
        settings: how many steps are sampled, and how they are timed; there are no folds.

    Raises:
        UsageError: requests of another model; a model to time that is not theirs. PlanError: too few requests.

    Examples:
        >>> import moeplan
        >>> trace, settings = moeplan.open_trace("embedded"), moeplan.EvaluationSettings(steps=20)
        >>> plan = moeplan.plan(trace, moeplan.Cluster(4, 2), "eplb")
        >>> moeplan.evaluate(plan, trace, settings).figures["remote_share"]
        MeasuredValue(0.7201, 95 % 0.7185 to 0.7218 over requests)
    """
    check_inputs(plan, requests)
    requests = read_requests(requests, signature_tokens=plan.signature.tokens)
    run = EvaluationRun.whole(requests, plan.task, settings)
    (fold,) = run.folds()
    linear = solve(requests.problem(plan.task), "linear", settings.seed)
    name = plan.strategy if plan.strategy != "linear" else "plan"
    rows = [
        Row("linear", "linear", "none"),
        Row(name, plan.strategy, "prefill"),
        Row(f"{name}/none", plan.strategy, "none"),
    ]
    if plan.prediction is not None:
        rows += [Row(f"{name}/{kind}", plan.strategy, kind) for kind in plan.prediction.usable_for(requests)]
    measured = {}
    for done, row in enumerate(rows):
        of = plan if done else linear
        progress(done, len(rows), row.name)
        measured[row.name] = [fold.measure(of, fold.group(of, row.signature))]
    table = tabulate(run, rows, measured, ())
    return Evaluation(table.row(name), table, requests.fitted(plan))
