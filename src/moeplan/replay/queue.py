"""Replay of a queue on one instance: first come first served, continuous batching, the routing of the very requests.

The gain of an order is the change of `experts_per_step` against random orders of the same requests.
"""

from __future__ import annotations

import numpy as np

from moeplan._kernels.queue import count_steps, queue_steps
from moeplan.arrays import ExpertArray, Int64Array
from moeplan.replay.distinct import count_distinct_steps, experts_per_step

__all__ = ["queue_experts", "queue_rows", "random_queue_experts"]


def queue_rows(span: Int64Array, slots: int, most_tokens: int | None = None) -> Int64Array:
    """int64 [S, slots]: the rows decoded in each step of a queue; -1: the slot is empty.

    Args:
        span: int64 [n, 2], first row and end of each request, in the order of the queue; at least one row each.
        slots: requests that decode together. most_tokens: longer answers are cut off; None: none is.
    """
    length = span[:, 1] - span[:, 0]
    if most_tokens is not None:
        length = np.minimum(length, most_tokens)
    length = np.ascontiguousarray(length)
    place, token = np.empty((2, count_steps(length, slots), slots), np.int64)
    queue_steps(length, slots, place, token)
    return np.asarray(np.where(place >= 0, span[:, 0][place] + token, -1))


def queue_experts(
    experts: ExpertArray, span: Int64Array, slots: int, num_experts: int, most_tokens: int | None = None
) -> float:
    """`experts_per_step` of a queue: distinct experts of a layer in a token's step, mean over tokens and layers.

    Args:
        experts: unsigned [T, L, k], of the trace. span, slots, most_tokens: see `queue_rows`.
    """
    rows = queue_rows(span, slots, most_tokens)
    return experts_per_step(count_distinct_steps(experts, rows, num_experts), (rows >= 0).sum(axis=1))


def random_queue_experts(
    experts: ExpertArray,
    span: Int64Array,
    slots: int,
    num_experts: int,
    most_tokens: int | None = None,
    *,
    orders: int = 4,
    seed: int = 0,
) -> float:
    """The same in random order: mean of several orders."""
    rng = np.random.default_rng([seed, 0x9F])
    drawn = [span[rng.permutation(len(span))] for _ in range(orders)]
    return float(np.mean([queue_experts(experts, each, slots, num_experts, most_tokens) for each in drawn]))
