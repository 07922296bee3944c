"""`linear`: what every engine does when told nothing."""

from __future__ import annotations

import numpy as np

from moeplan.planning.problem import Decision, Problem, Strategy


def linear(problem: Problem, seed: int) -> Decision:
    """Expert e in slot e, spare slots holding experts 0, 1, .. again.

    The engines' own initial layout: SGLang 0.5.23 `--init-expert-location trivial`; vLLM 0.33.0's initial map.
    """
    row = np.arange(problem.num_slots, dtype=np.int32) % problem.shape.num_experts
    return Decision(np.tile(row, (problem.shape.num_layers, 1)))


STRATEGIES = {"linear": Strategy(linear)}
