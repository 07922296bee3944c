"""Imbalance of expert load (arXiv 2604.23150: expert load, imbalance factor)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, mean_without_nan
from moeplan.profile.counts import STAGES, Counts

__all__ = ["Imbalance", "imbalance", "imbalance_factor"]

#: A layer in which one expert takes a larger share of the picks is a training defect, not a load to plan for.
DEGENERATE_SHARE = 0.5
FLOOR_DRAWS = 20


@dataclass(frozen=True)
class Imbalance:
    """Imbalance factors: the largest expert's load over the mean load.

    Attributes:
        layer_ids: the model's layer indices, length L.
        overall: float64 [L], over all rows.
        by_stage: float64 [S, L]; NaN where a stage has no rows.
        by_domain_stage: float64 [D, S, L].
        floor_by_stage: float64 [S], the noise floor: imbalance of as many uniformly random picks.
        floor_by_domain_stage: float64 [D, S].
        largest: int64 [L], the expert with most picks; largest_share: float64 [L], its share of the layer's picks.
        flagged: bool [L], layers where that share is above one half; left out of every mean over layers.
    """

    layer_ids: tuple[int, ...]
    domains: tuple[str, ...]
    overall: FloatArray
    by_stage: FloatArray
    by_domain_stage: FloatArray
    floor_by_stage: FloatArray
    floor_by_domain_stage: FloatArray
    largest: npt.NDArray[np.int64]
    largest_share: FloatArray
    flagged: npt.NDArray[np.bool_]

    @property
    def kept(self) -> npt.NDArray[np.intp]:
        """The layer rows that means are taken over: all but the flagged, or all when every layer is flagged."""
        return np.flatnonzero(~self.flagged) if not self.flagged.all() else np.arange(len(self.flagged))

    def mean(self, factors: FloatArray) -> Any:
        """Mean over the kept layers (last axis)."""
        return mean_without_nan(factors[..., self.kept], axis=-1)

    def to_dict(self) -> dict[str, Any]:
        def by_stage(values: Iterable[Any]) -> dict[str, Any]:
            return dict(zip(STAGES, values, strict=True))

        of_domains = zip(self.domains, self.by_domain_stage, self.floor_by_domain_stage, strict=True)
        return {
            "layers": self.layer_ids,
            "overall": self.overall,
            "mean": self.mean(self.overall),
            "by_stage": by_stage(self.by_stage),
            "mean_by_stage": by_stage([self.mean(factors) for factors in self.by_stage]),
            "floor_by_stage": by_stage(self.floor_by_stage),
            "by_domain": dict(zip(self.domains, map(by_stage, self.by_domain_stage), strict=True)),
            "mean_by_domain": {
                name: by_stage(
                    [{"mean": self.mean(one), "floor": floor} for one, floor in zip(factors, floors, strict=True)]
                )
                for name, factors, floors in of_domains
            },
            "largest_expert": self.largest,
            "largest_share": self.largest_share,
            "flagged_layers": [self.layer_ids[i] for i in np.flatnonzero(self.flagged)],
        }


def imbalance_factor(counts: npt.NDArray[Any]) -> FloatArray:
    """Largest over mean along the last axis (experts); NaN where nothing was counted."""
    mean = counts.mean(axis=-1)
    return np.asarray(np.divide(counts.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0))


def imbalance(counts: Counts, *, seed: int = 0) -> Imbalance:
    """Imbalance per layer, overall, by stage, and by domain and stage, with its noise floor."""
    by_domain_stage = counts.by_domain_stage  # [D, S, L, E]
    by_stage = by_domain_stage.sum(axis=0)
    overall = by_stage.sum(axis=0)
    share = overall.max(axis=-1) / np.maximum(overall.sum(axis=-1), 1)
    rng = np.random.default_rng([seed, 2])
    return Imbalance(
        layer_ids=counts.shape.layer_ids,
        domains=counts.domains,
        overall=imbalance_factor(overall),
        by_stage=imbalance_factor(by_stage),
        by_domain_stage=imbalance_factor(by_domain_stage),
        floor_by_stage=_floor(by_stage[:, 0], rng),
        floor_by_domain_stage=_floor(by_domain_stage[:, :, 0], rng),
        largest=overall.argmax(axis=-1).astype(np.int64),
        largest_share=share,
        flagged=share > DEGENERATE_SHARE,
    )


def _floor(counts: npt.NDArray[np.int64], rng: np.random.Generator) -> FloatArray:
    """Noise floor: mean imbalance factor of as many uniformly random picks (the same number in every layer)."""
    picks, experts = counts.sum(axis=-1), counts.shape[-1]
    draws = rng.poisson(picks[..., None] / experts, (FLOOR_DRAWS, *picks.shape, experts))
    return np.asarray(mean_without_nan(imbalance_factor(draws), axis=0), np.float64)
