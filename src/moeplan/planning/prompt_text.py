"""One prompt as it is read: terms are added while text is appended, and scores of groups follow at once.

For a gateway: some hundred microseconds for a prompt of a thousand tokens, and only the new tokens for the next turn.
`PromptPredictor.coordinates` is the same for many prompts at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan._kernels.ngrams import hash_grams
from moeplan._kernels.terms import add_terms, move_terms
from moeplan.arrays import Float32Array, FloatArray
from moeplan.errors import UsageError
from moeplan.planning.predictor import PromptPredictor, within
from moeplan.planning.router import LinearRouter
from moeplan.planning.terms import IDS_SECRET
from moeplan.trace.prompts import hash_key

__all__ = ["GroupScores", "PromptText"]

_KEY = hash_key(IDS_SECRET)
_FIRST_SLOTS = 256


class PromptText:
    """The terms of one prompt so far.

    Args:
        predictor: what its coordinates are read from.

    Examples:
        >>> import numpy as np
        >>> from moeplan.trace.prompts import PromptFeatures
        >>> prompts = PromptFeatures.of_ids([[first, word] for first in (1, 7) for word in range(10, 20)])
        >>> use = np.repeat([[[9, 1]], [[1, 9]]], 10, axis=0)
        >>> text = PromptText(PromptPredictor.fit(prompts, use))
        >>> bool(text.append_ids([1]).append_ids([25])._terms == 3), int(text.expected_use().argmax())
        (True, 0)
    """

    def __init__(self, predictor: PromptPredictor) -> None:
        self.predictor = predictor
        self._seen = np.zeros(_FIRST_SLOTS, np.uint32)
        self._counts = np.zeros(_FIRST_SLOTS, np.int32)
        self._terms = 0
        self._last: int | None = None
        self._sums = np.zeros(len(predictor.components) + 2)

    def append_ids(self, tokens: npt.ArrayLike) -> PromptText:
        """Add the token ids that follow.

        Raises:
            UsageError: the predictor reads hashed prompts.
        """
        if self.predictor.kind != "ids":
            raise UsageError("the predictor reads hashed prompts, not token ids")
        new = np.asarray(tokens, np.uint32)
        if not len(new):
            return self
        joined = new if self._last is None else np.concatenate((np.array([self._last], np.uint32), new))
        grams = np.empty(2 * len(joined) - 1, np.uint64)
        hash_grams(joined, np.array([0, len(joined)]), _KEY, grams)
        self._last = int(new[-1])
        if len(joined) > len(new):
            grams = grams[1:]  # the last token of before was counted then
        return self._add(grams.astype(np.uint32), np.ones(len(grams), np.int32))

    def append_hashed(self, hashes: npt.NDArray[np.uint32], counts: npt.NDArray[np.integer]) -> PromptText:
        """Add hashed terms, and how often each occurs: the difference that a further turn makes to the prompt's counts.

        Raises:
            UsageError: the predictor reads token ids.
        """
        if self.predictor.kind != "hashed":
            raise UsageError("the predictor reads token ids, not hashed prompts")
        return self._add(hashes.astype(np.uint32), counts.astype(np.int32))

    def _add(self, hashes: npt.NDArray[np.uint32], counts: npt.NDArray[np.int32]) -> PromptText:
        if 2 * (self._terms + len(hashes)) > len(self._seen):
            size = 1 << int(2 * (self._terms + len(hashes))).bit_length()
            seen, moved = np.zeros(size, np.uint32), np.zeros(size, np.int32)
            move_terms(self._seen, self._counts, seen, moved)
            self._seen, self._counts = seen, moved
        weighting, weights = self.predictor.weighting, self.predictor.weights
        self._terms += add_terms(
            hashes, counts, self._seen, self._counts, weighting.terms, self.predictor.slots, weighting.rarity,
            weighting.unknown, weights, self._sums,
        )  # fmt: skip
        return self

    @property
    def coordinates(self) -> FloatArray:
        """float64 [r], as `PromptPredictor.coordinates` gives them."""
        if self._sums[-1] == 0.0:  # no known term: the mean
            return np.zeros(len(self._sums) - 2)
        found = self._sums[:-2] / np.sqrt(self._sums[-2]) + self.predictor.intercept
        return within(found, self.predictor.limit)

    def expected_use(self) -> Float32Array:
        """float32 [L, E]: see `PromptPredictor.expected_use`."""
        return np.asarray(self.predictor.use_at(self.coordinates[None])[0])


@dataclass(frozen=True)
class GroupScores:
    """Scores of groups straight from coordinates, without the expected use in between.

    Attributes:
        base: float64 [D], scores of a prompt of which nothing is known. slope: float64 [D, r].
    """

    base: FloatArray
    slope: FloatArray

    @classmethod
    def of(cls, predictor: PromptPredictor, router: LinearRouter) -> GroupScores:
        """The scores that a router gives to the expected use.

        Expected shares below 0 are not cut off, so scores may differ from the router's by some thousandths.
        """
        weights = router.weights.astype(np.float64) / predictor.mean.shape[0]
        base = weights @ predictor.mean.reshape(-1) + router.intercept
        return cls(base, weights @ predictor.components.T.astype(np.float64))

    def scores(self, coordinates: FloatArray) -> FloatArray:
        """float64 [D] (or [n, D]) at coordinates [r] (or [n, r])."""
        return np.asarray(coordinates @ self.slope.T + self.base)
