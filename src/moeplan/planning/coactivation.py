"""Experts that the same tokens pick, placed on the same node, whatever node the tokens are on."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.swaps import swap_partition
from moeplan.arrays import FloatArray, Int32Array, Int64Array
from moeplan.planning.packing import replicate, slots_from_nodes
from moeplan.planning.problem import Problem

__all__ = ["coactivation_slots"]

_STARTS, _SWEEPS = 3, 50


def coactivation_slots(problem: Problem, seed: int) -> Int32Array:
    """Slots int32 [L, S]: each layer's co-activation graph cut into equal nodes; spare slots by co-activation too."""
    shape, cluster = problem.shape, problem.cluster
    rng = np.random.default_rng([seed, 0xAF])
    slots_per_node = problem.num_slots // cluster.nodes
    held = np.zeros((shape.num_layers, cluster.nodes, slots_per_node), np.int64)
    replicas = np.zeros((shape.num_layers, shape.num_experts), np.int64)
    for layer in range(shape.num_layers):
        weight = problem.pairs[layer].astype(np.float64)
        part = _partition(weight, cluster.nodes, rng)
        for node in range(cluster.nodes):
            if slots_per_node >= shape.num_experts:  # every expert fits; spare slots go where a replica carries most
                load = problem.load[layer : layer + 1]
                held[layer, node] = replicate(load, slots_per_node, cluster.gpus_per_node)[0][0]
                continue
            members = np.flatnonzero(part == node)
            together = weight[members].sum(axis=0)
            together[members] = -1.0
            spare = np.argsort(-together, kind="stable")[: slots_per_node - len(members)]
            held[layer, node] = np.concatenate((members, spare))
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
