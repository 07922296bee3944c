"""Planning problems made of drawn requests."""

from __future__ import annotations

import numpy as np

from moeplan.cluster import Cluster, Deployment
from moeplan.planning import PlanningProblem
from moeplan.planning.problem import TokenRows
from moeplan.types import ModelShape

__all__ = ["problem"]


def problem(
    seed: int = 0, *, n: int = 24, layers: int = 2, experts: int = 12, k: int = 2, nodes: int = 2, per_node: int = 2,
    redundant: int = 0, home: Deployment = Deployment.NODES, expert_groups: int = 1, rows: int = 12,
) -> PlanningProblem:  # fmt: skip
    """Requests of two kinds, each with its own half of the experts in front."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(n, rows, layers, experts))
    score[np.arange(n) % 2 == 0, :, :, : experts // 2] += 1.5
    picks = np.argsort(-score, axis=3)[..., :k].astype(np.uint8)
    use = np.zeros((n, layers, experts), np.uint32)
    for i, _, layer, j in np.ndindex(*picks.shape):
        use[i, layer, picks[i, _, layer, j]] += 1
    starts = np.arange(n) * rows
    return PlanningProblem(
        ModelShape("test", layers, experts, k, routing_groups=expert_groups), Cluster(nodes, per_node, home),
        redundant, use, use, TokenRows(picks.reshape(-1, layers, k), starts, starts + rows),
    )  # fmt: skip
