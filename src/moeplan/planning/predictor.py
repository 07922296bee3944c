"""Predicts from a prompt which experts its answer will use (docs/concepts/prediction.md).

The use of experts is reduced to a few principal components; a ridge regression predicts them from the prompt's terms.
What the terms leave unexplained of a domain is learned as an offset, shrunk by how few requests of the domain there
were. A prompt of which nothing is known is predicted as the mean.

Names: n requests, L layers, E experts, V terms, r components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan._kernels.terms import index_terms
from moeplan.arrays import Float32Array, FloatArray, Int32Array, Int64Array, NumberArray
from moeplan.errors import FormatError, UsageError
from moeplan.planning.ridge import MOST_EXACT, fit_ridge
from moeplan.planning.router import by_layer
from moeplan.planning.terms import TermWeights, hashed_terms
from moeplan.trace.prompts import PromptFeatures, PromptKind

__all__ = ["MAX_BYTES", "LeftOut", "PromptPredictor", "within"]

#: Most bytes of a stored predictor.
MAX_BYTES = 8 * 2**20
#: Components of the use of experts that are predicted.
COMPONENTS = 24
#: How many requests of a domain outweigh the prior, of which the one with the least leave-one-out error is taken.
_DOMAIN_STRENGTHS = (*(2.0 ** np.arange(-2.0, 8.1)), np.inf)
#: Coordinates longer than this share of the left-out ones are cut to that length: the regression's factor on
#: predictions (`fit_ridge`) overshoots for prompts that are nearly those of fitted requests.
_LIMIT = 0.95
_CHUNK = 4096


@dataclass(frozen=True)
class LeftOut:
    """Predictions of fitted requests by a regression that had not seen them.

    Attributes:
        index: int64 [m], which of the fitted requests. coordinates: float32 [m, r].
        domain_offset: float32 [m, r], what the others of their domain would add.
    """

    index: Int64Array
    coordinates: Float32Array
    domain_offset: Float32Array


@dataclass(frozen=True, eq=False)
class PromptPredictor:
    """From prompts to the expected use of experts.

    Attributes:
        kind, key: of the prompts that it was fitted on, and of those that it reads.
        mean: float32 [L, E], mean share of each expert; each layer sums to 1.
        components: float32 [r, L * E], added to the mean per unit of a coordinate.
        weighting: the known terms. weights: float32 [V, r], intercept: float32 [r], from a prompt's terms to its
            coordinates; a prompt without a known term is at 0, the mean.
        limit: longer coordinates are cut to this length.
        domain_offset: float32 [domains, r], added to the coordinates of a request whose domain is known.
        left_out: of the fit; None once it was stored.

    Examples:
        >>> import numpy as np
        >>> prompts = PromptFeatures.of_ids([[first, word] for first in (1, 7) for word in range(10, 20)])
        >>> use = np.repeat([[[9, 1]], [[1, 9]]], 10, axis=0)  # prompts with a 1 use expert 0, those with a 7 expert 1
        >>> predictor = PromptPredictor.fit(prompts, use)
        >>> predictor.expected_use(PromptFeatures.of_ids([[1], [7], [1, 99]])).argmax(axis=2).ravel().tolist()
        [0, 1, 0]
    """

    kind: PromptKind
    key: str
    mean: Float32Array
    components: Float32Array
    weighting: TermWeights
    weights: Float32Array
    intercept: Float32Array
    limit: float
    domain_offset: Float32Array
    left_out: LeftOut | None = field(default=None, repr=False)

    @classmethod
    def fit(
        cls, prompts: PromptFeatures, use: NumberArray, domain: Int64Array | None = None, *, seed: int = 0
    ) -> PromptPredictor:
        """Fit on what requests with these prompts used.

        Args:
            prompts: of n requests; without features where the prompt is not known.
            use: [n, L, E], picks of each request.
            domain: int64 [n], numbers from 0; None where no domains are known.
            seed: draws the sample that strengths are chosen on, of more than some thousand requests.

        Raises:
            UsageError: no request, or numbers of requests that differ.
        """
        n, layers, experts = use.shape
        if not n or len(prompts) != n or (domain is not None and len(domain) != n):
            raise UsageError(f"prompts of {len(prompts)} requests for the use of {n}")
        sample = np.arange(n)
        if n > MOST_EXACT:
            sample = np.sort(np.random.default_rng([seed, 0x9E]).choice(n, MOST_EXACT, replace=False))
        mean = sum(by_layer(use[at : at + _CHUNK]).sum(axis=0, dtype=np.float64) for at in range(0, n, _CHUNK)) / n
        components, coordinates = _components(use, mean, sample, seed)
        key, kind = prompts.key, prompts.kind
        hashed = hashed_terms(prompts, kind, key)
        most = (MAX_BYTES - 65536 - 2 * components.size - 4 * mean.size) // (6 + 2 * max(len(components), 1))
        weighting = TermWeights.fit(hashed, most)
        ridge = fit_ridge(weighting.points(hashed), coordinates, sample)
        limit = float(np.float32(np.quantile(np.linalg.norm(ridge.left_out, axis=1), _LIMIT)))
        left_out = within(ridge.left_out, limit)
        offset, of_others = np.zeros((0, len(components))), np.zeros_like(left_out)
        if domain is not None:
            offset, of_others = _domain_offset(coordinates[sample] - left_out, domain[sample], int(domain.max()) + 1)
        level = (mean * layers).reshape(layers, experts)
        level[level.sum(axis=1) <= 0] = 1.0 / experts
        level /= level.sum(axis=1, keepdims=True)
        apart = LeftOut(sample, left_out.astype(np.float32), of_others.astype(np.float32))
        return cls(
            kind, key, level.astype(np.float32), _half(components * layers), weighting, _half(ridge.weights),
            _half(ridge.intercept), limit, _half(offset), apart,
        )  # fmt: skip

    @cached_property
    def slots(self) -> Int32Array:
        """Hash table of the known terms, for `moeplan._kernels.terms`."""
        return index_terms(self.weighting.terms)

    def coordinates(self, prompts: PromptFeatures, domain: Int64Array | None = None) -> FloatArray:
        """float64 [n, r]: what `components` are multiplied by.

        Args:
            domain: int64 [n], as in the fit; one that it did not have, or None, adds nothing.

        Raises:
            UsageError: prompts of another kind, or hashed under another secret.
        """
        points = self.weighting.points(hashed_terms(prompts, self.kind, self.key))
        found = np.asarray(points @ self.weights.astype(np.float64))
        found[np.diff(points.indptr) > 0] += self.intercept
        found = within(found, self.limit)
        if domain is not None and len(self.domain_offset):
            known = (domain >= 0) & (domain < len(self.domain_offset))
            found[known] += self.domain_offset[domain[known]]
        return found

    def expected_use(self, prompts: PromptFeatures, domain: Int64Array | None = None) -> Float32Array:
        """float32 [n, L, E]: the expected share of each expert in its layer's picks; each layer sums to 1.

        Args:
            domain: see `coordinates`.
        """
        return self.use_at(self.coordinates(prompts, domain))

    def use_at(self, coordinates: NumberArray) -> Float32Array:
        """float32 [n, L, E] at coordinates [n, r]."""
        use = self.mean.reshape(-1) + coordinates.astype(np.float32) @ self.components
        use = np.maximum(use, 0.0).reshape(-1, *self.mean.shape)
        return np.asarray(use / use.sum(axis=2, keepdims=True), np.float32)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What a stored plan keeps, by file name: at most 8 MiB."""
        return {
            "prompt_terms": self.weighting.terms,
            "prompt_rarity": np.append(self.weighting.rarity, self.weighting.unknown).astype(np.float16),
            "prompt_weights": np.vstack((self.weights, self.intercept)).astype(np.float16),
            "prompt_components": self.components.astype(np.float16),
            "prompt_limit": np.array([self.limit], np.float32),
            "prompt_mean": self.mean,
            "prompt_domains": self.domain_offset.astype(np.float16),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], kind: PromptKind, key: str) -> PromptPredictor:
        """The predictor that `arrays` are of.

        Raises:
            FormatError: shapes that do not fit each other, or values that are not finite.
        """
        terms, rarity = arrays["prompt_terms"], arrays["prompt_rarity"].astype(np.float32)
        weights, components = arrays["prompt_weights"].astype(np.float32), arrays["prompt_components"]
        mean, offset, limit = arrays["prompt_mean"], arrays["prompt_domains"], arrays["prompt_limit"]
        rank = len(components)
        good = (
            terms.dtype == np.uint32 and bool((np.diff(terms.astype(np.int64)) > 0).all())
            and rarity.shape == (len(terms) + 1,) and weights.shape == (len(terms) + 1, rank)
            and components.shape == (rank, mean.size) and offset.shape[1:] == (rank,) and limit.shape == (1,)
            and bool((mean.sum(axis=1) > 0).all())
        )  # fmt: skip
        if not good or not all(np.isfinite(each).all() for each in (rarity, weights, components, mean, offset, limit)):
            raise FormatError("the prompt predictor's arrays do not fit each other", hint="plan again")
        return cls(
            kind, key, mean.astype(np.float32), components.astype(np.float32),
            TermWeights(terms, rarity[:-1], float(rarity[-1])), weights[:-1], weights[-1], float(limit[0]),
            offset.astype(np.float32),
        )  # fmt: skip


def within(coordinates: FloatArray, limit: float) -> FloatArray:
    """Coordinates [.., r], none longer than the limit."""
    length = np.linalg.norm(coordinates, axis=-1, keepdims=True)
    return np.asarray(coordinates * np.minimum(1.0, limit / np.maximum(length, 1e-300)))


def _half(values: FloatArray) -> Float32Array:
    """As a stored predictor has them, so that a plan predicts the same before and after it was stored."""
    return values.astype(np.float16).astype(np.float32)


def _components(use: NumberArray, mean: FloatArray, sample: Int64Array, seed: int) -> tuple[FloatArray, FloatArray]:
    """Principal components of the use of the sample: float64 [r, L * E], and coordinates of all requests [n, r].

    All components are of one length, so that the first coordinate varies most; its variance is about 1.
    """
    from sklearn.utils.extmath import randomized_svd

    n, width = len(use), mean.size
    centred = by_layer(use[sample]) - mean
    rank = min(COMPONENTS, len(sample) - 1, width)
    size, vector = np.zeros(0), np.zeros((0, width))
    if rank > 0:
        _, size, vector = randomized_svd(centred.astype(np.float64), rank, random_state=seed)
    size = size / np.sqrt(len(sample))
    kept = size > max(1e-4 * float(size.max(initial=0.0)), 1e-9)
    vector = vector[kept] * size.max(initial=0.0)
    into = vector.T / np.maximum((vector**2).sum(axis=1), 1e-300)
    coordinates = [(by_layer(use[at : at + _CHUNK]) - mean) @ into for at in range(0, n, _CHUNK)]
    return vector, np.concatenate(coordinates).astype(np.float64)


def _domain_offset(rest: FloatArray, domain: Int64Array, domains: int) -> tuple[FloatArray, FloatArray]:
    """Mean of what the terms left unexplained, shrunk to 0 for domains of few requests.

    Args:
        rest: float64 [m, r], use less its prediction, of requests that were left out.

    Returns:
        float64 [domains, r]; and float64 [m, r], the same for each request from the others of its domain.
    """
    count = np.bincount(domain, minlength=domains).astype(np.float64)[:, None]
    total = np.zeros((domains, rest.shape[1]))
    np.add.at(total, domain, rest)
    others, many = total[domain] - rest, count[domain] - 1.0
    error = {s: float(((rest - others / (many + s)) ** 2).sum()) for s in _DOMAIN_STRENGTHS}
    best = min(error, key=lambda strength: error[strength])
    return np.asarray(total / (count + best)), np.asarray(others / (many + best))
