"""What replicas are worth under an engine's own replica rule: SGLang takes the nearest, other engines any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeplan.cluster import ReplicaRule, routes
from moeplan.errors import UsageError
from moeplan.planning import Plan, RequestSet, read_requests
from moeplan.planning.assignment import equal_groups
from moeplan.planning.expected_load import remote_share
from moeplan.trace import Trace, open_trace

__all__ = ["ReplicaLocality", "replica_locality", "trace_locality"]


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


def trace_locality(
    path: str | Path, plan: Plan, *, signature_tokens: int | None = None
) -> tuple[ReplicaLocality, Trace]:
    """`replica_locality` on a trace, without layers that the plan does not place.

    Raises:
        UsageError: the trace is of another model.
    """
    trace, layers = open_trace(path), plan.model.layer_ids
    if trace.shape.layer_ids != layers:
        trace = open_trace(path, without_layers=tuple(i for i in trace.shape.layer_ids if i not in layers))
    if (trace.shape.layer_ids, trace.shape.num_experts) != (layers, plan.model.num_experts):
        raise UsageError("the trace is not of the plan's model", where=str(path), hint="give a trace of the same model")
    return replica_locality(read_requests(trace, signature_tokens=signature_tokens), plan), trace


def replica_locality(requests: RequestSet, plan: Plan) -> ReplicaLocality:
    """Replay the requests, in the equal groups that the plan's router gives them, under both rules."""
    groups = equal_groups(plan.router.scores(requests.signature))
    nearest, any_replica = (
        remote_share(routes(plan.placement, plan.cluster, rule, plan.seed), requests.measured, groups)
        for rule in (ReplicaRule.NEAREST_STATIC, ReplicaRule.HASH)
    )
    return ReplicaLocality(nearest, any_replica, 1 - 1 / plan.cluster.nodes)
