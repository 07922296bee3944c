"""Prompts as points for ordering and grouping: the products of two say how much is saved where they decode together.

From best to least: what earlier answers to the same prompts used; the use that a predictor expects of the prompts; the
words that prompts share, where nothing was recorded.

Names: n prompts, L layers, E experts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_ranges
from moeplan.arrays import Float32Array, Int64Array
from moeplan.errors import UsageError
from moeplan.planning.instances import pick_probability, sharing_points, unread
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.terms import IDS_SECRET, TermWeights
from moeplan.trace import Trace
from moeplan.trace.prompts import PromptFeatures

__all__ = ["Basis", "Known", "PredictedPoints", "PromptPoints", "RecordedPoints", "WordPoints", "answers", "word_ids"]

Basis = Literal["recorded", "predicted", "words"]
#: Terms and dimensions of points that are made from words alone, and the prompts that these are chosen on.
_MOST_TERMS, _WORD_DIMENSIONS, _WORD_SAMPLE = 200_000, 128, 10_000
_WORD = re.compile(r"\w+|[^\w\s]")


def word_ids(text: str) -> npt.NDArray[np.uint32]:
    """Each lower-case word or sign as a number, where no tokenizer is known: its CRC-32."""
    return np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(text.lower())], np.uint32)


class PromptPoints(Protocol):
    """Where points come from.

    Attributes:
        basis: what they rest on. tokens: int64, lengths of the answers that are known; empty where none are.
    """

    basis: Basis
    tokens: Int64Array

    def points(self, prompts: PromptFeatures, batch: int) -> Float32Array:
        """float32 [n, f]."""
        ...

    def chance(self, prompts: PromptFeatures) -> Float32Array | None:
        """float32 [n, L, E], the chance that a token of the answer picks an expert; None where it is not known."""
        ...


@dataclass(frozen=True)
class Known:
    """Answers of a trace.

    Attributes:
        index: int64 [m], their numbers in the trace. use: uint32 [m, L, E]. tokens: int64 [m].
    """

    index: Int64Array
    use: npt.NDArray[np.uint32]
    tokens: Int64Array


def answers(trace: Trace) -> Known:
    """What the decode of each request used; of requests without known phases, all rows.

    Raises:
        UsageError: no request has decode rows.
    """
    if trace.aggregate > 1:
        raise UsageError("holds sums, not requests", where=str(trace.path), hint="use the trace that they were made of")
    requests = trace.requests
    start = requests.offsets[:-1] + requests.prefill_known
    stop = requests.offsets[1:]
    index = np.flatnonzero(stop > start)
    if not len(index):
        raise UsageError("no request has decode rows", where=str(trace.path), hint="record with --max-new-tokens")
    use = np.zeros((len(index), trace.shape.num_layers, trace.shape.num_experts), np.uint32)
    start, stop = start[index], stop[index]
    count_ranges(trace.load().experts, start, stop, np.arange(len(index)), use)
    return Known(index, use, stop - start)


class PredictedPoints:
    """From the use that a predictor expects.

    Args:
        predictor: fitted on a trace. top_k: picks of a token in a layer. tokens: int64, lengths of known answers.
    """

    basis: Basis = "predicted"

    def __init__(self, predictor: PromptPredictor, top_k: int, tokens: Int64Array | None = None) -> None:
        self.predictor, self.top_k = predictor, top_k
        self.tokens = np.zeros(0, np.int64) if tokens is None else tokens

    @classmethod
    def fit(cls, trace: Trace, seed: int = 0) -> PredictedPoints:
        """Fit on the prompts and answers of a trace.

        Raises:
            UsageError: the trace keeps no prompts, or has no decode rows.
        """
        prompts = trace.prompts
        if prompts is None:
            raise UsageError(
                "keeps no prompts to predict experts from",
                where=str(trace.path),
                hint="record with --keep-prompt-tokens ids, or order by words alone (no --trace)",
            )
        known = answers(trace)
        predictor = PromptPredictor.fit(prompts.take(known.index), known.use, seed=seed)
        return cls(predictor, trace.shape.top_k, known.tokens)

    def points(self, prompts: PromptFeatures, batch: int) -> Float32Array:
        """In as many dimensions as the predictor has components: products are those of the expected use."""
        found = self.predictor.coordinates(prompts)
        if not found.any():
            raise UsageError(
                "no prompt has a token that the trace's prompts have",
                hint="texts need the model's tokenizer (--tokenizer), or order by words alone: no --trace, no --plan",
            )
        mean = pick_probability(self.predictor.mean, self.top_k).reshape(-1)
        scaled = self.predictor.components * (self.top_k * np.sqrt(unread(mean, batch)))
        size, vector = np.linalg.eigh((scaled @ scaled.T).astype(np.float64))
        points = (found - found.mean(axis=0)) @ (vector * np.sqrt(np.maximum(size, 0.0)))
        return np.asarray(points, np.float32)

    def chance(self, prompts: PromptFeatures) -> Float32Array:
        """From the expected use."""
        return pick_probability(self.predictor.expected_use(prompts), self.top_k)


class RecordedPoints:
    """From what earlier answers to the same prompts used.

    Args:
        trace: a recording of these prompts, in this order.
    """

    basis: Basis = "recorded"

    def __init__(self, trace: Trace) -> None:
        known = answers(trace)
        self.tokens, self.top_k = known.tokens, trace.shape.top_k
        total = known.use.sum(axis=(0, 2), keepdims=True)
        mean = known.use.sum(axis=0, keepdims=True) / np.maximum(total, 1)
        share = known.use / np.maximum(known.use.sum(axis=2, keepdims=True), 1)
        self._share = np.repeat(mean.astype(np.float32), len(trace.requests), axis=0)
        self._share[known.index] = share

    def _of(self, prompts: PromptFeatures) -> Float32Array:
        if len(prompts) != len(self._share):
            raise UsageError(
                f"{len(prompts)} prompts, but the trace has {len(self._share)} requests",
                hint="use the trace that was recorded from this very file, without --limit and --min-tokens",
            )
        return self._share

    def points(self, prompts: PromptFeatures, batch: int) -> Float32Array:
        """In the span of the use."""
        return sharing_points(self._of(prompts), self.top_k, batch)

    def chance(self, prompts: PromptFeatures) -> Float32Array:
        """From the share of each expert."""
        return pick_probability(self._of(prompts), self.top_k)


class WordPoints:
    """From the 1- and 2-grams that prompts share, weighed by their rarity; no recording is needed."""

    basis: Basis = "words"
    tokens: Int64Array = np.zeros(0, np.int64)

    def points(self, prompts: PromptFeatures, batch: int) -> Float32Array:
        """In the dimensions in which a sample of the prompts varies most."""
        from sklearn.utils.extmath import randomized_svd

        n = len(prompts)
        sample = np.arange(n)
        if n > _WORD_SAMPLE:
            sample = np.sort(np.random.default_rng(0x3D).choice(n, _WORD_SAMPLE, replace=False))
        hashed = _hashed(prompts.take(sample))
        weighting = TermWeights.fit(hashed, _MOST_TERMS)
        points = weighting.points(hashed)
        _, _, vector = randomized_svd(points, min(_WORD_DIMENSIONS, *points.shape), random_state=0, n_iter=2)
        found = np.empty((n, len(vector)), np.float32)
        for at in range(0, n, 4096):
            part = np.arange(at, min(at + 4096, n))
            found[part] = weighting.points(_hashed(prompts.take(part))) @ vector.T
        return np.asarray(found - found.mean(axis=0))

    def chance(self, prompts: PromptFeatures) -> None:
        """Not known."""
        return None


def _hashed(prompts: PromptFeatures) -> PromptFeatures:
    return prompts.hashed(IDS_SECRET) if prompts.kind == "ids" else prompts


def together(prompts: PromptFeatures, batch: int, prefix: int = 256) -> Int64Array:
    """int64 [n]: the unit of each prompt; those of a unit stay together in a queue.

    Samples of one prompt are a unit, and so are prompts that begin with the same `prefix` tokens, unless more than 8
    batches of them do: their prefix stays in an engine's cache in any order.
    """
    whole = np.array([zlib_key(prompts.of(r)[0]) for r in range(len(prompts))], np.uint64)
    unit = np.unique(whole, return_inverse=True)[1]
    if prompts.kind != "ids":
        return np.asarray(unit, np.int64)
    long = np.diff(prompts.offsets) > prefix
    start = np.array([zlib_key(prompts.of(r)[0][:prefix]) for r in np.flatnonzero(long).tolist()], np.uint64)
    if len(start):
        _, group, size = np.unique(start, return_inverse=True, return_counts=True)
        shared = (size[group] > 1) & (size[group] <= 8 * batch)
        unit[np.flatnonzero(long)[shared]] = len(prompts) + group[shared]
    return np.asarray(np.unique(unit, return_inverse=True)[1], np.int64)


def zlib_key(tokens: npt.NDArray[np.uint32]) -> int:
    """64 bits that tell token lists apart: two checksums of the bytes."""
    data = np.ascontiguousarray(tokens).tobytes()
    return (zlib.crc32(data) << 32) | zlib.crc32(data[::-1])


def unit_points(points: Float32Array, unit: Int64Array) -> Float32Array:
    """float32 [units, f]: means of the points of each unit."""
    count = np.bincount(unit)
    total = np.stack([np.bincount(unit, weights=column) for column in points.T], axis=1)
    return np.asarray(total / count[:, None], np.float32)


def features(prompts: PromptFeatures | Sequence[str] | Sequence[npt.ArrayLike]) -> PromptFeatures:
    """Prompts as features: texts by their words, lists of token ids as they are."""
    if isinstance(prompts, PromptFeatures):
        return prompts
    ids = [word_ids(prompt) if isinstance(prompt, str) else np.asarray(prompt, np.uint32) for prompt in prompts]
    return PromptFeatures.of_ids(ids)
