"""Simulated instances with continuous batching, and what one run of them measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moeplan._kernels.serving import Clock, Lanes, Limits, Work, advance, enqueue
from moeplan.arrays import ExpertArray, FloatArray, Int64Array
from moeplan.simulation.stream import Stream

__all__ = ["Engine", "Events"]


@dataclass(frozen=True)
class Events:
    """What became of each request, arrays [n].

    Attributes:
        group: int64, where it went. arrived, joined, first, end: float64 seconds: it came, its first step began, its
            first and last token came. preempted: int64, how often it lost its cache.
        sums: float64 [G, 6], see `moeplan._kernels.serving.Lanes`; of the measured span, from the end of the warm-up to
            the last arrival, which took `seconds`.
    """

    group: Int64Array
    arrived: FloatArray
    joined: FloatArray
    first: FloatArray
    end: FloatArray
    preempted: Int64Array
    sums: FloatArray
    seconds: float


class Engine:
    """Instances that serve a stream.

    Args:
        experts: unsigned [T, L, k], rows of the trace; None: routing is uniform, as `clock` has it.
        num_experts: E.
    """

    def __init__(
        self, stream: Stream, instances: int, limits: Limits, clock: Clock, experts: ExpertArray | None = None,
        num_experts: int = 1,
    ) -> None:  # fmt: skip
        n, slots = len(stream), limits.slots
        zeros, never = np.zeros(n, np.int64), np.full(n, np.nan)
        self._experts = np.zeros((0, 1, 1), np.uint8) if experts is None else experts
        self._marks = np.full((self._experts.shape[1], num_experts), -1, np.int64)
        self._limits, self._clock = limits, clock
        self.work = Work(
            stream.prompt, stream.answer, stream.row, stream.prompt.copy(), zeros, zeros.copy(), zeros.copy(), never,
            never.copy(), never.copy(),
        )  # fmt: skip
        each = np.zeros((instances, slots), np.int64)
        one = np.zeros(instances, np.int64)
        self.lanes = Lanes(
            each, each.copy(), one, np.zeros((instances, n), np.int64), one.copy(), one.copy(), one.copy(),
            np.full(instances, math.inf), np.zeros(slots + 1, np.int64), np.zeros(slots + 1, np.int64),
            np.zeros((instances, 6)),
        )  # fmt: skip

    def submit(self, request: int, instance: int, now: float) -> None:
        """Give a request to an instance."""
        enqueue(instance, request, now, self.work, self.lanes, self._limits, self._clock, self._experts, self._marks)

    def advance(self, until: float) -> tuple[float, list[int], list[int]]:
        """Run until a step gives first tokens or ends requests: (time, those, these); (until, [], []) without."""
        instance, now = advance(until, self.work, self.lanes, self._limits, self._clock, self._experts, self._marks)
        if instance < 0:
            return now, [], []
        started, ended = self.lanes.started, self.lanes.finished
        return now, started[: started[-1]].tolist(), ended[: ended[-1]].tolist()
