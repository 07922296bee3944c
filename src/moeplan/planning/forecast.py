"""What a signature foretells: how much of a request's decode each group would serve at home.

A prefill is a noisy sample of what the decode will use. The forecast trusts it in part (the share of the signature's
own picks that a group's node holds) and learns the rest from the fit requests by ridge regression on the signature,
which shrinks what a signature cannot tell to the mean. Trust and strength of the shrinking are those with the least
leave-one-out error, which for ridge regression has a closed form (Golub, Heath and Wahba 1979).
"""

from __future__ import annotations

import numpy as np

from moeplan.arrays import Float32Array, FloatArray, NumberArray
from moeplan.planning.router import LinearRouter, by_layer

__all__ = ["LocalityForecast"]


#: Ridges that are tried, in shares of the signatures' variance.
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
        kept = np.maximum(value, 0.0)[:, None] / (np.maximum(value, 0.0)[:, None] + STRENGTHS * len(gram))
        self._value, self._kept = np.maximum(value, 0.0), kept
        #: [m, strengths], 1 - the weight of each request's own target in its own fit.
        self._free = np.maximum(1.0 - (self._vector**2) @ kept - 1.0 / len(gram), 1e-6)

    def fit(self, target: FloatArray, home: Float32Array) -> tuple[LinearRouter, FloatArray]:
        """The router, and what it foretells of the requests when each is left out.

        Args:
            target: float64 [n, D], the share of each request's decode that each group holds.
            home: float32 [D, L * E], whether a group's node holds the expert.
        """
        n, groups = target.shape
        own = ((self._points + self._centre) @ home.T).astype(np.float64)
        both = np.hstack([target, own])
        mean = both.mean(axis=0)
        inside = self._vector.T @ (both - mean)
        least, trust, best, foretold = np.inf, 0.0, 0, target
        for number in range(len(STRENGTHS)):
            fitted = mean + self._vector @ (self._kept[:, number, None] * inside)
            miss = (both - fitted) / self._free[:, number, None]
            # Only differences between groups decide; the error of target - trust x own is a parabola in the trust.
            missed, spared = miss[:, :groups], miss[:, groups:]
            a, b = (part - part.mean(axis=1, keepdims=True) for part in (missed, spared))
            share = float(np.clip((a * b).sum() / max(float((b * b).sum()), 1e-300), 0.0, 1.0))
            error = float(((a - share * b) ** 2).sum())
            if error < least:
                least, trust, best = error, share, number
                foretold = target - (missed - share * spared)
        rest = inside[:, :groups] - trust * inside[:, groups:]
        strength = float(STRENGTHS[best])
        dual = self._vector @ (rest / (self._value + strength * n)[:, None]) / self._scale
        learnt = (self._points.T @ dual.astype(np.float32)).T
        intercept = mean[:groups] - trust * mean[groups:] - learnt.astype(np.float64) @ self._centre
        return LinearRouter(learnt + np.float32(trust) * home, intercept), foretold
