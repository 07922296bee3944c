"""The penalty for the load imbalance of one layer's placement: as it is, at its tangent, and after a move."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import Layer
from moeplan.arrays import FloatArray, Int64Array


def load_norm(load: FloatArray) -> FloatArray:
    """Load imbalance: the 16-norm of load over its mean, over the last axis; the definition, in NumPy.

    It is 1 where load is even, and near the largest load over the mean where one unit stands out; it is convex.
    """
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio**16).mean(axis=-1) ** (1 / 16))


def load_norm_slope(load: FloatArray) -> FloatArray:
    """What one more pick on each unit adds to the `load_norm`, times all picks."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio / np.maximum(load_norm(load), 1e-12)[..., None]) ** 15)


@compiled
def _power(ratio: float) -> float:
    """ratio ** 16."""
    square = ratio * ratio
    fourth = square * square
    eighth = fourth * fourth
    return eighth * eighth


@compiled
def _tangent(load: FloatArray, penalty: float, out: FloatArray) -> float:
    """Put what one more pick on each unit adds to the penalty, at the tangent, into `out`.

    The `load_norm` is convex: its true change is no less than the tangent's. Returns the sum of the powers.
    """
    mean = load.sum() / load.size
    total = 0.0
    for i in range(load.size):
        total += _power(load[i] / mean)
    scale = penalty / ((total / load.size) ** 0.9375 * load.size * mean)
    for i in range(load.size):
        ratio = load[i] / mean
        cube = ratio * ratio * ratio
        out[i] = scale * cube * cube * cube * cube * cube
    return total


class LoadState(NamedTuple):
    """Loads of a layer's placement as it is, and the penalty for them."""

    penalty: FloatArray  # [2], for each unit of imbalance of nodes and GPUs
    power: FloatArray  # [3], sums of the powers of node and of GPU loads over their mean, and the penalty for them
    node: FloatArray  # [N], loads
    gpu: FloatArray  # [P]
    slope: FloatArray  # [P], what one more pick on a GPU, and so on its node, costs at the tangent
    tally: FloatArray  # [3, E], see `load_penalty_linear`
    trial: FloatArray  # [P], loads as a move would make them; else as `gpu`
    touched: Int64Array  # [..], GPUs that it would change
    by_node: FloatArray  # [N], and by how much nodes; else 0


@compiled
def update_loads(layer: Layer, loads: LoadState) -> None:
    """Compute the loads for the placement as it is."""
    loads.gpu[:] = 0.0
    loads.node[:] = 0.0
    for e in range(layer.replicas.size):
        rest = 0.0
        for n in range(loads.node.size):
            if not layer.nearest or layer.on_node[n, e] == 0:
                rest += layer.use[n, e]
        loads.tally[2, e] = rest
        for i in range(layer.replicas[e]):
            gpu = layer.replica_gpu[e, i]
            loads.gpu[gpu] += rest / layer.replicas[e]
            if layer.nearest:
                loads.gpu[gpu] += layer.use[layer.node[gpu], e]
    for g in range(loads.gpu.size):
        loads.node[layer.node[g]] += loads.gpu[g]
        loads.trial[g] = loads.gpu[g]
    loads.power[0] = _tangent(loads.node, loads.penalty[0], loads.by_node)
    loads.power[1] = _tangent(loads.gpu, loads.penalty[1], loads.slope)
    for g in range(loads.gpu.size):
        loads.slope[g] += loads.by_node[layer.node[g]]
    loads.by_node[:] = 0.0
    for e in range(layer.replicas.size):
        own, slopes = 0.0, 0.0
        for i in range(layer.replicas[e]):
            gpu = layer.replica_gpu[e, i]
            slopes += loads.slope[gpu]
            if layer.nearest:
                own += loads.slope[gpu] * layer.use[layer.node[gpu], e]
        loads.tally[0, e] = own
        loads.tally[1, e] = slopes
    loads.power[2] = _penalty(loads, 0.0, 0.0)


@compiled
def _penalty(loads: LoadState, node: float, gpu: float) -> float:
    """The penalty for load imbalance, `node` and `gpu` being added to the sums of powers."""
    node_norm = ((loads.power[0] + node) / loads.node.size) ** 0.0625
    gpu_norm = ((loads.power[1] + gpu) / loads.gpu.size) ** 0.0625
    return float(loads.penalty[0] * node_norm + loads.penalty[1] * gpu_norm)


@compiled
def load_penalty_linear(
    own: float,
    slopes: float,
    rest: float,
    count: int,
    change: int,
    use_out: float,
    slope_out: float,
    use_in: float,
    slope_in: float,
) -> float:
    """What a change of an expert's replicas adds to the load penalty, at its tangent.

    Numbers alone, for the compiler to put it where it is called.

    Args:
        own, slopes, rest: over the replicas, the sums of slope x the own node's picks, and of slopes; picks that all
            replicas share.
        count, change: replicas, and how many more.
        use_out, slope_out, use_in, slope_in: of the node that a replica leaves, and of the one it enters (0: none).
    """
    before = own + slopes * rest / count
    own += slope_in * use_in - slope_out * use_out
    slopes += slope_in - slope_out
    rest += use_out - use_in
    return float(own + slopes * rest / (count + change) - before)


@compiled
def move_penalty_linear(layer: Layer, loads: LoadState, e: int, leaves: int, enters: int) -> float:
    """The same for a replica of expert e that leaves a GPU, enters another, or both (-1: none)."""
    tally, use_out, use_in, slope_out, slope_in = loads.tally, 0.0, 0.0, 0.0, 0.0
    if leaves >= 0:
        slope_out = loads.slope[leaves]
        use_out = layer.use[layer.node[leaves], e] if layer.nearest else 0.0
    if enters >= 0:
        slope_in = loads.slope[enters]
        use_in = layer.use[layer.node[enters], e] if layer.nearest else 0.0
    change = (enters >= 0) - (leaves >= 0)
    count = layer.replicas[e]
    return float(
        load_penalty_linear(tally[0, e], tally[1, e], tally[2, e], count, change, use_out, slope_out, use_in, slope_in)
    )


@compiled
def _shift(layer: Layer, loads: LoadState, e: int, leaves: int, enters: int, found: int) -> int:
    """Put the loads that a change of expert e's replicas makes into `trial`, and their GPUs into `touched`."""
    rest, count = loads.tally[2, e], layer.replicas[e]
    before = rest / count
    if leaves >= 0:
        count -= 1
        if layer.nearest:
            rest += layer.use[layer.node[leaves], e]
    if enters >= 0:
        count += 1
        if layer.nearest:
            rest -= layer.use[layer.node[enters], e]
    after = rest / count
    for i in range(layer.replicas[e]):
        gpu = layer.replica_gpu[e, i]
        loads.touched[found] = gpu
        found += 1
        if gpu != leaves:
            loads.trial[gpu] += after - before
        else:
            loads.trial[gpu] -= before + (layer.use[layer.node[gpu], e] if layer.nearest else 0.0)
    if enters >= 0:
        loads.touched[found] = enters
        found += 1
        loads.trial[enters] += after + (layer.use[layer.node[enters], e] if layer.nearest else 0.0)
    return found


@compiled
def load_penalty_delta(layer: Layer, loads: LoadState, a: int, b: int, here: int, there: int) -> float:
    """What the load penalty rises by when a replica of expert a goes from GPU `here` to `there`, and one of b back (-1:
    a is dropped, b is new). Only the GPUs that serve the two are looked at: the mean stays what it is."""
    found = _shift(layer, loads, b, there, here, _shift(layer, loads, a, here, there, np.int64(0)))
    mean_node = loads.node.sum() / loads.node.size
    mean_gpu = mean_node * loads.node.size / loads.gpu.size
    node, gpu = 0.0, 0.0
    for i in range(found):
        g = loads.touched[i]
        if loads.trial[g] != loads.gpu[g]:
            loads.by_node[layer.node[g]] += loads.trial[g] - loads.gpu[g]
            gpu += _power(loads.trial[g] / mean_gpu) - _power(loads.gpu[g] / mean_gpu)
            loads.trial[g] = loads.gpu[g]
    for i in range(found):
        n = layer.node[loads.touched[i]]
        if loads.by_node[n] != 0.0:
            node += _power((loads.node[n] + loads.by_node[n]) / mean_node) - _power(loads.node[n] / mean_node)
            loads.by_node[n] = 0.0
    return float(_penalty(loads, node, gpu) - loads.power[2])
