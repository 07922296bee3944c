"""`eplb`: DeepSeek's expert-parallel load balancer, both policies (`moeplan.planning.balance` has the algorithm)."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.errors import UsageError
from moeplan.planning.balance import eplb_slots
from moeplan.planning.problem import PlanningProblem, Solution, Strategy

_POLICIES = ("auto", "global", "hierarchical")


@dataclass(frozen=True)
class EplbStrategy(Strategy):
    """Balance the fit requests' expert load.

    Attributes:
        policy: hierarchical (the gate's groups of experts onto nodes first), global, or auto: hierarchical where
            the expert groups divide by the nodes.
    """

    policy: str = "auto"

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise UsageError(f"policy {self.policy!r} is not one of {', '.join(_POLICIES)}")

    @property
    def name(self) -> str:
        return "eplb" if self.policy == "auto" else f"eplb-{self.policy}"

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        groups = problem.shape.routing_groups
        slots, chosen = eplb_slots(problem.load, problem.num_slots, problem.cluster, groups, self.policy)
        nodes = problem.cluster.nodes
        forced = chosen == "global" and self.policy == "auto" and nodes > 1
        why = f" (number of expert groups, {groups}, is not divisible by {nodes} nodes)" if forced else ""
        return Solution(slots, notes=(f"eplb: {chosen} policy{why}",))


STRATEGIES = tuple(EplbStrategy(policy) for policy in _POLICIES)
