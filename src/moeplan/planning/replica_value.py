"""What replicas are worth under an engine's own replica rule: SGLang takes the nearest, other engines any."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.cluster import ReplicaRule, routes
from moeplan.planning import Plan, RequestSet
from moeplan.planning.assignment import equal_groups

__all__ = ["ReplicaLocality", "replica_locality"]


@dataclass(frozen=True)
class ReplicaLocality:
    """Shares of picks that another node serves than the one the token is on.

    Attributes:
        nearest: with the nearest replica. any_replica: with any replica, all equally often. scattered: with requests
            and experts spread without regard to one another, 1 - 1 / nodes.
    """

    nearest: float
    any_replica: float
    scattered: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"nearest-static": self.nearest, "hash": self.any_replica, "scattered": self.scattered}


def replica_locality(requests: RequestSet, plan: Plan) -> ReplicaLocality:
    """Replay the requests, in the equal groups that the plan's router gives them, under both rules."""
    groups = equal_groups(plan.router.scores(requests.signature))
    nearest, any_replica = (
        routes(plan.placement, plan.cluster, rule, plan.seed).remote_share(requests.measured, groups)
        for rule in (ReplicaRule.NEAREST_STATIC, ReplicaRule.HASH)
    )
    return ReplicaLocality(nearest, any_replica, 1 - 1 / plan.cluster.nodes)
