"""`random`: a seeded random placement, the floor that a real method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.planning.problem import PlanningProblem, Solution, Strategy


@dataclass(frozen=True)
class RandomStrategy(Strategy):
    """Every layer by itself: experts in random order, then the first R again, assigned to the GPUs round robin.

    Replicas of an expert lie next to each other in the deck, so that no GPU gets two of them.
    """

    name = "random"

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        rng = np.random.default_rng([seed, 0xA5])
        experts, gpus = problem.shape.num_experts, problem.cluster.num_gpus
        slots = np.zeros((problem.shape.num_layers, problem.num_slots), np.int32)
        replicas = np.bincount(np.arange(problem.num_slots) % experts, minlength=experts)
        for row in slots:
            deck = np.repeat(rng.permutation(experts), replicas)
            table = rng.permutation(gpus)
            row.reshape(gpus, -1)[table] = deck.reshape(-1, gpus).T
        return Solution(slots)


STRATEGIES = (RandomStrategy(),)
