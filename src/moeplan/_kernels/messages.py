"""Counting messages: what `moeplan.cluster` defines for one token, over whole steps and whole requests.

The plain reference is `moeplan.cluster.token_messages`; the property tests hold both loops here to it, for every
dispatch mode, replica rule and deployment. Ids of E and above stand for picks that a token lacks, and send nothing.

Mode codes: 0 `pick`, 1 `gpu`, 2 `node`, 3 `allgather`.
"""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import BoolArray, ExpertArray, FloatArray, Int16Array, Int32Array, Int64Array

#: floor(2**32 / golden ratio): vLLM's multiplier (0.30.0 and 0.33.0, fused_moe/router/base_router.py).
KNUTH = 2654435769

_PICK, _GPU, _NODE, _ALLGATHER = 0, 1, 2, 3


@compiled
def step_messages(
    experts: ExpertArray,
    rows: Int64Array,
    sources: Int64Array,
    indices: Int64Array,
    table: Int16Array,
    replica_gpu: Int16Array,
    replica_count: Int32Array,
    use_hash: bool,
    gpus_per_node: int,
    mode: int,
    links: Int32Array,
    picks: Int32Array,
    touched: Int32Array,
) -> None:
    """One decode step under the replica rule itself.

    Args:
        experts: unsigned [T, L, k], the trace's rows.
        rows, sources, indices: int64 [m]; which trace row is live, its source GPU, its index i in its group's batch.
        table: int16 [L, P, E], the GPU that serves expert e for source GPU s (nearest rules).
        replica_gpu, replica_count: int16 [L, E, X] and int32 [L, E] (the `hash` rule).
        links: int32 [L, P, P], set to the messages from GPU to GPU in dispatch; the diagonal stays 0.
        picks: int32 [L, P], set to the picks served.
        touched: int32 [L, P], set to the distinct experts served.
    """
    num_layers, num_experts = replica_count.shape
    num_gpus = links.shape[1]
    num_nodes = num_gpus // gpus_per_node
    k = experts.shape[2]
    links[:] = 0
    picks[:] = 0
    touched[:] = 0
    node_of = np.arange(num_gpus) // gpus_per_node  # looked up: division is the most expensive operation here
    expert_stamp = np.full((num_gpus, num_experts), -1, np.int32)
    gpu_stamp = np.full(num_gpus, -1, np.int64)
    node_stamp = np.full(num_nodes, -1, np.int64)
    for layer in range(num_layers):
        for r in range(rows.size):
            t, source = rows[r], sources[r]
            source_node, rail = source // gpus_per_node, source % gpus_per_node
            hashed = (indices[r] * KNUTH) & 0xFFFFFFFF
            mark = np.int64(layer) * rows.size + r
            for j in range(k):
                e = experts[t, layer, j]
                if e >= num_experts:
                    continue
                if use_hash:
                    gpu = int(replica_gpu[layer, e, hashed % replica_count[layer, e]])
                else:
                    gpu = int(table[layer, source, e])
                picks[layer, gpu] += 1
                if expert_stamp[gpu, e] != layer:
                    expert_stamp[gpu, e] = layer
                    touched[layer, gpu] += 1
                if mode == _PICK:
                    if gpu != source:
                        links[layer, source, gpu] += 1
                    continue
                if mode == _ALLGATHER or gpu_stamp[gpu] == mark:
                    continue
                gpu_stamp[gpu] = mark
                node = node_of[gpu]
                if mode == _GPU or node == source_node:
                    if gpu != source:
                        links[layer, source, gpu] += 1
                    continue
                forwarder = node * gpus_per_node + rail
                if node_stamp[node] != mark:
                    node_stamp[node] = mark
                    links[layer, source, forwarder] += 1
                if gpu != forwarder:
                    links[layer, forwarder, gpu] += 1
            if mode == _ALLGATHER:
                for node in range(num_nodes):
                    forwarder = node * gpus_per_node + rail
                    if forwarder != source:
                        links[layer, source, forwarder] += 1
                    for gpu in range(node * gpus_per_node, (node + 1) * gpus_per_node):
                        if gpu != forwarder:
                            links[layer, forwarder, gpu] += 1


#: How many values `summarise_step` gives.
STEP_VALUES = 6


@compiled
def summarise_step(
    links: Int32Array, picks: Int32Array, touched: Int32Array, gpus_per_node: int, out: FloatArray
) -> None:
    """One step's figures, from what `step_messages` counted.

    Args:
        links: int32 [L, P, P]; picks, touched: int32 [L, P].
        out: float64 [6], set to: sum over layers of N(N - 1) x the largest ordered node pair's messages; of P x the
            busiest rank's (the larger of sent and received); of messages between nodes; max / mean of picks served by
            GPUs and by nodes, mean over layers; distinct experts a GPU touches, mean over GPUs and layers.
    """
    layers, gpus = picks.shape
    nodes = gpus // gpus_per_node
    pair = np.zeros((nodes, nodes), np.int64)
    received, served = np.zeros(gpus, np.int64), np.zeros(nodes, np.int64)
    for i in range(out.size):
        out[i] = 0.0
    for layer in range(layers):
        most, fullest, total, experts = 0, 0, 0, 0
        for a in range(gpus):
            received[a] = 0
        for a in range(nodes):
            served[a] = 0
            for b in range(nodes):
                pair[a, b] = 0
        busiest, largest, across = 0, 0, 0
        for a in range(gpus):
            node, sent = a // gpus_per_node, 0
            for b in range(gpus):
                count = int(links[layer, a, b])
                sent += count
                received[b] += count
                pair[node, b // gpus_per_node] += count
            busiest = max(busiest, sent)
            most = max(most, int(picks[layer, a]))
            total += picks[layer, a]
            served[node] += picks[layer, a]
            experts += touched[layer, a]
        for a in range(gpus):
            busiest = max(busiest, int(received[a]))
        for a in range(nodes):
            fullest = max(fullest, int(served[a]))
            for b in range(nodes):
                if a != b:
                    largest = max(largest, int(pair[a, b]))
                    across += pair[a, b]
        out[0] += nodes * (nodes - 1) * largest
        out[1] += gpus * busiest
        out[2] += across
        out[3] += (most * gpus / total if total else 1.0) / layers
        out[4] += (fullest * nodes / total if total else 1.0) / layers
        out[5] += experts / gpus / layers


def summarise_step_reference(
    links: Int32Array, picks: Int32Array, touched: Int32Array, gpus_per_node: int
) -> list[float]:
    """`summarise_step` in plain NumPy."""
    layers, gpus = picks.shape
    nodes = gpus // gpus_per_node
    pairs = links.reshape(layers, nodes, gpus_per_node, nodes, gpus_per_node).sum(axis=(2, 4))
    pairs[:, np.arange(nodes), np.arange(nodes)] = 0
    busiest = np.maximum(links.sum(axis=1).max(axis=1), links.sum(axis=2).max(axis=1))
    served = picks.reshape(layers, nodes, -1).sum(axis=2)
    mean = np.maximum(picks.mean(axis=1), 1e-12)
    idle = mean <= 1e-12  # a layer without a pick is even
    return [
        float(nodes * (nodes - 1) * pairs.max(axis=(1, 2)).sum()),
        float(gpus * busiest.sum()),
        float(pairs.sum()),
        float(np.where(idle, 1.0, picks.max(axis=1) / mean).mean()),
        float(np.where(idle, 1.0, served.max(axis=1) / (mean * gpus_per_node)).mean()),
        float(touched.mean()),
    ]


@compiled
def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@compiled
def request_messages(
    experts: ExpertArray,
    starts: Int64Array,
    stops: Int64Array,
    first_gpus: Int64Array,
    group_gpus: int,
    table: Int16Array,
    uniform: BoolArray,
    replica_gpu: Int16Array,
    replica_count: Int32Array,
    use_hash: bool,
    gpus_per_node: int,
    mode: int,
    out: FloatArray,
) -> None:
    """Expected messages of whole requests, summed over their rows and layers.

    A row's source GPU is taken as equally likely to be any GPU of its group (`group_gpus` of them from `first_gpus[i]`
    on); under `hash`, the hash is taken as uniform modulo the counts of the row's replicas.

    Args:
        experts: unsigned [T, L, k].
        starts, stops, first_gpus: int64 [n]; a request's rows, and the first GPU of its group.
        table: int16 [L, P, E]; uniform: bool [L, P], true at a group's first GPU where its GPUs share one table row.
        replica_gpu, replica_count: int16 [L, E, X], int32 [L, E].
        out: float64 [n, 3], set to (messages between nodes, messages inside nodes, distinct other nodes reached).
    """
    num_layers, num_experts = replica_count.shape
    num_gpus = table.shape[1]
    num_nodes = num_gpus // gpus_per_node
    k = experts.shape[2]
    node_of, rail_of = np.arange(num_gpus) // gpus_per_node, np.arange(num_gpus) % gpus_per_node
    gpu_stamp = np.full(num_gpus, -1, np.int64)
    node_stamp = np.full(num_nodes, -1, np.int64)
    mark = np.int64(0)
    for i in range(starts.size):
        first = first_gpus[i]
        own_node = first // gpus_per_node
        inter_sum, intra_sum, node_sum = 0.0, 0.0, 0.0
        for t in range(starts[i], stops[i]):
            for layer in range(num_layers):
                # Scenarios: the hash's residues, or the group's source GPUs where they see different replicas.
                cycle = np.int64(1)
                if use_hash:
                    for j in range(k):
                        if experts[t, layer, j] >= num_experts:
                            continue
                        count = np.int64(replica_count[layer, experts[t, layer, j]])
                        cycle = cycle // _gcd(cycle, count) * count
                scenarios = cycle if use_hash else (1 if uniform[layer, first] else group_gpus)
                averaged = use_hash or uniform[layer, first]  # serving GPUs do not depend on the source
                inter, intra, nodes = 0.0, 0.0, 0.0
                for scenario in range(scenarios):
                    source = first if averaged else first + scenario
                    rail = rail_of[source]
                    mark += 1
                    own_picks, node_picks, far_picks = 0, 0, 0
                    own_gpus, node_gpus, far_gpus, far_nodes, rails = 0, 0, 0, 0, 0
                    for j in range(k):
                        e = experts[t, layer, j]
                        if e >= num_experts:
                            continue
                        if use_hash:
                            gpu = np.int64(replica_gpu[layer, e, scenario % replica_count[layer, e]])
                        else:
                            gpu = np.int64(table[layer, source, e])
                        node = node_of[gpu]
                        fresh = gpu_stamp[gpu] != mark
                        gpu_stamp[gpu] = mark
                        if node == own_node:
                            node_picks += 1
                            node_gpus += fresh
                            if gpu == source:
                                own_picks += 1
                                own_gpus = 1
                        else:
                            far_picks += 1
                            far_gpus += fresh
                            if fresh and rail_of[gpu] == rail:
                                rails += 1
                            if node_stamp[node] != mark:
                                node_stamp[node] = mark
                                far_nodes += 1
                    # Averaged: each GPU of the group is the source (or, elsewhere, the forwarder) equally often.
                    share = 1.0 / group_gpus
                    nodes += far_nodes
                    if mode == _PICK:
                        inter += far_picks
                        intra += node_picks - (node_picks * share if averaged and group_gpus > 1 else own_picks)
                    elif mode == _GPU:
                        inter += far_gpus
                        intra += node_gpus - (node_gpus * share if averaged and group_gpus > 1 else own_gpus)
                    elif mode == _NODE:
                        inter += far_nodes
                        if averaged and group_gpus > 1:
                            intra += (node_gpus + far_gpus) * (1.0 - share)
                        else:
                            intra += node_gpus - own_gpus + far_gpus - rails
                    else:
                        inter += num_nodes - 1
                        intra += num_nodes * (gpus_per_node - 1)
                inter_sum += inter / scenarios
                intra_sum += intra / scenarios
                node_sum += nodes / scenarios
        out[i, 0], out[i, 1], out[i, 2] = inter_sum, intra_sum, node_sum
