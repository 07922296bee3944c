"""From a prompt to its group: scores of groups from the predicted use of experts, and what to expect of the choice.

Names: n requests, D groups, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.arrays import FloatArray, Int64Array, NumberArray
from moeplan.planning.assignment import equal_groups
from moeplan.planning.router import ClusterRouter, LinearRouter, Router

__all__ = ["Calibration", "prompt_router"]

#: Requests behind each point of a calibration, and the most points.
_REQUESTS_A_POINT, _MOST_POINTS = 12, 20


def prompt_router(router: Router, local: FloatArray) -> LinearRouter | ClusterRouter:
    """The router for predicted use, in place of a plan's own.

    A plan's own router is fitted on recorded signatures, which are noisy, and shrinks them. Predictions are shrunk
    already: the share of the expected picks that each group's node serves is their score. Clusters stay as they are.

    Args:
        local: float64 [D, L, E], share of a group's picks of an expert that its own node serves.
    """
    if isinstance(router, ClusterRouter):
        return router
    return LinearRouter(local.reshape(len(local), -1).astype(np.float32), np.zeros(len(local)))


@dataclass(frozen=True)
class Calibration:
    """The local share to expect of a request whose chosen group has a certain score.

    A rising line through means of requests with neighbouring scores (isotonic regression of the means), level beyond
    its ends: the highest scores are those that errors raised most.

    Attributes:
        score, share: float64 [points], ascending.

    Examples:
        >>> Calibration(np.array([0.1, 0.2]), np.array([0.15, 0.2])).expected(np.array([0.0, 0.15, 0.9])).tolist()
        [0.15, 0.175, 0.2]
    """

    score: FloatArray
    share: FloatArray

    @classmethod
    def fit(cls, scores: FloatArray, local: FloatArray, use: NumberArray) -> Calibration:
        """From requests that were predicted by a regression without them, in equal groups.

        Args:
            scores: float64 [n, D], by those predictions.
            local: float64 [D, L, E], see `prompt_router`. use: [n, L, E], picks of the requests.
        """
        from sklearn.isotonic import IsotonicRegression

        n, groups = scores.shape
        group = equal_groups(scores) if n >= groups else scores.argmax(axis=1)
        chosen, share = chosen_share(scores, group, local, use)
        order = np.argsort(chosen, kind="stable")
        parts = np.array_split(order, int(np.clip(n // _REQUESTS_A_POINT, 1, _MOST_POINTS)))
        score = np.array([chosen[part].mean() for part in parts])
        means = np.array([share[part].mean() for part in parts])
        rising = IsotonicRegression().fit_transform(score, means, sample_weight=[len(part) for part in parts])
        return cls(score, np.asarray(rising, np.float64))

    def expected(self, scores: FloatArray) -> FloatArray:
        """The expected local share, of the shape of the scores."""
        return np.asarray(np.interp(scores, self.score, self.share))


def chosen_share(
    scores: FloatArray, group: Int64Array, local: FloatArray, use: NumberArray
) -> tuple[FloatArray, FloatArray]:
    """float64 [n] each: the score of each request's group, and the share of its picks that the group's node serves."""
    flat = use.reshape(len(use), -1).astype(np.float64)
    share = (flat * local.reshape(len(local), -1)[group]).sum(axis=1) / np.maximum(flat.sum(axis=1), 1.0)
    return scores[np.arange(len(scores)), group], share
