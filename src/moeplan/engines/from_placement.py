"""A placement that somebody else made, as a plan: to be stored, replayed, and improved by few moves."""

from __future__ import annotations

from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule, check_slots, routes
from moeplan.engines.placement import EnginePlacement
from moeplan.planning.plan import DEPLOYED, Plan, Provenance
from moeplan.planning.router import LocalityRouter
from moeplan.types import ModelShape

__all__ = ["deployed", "rule_of"]


def rule_of(engine: str, nodes: int) -> ReplicaRule:
    """The replica rule by which moeplan models an engine.

    SGLang takes the copy on the own GPU, else the first on the own node if that rules any copy out, else one of a fair
    deal (0.5.23, `_find_nearest_expert`): on one node that is `nearest-even`. vLLM takes copies by a hash of the row.
    TensorRT-LLM (in turn) and vLLM-Ascend (by rank) do not look at the distance either: `hash` has the same
    expectation, 1 / copies each.
    """
    if engine != "sglang":
        return ReplicaRule.HASH
    return ReplicaRule.NEAREST_STATIC if nodes > 1 else ReplicaRule.NEAREST_EVEN


def deployed(
    placement: EnginePlacement, model: ModelShape, *, deployment: Deployment, rule: ReplicaRule, dispatch: Dispatch,
    where: str,
) -> Plan:  # fmt: skip
    """A placement as the plan that it amounts to: nothing was fitted.

    Raises:
        UsageError, FormatError: the file is for other experts or layers.
    """
    place = placement.fit(model, where)
    cluster = Cluster(place.nodes, place.gpus_per_node, deployment)
    check_slots(model.num_experts, place.redundant, cluster)
    router = LocalityRouter.of(routes(place, cluster, rule))
    notes = (f"the placement of {where}; nothing was fitted",)
    return Plan(place, router, cluster, dispatch, rule, model, DEPLOYED, provenance=Provenance(notes=notes))
