"""A placement that somebody else made, as a plan: to be stored, replayed, and improved by few moves."""

from __future__ import annotations

import numpy as np

from moeplan.cluster import Cluster, Dispatch, Home, ReplicaRule, check_slots, routes
from moeplan.engines.placement import EnginePlacement
from moeplan.planning import Problem, Result
from moeplan.planning.problem import Stream
from moeplan.planning.router import LocalityRouter
from moeplan.types import ModelShape, expert_dtype

__all__ = ["STRATEGY", "deployed", "rule_of"]

#: What a plan is called whose placement came from an engine's file.
STRATEGY = "deployed"


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


class _Deployed(Problem):
    """The problem of a placement that nothing was fitted for: no requests."""

    def __post_init__(self) -> None:
        check_slots(self.shape.num_experts, self.redundant, self.cluster)


def deployed(
    placement: EnginePlacement, shape: ModelShape, *, home: Home, rule: ReplicaRule, dispatch: Dispatch, where: str,
    seed: int = 0,
) -> tuple[Result, Problem]:  # fmt: skip
    """What `solve` would have given, and the problem it is for (which holds no requests).

    Raises:
        UsageError, FormatError: the file is for other experts or layers.
    """
    place = placement.fit(shape, where)
    cluster = Cluster(place.nodes, place.gpus_per_node, home)
    none = np.zeros((0, shape.num_layers, shape.num_experts), np.uint32)
    rows = np.zeros((0, shape.num_layers, shape.top_k), expert_dtype(shape.num_experts))
    empty = np.zeros(0, np.int64)
    problem = _Deployed(
        shape, cluster, place.redundant, none, none, Stream(rows, empty, empty), rule, dispatch
    )  # fmt: skip
    who = routes(place, cluster, rule, seed)
    notes = (f"the placement of {where}; nothing was fitted",)
    return Result(STRATEGY, seed, place, who, LocalityRouter.of(who), True, notes, 0.0), problem
