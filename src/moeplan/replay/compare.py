"""`compare`: strategies on held-out requests. Fit on one part, measure on the other, several times over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeplan.cluster import Cluster, Dispatch, ReplicaRule
from moeplan.planning.plan import Plan, PlanningTask
from moeplan.planning.prediction import predictable
from moeplan.planning.problem import Strategy
from moeplan.planning.requests import RequestSet, read_requests, shape_of
from moeplan.planning.solver import solve
from moeplan.planning.strategies import find
from moeplan.progress import Progress, silent
from moeplan.replay.evaluator import EvaluationRun, Measured, Row
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import least_requests
from moeplan.replay.table import Comparison
from moeplan.replay.tabulate import tabulate
from moeplan.trace import Trace

__all__ = ["compare", "compare_task"]

#: Strategies that are also shown with their placement's own signature routing, so that a gain splits into two.
_ALSO_ROUTED = ("linear", "eplb")


def compare(
    requests: Trace | RequestSet,
    cluster: Cluster,
    strategies: Strategy | Sequence[str | Strategy] = ("random", "linear", "eplb", "affinity", "paper", "moeplan"),
    *,
    redundant: int = 0,
    dispatch: Dispatch | str = Dispatch.PICK,
    replica_rule: ReplicaRule | str = ReplicaRule.NEAREST_STATIC,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress = silent,
) -> Comparison:
    """Fit each strategy on a part of the requests and measure it on the others, several times over.

    Args:
        requests: a trace, or `read_requests` of one.
        strategies: names, or strategies with their parameters, or one; `linear`, the baseline, is always among them.
        redundant: extra expert slots per layer, over all GPUs.
        dispatch: what a message is. replica_rule: which replica of an expert serves a token.

    Raises:
        PlanError: slots that do not divide, more groups than requests, too few held-out requests a group.
        UsageError: no such strategy; a model to time that is not the trace's.

    Examples:
        >>> import moeplan
        >>> trace, settings = moeplan.open_trace("embedded"), moeplan.EvaluationSettings(folds=1, steps=20)
        >>> table = moeplan.compare(trace, moeplan.Cluster(4, 2), ("eplb",), settings=settings)
        >>> [row.name for row in table.rows]
        ['linear', 'linear/prefill', 'eplb', 'eplb/prefill']
    """
    task = PlanningTask(cluster, redundant, Dispatch(dispatch), ReplicaRule(replica_rule))
    return compare_task(requests, task, strategies, settings, progress)


def compare_task(
    requests: Trace | RequestSet,
    task: PlanningTask,
    strategies: Strategy | Sequence[str | Strategy],
    settings: EvaluationSettings,
    progress: Progress = silent,
) -> Comparison:
    """`compare` for a task."""
    chosen = _by_name(strategies)
    task.check(shape_of(requests).num_experts)  # before a large trace is read
    requests, cluster = read_requests(requests), task.cluster
    ways = ["fewer nodes", *["--deployment nodes"] * (cluster.gpus_per_group < cluster.gpus_per_node), "another --fit"]
    ways += ["a smaller --block"] * (settings.block > 1)
    hint = f"use {', '.join(ways)}, or a trace with {least_requests(cluster, settings.fit_share)} usable requests"
    few = f"{cluster.num_groups} groups for {{}} fit requests"
    run = EvaluationRun.split(requests, task, settings, few, hint)
    rows = rows_of(chosen, requests)
    measured: dict[str, list[Measured]] = {row.name: [] for row in rows}
    notes: dict[str, dict[str, None]] = {}
    done, total = 0, len(rows) * settings.folds
    for fold in run.folds():
        problem, plans = requests.problem(task, fold.fit), dict[str, Plan]()
        for row in rows:
            progress(done, total, f"fold {fold.fold + 1}, {row.name}")
            if row.strategy not in plans:
                plans[row.strategy] = solve(problem, chosen[row.strategy], settings.seed + fold.fold)
                for note in plans[row.strategy].provenance.notes:
                    notes.setdefault(note, {})[str(fold.fold + 1)] = None
            plan = plans[row.strategy]
            measured[row.name].append(fold.measure(plan, fold.group(plan, row.signature)))
            done += 1
    lines = (
        f"{note} (fold{'s' * (len(at) > 1)} {', '.join(at)})" if len(at) < settings.folds else note
        for note, at in notes.items()
    )
    given = (getattr(strategy, "clusters", None) for strategy in chosen.values())
    return tabulate(run, rows, measured, tuple(lines), next(filter(None, given), None))


def rows_of(strategies: dict[str, Strategy], requests: RequestSet) -> list[Row]:
    """The rows to show: each strategy in its own way, then the variants that split a gain into its parts.

    A strategy that groups requests comes with every kind of signature that the trace allows; the others with random
    equal groups, and `linear` and `eplb` also with signature routing.
    """
    several = len(np.unique(requests.domain)) > 1
    rows: list[Row] = []
    for name, strategy in strategies.items():
        if strategy.routed:
            kinds = ["none", *(["domain"] if several else []), *predictable(requests), "oracle"]
            rows.append(Row(name, name, "prefill"))
            if strategy.equal_groups:
                rows += [Row(f"{name}/{kind}", name, kind) for kind in kinds]
        else:
            rows.append(Row(name, name, "none"))
            if name in _ALSO_ROUTED:
                rows.append(Row(f"{name}/prefill", name, "prefill"))
    return rows


def _by_name(strategies: Strategy | Sequence[str | Strategy]) -> dict[str, Strategy]:
    """The strategies by name, with the baseline in front; of several with one name, the last."""
    given = (strategies,) if isinstance(strategies, str | Strategy) else strategies
    return {strategy.name: strategy for strategy in map(find, ("linear", *given))}
