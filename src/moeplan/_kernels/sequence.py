"""Order of a queue: neighbours that share experts, by simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983)."""

from __future__ import annotations

import math

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Float32Array, FloatArray, Int64Array

__all__ = ["anneal_sequence", "sequence_value"]


@compiled
def anneal_sequence(
    gram: Float32Array,
    weight: FloatArray,
    order: Int64Array,
    first: int,
    last: int,
    proposals: int,
    hot: float,
    cold: float,
    rng: np.random.Generator,
) -> float:
    """Raise `sequence_value` by swaps of two places and reversals of a stretch; worse ones pass less and less often.

    Args:
        gram: float32 [n, n], symmetric: how much is gained where two requests decode together.
        weight: float64 [W], how much of their time requests 1 .. W places apart decode together.
        order: int64 [n], the request at each place; changed in place. Places before `first` and from `last` on stay.
        proposals: how many changes are tried, while the temperature falls from `hot` to `cold`.

    Returns:
        The gain in value.
    """
    n, reach, places = order.size, weight.size, last - first
    cooling = (cold / hot) ** (1.0 / max(proposals, 1))
    temperature, total = hot, 0.0
    for _ in range(proposals):
        temperature *= cooling
        a = first + int(places * rng.random())
        b = first + int(places * rng.random())
        if a == b:
            continue
        if a > b:
            a, b = b, a
        gain = 0.0
        swap = rng.random() < 0.75
        if swap:
            at_a, at_b = order[a], order[b]
            for q in range(max(0, a - reach), min(n, a + reach + 1)):
                if q != a and q != b:
                    gain += weight[abs(q - a) - 1] * (gram[at_b, order[q]] - gram[at_a, order[q]])
            for q in range(max(0, b - reach), min(n, b + reach + 1)):
                if q != a and q != b:
                    gain += weight[abs(q - b) - 1] * (gram[at_a, order[q]] - gram[at_b, order[q]])
        else:
            for q in range(max(0, a - reach), a):
                for i in range(a, min(b, q + reach) + 1):
                    gain += weight[i - q - 1] * (gram[order[q], order[a + b - i]] - gram[order[q], order[i]])
            for q in range(b + 1, min(n, b + reach + 1)):
                for i in range(max(a, q - reach), b + 1):
                    gain += weight[q - i - 1] * (gram[order[q], order[a + b - i]] - gram[order[q], order[i]])
        if gain > 0.0 or rng.random() < math.exp(gain / temperature):
            if swap:
                order[a], order[b] = order[b], order[a]
            else:
                while a < b:
                    order[a], order[b] = order[b], order[a]
                    a += 1
                    b -= 1
            total += gain
    return total


def sequence_value(gram: Float32Array, weight: FloatArray, order: Int64Array) -> float:
    """What `anneal_sequence` raises: gram of all pairs, times the weight of how far apart they are."""
    placed = gram[np.ix_(order, order)].astype(np.float64)
    return float(sum(w * np.trace(placed, distance + 1) for distance, w in enumerate(weight)))
