"""The front door: `solve(problem, strategy, seed) -> result`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from moeplan.cluster import Routes, routes
from moeplan.errors import PlanError, UsageError
from moeplan.planning import strategies
from moeplan.planning.problem import Problem
from moeplan.planning.router import LocalityRouter, Router
from moeplan.types import Placement

__all__ = ["Result", "solve"]


@dataclass(frozen=True)
class Result:
    """A solved problem.

    Attributes:
        placement: where every expert lives.
        who: the replica rule applied to it.
        router: how new requests find their group.
        equal_groups: False for a strategy whose groups are unequal by nature.
        notes: choices made, one line each.
        seconds: wall time.
    """

    strategy: str
    seed: int
    placement: Placement
    who: Routes
    router: Router
    equal_groups: bool
    notes: tuple[str, ...]
    seconds: float


def solve(problem: Problem, strategy: str, seed: int = 0) -> Result:
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
    who = routes(placement, cluster, problem.rule, seed)
    router = decision.router or LocalityRouter.of(who)
    return Result(
        strategy, seed, placement, who, router, chosen.equal, decision.notes,
        time.perf_counter() - start,
    )  # fmt: skip
