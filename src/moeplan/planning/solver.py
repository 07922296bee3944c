"""The front door: `solve(problem, strategy, seed) -> result`."""

from __future__ import annotations

import math
import time

from moeplan.cluster import routes
from moeplan.errors import PlanError, UsageError
from moeplan.planning import strategies
from moeplan.planning.plan import Plan, Provenance
from moeplan.planning.problem import Problem
from moeplan.planning.router import LocalityRouter
from moeplan.types import Placement

__all__ = ["solve"]


def solve(problem: Problem, strategy: str, seed: int = 0) -> Plan:
    """Decide, check the invariants of a placement, and bring the router along.

    Raises:
        UsageError: no such strategy. PlanError: the problem has no such plan.
    """
    chosen = strategies.find(strategy)
    if problem.old is not None and strategy != "moeplan":
        raise UsageError(
            f"{strategy} cannot start from an older plan", hint="use --strategy moeplan, or leave out --from"
        )
    start = time.perf_counter()
    decision = chosen.decide(problem, seed)
    cluster = problem.cluster
    placement = Placement(decision.slots, problem.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
    if placement.slots.shape != (problem.shape.num_layers, problem.num_slots):
        raise PlanError(f"{strategy} made slots of shape {placement.slots.shape}")
    router = decision.router or LocalityRouter.of(routes(placement, cluster, problem.rule, seed))
    params = {
        "guard": problem.options.guard if math.isfinite(problem.options.guard) else None,
        "objective": problem.options.objective if strategy == "moeplan" else None,
    }
    seconds = time.perf_counter() - start
    return Plan(
        placement, router, cluster, problem.dispatch, problem.rule, problem.shape, strategy, params,
        seed=seed, equal_groups=chosen.equal,
        provenance=Provenance(fit_requests=len(problem.use), fit_seconds=seconds, notes=decision.notes),
    )  # fmt: skip
