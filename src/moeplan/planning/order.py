"""An order of a queue in which neighbours use the same experts, for batch jobs.

Engines serve a queue first come first served: requests that are near each other decode together. The order raises the
sum, over pairs, of what two requests save where they decode together (`moeplan.planning.instances`), times the share of
their time in which they do. Large queues are first laid out by recursive bisection along the direction in which points
vary most; then blocks of neighbours are improved by simulated annealing.

Names: n requests, B requests that decode together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplan._kernels.sequence import anneal_sequence
from moeplan.arrays import Float32Array, FloatArray, Int64Array
from moeplan.progress import Progress, silent

__all__ = ["overlap", "sharing_order", "split_order"]

#: Queues of up to so many requests are annealed as a whole; longer ones in blocks of half as many.
WHOLE = 1024
_BLOCK = WHOLE // 2
#: Changes tried at most for each request of a whole queue, and of a block, which is in order already.
_TRIED_WHOLE, _TRIED_BLOCK = 3000, 120
#: Beyond so many places neighbours are not compared; wider batches are approximated by their inner part.
_REACH = 48
#: Terms that are added up for each request, whatever the reach.
_TERMS_WHOLE, _TERMS_BLOCK = 500_000, 20_000
_WORKERS = 2
_ANSWER = 4096


def overlap(batch: int, tokens: Int64Array | None = None, seed: int = 0) -> FloatArray:
    """float64 [W]: how much requests 1 .. W places apart decode together, 1 for neighbours.

    With B slots a request starts every mean / B steps. Requests d places apart overlap from the later one's start to
    the earlier end of the two.

    Args:
        tokens: int64, lengths of earlier answers; None: exponentially distributed.
    """
    rng = np.random.default_rng([seed, 0x0E])
    if tokens is None or not len(tokens):
        first, second = rng.exponential(size=(2, _ANSWER))
    else:
        first, second = rng.choice(tokens, (2, _ANSWER)).astype(np.float64)
    start = np.arange(1, min(6 * max(batch, 2), _REACH + 1))[:, None] * first.mean() / batch
    weight = np.minimum(np.maximum(first - start, 0.0), second).mean(axis=1)
    weight /= max(float(weight[0]), 1e-12)
    return np.asarray(weight[: max(int((weight > 0.03).sum()), 1)])


def sharing_order(
    points: Float32Array,
    weight: FloatArray,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Int64Array:
    """int64 [n]: the requests in an order in which neighbours share experts.

    Args:
        points: float32 [n, f], from `sharing_points`. weight: float64 [W], from `overlap`.

    Examples:
        >>> points = np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)
        >>> points[sharing_order(points, np.array([1.0]))].ravel().tolist() in ([1, 1, -1, -1], [-1, -1, 1, 1])
        True
    """
    n = len(points)
    if n < 2:
        return np.arange(n)
    terms = 3.0 * len(weight) + 0.25 * len(weight) ** 2  # of a change: swaps and reversals
    whole, block = min(_TRIED_WHOLE, int(_TERMS_WHOLE / terms)), min(_TRIED_BLOCK, int(_TERMS_BLOCK / terms))
    order = _lay_out(points, _BLOCK)
    if n <= WHOLE:
        _improve(points, weight, order, order, 0, n, whole, 1.0, seed)
        return order
    for turn in range(2):
        starts = list(range(0, n, _BLOCK)) if turn == 0 else [0, *range(_BLOCK // 2, n, _BLOCK)]
        ends = [*starts[1:], n]
        known = order.copy()  # neighbours of a block as they were: the result does not depend on who is first
        with ThreadPoolExecutor(_WORKERS) as pool:
            jobs = [
                pool.submit(_improve, points, weight, order, known, first, last, block, 0.1, seed)
                for first, last in zip(starts, ends, strict=True)
            ]
            for done, job in enumerate(jobs):
                job.result()
                progress(turn * len(jobs) + done + 1, 2 * len(jobs), "ordering")
    return order


def _improve(
    points: Float32Array,
    weight: FloatArray,
    order: Int64Array,
    known: Int64Array,
    first: int,
    last: int,
    tried: int,
    warmth: float,
    seed: int,
) -> None:
    """Anneal the places first .. last - 1 of an order between its neighbours in `known`."""
    if last - first < 2:
        return
    low, high = max(first - len(weight), 0), min(last + len(weight), len(order))
    around = known[low:high]
    placed = points[around]
    gram = placed @ placed.T
    spread = float(gram.std()) * float(np.sqrt((weight**2).sum())) * 2.0 * warmth
    if spread <= 0.0:
        return
    local = np.arange(len(around))
    count = last - first
    anneal_sequence(
        gram,
        weight,
        local,
        first - low,
        last - low,
        tried * count,
        spread,
        spread / (100.0 * warmth),
        np.random.default_rng([seed, first]),
    )
    order[first:last] = around[local[first - low : last - low]]


def _lay_out(points: Float32Array, leaf: int) -> Int64Array:
    """int64 [n], by recursive bisection; each half is turned to its neighbour."""
    out: list[Int64Array] = []
    stack: list[tuple[Int64Array, Float32Array | None, Float32Array | None]] = [(np.arange(len(points)), None, None)]
    while stack:
        index, left, right = stack.pop()
        if len(index) <= leaf:
            out.append(index)
            continue
        along = _along(points[index])
        half = len(index) // 2
        split = np.argpartition(along, half)
        low, high = index[split[:half]], index[split[half:]]
        means = points[low].mean(axis=0), points[high].mean(axis=0)
        toward = np.zeros(points.shape[1], np.float32)
        if left is not None:
            toward = toward - left
        if right is not None:
            toward = toward + right
        if float((means[1] - means[0]) @ toward) < 0.0:
            low, high, means = high, low, (means[1], means[0])
        stack.append((high, means[0], right))  # the first half is popped first
        stack.append((low, left, means[1]))
    return np.concatenate(out)


def _along(points: Float32Array) -> Float32Array:
    """float32 [n]: the points along the direction in which they vary most, by power iteration."""
    centre = points.mean(axis=0)
    far = int(np.argmax(((points[:4096] - centre) ** 2).sum(axis=1)))
    direction = points[far] - centre
    for _ in range(6):
        length = float(np.linalg.norm(direction))
        if length <= 0.0:
            break
        direction /= length
        along = points @ direction - centre @ direction
        direction = along @ points - along.sum() * centre
    return np.asarray(points @ direction)


def split_order(order: Int64Array, tokens: FloatArray, instances: int) -> list[Int64Array]:
    """Stretches of an order, one an instance, of about equal expected tokens.

    Args:
        order: int64 [n]. tokens: float64 [n], expected tokens of each request.

    Examples:
        >>> [part.tolist() for part in split_order(np.array([2, 0, 1, 3]), np.array([1.0, 1.0, 2.0, 2.0]), 2)]
        [[2, 0], [1, 3]]
    """
    reached = np.cumsum(tokens[order])
    cuts = np.searchsorted(reached - tokens[order] / 2, reached[-1] * np.arange(1, instances) / instances)
    return np.split(order, cuts)
