"""Making plans: `plan` from a trace, `rebalance` from an older plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moeplan.cluster import Cluster, Dispatch, ReplicaRule
from moeplan.errors import PlanError
from moeplan.planning.plan import Plan, PlanningTask
from moeplan.planning.prediction import Prediction, predictable
from moeplan.planning.problem import MoveLimit, Strategy
from moeplan.planning.requests import RequestSet, read_requests, shape_of
from moeplan.planning.solver import solve
from moeplan.planning.strategies import find
from moeplan.planning.strategies.moeplan import MoeplanStrategy
from moeplan.progress import Progress, silent
from moeplan.replay.compare import compare_task
from moeplan.replay.evaluator import check_inputs
from moeplan.replay.settings import EvaluationSettings
from moeplan.trace import Trace

__all__ = ["HELD_OUT", "expected_figures", "fit", "plan", "plan_task", "rebalance"]

#: The figures that a plan keeps of its evaluation on held-out requests.
EXPECTED = ("remote_share", "remote_nodes_per_token", "gpu_load_ratio", "node_load_ratio", "experts_per_gpu")
#: How they are measured: fitted on three quarters, measured on the last.
HELD_OUT = EvaluationSettings(fit_share=0.75, folds=1, steps=100, bootstrap_draws=200)


def plan(
    requests: Trace | RequestSet,
    cluster: Cluster,
    strategy: str | Strategy = "moeplan",
    *,
    redundant: int = 0,
    dispatch: Dispatch | str = Dispatch.PICK,
    replica_rule: ReplicaRule | str = ReplicaRule.NEAREST_STATIC,
    seed: int = 0,
    progress: Progress = silent,
) -> Plan:
    """Fit a plan on all usable requests of a trace.

    Its expected figures come from a second plan, fitted on three quarters of the requests and measured on the last.

    Args:
        requests: a trace, or `read_requests` of one; `RequestSet.split` holds some back to evaluate the plan on.
        strategy: a name, or a strategy with its parameters.
        redundant: extra expert slots per layer, over all GPUs.
        dispatch: what a message is. replica_rule: which replica of an expert serves a token.

    Raises:
        PlanError: slots that do not divide over the GPUs, more groups than requests. UsageError: no such strategy.

    Examples:
        >>> import moeplan
        >>> plan = moeplan.plan(moeplan.open_trace("embedded"), moeplan.Cluster(4, 2), "eplb", redundant=8)
        >>> plan.placement.slots.shape
        (8, 40)
    """
    task = PlanningTask(cluster, redundant, Dispatch(dispatch), ReplicaRule(replica_rule))
    return plan_task(requests, task, strategy, dataclasses.replace(HELD_OUT, seed=seed), progress)


def plan_task(
    requests: Trace | RequestSet,
    task: PlanningTask,
    strategy: str | Strategy = "moeplan",
    held_out: EvaluationSettings = HELD_OUT,
    progress: Progress = silent,
) -> Plan:
    """`plan` for a task, with the settings by which its figures on held-out requests are measured.

    Args:
        held_out: their seed is the plan's, too.
    """
    chosen = find(strategy)
    task.check(shape_of(requests).num_experts)  # before a large trace is read
    requests = read_requests(requests, rows=False)
    progress(0, 2, "solving")
    made = fit(requests, task, chosen, held_out.seed)
    progress(1, 2, "figures on a held-out quarter")
    return dataclasses.replace(made, expected=expected_figures(requests, task, chosen, held_out))


def rebalance(
    plan: Plan,
    requests: Trace | RequestSet,
    *,
    max_moves: int,
    strategy: MoeplanStrategy | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Plan:
    """Improve a plan for other requests by moving few experts; the router is fitted anew.

    Args:
        max_moves: most replicas of each layer that may end on another GPU than in the plan.
        strategy: guard and objective in place of the plan's; needed for a plan that was made for time.

    Raises:
        UsageError: requests of another model; a plan made for time, without `strategy`.
        FormatError: the plan's parameters are invalid.

    Examples:
        >>> new = moeplan.rebalance(plan, trace, max_moves=4)  # doctest: +SKIP
        >>> new.moves_from(plan).most_in_a_layer  # doctest: +SKIP
        4
    """
    check_inputs(plan, requests)
    chosen, limit = strategy or MoeplanStrategy.of_plan(plan.params), MoveLimit(plan.placement.slots, max_moves)
    requests = read_requests(requests, signature_tokens=plan.signature.tokens, rows=False)
    progress(0, 1, "solving")
    return fit(requests, plan.task, chosen, seed, limit)


def fit(
    requests: RequestSet, task: PlanningTask, strategy: str | Strategy, seed: int = 0, limit: MoveLimit | None = None
) -> Plan:
    """A plan fitted on all of these requests, without expected figures.

    Args:
        limit: the placement to start from, and how far the new one may be from it; None: anywhere.
    """
    made = solve(requests.problem(task), strategy, seed, limit)
    trace, origin = requests.trace, made.provenance
    if trace is not None:
        index = () if requests.whole else tuple(requests.index.tolist())
        origin = dataclasses.replace(origin, trace_checksum=trace.checksum, synthetic=trace.synthetic, fit_index=index)
    prediction = None
    if predictable(requests):
        everyone = np.arange(len(requests))
        prediction = Prediction.fit(requests, everyone, seed)
        prediction = prediction.calibrated(requests, everyone, made.router, made.routes.local_share)
    return dataclasses.replace(made, signature=requests.known, provenance=origin, prediction=prediction)


def expected_figures(
    requests: RequestSet, task: PlanningTask, strategy: str | Strategy, settings: EvaluationSettings = HELD_OUT
) -> dict[str, Any] | None:
    """A strategy's figures on held-out requests; None where there are too few of them, or no token rows."""
    if requests.sums is not None:
        return None
    try:
        row = compare_task(requests, task, (strategy,), settings).row(find(strategy).name).to_dict()
    except PlanError:
        return None
    return {key: row[key] for key in EXPECTED}
