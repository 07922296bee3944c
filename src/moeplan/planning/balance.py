"""Balanced placements from expert load alone: it has the load of each expert, but not which requests pick it.

Names: L layers, E experts, S slots, N nodes, P GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.arrays import FloatArray, Int32Array
from moeplan.cluster import Cluster, ReplicaRule, check_slots, routes
from moeplan.errors import PlanError, UsageError
from moeplan.planning.expected_load import load_ratio
from moeplan.planning.packing import pack, replicate, slots_from_nodes
from moeplan.types import Placement, has_duplicate_experts

__all__ = ["Candidate", "balance", "candidates", "eplb_slots", "gpu_load_ratio", "linear_slots", "rebalance_experts"]


@dataclass(frozen=True)
class Candidate:
    """One way to balance.

    Attributes:
        name: linear (experts in order, an engine's own default), eplb (DeepSeek's hierarchical policy, where the
            gate's groups of experts allow it), eplb-global, or spread.
        placement: its slots. ratio: `gpu_load_ratio` on the counts that it was made from.
    """

    name: str
    placement: Placement
    ratio: float


def balance(
    counts: npt.ArrayLike,
    cluster: Cluster,
    *,
    redundant: int = 0,
    replica_rule: ReplicaRule | str = ReplicaRule.NEAREST_STATIC,
    expert_groups: int = 1,
) -> Placement:
    """The placement with the most even GPU load for given expert load: DeepSeek's EPLB, or replicas spread over nodes.

    Args:
        counts: [L, E], picks of every expert (any unit, finite, not negative).
        cluster: nodes and GPUs per node.
        redundant: R, extra slots per layer; E + R divides over the GPUs.
        replica_rule: how the engine chooses among replicas.
        expert_groups: groups of experts of the gate, n_group of config.json (DeepSeek-V3: 8).

    Raises:
        PlanError: slots that do not divide over the GPUs. UsageError: invalid counts, or a layer without a pick.

    Examples:
        >>> counts = [[90, 132, 40, 61, 104, 165, 39, 4]]
        >>> balance(counts, Cluster(nodes=2, gpus_per_node=2), redundant=4).slots
        array([[5, 4, 7, 5, 0, 6, 1, 3, 2, 1, 4, 0]], dtype=int32)
    """
    rule = ReplicaRule(replica_rule)
    return candidates(counts, cluster, redundant, rule, expert_groups=expert_groups)[1].placement


def candidates(
    counts: npt.ArrayLike,
    cluster: Cluster,
    redundant: int,
    replica_rule: ReplicaRule,
    *,
    expert_groups: int = 1,
    distinct: bool = False,
) -> list[Candidate]:
    """Every way to balance: `linear` first, then the others, the most even first.

    Args:
        counts, cluster, redundant, replica_rule, expert_groups: as for `balance`.
        distinct: leave out ways that put two replicas of an expert on one GPU.

    Raises:
        PlanError: slots that do not divide over the GPUs. UsageError: invalid counts, or a layer without a pick.
    """
    load = np.asarray(counts, np.float64)
    if load.ndim != 2:
        raise UsageError(f"counts of shape {load.shape}, expected [layers, experts]")
    if not np.isfinite(load).all() or (load < 0).any():
        raise UsageError("counts must be finite, and 0 or more")
    experts = load.shape[1]
    check_slots(experts, redundant, cluster)
    slots = experts + redundant
    made = {"linear": linear_slots(len(load), experts, slots)}
    made["eplb-global"] = rebalance_experts(load, slots, 1, 1, cluster.num_gpus)
    if cluster.nodes > 1 and _fits_nodes(slots, expert_groups, cluster):
        made["eplb"] = rebalance_experts(load, slots, expert_groups, cluster.nodes, cluster.num_gpus)
    # Replicas on different nodes, if there are not too many of them; else on different GPUs.
    apart = cluster if 0 < redundant <= experts * (cluster.nodes - 1) else Cluster(cluster.num_gpus, 1)
    made["spread"] = spread_slots(load, slots, apart)
    found = []
    for name, of_slots in made.items():
        placement = Placement(of_slots, experts, cluster.nodes, cluster.gpus_per_node)
        if distinct and name != "linear" and has_duplicate_experts(placement.slots, placement.num_gpus).any():
            continue
        found.append(Candidate(name, placement, gpu_load_ratio(load, placement, cluster, replica_rule)))
    return [found[0], *sorted(found[1:], key=lambda candidate: (candidate.ratio, candidate.name))]


def linear_slots(layers: int, experts: int, slots: int) -> Int32Array:
    """int32 [L, S]: expert e in slot e, redundant slots with experts 0, 1, .. again."""
    return np.tile(np.arange(slots, dtype=np.int32) % experts, (layers, 1))


def eplb_slots(
    load: FloatArray, slots: int, cluster: Cluster, expert_groups: int, policy: str = "auto"
) -> tuple[Int32Array, str]:
    """DeepSeek's load balancer: slots int32 [L, S] from load [L, E], and which policy made them.

    Args:
        policy: hierarchical, global, or auto: hierarchical where the expert groups divide by the nodes.

    Raises:
        PlanError: hierarchical, where they do not.
    """
    fits = _fits_nodes(slots, expert_groups, cluster)
    if policy == "hierarchical" and not fits:
        raise PlanError(
            f"eplb-hierarchical needs expert groups that divide by the nodes: {expert_groups} on {cluster.nodes} nodes",
            hint="use eplb, or import the trace with --expert-groups",
        )
    if policy == "global" or not fits:
        return rebalance_experts(load, slots, 1, 1, cluster.num_gpus), "global"
    return rebalance_experts(load, slots, expert_groups, cluster.nodes, cluster.num_gpus), "hierarchical"


def _fits_nodes(slots: int, expert_groups: int, cluster: Cluster) -> bool:
    return expert_groups % cluster.nodes == 0 and slots % cluster.nodes == 0


def rebalance_experts(weight: npt.ArrayLike, slots: int, expert_groups: int, nodes: int, gpus: int) -> Int32Array:
    """DeepSeek's EPLB: int32 [L, S] from weight [L, E], expert load (deepseek-ai/EPLB at d52c72d5, `eplb.py`).

    Hierarchical (`expert_groups` divides by `nodes`, nodes > 1): pack the gate's groups of experts onto nodes, add
    replicas inside each node, pack replicas onto its GPUs. Global (`nodes` = 1): replicas and GPUs, no groups, no
    nodes. It balances load and nothing else; two replicas of an expert may come to lie on one GPU.
    """
    load = np.asarray(weight, np.float64)
    layers, experts = load.shape
    per_node, per_group = experts // nodes, experts // expert_groups
    node, rank = pack(load.reshape(layers, expert_groups, per_group).sum(axis=2), nodes)
    group_start = (node * (expert_groups // nodes) + rank) * per_group
    place = (group_start[:, :, None] + np.arange(per_group)).reshape(layers, experts)  # expert -> its place by nodes
    by_place = np.argsort(place, axis=1)

    node_load = np.take_along_axis(load, by_place, axis=1).reshape(layers * nodes, per_node)
    expert, count = replicate(node_load, slots // nodes)
    replica_load = np.take_along_axis(node_load / count, expert, axis=1)

    per_gpu = slots // gpus
    gpu, rank = pack(replica_load, gpus // nodes)
    held = np.empty_like(expert)
    np.put_along_axis(held, gpu * per_gpu + rank, expert, axis=1)  # slot within the node -> expert within the node
    held = held.reshape(layers, nodes, -1) + np.arange(nodes)[None, :, None] * per_node
    return np.take_along_axis(by_place, held.reshape(layers, slots), axis=1).astype(np.int32)


def spread_slots(load: FloatArray, slots: int, cluster: Cluster) -> Int32Array:
    """int32 [L, S]: the replicas of an expert on different nodes, nodes and GPUs evenly loaded.

    An engine that takes the nearest replica asks each of them from whole nodes, so replicas share their expert's load
    evenly only when they are on different nodes; DeepSeek's balancer assumes that they always share it evenly.
    """
    _, count = replicate(load, slots, max_replicas=cluster.nodes)
    each = load / count
    slots_per_node = slots // cluster.nodes
    held = np.zeros((len(load), cluster.nodes, slots_per_node), np.int64)
    for layer in range(len(load)):
        filled, weight = np.zeros(cluster.nodes, np.int64), np.zeros(cluster.nodes)
        # Experts with several replicas first, to the emptiest nodes: then the last of them finds enough nodes.
        order = np.lexsort((-each[layer], -count[layer]))
        for expert in order:
            if count[layer, expert] > 1:
                nodes = np.lexsort((weight, filled))[: count[layer, expert]]
            else:
                nodes = np.array([np.where(filled < slots_per_node, weight, np.inf).argmin()])
            held[layer, nodes, filled[nodes]] = expert
            filled[nodes] += 1
            weight[nodes] += each[layer, expert]
    replica_load = np.take_along_axis(each, held.reshape(len(load), -1), axis=1).reshape(held.shape)
    return slots_from_nodes(held, replica_load, cluster.gpus_per_node)


def gpu_load(counts: npt.ArrayLike, placement: Placement, cluster: Cluster, replica_rule: ReplicaRule) -> FloatArray:
    """float64 [L, P]: picks that each GPU serves of counts [L, E], where all GPUs ask for an expert equally often."""
    load = np.asarray(counts, np.float64)
    applied = routes(placement, cluster, replica_rule)
    return np.stack([load[layer] @ applied.share(layer).mean(axis=0) for layer in range(len(load))])


def gpu_load_ratio(counts: npt.ArrayLike, placement: Placement, cluster: Cluster, replica_rule: ReplicaRule) -> float:
    """Picks of the busiest GPU over the mean, mean over layers (`gpu_load_total` of the metrics, from counts alone).

    Raises:
        UsageError: a layer without a pick.
    """
    load = gpu_load(counts, placement, cluster, replica_rule)
    if not (picks := load.sum(axis=1)).all():
        raise UsageError(
            f"row {int(picks.argmin())} of the counts has no pick",
            hint="count while requests run, and leave layers without experts out: counts[list(model.moe_layers)]",
        )
    return float(load_ratio(load).mean())
