"""A balanced placement where counts of picks are all that is known: which experts are busy, but not who asks for them.

Names: L layers, E experts, S slots, N nodes, P GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster, ReplicaRule, check_slots, routes
from moeplan.errors import UsageError
from moeplan.planning.packing import replicate, slots_from_nodes
from moeplan.planning.strategies.eplb import rebalance
from moeplan.types import Int32Array, Placement, has_duplicate_experts

__all__ = ["Candidate", "balance", "balanced", "gpu_load", "load_ratio", "spread"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One way to balance, and what it comes to.

    Attributes:
        name: linear (experts in order, as an engine starts by itself), eplb (DeepSeek's, by nodes where the router's
            groups allow it), eplb-global, or spread.
        placement: its slots. ratio: `load_ratio` on the counts that it was made of.
    """

    name: str
    placement: Placement
    ratio: float


def balance(
    counts: npt.ArrayLike,
    cluster: Cluster,
    *,
    redundant: int = 0,
    replica_rule: ReplicaRule = ReplicaRule.NEAREST_STATIC,
    routing_groups: int = 1,
) -> Placement:
    """A placement with even load from counts alone: the best of DeepSeek's balancer (EPLB) and its variants.

    Args:
        counts: [L, E], picks of every expert in each MoE layer.
        redundant: extra slots per layer, over all GPUs.
        replica_rule: how the engine chooses among replicas.
        routing_groups: groups of the model's router (DeepSeek-V3: 8).

    Raises:
        PlanError: slots that do not divide over the GPUs. UsageError: a layer without a pick.

    Example:
        >>> import moeplan, numpy
        >>> counts = numpy.array([[90, 132, 40, 61, 104, 165, 39, 4]])
        >>> moeplan.balance(counts, moeplan.Cluster(2, 2), redundant=4).slots
        array([[5, 4, 7, 5, 0, 6, 1, 3, 2, 1, 4, 0]], dtype=int32)
    """
    load = np.asarray(counts)
    if load.ndim != 2:
        raise UsageError(f"counts of shape {load.shape}, expected [layers, experts]")
    return balanced(load, cluster, redundant, replica_rule, routing_groups=routing_groups)[1].placement


def balanced(
    counts: npt.ArrayLike, cluster: Cluster, redundant: int, rule: ReplicaRule, *, routing_groups: int = 1,
    distinct: bool = False,
) -> list[Candidate]:  # fmt: skip
    """Every way, `linear` first, then the others with the best first.

    Args:
        counts: [L, E], picks of every expert. rule: how the engine chooses among copies.
        routing_groups: of the router (DeepSeek-V3: 8). distinct: leave out ways that put an expert on a GPU twice.

    Raises:
        PlanError: slots that do not divide over the GPUs.
    """
    load = np.asarray(counts, np.float64)
    experts = load.shape[1]
    check_slots(experts, redundant, cluster)
    slots = experts + redundant
    made: dict[str, Callable[[], Int32Array]] = {
        "linear": lambda: np.tile(np.arange(slots, dtype=np.int32) % experts, (len(load), 1)),
        "eplb-global": lambda: rebalance(load, slots, 1, 1, cluster.num_gpus),
    }
    if cluster.nodes > 1 and routing_groups % cluster.nodes == 0 and slots % cluster.nodes == 0:
        made["eplb"] = lambda: rebalance(load, slots, routing_groups, cluster.nodes, cluster.num_gpus)
    # Copies as far apart as nodes are, if there are not too many of them; else as GPUs are.
    apart = cluster if 0 < redundant <= experts * (cluster.nodes - 1) else Cluster(cluster.num_gpus, 1)
    made["spread"] = lambda: spread(load, slots, apart)
    found = []
    for name, make in made.items():
        placement = Placement(make(), experts, cluster.nodes, cluster.gpus_per_node)
        if distinct and name != "linear" and has_duplicate_experts(placement.slots, placement.num_gpus).any():
            continue
        found.append(Candidate(name, placement, load_ratio(load, placement, cluster, rule)))
    return [found[0], *sorted(found[1:], key=lambda candidate: (candidate.ratio, candidate.name))]


def spread(load: FloatArray, slots: int, cluster: Cluster) -> Int32Array:
    """Copies of an expert on different nodes, nodes and GPUs evenly loaded: int32 [L, S].

    An engine that takes the nearest copy asks each of them from whole nodes, so copies share their expert's load evenly
    only when they are as far apart as nodes are; DeepSeek's balancer takes it for granted that they share alike.
    """
    _, count = replicate(load, slots, most=cluster.nodes)
    each = load / count
    room = slots // cluster.nodes
    held = np.zeros((len(load), cluster.nodes, room), np.int64)
    for layer in range(len(load)):
        filled, weight = np.zeros(cluster.nodes, np.int64), np.zeros(cluster.nodes)
        # Experts with several copies first, to the emptiest nodes: then the last of them finds as many as it needs.
        order = np.lexsort((-each[layer], -count[layer]))
        for expert in order:
            if count[layer, expert] > 1:
                nodes = np.lexsort((weight, filled))[: count[layer, expert]]
            else:
                nodes = np.array([np.where(filled < room, weight, np.inf).argmin()])
            held[layer, nodes, filled[nodes]] = expert
            filled[nodes] += 1
            weight[nodes] += each[layer, expert]
    by_copy = np.take_along_axis(each, held.reshape(len(load), -1), axis=1).reshape(held.shape)
    return slots_from_nodes(held, by_copy, cluster.gpus_per_node)


def gpu_load(counts: npt.ArrayLike, placement: Placement, cluster: Cluster, rule: ReplicaRule) -> FloatArray:
    """float64 [L, P]: picks that each GPU serves, where every GPU asks for every expert alike."""
    load = np.asarray(counts, np.float64)
    who = routes(placement, cluster, rule)
    return np.stack([load[layer] @ who.share(layer).mean(axis=0) for layer in range(len(load))])


def load_ratio(counts: npt.ArrayLike, placement: Placement, cluster: Cluster, rule: ReplicaRule) -> float:
    """Picks of the busiest GPU over the mean, mean over layers (`gpu_load_total` of docs/metrics.md, from counts)."""
    load = gpu_load(counts, placement, cluster, rule)
    if not (load.sum(axis=1) > 0).all():
        raise UsageError("a layer has no pick", hint="count while requests run")
    return float((load.max(axis=1) / load.mean(axis=1)).mean())
