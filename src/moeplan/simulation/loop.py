"""The event loop: requests come, a policy sends them, instances run them, ends free their places."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moeplan.arrays import FloatArray
from moeplan.gateway.fleet import Request
from moeplan.gateway.policies import Policy, Waiting
from moeplan.simulation.engine import Engine, Events
from moeplan.simulation.stream import Stream

__all__ = ["WARM_UP", "serve"]

#: Share of the requests that fill the instances first and are not measured.
WARM_UP = 0.1


class _Run:
    """One run's state: who has come, who waits, and the sums when the measured span began and ended."""

    def __init__(self, stream: Stream, engine: Engine, policy: Policy, requests: Sequence[Request]) -> None:
        self.stream, self.engine, self.policy, self.requests = stream, engine, policy, requests
        self.group, self.arrived = np.full(len(stream), -1, np.int64), np.full(len(stream), np.nan)
        self.waiting: list[Waiting] = []
        self.coming = 0
        self.marks: list[tuple[float, FloatArray]] = []

    def arrive(self, now: float) -> None:
        """The next request of the stream: sent at once, or put behind those that wait."""
        r, n = self.coming, len(self.stream)
        if r in (int(WARM_UP * n), n - 1):
            self.marks.append((now, self.engine.lanes.sums.copy()))
        self.coming, self.arrived[r] = r + 1, now
        group = None if self.waiting else self.policy.choose(self.requests[r], now)
        if group is None:
            self.waiting.append(Waiting(self.requests[r], len(self.waiting)))
        else:
            self.send(r, group, now)

    def send(self, r: int, group: int, now: float) -> None:
        self.group[r] = group
        self.engine.submit(r, group, now)

    def drain(self, now: float) -> None:
        """Send waiting requests while a group is free."""
        while self.waiting and (found := self.policy.pick_next(self.waiting, now)) is not None:
            index, group = found
            r = self.waiting.pop(index).request.id
            assert isinstance(r, int)
            self.send(r, group, now)


def serve(stream: Stream, engine: Engine, policy: Policy, requests: Sequence[Request]) -> Events:
    """Run a stream to its end.

    Args:
        requests: what the policy is told of the stream's requests, in order; the id of each is its number there.
    """
    run, n = _Run(stream, engine, policy, requests), len(stream)
    for _ in range(min(stream.concurrency, n)):
        run.arrive(0.0)
    while True:
        following = stream.time[run.coming] if run.coming < n and not stream.concurrency else math.inf
        now, started, ended = engine.advance(float(following))
        for r in started:
            policy.first_token(r, now)
        if not ended and not started:
            if following == math.inf:
                break
            run.arrive(now)
            continue
        for r in ended:
            policy.finish(r, now)
        run.drain(now)
        if stream.concurrency:
            for _ in range(min(len(ended), n - run.coming)):
                run.arrive(now)
    (start, before), (stop, after) = run.marks
    work = engine.work
    return Events(
        run.group, run.arrived, work.joined, work.first, work.end, work.preempted, after - before, stop - start
    )
