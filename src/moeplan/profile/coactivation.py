"""Co-activation: which experts a token picks together, compared with what their popularity alone predicts.

A token's picks are distinct, so independence cannot be the product of margins: the diagonal is empty by construction.
The baseline is quasi-independence, F[a, b] = x[a] x[b] off the diagonal, fitted to the observed margins by iterative
proportional fitting (L. A. Goodman, J. Am. Stat. Assoc. 63 (1968)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_pairs
from moeplan.profile.common import FloatArray, Skipped
from moeplan.profile.counts import WITHOUT_ROWS, Counts

__all__ = ["Coactivation", "coactivation", "quasi_independence"]

STRONGEST, MIN_EXPECTED, MIN_SIGMA = 20, 20.0, 5.0


@dataclass(frozen=True)
class Coactivation:
    """Distance of pair counts from quasi-independence.

    Attributes:
        distance: float64 [L], total variation between observed and fitted pair shares, 0 (independent) .. 1.
        floor: float64 [L], the same for a Poisson draw of the fitted counts: the noise floor.
        strongest: pairs with the highest lift (observed / fitted) among those expected at least 20 times and more than
            5 standard deviations above expectation: (layer id, expert, expert, observed, expected, lift).
        rows: token rows counted; stage: its label.
    """

    layer_ids: tuple[int, ...]
    distance: FloatArray
    floor: FloatArray
    strongest: list[tuple[int, int, int, int, float, float]]
    rows: int
    stage: str

    def to_dict(self) -> dict[str, Any]:
        names = ("layer", "a", "b", "observed", "expected", "lift")
        return {
            "layers": self.layer_ids,
            "distance": self.distance,
            "floor": self.floor,
            "strongest_pairs": [dict(zip(names, pair, strict=True)) for pair in self.strongest],
            "rows": self.rows,
            "stage": self.stage,
        }


def quasi_independence(pairs: npt.NDArray[Any], *, iterations: int = 200, tolerance: float = 1e-9) -> FloatArray:
    """The symmetric table x[a] x[b] with zero diagonal that has the margins of `pairs`.

    Args:
        pairs: counts [E, E], symmetric, diagonal 0.
        iterations, tolerance: stop when no margin differs by more than `tolerance` of the whole.

    Returns:
        float64 [E, E]. Where no such table exists (one expert in nearly every pair), the closest one found.
    """
    margin = pairs.sum(axis=1, dtype=np.float64)
    total = margin.sum()
    if total == 0:
        return np.zeros(pairs.shape)
    x = margin / np.sqrt(total)
    for _ in range(iterations):
        reached = x * (x.sum() - x)
        if np.abs(reached - margin).max() <= tolerance * total:
            break
        # The square root halves the step in the exponent: rows and columns are scaled together.
        x = x * np.sqrt(np.divide(margin, reached, out=np.zeros_like(x), where=reached > 0))
    fitted = np.outer(x, x)
    np.fill_diagonal(fitted, 0.0)
    return fitted


def coactivation(counts: Counts, *, seed: int = 0) -> Coactivation | Skipped:
    """Pairs in the reservoir's decode rows; without any, in prefill rows, else in rows of unknown phase."""
    if counts.shape.top_k < 2:
        return Skipped("no pairs: a token picks one expert per layer (top-1)")
    if not len(counts.reservoir.experts):
        return Skipped(WITHOUT_ROWS)
    stage = counts.reservoir.serving_stage()
    experts = counts.reservoir.experts[counts.reservoir.stage == stage]
    layers, size = counts.shape.num_layers, counts.shape.num_experts
    rng = np.random.default_rng([seed, 7])
    start, stop = np.array([0]), np.array([len(experts)])
    upper = np.triu_indices(size, 1)
    distance, floor = np.zeros(layers), np.zeros(layers)
    strongest: list[tuple[int, int, int, int, float, float]] = []
    for layer in range(layers):  # one [E, E] table at a time
        pairs = np.zeros((1, size, size), np.uint32)
        count_pairs(np.ascontiguousarray(experts[:, layer : layer + 1]), start, stop, pairs)
        np.fill_diagonal(pairs[0], 0)
        fitted = quasi_independence(pairs[0])
        observed, expected = pairs[0][upper].astype(np.float64), fitted[upper]
        distance[layer] = _total_variation(observed, expected)
        drawn = np.zeros((size, size))
        drawn[upper] = rng.poisson(expected)
        drawn += drawn.T
        floor[layer] = _total_variation(drawn[upper], quasi_independence(drawn)[upper])
        significant = np.flatnonzero(
            (expected >= MIN_EXPECTED) & (observed - expected > MIN_SIGMA * np.sqrt(np.maximum(expected, 1.0)))
        )
        best = significant[np.argsort(-observed[significant] / expected[significant], kind="stable")[:STRONGEST]]
        pairs_of = zip(*(values[best].tolist() for values in (*upper, observed, expected)), strict=True)
        strongest += [(counts.shape.layer_ids[layer], a, b, int(seen), fit, seen / fit) for a, b, seen, fit in pairs_of]
    strongest.sort(key=lambda pair: -pair[-1])
    return Coactivation(
        counts.shape.layer_ids, distance, floor, strongest[:STRONGEST], len(experts), counts.stages.label(stage)
    )


def _total_variation(a: FloatArray, b: FloatArray) -> float:
    if a.sum() <= 0 or b.sum() <= 0:
        return float("nan")
    return float(0.5 * np.abs(a / a.sum() - b / b.sum()).sum())
