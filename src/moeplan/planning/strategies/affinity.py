"""`affinity`: source-free co-activation. Experts that serve the same token share a node, wherever the token lives.

The family of ExFlow, TACG and CAP: it lowers the distinct nodes that a token touches and knows nothing of requests,
homes or load.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan._kernels.swaps import swap_partition
from moeplan.planning.packing import replicate, slots_from_nodes
from moeplan.planning.problem import Decision, Problem, Strategy
from moeplan.planning.strategies.linear import linear

_STARTS, _SWEEPS = 3, 50


def affinity(problem: Problem, seed: int) -> Decision:
    """Partition each layer's co-activation graph into equal nodes; spare slots take what a node's experts call most."""
    shape, cluster = problem.shape, problem.cluster
    if shape.top_k == 1:
        note = "affinity: a top-1 model has no pairs of experts in a token; this is linear's placement"
        return Decision(linear(problem, seed).slots, notes=(note,))
    rng = np.random.default_rng([seed, 0xAF])
    held = problem.num_slots // cluster.nodes
    experts = np.zeros((shape.num_layers, cluster.nodes, held), np.int64)
    copies = np.zeros((shape.num_layers, shape.num_experts), np.int64)
    for layer in range(shape.num_layers):
        weight = problem.pairs[layer].astype(np.float64)
        part = _partition(weight, cluster.nodes, rng)
        for node in range(cluster.nodes):
            if held >= shape.num_experts:  # room for all of them: the rest goes where a copy carries most
                experts[layer, node] = replicate(problem.load[layer : layer + 1], held, cluster.gpus_per_node)[0][0]
                continue
            members = np.flatnonzero(part == node)
            called = weight[members].sum(axis=0)
            called[members] = -1.0
            spare = np.argsort(-called, kind="stable")[: held - len(members)]
            experts[layer, node] = np.concatenate((members, spare))
        copies[layer] = np.bincount(experts[layer].ravel(), minlength=shape.num_experts)
    load = np.take_along_axis((problem.load / copies)[:, None, :].repeat(cluster.nodes, 1), experts, axis=2)
    return Decision(slots_from_nodes(experts, load, cluster.gpus_per_node))


def _partition(weight: npt.NDArray[np.float64], nodes: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64 [E]: equal parts with much weight inside; the best of a few seeded starts, the first of them linear."""
    count = len(weight)
    even = np.arange(count, dtype=np.int64) * nodes // count
    best, most = even, -1.0
    for start in range(_STARTS):
        part = even.copy() if start == 0 else rng.permutation(even)
        swap_partition(weight, part, nodes, _SWEEPS)
        inside = float(weight[part[:, None] == part[None, :]].sum())
        if inside > most:
            best, most = part, inside
    return best


STRATEGIES = {"affinity": Strategy(affinity)}
