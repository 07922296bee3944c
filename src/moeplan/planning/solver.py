"""From a planning problem to a `Plan`: `solve(problem, strategy, seed)`."""

from __future__ import annotations

import time

from moeplan.planning import strategies
from moeplan.planning.plan import Plan, Provenance
from moeplan.planning.problem import MoveLimit, PlanningProblem, Strategy
from moeplan.planning.router import LocalityRouter

__all__ = ["solve"]


def solve(problem: PlanningProblem, strategy: str | Strategy, seed: int = 0, limit: MoveLimit | None = None) -> Plan:
    """Run a strategy and return a `Plan`; build the default request router if the strategy has none.

    Args:
        strategy: a name, for its default parameters, or a strategy with parameters.
        limit: a deployed placement to improve by few moves.

    Raises:
        UsageError: no such strategy, or one that cannot start from a placement. PlanError: there is no such plan.
    """
    chosen = strategies.find(strategy)
    start = time.perf_counter()
    solution = chosen.solve(problem, seed) if limit is None else chosen.rebalance(problem, limit, seed)
    routes = problem.routes(solution.slots, seed)
    router = solution.router or LocalityRouter.of(routes)
    seconds = time.perf_counter() - start
    return Plan(
        placement=routes.placement,
        router=router,
        cluster=problem.cluster,
        dispatch=problem.dispatch,
        replica_rule=problem.replica_rule,
        model=problem.shape,
        strategy=chosen.name,
        params=chosen.to_dict(),
        seed=seed,
        equal_groups=chosen.equal_groups,
        provenance=Provenance(fit_requests=len(problem.use), fit_seconds=seconds, notes=solution.notes),
    )
