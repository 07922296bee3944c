"""The requests of one simulated run, and when they come."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplan.arrays import FloatArray, Int64Array
from moeplan.errors import UsageError

__all__ = ["ARRIVALS", "Stream", "bursty_gaps", "poisson_gaps", "recorded_times"]

ARRIVALS = ("poisson", "bursty", "recorded", "closed")
#: Of bursty arrivals: squared coefficient of variation of the gaps (a Poisson process has 1).
BURSTINESS = 4.0


@dataclass(frozen=True)
class Stream:
    """Requests in the order in which they come.

    Attributes:
        source: int64 [n], the trace's request that each repeats. time: float64 [n], seconds.
        concurrency: requests that are in the system at a time, each end being followed by the next arrival; then
            `time` is not used. 0: requests come at their times.
        prompt, answer: int64 [n], tokens. row: int64 [n], first decode row of the trace; -1: routing is not known.
    """

    source: Int64Array
    time: FloatArray
    prompt: Int64Array
    answer: Int64Array
    row: Int64Array
    concurrency: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int) -> Stream:
        """Its first requests."""
        arrays = self.prompt[:count], self.answer[:count], self.row[:count]
        return Stream(self.source[:count], self.time[:count], *arrays, self.concurrency)

    def closed(self, concurrency: int) -> Stream:
        """The same requests, so many of them in the system at a time."""
        return replace(self, time=np.zeros(len(self)), concurrency=concurrency)

    def at(self, gaps: FloatArray) -> Stream:
        """The same requests, with these seconds between them."""
        return replace(self, time=np.cumsum(gaps), concurrency=0)


def poisson_gaps(count: int, rate: float, rng: np.random.Generator) -> FloatArray:
    """float64 [count]: seconds between requests that come independently of one another, `rate` per second."""
    return np.asarray(rng.exponential(1 / rate, count), np.float64)


def bursty_gaps(count: int, rate: float, rng: np.random.Generator, burstiness: float = BURSTINESS) -> FloatArray:
    """Gaps of a Gamma distribution: with the same mean, but `burstiness` times the variance of a Poisson process."""
    return np.asarray(rng.gamma(1 / burstiness, burstiness / rate, count), np.float64)


def recorded_times(arrival: FloatArray, rate: float | None = None) -> tuple[Int64Array, FloatArray]:
    """(order, seconds) of recorded arrivals; `rate` stretches them to so many requests per second.

    Raises:
        UsageError: a request without a recorded arrival, or all at one time.
    """
    if np.isnan(arrival).any():
        raise UsageError("the trace does not say when its requests came", hint="use --arrivals poisson or bursty")
    order = np.argsort(arrival, kind="stable")
    time = arrival[order] - arrival.min()
    if rate is not None:
        if time[-1] <= 0:
            raise UsageError("all recorded arrivals are at one time", hint="leave --rate out")
        time = time * ((len(time) - 1) / time[-1] / rate)
    return order, time
