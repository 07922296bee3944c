"""Which group a request goes to: the same code in a gateway and in the simulation.

A policy is seeded, does no input or output, and is told the time. `choose` sends a request to a group, or says that it
must wait; `pick_next` takes a waiting one when a slot is free; `finish` says that one has ended.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from moeplan.arrays import BoolArray, FloatArray
from moeplan.errors import UsageError
from moeplan.gateway.fleet import NEWEST, Fleet, Request

__all__ = [
    "POLICIES", "ExpertPolicy", "ExpertSettings", "LeastLoaded", "Policy", "PowerOfTwo", "PrefixAffinity", "Random",
    "RoundRobin", "Waiting", "make_policy",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a slot. ahead: how many waited when it came."""

    request: Request
    ahead: int = 0


class Policy(Protocol):
    """What a gateway and the simulation ask."""

    name: ClassVar[str]
    fleet: Fleet

    def choose(self, request: Request, now: float) -> int | None:
        """Send a request to a group; None where all are full: then it waits."""
        ...

    def pick_next(self, waiting: Sequence[Waiting], now: float) -> tuple[int, int] | None:
        """(index, group) of a waiting request, oldest first in `waiting`, that is sent now; None where all are full."""
        ...

    def first_token(self, request_id: Hashable, now: float) -> None:
        """A request's first token has come: its prompt is done."""
        ...

    def finish(self, request_id: Hashable, now: float) -> int:
        """A request has ended; the group that it leaves."""
        ...


class _Policy:
    """What all policies share: first come first served, and a group chosen among those that are free."""

    name: ClassVar[str] = ""

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        self.fleet, self._rng = fleet, np.random.default_rng(seed)

    def choose(self, request: Request, now: float) -> int | None:
        free = self.fleet.free
        if not free.any():
            return None
        group = self._group(request, free, now)
        self.fleet.join(request, group, now)
        return group

    def pick_next(self, waiting: Sequence[Waiting], now: float) -> tuple[int, int] | None:
        group = self.choose(waiting[0].request, now) if waiting else None
        return None if group is None else (0, group)

    def first_token(self, request_id: Hashable, now: float) -> None:
        self.fleet.first_token(request_id)

    def finish(self, request_id: Hashable, now: float) -> int:
        return self.fleet.leave(request_id, now)

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        """One of the free groups."""
        raise NotImplementedError

    def _least(self, load: FloatArray, among: BoolArray) -> int:
        """The group of least load, ties at random."""
        least = load[among].min()
        return int(self._rng.choice(np.flatnonzero(among & (load == least))))


class Random(_Policy):
    """Any free group."""

    name = "random"

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        return int(self._rng.choice(np.flatnonzero(free)))


class RoundRobin(_Policy):
    """Groups take turns."""

    name = "round-robin"

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        super().__init__(fleet, seed)
        self._last = -1

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        order = (self._last + 1 + np.arange(self.fleet.groups)) % self.fleet.groups
        self._last = int(order[free[order]][0])
        return self._last


class LeastLoaded(_Policy):
    """The group with the fewest live requests."""

    name = "least-loaded"

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        return self._least(self.fleet.live.astype(np.float64), free)


class PowerOfTwo(_Policy):
    """The less loaded of two groups drawn at random (Mitzenmacher 2001)."""

    name = "power-of-two"

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        groups = np.flatnonzero(free)
        drawn = np.zeros_like(free)
        drawn[self._rng.choice(groups, min(2, len(groups)), replace=False)] = True
        return self._least(self.fleet.live.astype(np.float64), drawn)


class PrefixAffinity(_Policy):
    """The group that its session or prefix hashes to, while that is at most `SPREAD` above the mean; else least loaded.

    Rendezvous hashing: groups that come or go move only their own keys.
    """

    name = "prefix-affinity"
    SPREAD = 1.25

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        load = self.fleet.live.astype(np.float64)
        if request.affinity is not None:
            weights = [zlib.crc32(f"{request.affinity!r}/{group}".encode()) for group in range(self.fleet.groups)]
            home = int(np.argmax(weights))
            if free[home] and load[home] + 1 <= self.SPREAD * (load.mean() + 1):
                return home
        return self._least(load, free)


@dataclass(frozen=True)
class ExpertSettings:
    """How `ExpertPolicy` weighs.

    Attributes:
        load_price: what one more live request than the mean, in shares of the mean, costs: so large a share of distinct
            experts must the more loaded group save.
        score_weight: the same of one unit of a plan's router score (a share of picks that stay on their node).
        band: groups whose cost is within this of the best are as good; the least loaded of them is taken.
        balance: most load of a group, live requests and cached tokens, in multiples of the mean of all groups; both now
            (rounded up to whole requests) and over the fleet's window.
        look_ahead: oldest waiting requests among which a free slot chooses.
        extra_wait: how much longer a request may wait for that: so many later requests may be sent before it, in shares
            of those beyond the first `look_ahead` that waited when it came. In a short queue all are sent in order.
        prefix_weight: what going where its session or prefix went before is worth, as a share of distinct experts.
    """

    load_price: float = 0.4
    score_weight: float = 2.0
    band: float = 0.005
    balance: float = 1.1
    look_ahead: int = 16
    extra_wait: float = 0.16
    prefix_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = self.load_price, self.band, self.extra_wait, self.prefix_weight
        if self.look_ahead < 1 or not self.balance >= 1 or not all(0 <= weight < math.inf for weight in weights):
            raise UsageError("look_ahead and balance must be at least 1, prices and waits at least 0")


class ExpertPolicy(_Policy):
    """The group whose live requests use the experts that the request will use, while that costs no balance.

    A group's cost is the share of distinct experts that the request adds beyond what the mean request would add, less
    what a plan's router says for it, and the price of its load. Groups above `balance` times the mean load are left out
    while another is free, so that the tail does not pay for locality. A request of unknown use goes by load alone.

    When all are full, the first free slot takes the waiting request that it suits best compared with other groups.
    """

    name = "experts"

    def __init__(self, fleet: Fleet, seed: int = 0, settings: ExpertSettings = ExpertSettings()) -> None:
        super().__init__(fleet, seed)
        self.settings = settings
        self._homes: dict[Hashable, int] = {}
        self._passed: dict[Hashable, int] = {}
        self._usual, self._scored = np.zeros(fleet.groups), 0

    def _group(self, request: Request, free: BoolArray, now: float) -> int:
        live = self.fleet.live.astype(np.float64)
        cost = self._misfit([request])[0] + self.settings.load_price * (live - live.mean()) / max(live.mean(), 1.0)
        among = self._balanced(free, now)
        group = self._least(live, among & (cost <= cost[among].min() + self.settings.band))
        if request.scores is not None:  # the mean scores of all, later of the last few hundred
            self._scored += 1
            self._usual += max(1 / self._scored, NEWEST) * (request.scores - self._usual)
        if self.settings.prefix_weight and request.affinity is not None:
            self._homes[request.affinity] = group
        return group

    def _misfit(self, requests: Sequence[Request]) -> FloatArray:
        """float64 [m, G]: how badly each group suits each request, without its load; 0 where nothing is known."""
        fleet, settings = self.fleet, self.settings
        out = np.stack([fleet.surprise(request) for request in requests])
        for cost, request in zip(out, requests, strict=True):
            if request.scores is not None:
                usual = self._usual if self._scored else request.scores
                cost -= settings.score_weight * (request.scores - usual)  # a group that suits all gets no more for it
            home = self._homes.get(request.affinity) if request.affinity is not None else None
            if home is not None:
                cost[home] -= settings.prefix_weight
        return out

    def _balanced(self, free: BoolArray, now: float) -> BoolArray:
        """Free groups whose load is within bounds, now and over the window; all free ones where none is."""
        fleet, most = self.fleet, self.settings.balance
        loads = fleet.loads(now)
        within = (loads <= most * loads.mean(axis=1, keepdims=True) + 1e-9).all(axis=0)
        whole = max(math.ceil(most * (fleet.live.sum() + 1) / fleet.groups), int(fleet.live[free].min()) + 1)
        within &= free & (fleet.live < whole)
        if within.any():  # prompts of one group wait for one another
            within &= fleet.prompts == fleet.prompts[within].min()
        return within if within.any() else free

    def pick_next(self, waiting: Sequence[Waiting], now: float) -> tuple[int, int] | None:
        free = self.fleet.free
        if not waiting or not free.any():
            return None
        seen = self._may_be_first(waiting[: self.settings.look_ahead])
        index = 0
        if len(seen) > 1:
            misfit = self._misfit([item.request for item in seen])
            misfit -= misfit.mean(axis=1, keepdims=True)  # who suits other groups better waits for those
            index = int(np.argmin(misfit[:, free].min(axis=1)))
        for other in seen[:index]:
            self._passed[other.request.id] = self._passed.get(other.request.id, 0) + 1
        self._passed.pop(seen[index].request.id, None)
        group = self.choose(seen[index].request, now)
        assert group is not None
        return index, group

    def _may_be_first(self, seen: Sequence[Waiting]) -> Sequence[Waiting]:
        """Those up to the first that nobody may pass any more."""
        for i, item in enumerate(seen):
            most = self.settings.extra_wait * (item.ahead - self.settings.look_ahead)
            if self._passed.get(item.request.id, 0) >= most:
                return seen[: i + 1]
        return seen


POLICIES: dict[str, type[_Policy]] = {
    policy.name: policy for policy in (Random, RoundRobin, LeastLoaded, PowerOfTwo, PrefixAffinity, ExpertPolicy)
}


def make_policy(name: str, fleet: Fleet, seed: int = 0) -> _Policy:
    """A policy by its name.

    Raises:
        UsageError: no such policy.
    """
    if name not in POLICIES:
        raise UsageError(f'no policy is called "{name[:40]}"', hint=f"use {', '.join(POLICIES)}")
    return POLICIES[name](fleet, seed)
