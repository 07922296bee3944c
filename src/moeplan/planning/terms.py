"""Prompts as weighted terms: the features that experts are predicted from.

A *term* is a hashed 1- or 2-gram of the prompt's tokens. Its weight in a prompt is (1 + ln count) x rarity, and the
weights of a prompt have length 1, terms that no fitted prompt had included: so a prompt of unknown words is near the
origin, which is predicted as the mean.

Names: n prompts, V known terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from moeplan.arrays import Float32Array, Int64Array
from moeplan.errors import UsageError
from moeplan.trace.prompts import PromptFeatures, PromptKind

__all__ = ["IDS_SECRET", "TermWeights", "hashed_terms"]

Uint32Array = npt.NDArray[np.uint32]
#: Token ids are hashed under this key. It is no secret: whoever has ids has the prompt.
IDS_SECRET = b"moeplan: terms of token ids"
#: Rarity is (ln((1 + n) / (1 + prompts with the term)) + 1) to this power. The usual weighting (power 1) makes prompts
#: alike that share common words only; for groups of requests the rarer ones matter more (docs/concepts/prediction.md).
POWER = 1.75


def hashed_terms(prompts: PromptFeatures, kind: PromptKind, key: str) -> PromptFeatures:
    """The terms of prompts of the given kind, as hashes and counts.

    Args:
        kind, key: what the predictor was fitted on.

    Raises:
        UsageError: prompts of another kind, or hashed under another secret.
    """
    if prompts.kind != kind:
        raise UsageError(
            f"the predictor was fitted on prompts kept as {kind}, these are {prompts.kind}",
            hint="use a trace that keeps them alike (--keep-prompt-tokens), or plan again",
        )
    if kind == "ids":
        return prompts.hashed(IDS_SECRET)
    if prompts.key != key:
        raise UsageError(
            "the prompts are hashed under another secret than those that the predictor was fitted on",
            hint="record or import with the same --prompt-secret FILE",
        )
    return prompts


@dataclass(frozen=True)
class TermWeights:
    """How much each term of a prompt weighs.

    Attributes:
        terms: uint32 [V], the known terms, ascending. rarity: float32 [V]. unknown: rarity of any other term.
    """

    terms: Uint32Array
    rarity: Float32Array
    unknown: float

    @classmethod
    def fit(cls, hashed: PromptFeatures, most: int) -> TermWeights:
        """The weights of the terms of some prompts; of more than `most` terms, those that weigh most over all."""
        terms, found = np.unique(hashed.tokens, return_counts=True)  # a prompt has each term once
        n = int(hashed.known.sum())
        rarity = (np.log((1.0 + n) / (1.0 + found)) + 1.0) ** POWER
        if len(terms) > most:
            kept = np.sort(np.argsort(-found * rarity**2, kind="stable")[:most])
            terms, rarity = terms[kept], rarity[kept]
        rounded = rarity.astype(np.float16).astype(np.float32)
        return cls(terms.astype(np.uint32), rounded, float(np.float16((np.log(1.0 + n) + 1.0) ** POWER)))

    def points(self, hashed: PromptFeatures) -> sparse.csr_array:
        """float64 [n, V], each prompt as a vector of length at most 1; zero for a prompt without terms."""
        counts = np.asarray(hashed.counts, np.float64)
        row = np.repeat(np.arange(len(hashed)), np.diff(hashed.offsets))
        at = np.searchsorted(self.terms, hashed.tokens)
        at[at == len(self.terms)] = 0
        known = self.terms[at] == hashed.tokens if len(self.terms) else np.zeros(len(at), np.bool_)
        weight = 1.0 + np.log(counts)
        weight[known] *= self.rarity[at[known]]
        weight[~known] *= self.unknown
        weight /= _length(weight, row, len(hashed))[row]
        ends = np.concatenate(([0], np.cumsum(np.bincount(row[known], minlength=len(hashed)))))
        return sparse.csr_array((weight[known], at[known], ends), shape=(len(hashed), len(self.terms)))


def _length(weight: npt.NDArray[np.float64], row: Int64Array, n: int) -> npt.NDArray[np.float64]:
    return np.asarray(np.sqrt(np.maximum(np.bincount(row, weights=weight**2, minlength=n), 1e-300)))
