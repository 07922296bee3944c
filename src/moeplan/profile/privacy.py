"""Privacy: what stored rows leak of a request: its domain, and which request it was.

*Kind*: predict the domain of a held-out row from its counts over all layers. Ridge regression onto one
column per domain (A. E. Hoerl, R. W. Kennard, Technometrics 12 (1970)), in 5 folds, with the penalty chosen inside the
training folds by generalised cross-validation (G. H. Golub, M. Heath, G. Wahba, Technometrics 21 (1979)).

*Link*: an attacker has a request's routing and looks for its stored row among 10 candidates: its own row and 9 others
of its domain drawn at random; the expectation over all such draws is exact. With N requests summed into a row, as
`--aggregate N` would store them, its own row is the sum that contains the request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped, wilson
from moeplan.profile.counts import DECODE, PREFILL, STAGES, Counts, stratified

__all__ = ["LINE_UP", "DomainInference", "Privacy", "Reidentification", "identification_rate", "privacy"]

FOLDS, MAX_ROWS = 5, 1_000
PENALTIES = 10.0 ** np.arange(-4, 5)
LINE_UP, MAX_LINKED, MAX_PER_DOMAIN = 10, 640, 160


@dataclass(frozen=True)
class DomainInference:
    """How well a row's domain is predicted.

    Attributes:
        accuracy: share of held-out rows whose domain is predicted correctly; ci95: Wilson's interval.
        chance: the share of the largest domain, the accuracy of always predicting it.
        rows: number of rows; domains: the classes; left_out: domains of fewer than 5 rows.
    """

    accuracy: float
    ci95: FloatArray
    chance: float
    rows: int
    domains: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Reidentification:
    """How often the row with a request's prefill is identified among 10, by the number of requests in a row.

    Attributes:
        aggregate: int64 [a], N = 1, 2, 4 .., while a domain fills 10 rows.
        requests: int64 [a], requests tested; for a larger N only larger domains are eligible.
        by_routing: float64 [a], identified by the routing of their decode; by_text: float64 [a], by the exact
            counts of their prefill, which anyone with the text can compute with the model.
        routing_ci, text_ci: float64 [a, 2], Wilson's intervals.
        chance: 1 / 10.
    """

    aggregate: npt.NDArray[np.int64]
    requests: npt.NDArray[np.int64]
    by_routing: FloatArray
    by_text: FloatArray
    routing_ci: FloatArray
    text_ci: FloatArray
    chance: float = 1 / LINE_UP

    def to_dict(self) -> dict[str, Any]:
        return {
            "line_up": LINE_UP,
            "chance": self.chance,
            "by_aggregate": {
                str(n): {
                    "requests": self.requests[i],
                    "by_routing": {"value": self.by_routing[i], "ci95": self.routing_ci[i]},
                    "by_text": {"value": self.by_text[i], "ci95": self.text_ci[i]},
                }
                for i, n in enumerate(self.aggregate.tolist())
            },
        }


@dataclass(frozen=True)
class Privacy:
    """What a trace leaks.

    Attributes:
        aggregate: N, requests in a stored row.
        kind: by stage, keys "prefill" and "decode".
        link: Skipped where no row is of one request.
    """

    aggregate: int
    kind: dict[str, DomainInference | Skipped]
    link: Reidentification | Skipped

    def to_dict(self) -> dict[str, Any]:
        return {"requests_per_row": self.aggregate, "kind": self.kind, "link": self.link}


def privacy(counts: Counts, kept: npt.NDArray[np.intp], aggregate: int = 1, *, seed: int = 0) -> Privacy:
    """Measure what the rows of a trace leak.

    Args:
        counts: of the whole trace.
        kept: layer rows to use.
        aggregate: N, requests that each stored row is the sum of.
        seed: of the sample and the folds.
    """
    kind = {STAGES[stage]: _kind(counts, stage, kept, seed) for stage in (PREFILL, DECODE)}
    if aggregate > 1:
        return Privacy(aggregate, kind, Skipped(f"no row has fewer than {aggregate} requests"))
    return Privacy(aggregate, kind, _link(counts, kept))


# ---- domain


def _kind(counts: Counts, stage: int, kept: npt.NDArray[np.intp], seed: int) -> DomainInference | Skipped:
    domain = counts.domain[counts.sample]
    eligible = (counts.stages.lengths(stage)[counts.sample] > 0) & ~counts.is_lump[domain]
    size = np.bincount(domain[eligible], minlength=len(counts.domains))
    enough = size >= FOLDS
    if enough.sum() < 2:
        return Skipped(f"needs 2 domains with {FOLDS} rows of {counts.stages.phrase(stage)}; there are {enough.sum()}")
    rng = np.random.default_rng([seed, 9, stage])
    rows = np.flatnonzero(eligible & enough[domain])
    rows = rows[stratified(domain[rows], MAX_ROWS, rng)]
    classes, label = np.unique(domain[rows], return_inverse=True)
    order = np.lexsort((rng.random(len(rows)), label))  # by domain, shuffled within it: each fold gets every domain
    fold = np.empty(len(rows), np.int64)
    fold[order] = np.arange(len(rows)) % FOLDS
    right = _predicts_correctly(features(counts.by_request[stage][rows][:, kept]), label, fold)
    return DomainInference(
        accuracy=float(right.mean()),
        ci95=wilson(float(right.mean()), len(rows)),
        chance=float(np.bincount(label).max() / len(rows)),
        rows=len(rows),
        domains=tuple(counts.domains[d] for d in classes),
        left_out=tuple(counts.domains[d] for d in np.flatnonzero((size > 0) & ~enough)),
    )


def features(use: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """float32 [n, L * E]: square roots of each layer's shares, so that a few experts of high load do not dominate."""
    share = use.astype(np.float32)
    share /= np.maximum(share.sum(axis=2, keepdims=True), 1)
    return np.sqrt(share).reshape(len(share), -1)


def _predicts_correctly(x: npt.NDArray[np.float32], label: npt.NDArray[np.int64], fold: npt.NDArray[np.int64]) -> Any:
    """bool [n]: whether ridge regression on the other folds predicts the row's class.

    In dual form (inner products of rows, centred on the training rows): there are fewer rows than features.
    """
    products = (x @ x.T).astype(np.float64)
    one_hot = np.eye(label.max() + 1)[label]
    right = np.empty(len(label), np.bool_)
    for held in range(FOLDS):
        train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        inner, cross = products[np.ix_(train, train)], products[np.ix_(test, train)]
        mean = inner.mean(axis=0)
        inner = inner - mean - mean[:, None] + mean.mean()
        cross = cross - cross.mean(axis=1, keepdims=True) - mean + mean.mean()
        prior = one_hot[train].mean(axis=0)
        values, vectors = np.linalg.eigh(inner)
        values = np.maximum(values, 0)
        rotated = vectors.T @ (one_hot[train] - prior)
        penalty = min(PENALTIES * max(values.mean(), 1e-12), key=lambda p: _gcv(values, rotated, p))
        score = prior + cross @ (vectors @ (rotated / (values + penalty)[:, None]))
        right[test] = score.argmax(axis=1) == label[test]
    return right


def _gcv(values: FloatArray, rotated: FloatArray, penalty: float) -> float:
    """Generalised cross-validation: the squared residual over the squared residual degrees of freedom."""
    left = penalty / (values + penalty)
    freedom = left.sum() - 1  # one for centring
    return float(((left[:, None] * rotated) ** 2).sum() / max(freedom**2, 1e-12))


# ---- identity


def _link(counts: Counts, kept: npt.NDArray[np.intp]) -> Reidentification | Skipped:
    usable = counts.stages.usable[counts.sample]
    domain = counts.domain[counts.sample]
    members = [np.flatnonzero(usable & (domain == d)) for d in np.flatnonzero(~counts.is_lump)]
    members = [rows for rows in members if len(rows) >= LINE_UP]
    if not members:
        named = [counts.stages.phrase(stage) for stage in (PREFILL, DECODE)]
        return Skipped(f"needs a domain of {LINE_UP} requests with rows of both {named[0]} and {named[1]}")
    limit = max(LINE_UP, min(MAX_PER_DOMAIN, MAX_LINKED // len(members)))
    found: list[tuple[int, FloatArray]] = []
    for rows in members:
        rows = rows[:limit]
        known, stored = (counts.by_request[stage][rows][:, kept] for stage in (DECODE, PREFILL))
        aggregate = 1
        while len(rows) >= LINE_UP * aggregate:
            found.append((aggregate, _identification_rates(known, stored, aggregate)))
            aggregate *= 2
    steps = np.unique([n for n, _ in found])
    rates = [np.concatenate([rate for n, rate in found if n == step], axis=1) for step in steps]
    mean = np.array([rate.mean(axis=1) for rate in rates])  # [a, 2]
    size = np.array([rate.shape[1] for rate in rates])
    ci = np.array([[wilson(m, n) for m in both] for both, n in zip(mean, size, strict=True)])
    return Reidentification(steps, size, mean[:, 0], mean[:, 1], ci[:, 0], ci[:, 1])


def _identification_rates(known: npt.NDArray[np.uint32], prefill: npt.NDArray[np.uint32], aggregate: int) -> FloatArray:
    """float64 [2, m]: how often each request is identified by its routing, and by its text; m fill rows.

    Args:
        known, prefill: uint32 [requests, L, E] of one domain, decode and prefill.
    """
    rows = len(prefill) // aggregate
    stored = prefill[: rows * aggregate].reshape(rows, aggregate, *prefill.shape[1:]).sum(axis=1, dtype=np.uint32)
    own = np.arange(rows * aggregate) // aggregate
    a, b = centred(features(known[: len(own)])), centred(features(stored))
    flat, texts = stored.reshape(rows, -1), prefill[: len(own)].reshape(len(own), -1)
    # A row that contains the request has all of its picks, any other row some of them.
    overlap = np.stack([np.minimum(text, flat).sum(axis=1) for text in texts])
    return np.stack((identification_rate(a @ b.T, own), identification_rate(overlap, own)))


def centred(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows minus the mean row, which does not distinguish them, scaled to length 1."""
    x = x - x.mean(axis=0)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), np.float32)


def identification_rate(score: npt.NDArray[Any], own: npt.NDArray[np.int64]) -> FloatArray:
    """How often the own row scores highest among itself and 9 others drawn without replacement; ties at random.

    Args:
        score: [m, rows], at least 10 rows.
        own: int64 [m], each one's own row.

    Returns:
        float64 [m], the expectation over all draws. Of the rows - 1 others, w score no higher and t of them the same.
        A random order ranks u = 0 .. t of those above the own row; the mean of C(w - u, 9) / C(rows - 1, 9) over u is
        (C(w + 1, 10) - C(w - t, 10)) / ((t + 1) C(rows - 1, 9)).
    """
    rows = score.shape[1]
    mine = score[np.arange(len(own)), own][:, None]
    below, same = (score <= mine).sum(axis=1) - 1, (score == mine).sum(axis=1) - 1
    choose = np.array([math.comb(x, LINE_UP) for x in range(rows + 1)], np.float64)
    draws = math.comb(rows - 1, LINE_UP - 1)
    return np.asarray((choose[below + 1] - choose[below - same]) / ((same + 1) * draws))
