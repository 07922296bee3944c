"""Predicts from a request's signature what share of its decode each group's node would serve.

A prefill is a noisy sample of what the decode will use. The forecast trusts it in part (the share of the signature's
own picks that a group's node serves) and learns the rest from the fit requests by ridge regression on the signature,
which shrinks what a signature cannot tell to the mean. Trust and ridge strength are those with the least leave-one-out
error, which for ridge regression has a closed form (Golub, Heath and Wahba 1979).
"""

from __future__ import annotations

import numpy as np

from moeplan.arrays import Float32Array, FloatArray, NumberArray
from moeplan.planning.router import LinearRouter, by_layer

__all__ = ["LocalityForecast"]

#: Ridge strengths that are tried, in shares of the signatures' variance.
STRENGTHS = 0.001 * 10.0 ** np.arange(0, 6.01, 0.5)


class LocalityForecast:
    """Regression on the fit requests' signatures; fitted again for every placement, cheaply.

    To set it up costs the cube of the requests: give it some hundreds.

    Args:
        signature: [n, L, E], picks of each fit request in its signature rows.
    """

    def __init__(self, signature: NumberArray) -> None:
        self._points = by_layer(signature)
        self._centre = self._points.mean(axis=0)
        self._points -= self._centre
        gram = (self._points @ self._points.T).astype(np.float64)
        self._scale = max(float(np.trace(gram)) / len(gram), 1e-12)
        value, self._vector = np.linalg.eigh(gram / self._scale)
        self._value = np.maximum(value, 0.0)
        #: [n, strengths], what the ridge leaves of each direction; [n, strengths], 1 - each request's leverage.
        self._shrunk = self._value[:, None] / (self._value[:, None] + STRENGTHS * len(gram))
        self._others = np.maximum(1.0 - (self._vector**2) @ self._shrunk - 1.0 / len(gram), 1e-6)

    def fit(self, target: FloatArray, local: Float32Array) -> tuple[LinearRouter, FloatArray]:
        """The router, and its predictions float64 [n, D] of the requests with each left out.

        Args:
            target: float64 [n, D], the share of each request's decode that each group's node serves.
            local: float32 [D, L * E], the share of an expert's picks that a group's node serves.
        """
        n, groups = target.shape
        own = ((self._points + self._centre) @ local.T).astype(np.float64)  # the same shares of the signatures
        both = np.hstack([target, own])
        mean = both.mean(axis=0)
        projected = self._vector.T @ (both - mean)
        least, trust, best, predicted = np.inf, 0.0, 0, target
        for number in range(len(STRENGTHS)):
            fitted = mean + self._vector @ (self._shrunk[:, number, None] * projected)
            residual = (both - fitted) / self._others[:, number, None]  # with the request left out
            # Only differences between groups decide; the error of target - trust x own is a parabola in the trust.
            of_target, of_own = residual[:, :groups], residual[:, groups:]
            a, b = (part - part.mean(axis=1, keepdims=True) for part in (of_target, of_own))
            share = float(np.clip((a * b).sum() / max(float((b * b).sum()), 1e-300), 0.0, 1.0))
            error = float(((a - share * b) ** 2).sum())
            if error < least:
                least, trust, best = error, share, number
                predicted = target - (of_target - share * of_own)
        rest = projected[:, :groups] - trust * projected[:, groups:]
        strength = float(STRENGTHS[best])
        dual = self._vector @ (rest / (self._value + strength * n)[:, None]) / self._scale
        learnt = (self._points.T @ dual.astype(np.float32)).T
        intercept = mean[:groups] - trust * mean[groups:] - learnt.astype(np.float64) @ self._centre
        return LinearRouter(learnt + np.float32(trust) * local, intercept), predicted
