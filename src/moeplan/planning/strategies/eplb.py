"""`eplb`: DeepSeek's expert-parallel load balancer, both policies.

Source of the algorithm: deepseek-ai/EPLB at d52c72d5, README and `eplb.py` (its README example is a golden test). It
balances load and nothing else; two copies of an expert may come to lie on one GPU.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from moeplan.errors import PlanError
from moeplan.planning.packing import pack, replicate
from moeplan.planning.problem import Decision, Problem, Strategy
from moeplan.types import Int32Array

__all__ = ["rebalance"]


def rebalance(weight: npt.NDArray[np.floating], slots: int, routing_groups: int, nodes: int, gpus: int) -> Int32Array:
    """The whole algorithm: int32 [L, slots] from weight [L, E], the load of every expert.

    Hierarchical (`routing_groups` divides by `nodes`, nodes > 1): pack the router's groups of experts onto nodes, add
    copies inside each node, pack copies onto its GPUs. Global (`nodes` = 1): copies and GPUs, no groups, no nodes.
    """
    load: npt.NDArray[np.float64] = np.asarray(weight, np.float64)
    layers, experts = load.shape
    per_node, per_group = experts // nodes, experts // routing_groups
    node, rank = pack(load.reshape(layers, routing_groups, per_group).sum(axis=2), nodes)
    group_start = (node * (routing_groups // nodes) + rank) * per_group
    place = (group_start[:, :, None] + np.arange(per_group)).reshape(layers, experts)  # expert -> its place by nodes
    by_place = np.argsort(place, axis=1)

    node_load = np.take_along_axis(load, by_place, axis=1).reshape(layers * nodes, per_node)
    copy, count = replicate(node_load, slots // nodes)
    copy_load = np.take_along_axis(node_load / count, copy, axis=1)

    per_gpu = slots // gpus
    gpu, rank = pack(copy_load, gpus // nodes)
    held = np.empty_like(copy)
    np.put_along_axis(held, gpu * per_gpu + rank, copy, axis=1)  # slot within the node -> expert within the node
    held = held.reshape(layers, nodes, -1) + np.arange(nodes)[None, :, None] * per_node
    return np.take_along_axis(by_place, held.reshape(layers, slots), axis=1).astype(np.int32)


def eplb(problem: Problem, seed: int, policy: str = "auto") -> Decision:
    """Balance the fit requests' load; `auto` is hierarchical where the model's routing groups divide by the nodes."""
    cluster, groups = problem.cluster, problem.shape.routing_groups
    fits = groups % cluster.nodes == 0 and problem.num_slots % cluster.nodes == 0
    if policy == "hierarchical" and not fits:
        raise PlanError(
            f"eplb-hierarchical needs routing groups that divide by the nodes: {groups} on {cluster.nodes} nodes",
            hint="use eplb, or import the trace with --routing-groups",
        )
    chosen = "hierarchical" if policy != "global" and fits else "global"
    nodes, groups = (cluster.nodes, groups) if chosen == "hierarchical" else (1, 1)
    slots = rebalance(problem.load, problem.num_slots, groups, nodes, cluster.num_gpus)
    return Decision(slots, notes=(f"eplb: {chosen} policy",))


STRATEGIES = {
    "eplb": Strategy(eplb),
    "eplb-global": Strategy(partial(eplb, policy="global")),
    "eplb-hierarchical": Strategy(partial(eplb, policy="hierarchical")),
}
