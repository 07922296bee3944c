"""`affinity`: co-activation alone. Experts that the same token picks share a node, wherever the token is.

The family of ExFlow, TACG and CAP: it lowers the distinct nodes that a token reaches, and uses neither requests, nor
their groups, nor load.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planning.balance import linear_slots
from moeplan.planning.initial_placement import coactivation_slots
from moeplan.planning.problem import PlanningProblem, Solution, Strategy


@dataclass(frozen=True)
class AffinityStrategy(Strategy):
    """Partition each layer's co-activation graph into equal nodes; redundant slots take a node's most co-activated."""

    name = "affinity"

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        shape = problem.shape
        if shape.top_k > 1:
            return Solution(coactivation_slots(problem, seed))
        note = "affinity: a top-1 model has no pairs of experts in a token; this is linear's placement"
        return Solution(linear_slots(shape.num_layers, shape.num_experts, problem.num_slots), notes=(note,))


STRATEGIES = (AffinityStrategy(),)
