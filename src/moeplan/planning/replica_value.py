"""What copies are worth under an engine's own way of choosing one: SGLang takes the nearest, the others any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.cluster import Cluster, ReplicaRule, routes
from moeplan.planning import Plan, RequestSet
from moeplan.planning.assignment import equal_groups
from moeplan.types import Placement

__all__ = ["ReplicaLocality", "remote_share", "replica_locality"]


@dataclass(frozen=True)
class ReplicaLocality:
    """Shares of picks that are served on another node than the token's home.

    Attributes:
        nearest: where the nearest copy is taken. any_copy: where any copy is, each alike. scattered: where requests and
            experts are spread without regard to one another, 1 - 1 / nodes.
    """

    nearest: float
    any_copy: float
    scattered: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"nearest-static": self.nearest, "hash": self.any_copy, "scattered": self.scattered}


def replica_locality(requests: RequestSet, plan: Plan) -> ReplicaLocality:
    """Replay the requests, in the equal groups that the plan's router gives them, under both rules."""
    groups = equal_groups(plan.router.scores(requests.signature))
    nearest, any_copy = (
        remote_share(requests, groups, plan.placement, plan.cluster, rule, plan.seed)
        for rule in (ReplicaRule.NEAREST_STATIC, ReplicaRule.HASH)
    )
    return ReplicaLocality(nearest, any_copy, 1 - 1 / plan.cluster.nodes)


def remote_share(
    requests: RequestSet, groups: np.ndarray[tuple[int], np.dtype[np.int64]], placement: Placement, cluster: Cluster,
    rule: ReplicaRule, seed: int,
) -> float:  # fmt: skip
    """Expected share of the requests' picks that another node serves; groups: int64 [n]."""
    local = routes(placement, cluster, rule, seed).local_share  # [D, L, E]
    use = np.zeros((cluster.num_groups, *requests.measured.shape[1:]))
    np.add.at(use, groups, requests.measured)
    return float(1 - (use * local).sum() / use.sum())
