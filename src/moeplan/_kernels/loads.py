"""What uneven load costs a placement of one layer: as it is, at its tangent, and after a move."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import Layer

__all__ = ["Weights", "dear_move", "dearer", "load_norm", "load_norm_slope", "load_penalty", "paid", "weigh"]

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def load_norm(load: Float) -> Float:
    """Load imbalance: the 16-norm of load over its mean, over the last axis; the definition, in NumPy.

    It is 1 where load is even, and near the largest load over the mean where one unit stands out; it is convex.
    """
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio**16).mean(axis=-1) ** (1 / 16))


def load_norm_slope(load: Float) -> Float:
    """What one more pick on each unit adds to the `load_norm`, times all picks."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio / np.maximum(load_norm(load), 1e-12)[..., None]) ** 15)


@compiled
def power(ratio: float) -> float:
    square = ratio * ratio
    fourth = square * square
    eighth = fourth * fourth
    return eighth * eighth


@compiled
def slope_of(load: Float, price: float, out: Float) -> float:
    """What one more pick on each unit costs, at the tangent, is put into `out`.

    The price is on unevenness: the 16-norm of load / mean, 1 where even and near the largest where one stands out. It
    is convex: the true cost is no less than the tangent's. Returns the sum of the powers; it is their mean's root.
    """
    mean = load.sum() / load.size
    total = 0.0
    for i in range(load.size):
        total += power(load[i] / mean)
    scale = price / ((total / load.size) ** 0.9375 * load.size * mean)
    for i in range(load.size):
        ratio = load[i] / mean
        cube = ratio * ratio * ratio
        out[i] = scale * cube * cube * cube * cube * cube
    return total


class Weights(NamedTuple):
    """Loads of the state as it is, and their price."""

    price: Float  # [2], of uneven nodes and uneven GPUs
    power: Float  # [3], sums of the powers of loads over their mean, and what is paid for them
    node: Float  # [N], loads
    gpu: Float  # [P]
    slope: Float  # [P], what one more pick on a GPU, and so on its node, costs at the tangent
    tally: Float  # [3, E], see `load_penalty`
    trial: Float  # [P], loads as a move would make them; else as `gpu`
    touched: Int  # [..], GPUs that it would change
    by_node: Float  # [N], and by how much nodes; else 0


@compiled
def weigh(layer: Layer, w: Weights) -> None:
    """Fill the weights for the state as it is."""
    w.gpu[:] = 0.0
    w.node[:] = 0.0
    for e in range(layer.copies.size):
        rest = 0.0
        for n in range(w.node.size):
            if not layer.nearest or layer.at[n, e] == 0:
                rest += layer.use[n, e]
        w.tally[2, e] = rest
        for i in range(layer.copies[e]):
            gpu = layer.where[e, i]
            w.gpu[gpu] += rest / layer.copies[e]
            if layer.nearest:
                w.gpu[gpu] += layer.use[layer.node[gpu], e]
    for g in range(w.gpu.size):
        w.node[layer.node[g]] += w.gpu[g]
        w.trial[g] = w.gpu[g]
    w.power[0] = slope_of(w.node, w.price[0], w.by_node)
    w.power[1] = slope_of(w.gpu, w.price[1], w.slope)
    for g in range(w.gpu.size):
        w.slope[g] += w.by_node[layer.node[g]]
    w.by_node[:] = 0.0
    for e in range(layer.copies.size):
        own, slopes = 0.0, 0.0
        for i in range(layer.copies[e]):
            gpu = layer.where[e, i]
            slopes += w.slope[gpu]
            if layer.nearest:
                own += w.slope[gpu] * layer.use[layer.node[gpu], e]
        w.tally[0, e] = own
        w.tally[1, e] = slopes
    w.power[2] = paid(w, 0.0, 0.0)


@compiled
def paid(w: Weights, node: float, gpu: float) -> float:
    """The price of load, `node` and `gpu` being added to the sums of powers."""
    uneven_node = ((w.power[0] + node) / w.node.size) ** 0.0625
    uneven_gpu = ((w.power[1] + gpu) / w.gpu.size) ** 0.0625
    return float(w.price[0] * uneven_node + w.price[1] * uneven_gpu)


@compiled
def load_penalty(
    own: float, slopes: float, rest: float, count: int, change: int, use_out: float, slope_out: float, use_in: float,
    slope_in: float,
) -> float:  # fmt: skip
    """What a change of an expert's copies does to the price of load, at its tangent.

    Numbers alone, for the compiler to put it where it is called.

    Args:
        own, slopes, rest: over the copies, sum of slope x the own node's picks, and of slopes; picks that all share.
        count, change: copies, and how many more.
        use_out, slope_out, use_in, slope_in: of the node that a copy leaves and of the one that it enters (0: none).
    """
    before = own + slopes * rest / count
    own += slope_in * use_in - slope_out * use_out
    slopes += slope_in - slope_out
    rest += use_out - use_in
    return float(own + slopes * rest / (count + change) - before)


@compiled
def dear_move(layer: Layer, w: Weights, e: int, leaves: int, enters: int) -> float:
    """The same of a copy of expert e that leaves a GPU, enters another, or both (-1: none)."""
    tally, use_out, use_in, slope_out, slope_in = w.tally, 0.0, 0.0, 0.0, 0.0
    if leaves >= 0:
        slope_out = w.slope[leaves]
        use_out = layer.use[layer.node[leaves], e] if layer.nearest else 0.0
    if enters >= 0:
        slope_in = w.slope[enters]
        use_in = layer.use[layer.node[enters], e] if layer.nearest else 0.0
    change = (enters >= 0) - (leaves >= 0)
    count = layer.copies[e]
    return float(
        load_penalty(tally[0, e], tally[1, e], tally[2, e], count, change, use_out, slope_out, use_in, slope_in)
    )


@compiled
def shift(layer: Layer, w: Weights, e: int, leaves: int, enters: int, found: int) -> int:
    """Put the loads that a change of expert e's copies makes into `trial`, and their GPUs into `touched`."""
    rest, count = w.tally[2, e], layer.copies[e]
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
    for i in range(layer.copies[e]):
        gpu = layer.where[e, i]
        w.touched[found] = gpu
        found += 1
        if gpu != leaves:
            w.trial[gpu] += after - before
        else:
            w.trial[gpu] -= before + (layer.use[layer.node[gpu], e] if layer.nearest else 0.0)
    if enters >= 0:
        w.touched[found] = enters
        found += 1
        w.trial[enters] += after + (layer.use[layer.node[enters], e] if layer.nearest else 0.0)
    return found


@compiled
def dearer(layer: Layer, w: Weights, a: int, b: int, here: int, there: int) -> float:
    """What the price of load rises by when a copy of expert a goes from GPU `here` to `there`, and one of b back (-1:
    a is dropped, b is new). Only the GPUs that serve the two are looked at: the mean stays what it is."""
    found = shift(layer, w, b, there, here, shift(layer, w, a, here, there, np.int64(0)))
    mean_node = w.node.sum() / w.node.size
    mean_gpu = mean_node * w.node.size / w.gpu.size
    node, gpu = 0.0, 0.0
    for i in range(found):
        g = w.touched[i]
        if w.trial[g] != w.gpu[g]:
            w.by_node[layer.node[g]] += w.trial[g] - w.gpu[g]
            gpu += power(w.trial[g] / mean_gpu) - power(w.gpu[g] / mean_gpu)
            w.trial[g] = w.gpu[g]
    for i in range(found):
        n = layer.node[w.touched[i]]
        if w.by_node[n] != 0.0:
            node += power((w.node[n] + w.by_node[n]) / mean_node) - power(w.node[n] / mean_node)
            w.by_node[n] = 0.0
    return float(paid(w, node, gpu) - w.power[2])
