"""Placements that a search begins from: for given groups, and by co-activation.

Names: L layers, N nodes (or D groups), G GPUs per node, E experts, S slots; use [L, N, E] is the picks of each expert
by the requests at each node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplan._kernels.layer_state import Objective
from moeplan._kernels.local_search import improve
from moeplan._kernels.swaps import swap_partition
from moeplan.arrays import FloatArray, Int32Array, Int64Array
from moeplan.cluster import Cluster
from moeplan.errors import PlanError
from moeplan.planning.expected_load import ExpectedLoad
from moeplan.planning.packing import replicate, slots_from_nodes
from moeplan.planning.problem import PlanningProblem

__all__ = ["by_router_group", "coactivation_slots", "orient_to_demand", "place_by_use", "place_quickly"]

#: Starts and sweeps of a partition by co-activation.
_STARTS, _SWEEPS = 3, 50


def place_by_use(use: FloatArray, slots_per_node: int, max_replicas: int = 1) -> Int64Array:
    """The published placement (arXiv 2604.23150), layer by layer: int64 [L, N, M], the experts of each node.

    Phase 1: experts in descending max_n U; each goes to the node that uses it most and has room, at most ceil(E / N).
    Phase 2: every node is filled to M slots with the experts it uses most among those it lacks. Ties: lower index.
    A node with more slots than there are experts lacks none: the rest go to the experts whose replicas carry most.

    Args:
        use: U, float64 [L, N, E]. slots_per_node: M = (E + R) / N.
        max_replicas: the most replicas of an expert on a node (its GPUs).
    """
    layers, nodes, experts = use.shape
    if slots_per_node > experts:
        replica, _ = replicate(use.reshape(layers * nodes, experts), slots_per_node, max_replicas)
        return replica.reshape(layers, nodes, slots_per_node)
    row = np.arange(layers)
    has = np.zeros(use.shape, np.bool_)
    size = np.zeros((layers, nodes), np.int64)
    order = np.argsort(-use.max(axis=1), axis=1, kind="stable")
    max_first = -(-experts // nodes)
    for i in range(experts):
        expert = order[:, i]
        node = np.where(size < max_first, use[row, :, expert], -1.0).argmax(axis=1)
        has[row, node, expert] = True
        size[row, node] += 1
    lacking = np.where(has, -1.0, use)
    rank = np.argsort(np.argsort(-lacking, axis=2, kind="stable"), axis=2, kind="stable")
    has |= rank < (slots_per_node - size)[:, :, None]
    if (has.sum(axis=2) != slots_per_node).any() or not has.any(axis=1).all():
        raise PlanError(f"{experts} experts do not fit {nodes} groups of {slots_per_node} slots")  # paper's invariants
    return np.nonzero(has)[2].reshape(layers, nodes, slots_per_node)


def place_quickly(
    use: FloatArray, slots_per_node: int, gpus_per_node: int, node_penalty: float, sweeps: int = 30
) -> Int64Array:
    """Slots [L, S]: nodes by local search, GPUs assigned by load.

    An online balancer has time for this: fractions of a second for a whole model. A node holds at most one replica of
    an expert; a pick without a replica on its own node is shared by all replicas.
    """
    held = place_by_use(use, slots_per_node)
    slots = held.reshape(len(use), -1).astype(np.int64)
    improve(use, slots, 1, Objective(node_penalty, 0.0), sweeps)
    return _deal_to_gpus(slots.reshape(held.shape), use, gpus_per_node)


def _deal_to_gpus(held: Int64Array, use: FloatArray, gpus_per_node: int) -> Int64Array:
    """Slots [L, S] of the experts of each node [L, N, M], GPUs assigned by load."""
    placed = ExpectedLoad(Cluster(use.shape[1], 1), held.reshape(len(held), -1), use.shape[2], True)
    load = np.take_along_axis(placed.per_replica(use), held, axis=2)
    return slots_from_nodes(held, load, gpus_per_node).astype(np.int64)


def orient_to_demand(slots: npt.NDArray[np.integer], use: FloatArray) -> Int64Array:
    """Slots [L, S] with the same experts together, each node's share of them where it is asked for most."""
    out = slots.astype(np.int64)
    nodes = use.shape[1]
    for layer, layer_use in zip(out, use, strict=True):
        parts = layer.reshape(nodes, -1).copy()
        part, node = linear_sum_assignment(layer_use[:, parts].sum(axis=2).T, maximize=True)
        layer.reshape(nodes, -1)[node] = parts[part]
    return out


def by_router_group(use: FloatArray, slots_per_node: int, gpus_per_node: int) -> Int64Array:
    """Slots [L, S]: each node holds the expert groups that it asks for most, then replicas that it asks for most.

    A model whose gate chooses groups of experts before experts (DeepSeek-V3: 4 of 8) then reaches few nodes.
    """
    layers, nodes, experts = use.shape
    held = np.empty((layers, nodes, slots_per_node), np.int64)
    block = np.arange(experts).reshape(nodes, -1)
    for layer_use, layer_held in zip(use, held, strict=True):
        part, node = linear_sum_assignment(layer_use.reshape(nodes, nodes, -1).sum(axis=2).T, maximize=True)
        own, redundant = np.split(layer_held, [block.shape[1]], axis=1)
        own[node] = block[part]
        lacking = layer_use.copy()
        np.put_along_axis(lacking, own, -1.0, axis=1)
        redundant[:] = np.argsort(-lacking, axis=1, kind="stable")[:, : redundant.shape[1]]
    return _deal_to_gpus(held, use, gpus_per_node)


def coactivation_slots(problem: PlanningProblem, seed: int) -> Int32Array:
    """Slots int32 [L, S]: a layer's co-activation graph is cut into equal nodes; so are redundant slots filled."""
    shape, cluster = problem.shape, problem.cluster
    rng = np.random.default_rng([seed, 0xAF])
    slots_per_node = problem.num_slots // cluster.nodes
    held = np.zeros((shape.num_layers, cluster.nodes, slots_per_node), np.int64)
    replicas = np.zeros((shape.num_layers, shape.num_experts), np.int64)
    for layer in range(shape.num_layers):
        weight = problem.pairs[layer].astype(np.float64)
        part = _partition(weight, cluster.nodes, rng)
        for node in range(cluster.nodes):
            if slots_per_node >= shape.num_experts:  # every expert fits; the rest go where a replica carries most
                load = problem.load[layer : layer + 1]
                held[layer, node] = replicate(load, slots_per_node, cluster.gpus_per_node)[0][0]
                continue
            members = np.flatnonzero(part == node)
            together = weight[members].sum(axis=0)
            together[members] = -1.0
            redundant = np.argsort(-together, kind="stable")[: slots_per_node - len(members)]
            held[layer, node] = np.concatenate((members, redundant))
        replicas[layer] = np.bincount(held[layer].ravel(), minlength=shape.num_experts)
    load = np.take_along_axis((problem.load / replicas)[:, None, :].repeat(cluster.nodes, 1), held, axis=2)
    return slots_from_nodes(held, load, cluster.gpus_per_node)


def _partition(weight: FloatArray, nodes: int, rng: np.random.Generator) -> Int64Array:
    """int64 [E]: equal parts with much weight inside; the best of a few seeded starts, the first of them linear."""
    count = len(weight)
    even = np.arange(count, dtype=np.int64) * nodes // count
    best, most_inside = even, -1.0
    for start in range(_STARTS):
        part = even.copy() if start == 0 else rng.permutation(even)
        swap_partition(weight, part, nodes, _SWEEPS)
        inside = float(weight[part[:, None] == part[None, :]].sum())
        if inside > most_inside:
            best, most_inside = part, inside
    return best
