"""Counting picks: numba against NumPy's `bincount` per layer, in one run, on one core.

Picks are skewed (Dirichlet 0.6 per layer), since equal counters in a row are what slows counting down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from moeplan._kernels.counting import count_pairs, count_ranges

#: name -> (tokens, L, E, k)
SHAPES = {
    "DeepSeek-V3 like, 58 x 256, top-8": (12_000, 58, 256, 8),
    "gpt-oss-20b like, 24 x 32, top-4": (50_000, 24, 32, 4),
    "Maverick like, 24 x 128, top-1": (100_000, 24, 128, 1),
}
REQUEST_ROWS = 200


def bench() -> list[tuple[str, str]]:
    """(label, result) per shape: picks/s of `count_ranges`, its ratio to `bincount`, and pairs/s of `count_pairs`."""
    return [(f"count picks, {name}", _measure(*shape)) for name, shape in SHAPES.items()]


def _measure(tokens: int, layers: int, count: int, k: int) -> str:
    rng = np.random.default_rng(0)
    experts = np.empty((tokens, layers, k), np.uint8)
    for layer in range(layers):
        experts[:, layer] = rng.choice(count, (tokens, k), p=rng.dirichlet(np.full(count, 0.6)))
    starts = np.arange(0, tokens, REQUEST_ROWS)
    stops, keys = np.minimum(starts + REQUEST_ROWS, tokens), np.zeros(len(starts), np.int64)
    out = np.zeros((1, layers, count), np.uint32)

    def by_bincount() -> None:
        for layer in range(layers):
            np.bincount(experts[:, layer].ravel(), minlength=count)

    fast, slow = _best_together(lambda: count_ranges(experts, starts, stops, keys, out), by_bincount)
    text = f"{experts.size / fast / 1e6:,.0f} M picks/s on one core, {slow / fast:.1f} x bincount per layer"
    if k > 1:
        pairs, few = np.zeros((layers, count, count), np.uint32), min(tokens, 6_000)
        ends = np.array([0]), np.array([few])
        seconds, _ = _best_together(lambda: count_pairs(experts, *ends, pairs), lambda: None, repeats=3)
        text += f"; {few * layers * k * (k - 1) / 2 / seconds / 1e6:,.0f} M pairs/s"
    return text


def _best_together(a: Callable[[], None], b: Callable[[], None], repeats: int = 9) -> tuple[float, float]:
    """Best seconds of each, taken in turn so that both meet the same machine."""
    best = [np.inf, np.inf]
    a()
    b()
    for _ in range(repeats):
        for i, work in enumerate((a, b)):
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    return float(best[0]), float(best[1])


if __name__ == "__main__":
    for label, result in bench():
        print(f"{label}: {result}")
