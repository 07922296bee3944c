"""What earlier answers of a session tell about the next one.

The more tokens the earlier answers had, the less what is expected without them weighs.

Names: n requests, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.arrays import Float32Array, Int64Array, NumberArray
from moeplan.planning.router import by_layer

__all__ = ["EarlierAnswers", "earlier_use"]

#: Picks in a layer that outweigh the prior: what is tried, and what is taken without a session to learn it from.
_STRENGTHS = 2.0 ** np.arange(4.0, 16.1)
_DEFAULT_STRENGTH = 512.0


def earlier_use(session: Int64Array, turn: Int64Array, use: NumberArray) -> Float32Array:
    """float32 [n, L, E]: picks of all earlier answers of each request's session; zero where there are none.

    Args:
        session, turn: int64 [n]; -1 where unknown. use: [n, L, E], picks of each answer.
    """
    out = np.zeros(use.shape, np.float32)
    order = np.lexsort((turn, session))
    order = order[(session[order] >= 0) & (turn[order] >= 0)]
    start = np.flatnonzero(np.diff(session[order], prepend=-1))
    for first, last in zip(start, [*start[1:], len(order)], strict=True):
        before = np.zeros(use.shape[1:], np.float32)
        waiting: list[int] = []  # answers of one turn do not know each other
        for at in order[first:last].tolist():
            if waiting and turn[waiting[0]] != turn[at]:
                before += use[waiting].sum(axis=0, dtype=np.float32)
                waiting = []
            out[at] = before
            waiting.append(at)
    return out


@dataclass(frozen=True)
class EarlierAnswers:
    """Expected use from a prior and from earlier answers.

    Attributes:
        strength: picks in a layer at which the earlier answers weigh as much as the prior.
    """

    strength: float = _DEFAULT_STRENGTH

    @classmethod
    def fit(cls, prior: NumberArray, earlier: NumberArray, use: NumberArray) -> EarlierAnswers:
        """The strength with the least squared error on requests that have earlier answers.

        Args:
            prior: [n, L, E], expected share of each expert in its layer, by a prediction that had not seen the request.
            earlier, use: [n, L, E], picks.
        """
        known = earlier.sum(axis=(1, 2)) > 0
        if not known.any():
            return cls()
        true = by_layer(use[known]).reshape(-1, *use.shape[1:]) * use.shape[1]
        error = {
            strength: float(((cls(float(strength)).combined(prior[known], earlier[known]) - true) ** 2).sum())
            for strength in _STRENGTHS
        }
        return cls(float(min(error, key=lambda strength: error[strength])))

    def combined(self, prior: NumberArray, earlier: NumberArray) -> Float32Array:
        """float32 [n, L, E], each layer sums to 1."""
        both = earlier.astype(np.float32) + np.float32(self.strength) * prior.astype(np.float32)
        return np.asarray(both / both.sum(axis=2, keepdims=True), np.float32)
