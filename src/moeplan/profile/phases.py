"""How well the prefill predicts the decode, compared with three baselines (arXiv 2604.23150: predictability).

The published measure pools all requests; popular experts alone can make it high. So each request's own correlation
is compared with null baselines: the prefill of another request, and the popularity of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped, interval, mean_without_nan, pearson, standardised
from moeplan.profile.counts import DECODE, PREFILL, Counts
from moeplan.trace.stages import MIN_DECODE, MIN_PREFILL

__all__ = ["NULLS", "Phases", "derangement", "phases"]

NULLS = ("another request's prefill", "global popularity", "same-domain popularity")
BOOTSTRAP = 1_000


@dataclass(frozen=True)
class Phases:
    """Correlations of expert counts, prefill against decode.

    Attributes:
        pooled: float64 [L], over the sums of all usable requests.
        own: float64 [L], mean over sampled usable requests of each one's own correlation.
        nulls: float64 [3, L], the same with the prefill replaced, in the order of `NULLS`.
        mean_pooled, mean_own: over kept layers; mean_nulls: [3].
        advantage: float64 [3], own minus null over the requests that have both, mean over kept layers;
            advantage_ci: [3, 2], 95 %, bootstrap over requests.
        usable: requests with enough of both stages, of `requests`; sampled: how many of them `own` is the mean of;
        with_domain: how many of those have another usable request of the same domain.
    """

    layer_ids: tuple[int, ...]
    pooled: FloatArray
    own: FloatArray
    nulls: FloatArray
    mean_pooled: float
    mean_own: float
    mean_nulls: FloatArray
    advantage: FloatArray
    advantage_ci: FloatArray
    requests: int
    usable: int
    sampled: int
    with_domain: int

    def to_dict(self) -> dict[str, Any]:
        names = ("other_request", "global_popularity", "domain_popularity")
        return {
            "layers": self.layer_ids,
            "pooled": self.pooled,
            "per_request": self.own,
            "nulls": dict(zip(names, self.nulls, strict=True)),
            "mean": {
                "pooled": self.mean_pooled,
                "per_request": self.mean_own,
                **dict(zip(names, self.mean_nulls, strict=True)),
            },
            "advantage": {
                name: {"value": self.advantage[i], "ci95": self.advantage_ci[i]} for i, name in enumerate(names)
            },
            "requests": {
                "all": self.requests,
                "usable": self.usable,
                "sampled": self.sampled,
                "with_domain_peer": self.with_domain,
            },
        }


def phases(counts: Counts, kept: npt.NDArray[np.intp], *, seed: int = 0) -> Phases | Skipped:
    """Correlation of prefill and decode per layer: pooled, per request, and its null baselines.

    Args:
        counts: of the whole trace.
        kept: layer rows that means are taken over.
        seed: of the derangement and the bootstrap.
    """
    usable = int(counts.stages.usable.sum())
    rows = np.flatnonzero(counts.stages.usable[counts.sample])
    if len(rows) < 2:
        need = f"{MIN_PREFILL} prefill and {MIN_DECODE} decode rows"
        return Skipped(f"needs 2 requests with at least {need}; the trace has {usable} (see --signature-tokens)")
    rng = np.random.default_rng([seed, 3])
    of_usable = counts.totals[1]  # [D, S, L, E]
    pooled = pearson(of_usable[:, PREFILL].sum(axis=0), of_usable[:, DECODE].sum(axis=0))

    domain = counts.domain[counts.sample[rows]]
    peers = np.bincount(counts.domain[counts.stages.usable], minlength=len(counts.domains))
    without_peer = (peers[domain] < 2) | counts.is_lump[domain]
    swap = derangement(len(rows), rng)
    layers = counts.shape.num_layers
    correlation = np.empty((4, len(rows), layers))
    for layer in range(layers):
        prefill = standardised(counts.by_request[PREFILL][rows, layer])
        raw = counts.by_request[DECODE][rows, layer].astype(np.float64)
        decode = standardised(raw)
        popular = of_usable[:, DECODE, layer]
        correlation[0, :, layer] = np.sum(prefill * decode, axis=-1)
        correlation[1, :, layer] = np.sum(prefill[swap] * decode, axis=-1)
        correlation[2, :, layer] = np.sum(standardised(popular.sum(axis=0) - raw) * decode, axis=-1)
        correlation[3, :, layer] = np.sum(standardised(popular[domain] - raw) * decode, axis=-1)
    correlation[3, without_peer] = np.nan

    per_layer = mean_without_nan(correlation, axis=1)
    per_request = mean_without_nan(correlation[:, :, kept], axis=2)  # [4, n]
    gain = per_request[:1] - per_request[1:]  # [3, n]
    draws = np.stack(
        [mean_without_nan(gain[:, rng.integers(0, len(rows), len(rows))], axis=1) for _ in range(BOOTSTRAP)]
    )
    return Phases(
        layer_ids=counts.shape.layer_ids,
        pooled=pooled,
        own=per_layer[0],
        nulls=per_layer[1:],
        mean_pooled=mean_without_nan(pooled[kept]),
        mean_own=mean_without_nan(per_layer[0, kept]),
        mean_nulls=np.asarray(mean_without_nan(per_layer[1:, kept], axis=1)),
        advantage=np.asarray(mean_without_nan(gain, axis=1)),
        advantage_ci=interval(draws).T,
        requests=len(counts.requests),
        usable=usable,
        sampled=len(rows),
        with_domain=int((~without_peer).sum()),
    )


def derangement(n: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """A seeded permutation of 0 .. n - 1 without a fixed point (n >= 2): one random cycle."""
    cycle = rng.permutation(n)
    swap = np.empty(n, np.intp)
    swap[cycle] = np.roll(cycle, 1)
    return swap
