"""What the planner counts as a message, and what it charges for load imbalance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan._kernels.layer_state import BY_GPU, BY_NODE, BY_PICK, Objective
from moeplan.arrays import ExpertArray, FloatArray, Int64Array
from moeplan.cluster import Dispatch
from moeplan.planning.problem import PlanningProblem

__all__ = ["BALANCE", "BOTH", "LOCALITY", "Pricing", "TokenSample"]


_COUNTED_BY = {Dispatch.NODE: BY_NODE, Dispatch.GPU: BY_GPU}


@dataclass(frozen=True)
class TokenSample:
    """Token rows of the fit requests, sampled: they tell which experts one token picks together.

    Attributes:
        counted_by: `BY_NODE` or `BY_GPU`, what a message is counted by.
        request: int64 [T], the fit request of each row.
        experts: for each layer, unsigned [T, k].
        draw: float64 [T] in [0, 1), chooses one of the groups that the row's request belongs to in part.
    """

    counted_by: int
    request: Int64Array
    experts: list[ExpertArray]
    draw: FloatArray

    @classmethod
    def of(cls, problem: PlanningProblem, max_rows: int, seed: int) -> TokenSample | None:
        """A seeded sample; None where messages are counted by pick, so that a pick shares its message with none."""
        if problem.dispatch not in _COUNTED_BY or problem.shape.top_k == 1:
            return None
        rows, rng = problem.rows, np.random.default_rng([seed, 0x50])
        length = rows.stops - rows.starts
        position = np.sort(rng.choice(int(length.sum()), min(max_rows, int(length.sum())), replace=False))
        end = np.cumsum(length)
        request = np.searchsorted(end, position, side="right")
        picked = rows.experts[rows.starts[request] + position - (end - length)[request]]
        experts = [np.ascontiguousarray(picked[:, layer]) for layer in range(picked.shape[1])]
        return cls(_COUNTED_BY[problem.dispatch], request, experts, rng.random(len(request)))

    def by_layer(self, member: FloatArray, group_node: Int64Array) -> list[tuple[ExpertArray, Int64Array]]:
        """For each layer, the rows' experts [T, k] and home nodes [T], given memberships [n, D] in the groups."""
        home = group_node[(np.cumsum(member[self.request], axis=1) < self.draw[:, None]).sum(axis=1)]
        return [(experts, home) for experts in self.experts]


@dataclass(frozen=True)
class Pricing:
    """What a plan is charged for, in shares of all picks.

    Attributes:
        node_penalty, gpu_penalty: for each unit of load imbalance (the load norm) of nodes and of GPUs.
        sharing_credit: how much it counts that picks of one token share a message: 1 in full, 0 not at all.
        rows: token rows to count messages on; None: every pick that leaves its node is one message.
    """

    node_penalty: float
    gpu_penalty: float
    sharing_credit: float = 1.0
    rows: TokenSample | None = None

    def objective(self, nearest: bool) -> Objective:
        """What the local search raises, where the nearest replica serves (`nearest`) or any."""
        counted_by = BY_PICK if self.rows is None else self.rows.counted_by
        return Objective(self.node_penalty, self.gpu_penalty, nearest, counted_by, self.sharing_credit)


#: First penalties of three objectives: locality within the load guard, locality and load, load before locality.
LOCALITY, BOTH, BALANCE = Pricing(0.02, 0.2), Pricing(0.2, 1.0), Pricing(2.0, 2.0)
