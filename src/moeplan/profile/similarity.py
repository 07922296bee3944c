"""Domain similarity: correlation of the domains' expert use, and whether a difference exceeds the noise.

Similarity is the published measure (arXiv 2604.23150): Pearson correlation of per-expert token counts. A small sample
lowers it. So two halves of one domain are compared with each other (split-half reliability), and the similarity of two
domains is compared with the reliability of each. Disattenuation: C. Spearman, Am. J. Psychol. 15 (1904).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped, interval, mean_without_nan, standardised
from moeplan.profile.counts import Counts

__all__ = ["Similarity", "similarity"]

#: A domain with fewer sampled requests is not split into halves.
MIN_REQUESTS = 4
SPLITS, BOOTSTRAP = 20, 100


@dataclass(frozen=True)
class Similarity:
    """Similarity of domains in one stage.

    Attributes:
        domains: D labels; matrix: float64 [D, D], over all requests, mean over kept layers.
        halved: indices of the H domains with halves; requests: int64 [H], sampled requests of each.
        within: float64 [H], correlation between a domain's own halves (Pearson, mean over splits and kept layers).
        between: float64 [H, H], the same between halves of two domains, so that sample sizes match.
        disattenuated: float64 [H, H], between over the geometric mean of the two within; NaN if that is 0.
        gap: float64 [H, H], that geometric mean minus between; gap_ci: [H, H, 2], 95 %, bootstrap inside the halves.
        left_out: domains without halves.
    """

    domains: tuple[str, ...]
    matrix: FloatArray
    halved: npt.NDArray[np.intp]
    requests: npt.NDArray[np.int64]
    within: FloatArray
    between: FloatArray
    disattenuated: FloatArray
    gap: FloatArray
    gap_ci: FloatArray
    left_out: tuple[str, ...]

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Each pair of domains with halves, the least similar first, and whether the difference exceeds the noise."""
        found = [
            {
                "a": self.domains[self.halved[j]],
                "b": self.domains[self.halved[i]],
                "similarity": float(self.matrix[self.halved[i], self.halved[j]]),
                "between": float(self.between[i, j]),
                "reliability": float(self.between[i, j] + self.gap[i, j]),
                "disattenuated": float(self.disattenuated[i, j]),
                "gap_ci95": self.gap_ci[i, j].tolist(),
                "differs": bool(self.gap_ci[i, j, 0] > 0),
            }
            for i in range(len(self.halved))
            for j in range(i)
        ]
        return sorted(
            found, key=lambda pair: pair["disattenuated"] if pair["disattenuated"] == pair["disattenuated"] else 9
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "domains": self.domains,
            "matrix": self.matrix,
            "within": {
                self.domains[d]: {"halves": self.within[i], "requests": self.requests[i]}
                for i, d in enumerate(self.halved)
            },
            "pairs": self.pairs,
            "left_out": self.left_out,
        }


def similarity(counts: Counts, stage: int, kept: npt.NDArray[np.intp], *, seed: int = 0) -> Similarity | Skipped:
    """Similarity matrix and split-half reliability of one stage.

    Args:
        counts: of the whole trace.
        stage: `PREFILL` or `DECODE`.
        kept: layer rows that means are taken over.
        seed: of the halves and the bootstrap.
    """
    by_domain = counts.by_domain_stage[:, stage][:, kept]  # [D, L', E]
    present = np.flatnonzero(by_domain.sum(axis=(1, 2)))
    if len(present) < 2:
        what = "no rows" if not len(present) else f"one domain ({counts.domains[present[0]]})"
        return Skipped(f"{counts.stages.label(stage)}: {what}, nothing to compare")
    unit = standardised(by_domain).transpose(1, 0, 2)
    matrix = np.asarray(mean_without_nan(unit @ unit.transpose(0, 2, 1), axis=0))
    rng = np.random.default_rng([seed, 4, stage])
    members = counts.members(stage)
    halved = np.array([d for d, rows in enumerate(members) if len(rows) >= MIN_REQUESTS], np.intp)
    chosen = [members[d] for d in halved]
    point = _halves(counts, stage, kept, chosen, SPLITS, False, rng)
    draws = _halves(counts, stage, kept, chosen, BOOTSTRAP, True, rng)
    between, reliable = point[0].mean(axis=0), point[1].mean(axis=0)
    ratio = np.divide(between, reliable, out=np.full_like(between, np.nan), where=reliable > 0)
    return Similarity(
        domains=counts.domains,
        matrix=matrix,
        halved=halved,
        requests=np.array([len(items) for items in chosen], np.int64),
        within=np.diagonal(between).copy(),
        between=between,
        disattenuated=ratio,
        gap=reliable - between,
        gap_ci=np.moveaxis(interval(draws[1] - draws[0]), 0, -1),
        left_out=tuple(counts.domains[d] for d in present if d not in set(halved.tolist())),
    )


def _halves(
    counts: Counts,
    stage: int,
    kept: npt.NDArray[np.intp],
    members: list[npt.NDArray[np.intp]],
    draws: int,
    resample: bool,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Correlations between seeded halves, `draws` times, mean over layers.

    Returns:
        between: [draws, H, H], half against other half (symmetrised; the diagonal is `within`).
        reliable: [draws, H, H], geometric mean per layer of the two domains' within (not below 0).
    """
    weights = [_half_weights(len(items), draws, resample, rng) for items in members]
    shape = (draws, len(members), len(members))
    between, reliable, used = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    if not members:
        return between, reliable
    requests = counts.by_request[stage]
    for layer in kept:
        sums = np.stack(
            [w @ requests[items, layer].astype(np.float32) for w, items in zip(weights, members, strict=True)]
        )
        unit = standardised(sums.reshape(len(members), 2, draws, -1).transpose(1, 2, 0, 3))  # [2, draws, H, E]
        cross = unit[0] @ unit[1].transpose(0, 2, 1)
        cross = (cross + cross.transpose(0, 2, 1)) / 2
        within = np.maximum(np.diagonal(cross, axis1=1, axis2=2), 0.0)
        geometric = np.sqrt(within[:, :, None] * within[:, None, :])
        valid = ~np.isnan(cross + geometric)
        between += np.where(valid, cross, 0)
        reliable += np.where(valid, geometric, 0)
        used += valid
    nan = np.full(shape, np.nan)
    return np.divide(between, used, out=nan.copy(), where=used > 0), np.divide(reliable, used, out=nan, where=used > 0)


def _half_weights(n: int, draws: int, resample: bool, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """[2 * draws, n]: which requests are in the first halves, then in the second.

    With `resample`, requests are drawn again with replacement inside their half, never across: a request in both
    halves would raise their correlation.
    """
    weights = np.zeros((2, draws, n), np.float32)
    for draw in range(draws):
        order = rng.permutation(n)
        for half, items in enumerate((order[: n // 2], order[n // 2 :])):
            chosen = rng.choice(items, len(items)) if resample else items
            np.add.at(weights[half, draw], chosen, 1.0)
    return weights.reshape(2 * draws, n)
