"""`linear`: what every engine does by default."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planning.balance import linear_slots
from moeplan.planning.problem import PlanningProblem, Solution, Strategy


@dataclass(frozen=True)
class LinearStrategy(Strategy):
    """Expert e in slot e, redundant slots with experts 0, 1, .. again.

    The engines' own initial layout: SGLang 0.5.23 `--init-expert-location trivial`; vLLM 0.33.0's initial map.
    """

    name = "linear"

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        return Solution(linear_slots(problem.shape.num_layers, problem.shape.num_experts, problem.num_slots))


STRATEGIES = (LinearStrategy(),)
