"""The public functions that join planning and replay: plan, rebalance, evaluate, compare, detect_drift.

Each takes a trace, or the requests of one (`read_requests`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeplan.cluster import Cluster, Dispatch, ReplicaRule
from moeplan.errors import PlanError
from moeplan.planning import MoveLimit, Plan, PlanningTask, RequestSet, Strategy, read_requests, solve
from moeplan.planning.strategies import find
from moeplan.planning.strategies.moeplan import MoeplanParams
from moeplan.replay import comparison, drift
from moeplan.replay.comparison import Setup, check_shape, fit_problem
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.table import Comparison
from moeplan.trace import Trace

__all__ = ["compare", "detect_drift", "evaluate", "plan", "rebalance"]

Progress = Callable[[int, int, str], None]
#: The figures that a plan keeps of its evaluation on held-out requests.
EXPECTED = ("remote_share", "remote_nodes_per_token", "gpu_load_ratio", "node_load_ratio", "experts_per_gpu")
#: How they are measured: fitted on three quarters, measured on the last.
HELD_OUT = EvaluationSettings(fit=0.75, folds=1, steps=100, draws=200)


def plan(
    requests: Trace | RequestSet,
    cluster: Cluster,
    strategy: str | Strategy = "moeplan",
    *,
    redundant: int = 0,
    dispatch: Dispatch = Dispatch.PICK,
    replica_rule: ReplicaRule = ReplicaRule.NEAREST_STATIC,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Fit a plan on all usable requests of a trace.

    Args:
        requests: a trace, or `read_requests` of one.
        strategy: a name, or a strategy with parameters, such as `MoeplanParams(guard=1.2)`.
        redundant: extra expert slots per layer, over all GPUs.
        dispatch: what a message is. replica_rule: which replica of an expert serves a token.

    Raises:
        PlanError: slots that do not divide over the GPUs, more groups than requests. UsageError: no such strategy.

    Example:
        >>> import moeplan
        >>> plan = moeplan.plan(moeplan.open_trace("embedded"), moeplan.Cluster(4, 2), "eplb", redundant=8)
        >>> plan.placement.slots.shape
        (8, 40)
    """
    task = PlanningTask(cluster, redundant, dispatch, replica_rule)
    return plan_task(requests, task, strategy, dataclasses.replace(HELD_OUT, seed=seed), progress)


def plan_task(
    requests: Trace | RequestSet,
    task: PlanningTask,
    strategy: str | Strategy = "moeplan",
    held_out: EvaluationSettings = HELD_OUT,
    progress: Progress | None = None,
) -> Plan:
    """`plan` for a task, with the settings by which its figures on held-out requests are measured.

    Args:
        held_out: their seed is the plan's, too.
    """
    requests = _for_plans(requests, None, task)
    if progress:
        progress(0, 2, "solving")
    made = fit(requests, task, strategy, held_out.seed)
    if progress:
        progress(1, 2, "figures on a held-out quarter")
    return dataclasses.replace(made, expected=expected_figures(requests, task, strategy, held_out))


def fit(requests: RequestSet, task: PlanningTask, strategy: str | Strategy, seed: int = 0) -> Plan:
    """A plan fitted on all of these requests, without expected figures."""
    problem = fit_problem(requests, _setup(task, EvaluationSettings(), ()), np.arange(len(requests)))
    return _with_origin(solve(problem, strategy, seed), requests)


def rebalance(
    plan: Plan,
    requests: Trace | RequestSet,
    *,
    max_moves: int,
    params: MoeplanParams | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Improve a plan for other requests by moving few experts; the router is fitted anew.

    Args:
        max_moves: most replicas of each layer that may end on another GPU than in the plan.
        params: guard and objective in place of the plan's; needed for a plan that was made for time.

    Raises:
        UsageError: requests of another model; a plan made for time without `params`.

    Example:
        >>> new = moeplan.rebalance(plan, trace, max_moves=4)  # doctest: +SKIP
        >>> new.moves_from(plan).most_in_a_layer  # doctest: +SKIP
        4
    """
    requests = _for_plans(requests, plan, plan.task)
    problem = fit_problem(requests, _setup(plan.task, EvaluationSettings(), ()), np.arange(len(requests)))
    if progress:
        progress(0, 1, "solving")
    limit = MoveLimit(plan.placement.slots, max_moves)
    return _with_origin(solve(problem, params or drift.params_of(plan), seed, limit), requests)


def evaluate(
    plan: Plan,
    requests: Trace | RequestSet,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress | None = None,
) -> Comparison:
    """A plan's figures on all usable requests, beside those of `linear` on the same cluster and slots.

    Args:
        requests: of the plan's model; other requests than it was fitted on, or its figures are optimistic.
        settings: how many steps are sampled, and how they are timed; there are no folds.

    Raises:
        UsageError: requests of another model. PlanError: too few requests for the groups.

    Example:
        >>> moeplan.evaluate(plan, other_trace).row("moeplan").figures["remote_share"].value  # doctest: +SKIP
        0.412
    """
    if isinstance(requests, Trace):
        check_shape(requests.shape, plan.model, "plan")
        requests = read_requests(requests, signature_tokens=plan.signature.tokens)
    check_shape(requests.shape, plan.model, "plan")
    return comparison.replay(requests, plan, _setup(plan.task, settings, ()))


def compare(
    requests: Trace | RequestSet,
    cluster: Cluster,
    strategies: Sequence[str | Strategy] = ("random", "linear", "eplb", "affinity", "paper", "moeplan"),
    *,
    redundant: int = 0,
    dispatch: Dispatch = Dispatch.PICK,
    replica_rule: ReplicaRule = ReplicaRule.NEAREST_STATIC,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress | None = None,
) -> Comparison:
    """Fit each strategy on a part of the requests and measure it on the others, several times over.

    Args:
        strategies: names, or strategies with parameters; `linear`, the baseline, is always among them.

    Raises:
        PlanError: slots that do not divide, more groups than requests, too few held-out requests a group.
        UsageError: no such strategy.

    Example:
        >>> import moeplan
        >>> trace, settings = moeplan.open_trace("embedded"), moeplan.EvaluationSettings(folds=1, steps=20)
        >>> table = moeplan.compare(trace, moeplan.Cluster(4, 2), ("eplb",), settings=settings)
        >>> [row.name for row in table.rows]
        ['linear', 'linear/prefill', 'eplb', 'eplb/prefill']
    """
    return compare_task(
        requests, PlanningTask(cluster, redundant, dispatch, replica_rule), strategies, settings, progress
    )


def compare_task(
    requests: Trace | RequestSet,
    task: PlanningTask,
    strategies: Sequence[str | Strategy],
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress | None = None,
) -> Comparison:
    """`compare` for a task."""
    task.check(requests.shape.num_experts)  # before a large trace is read
    if isinstance(requests, Trace):
        requests = read_requests(requests)
    return comparison.compare(requests, _setup(task, settings, tuple(strategies)), progress)


def detect_drift(
    plan: Plan,
    requests: Trace | RequestSet,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress | None = None,
) -> drift.DriftReport:
    """Whether new traffic has made a plan stale: would planning anew lower what it was made to lower, beyond noise?

    Raises:
        UsageError: requests of another model; a plan of which nothing can go stale. PlanError: too few requests.

    Example:
        >>> moeplan.detect_drift(plan, new_trace).stale  # doctest: +SKIP
        False
    """
    chosen = drift.drift_setup(
        plan, seed=settings.seed, block=settings.block, steps=settings.steps, folds=settings.folds
    )  # fmt: skip
    check_shape(requests.shape, plan.model, "plan")
    if isinstance(requests, Trace):
        requests = read_requests(requests, signature_tokens=plan.signature.tokens)
    return drift.drift(requests, plan, chosen, progress)


def expected_figures(
    requests: RequestSet, task: PlanningTask, strategy: str | Strategy, settings: EvaluationSettings
) -> dict[str, Any] | None:
    """A strategy's figures on held-out requests; None where there are too few of them, or no token rows."""
    if requests.sums is not None:
        return None
    try:
        table = comparison.compare(requests, _setup(task, settings, (strategy,)))
    except PlanError:
        return None
    row = table.row(find(strategy).name).to_dict()
    return {key: row[key] for key in EXPECTED}


def _for_plans(requests: Trace | RequestSet, plan: Plan | None, task: PlanningTask) -> RequestSet:
    task.check(requests.shape.num_experts)  # before a large trace is read
    if plan is not None:
        check_shape(requests.shape, plan.model, "plan")
    if isinstance(requests, RequestSet):
        return requests
    return read_requests(requests, signature_tokens=plan.signature.tokens if plan else None, rows=False)


def _with_origin(plan: Plan, requests: RequestSet) -> Plan:
    trace, origin = requests.trace, plan.provenance
    if trace is not None:
        origin = dataclasses.replace(origin, trace_checksum=trace.checksum, synthetic=trace.synthetic)
    return dataclasses.replace(plan, signature=requests.known, provenance=origin)


def _setup(task: PlanningTask, settings: EvaluationSettings, strategies: tuple[str | Strategy, ...]) -> Setup:
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return Setup(task.cluster, strategies, task.redundant, task.replica_rule, task.dispatch, **chosen)
