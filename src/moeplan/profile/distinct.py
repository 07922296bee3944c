"""Distinct experts that a batch touches in a layer: the weights that a decode step must read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped, mean_without_nan
from moeplan.profile.counts import WITHOUT_ROWS, Counts

__all__ = ["Distinct", "distinct"]

MAX_BATCH, DRAWS = 512, 24


@dataclass(frozen=True)
class Distinct:
    """Distinct experts per layer against batch size (tokens in the step), mean over draws and kept layers.

    Attributes:
        batch: int64 [b], 1, 2, 4, .. 512, limited by the number of rows.
        mixed: float64 [b], rows of any domain; single: float64 [b], rows of one domain, drawn by its rows (NaN: no
            domain has so many rows, or there is only one domain).
        uniform: float64 [b], as many uniformly random picks.
        popular: float64 [b], independent picks in proportion to each layer's expert load.
        rows: token rows drawn from; stage: its label.
    """

    batch: npt.NDArray[np.int64]
    mixed: FloatArray
    single: FloatArray
    uniform: FloatArray
    popular: FloatArray
    rows: int
    stage: str


def distinct(counts: Counts, kept: npt.NDArray[np.intp], *, seed: int = 0) -> Distinct | Skipped:
    """Draw batches of rows without replacement from the reservoir and count the experts that they pick.

    Args:
        counts: of the whole trace.
        kept: layer rows that means are taken over.
        seed: of the draws.
    """
    if not len(counts.reservoir.experts):
        return Skipped(WITHOUT_ROWS)
    stage = counts.reservoir.serving_stage()
    of_stage = counts.reservoir.stage == stage
    experts = counts.reservoir.experts[of_stage][:, kept]  # [m, L', k]
    domain = counts.domain[counts.reservoir.request[of_stage]]
    size = counts.shape.num_experts
    k = float((experts < size).sum()) / (len(experts) * len(kept))  # a token may have fewer picks than the model's k
    batch = 2 ** np.arange(int(np.log2(min(MAX_BATCH, len(experts)))) + 1)
    rng = np.random.default_rng([seed, 8])

    share = np.zeros((len(kept), size))  # of tokens that pick the expert
    for layer in range(len(kept)):
        share[layer] = np.bincount(experts[:, layer].ravel(), minlength=size)[:size] / len(experts)
    mixed = [
        _count_distinct(experts[rng.choice(len(experts), batch[-1], replace=False)], batch, size) for _ in range(DRAWS)
    ]
    rows_of = [np.flatnonzero(domain == d) for d in range(len(counts.domains)) if not counts.is_lump[d]]
    single = np.full((DRAWS, len(batch)), np.nan)
    if sum(len(rows) > 0 for rows in rows_of) > 1:
        for draw, rows in enumerate(_domains_by_rows(rows_of, rng)):
            sizes = batch[batch <= len(rows)]
            chosen = rng.choice(rows, sizes[-1], replace=False)
            single[draw, : len(sizes)] = _count_distinct(experts[chosen], sizes, size)
    single[:, (~np.isnan(single)).sum(axis=0) < DRAWS] = np.nan  # every mean is over the same domains as at batch 1
    return Distinct(
        batch=batch,
        mixed=np.mean(mixed, axis=0),
        single=np.asarray(mean_without_nan(single, axis=0)),
        uniform=size * (1 - (1 - k / size) ** batch.astype(np.float64)),
        popular=np.array([(1 - (1 - np.minimum(share, 1.0)) ** b).sum(axis=1).mean() for b in batch.tolist()]),
        rows=len(experts),
        stage=counts.stages.label(stage),
    )


def _domains_by_rows(rows_of: list[npt.NDArray[np.intp]], rng: np.random.Generator) -> list[npt.NDArray[np.intp]]:
    """`DRAWS` domains, in proportion to their rows; only those that can fill the largest batch, if any can."""
    eligible = [rows for rows in rows_of if len(rows) >= MAX_BATCH] or [rows for rows in rows_of if len(rows)]
    length = np.array([len(rows) for rows in eligible], np.float64)
    return [eligible[i] for i in rng.choice(len(eligible), DRAWS, p=length / length.sum())]


def _count_distinct(
    experts: npt.NDArray[np.unsignedinteger], sizes: npt.NDArray[np.int64], num_experts: int
) -> FloatArray:
    """Mean over layers of distinct experts in the first b rows, for each b of `sizes`."""
    layers = experts.shape[1]
    seen = np.zeros((layers, num_experts + 1), np.bool_)  # the last column is for picks that a token lacks
    column = np.arange(layers)[None, :, None]
    found, done = [], 0
    for b in sizes.tolist():
        seen[column, experts[done:b]] = True
        found.append(seen[:, :num_experts].sum() / layers)
        done = b
    return np.array(found)
