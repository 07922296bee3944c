"""What a gateway knows of its groups: their live requests, their cache, and the experts that they use.

A group is an independent instance, a node of a wide server, or a data-parallel rank. No clock runs here and nothing is
sent: the caller tells the time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from moeplan._kernels.fleet import enter
from moeplan.arrays import BoolArray, Float32Array, FloatArray, Int64Array
from moeplan.errors import UsageError

__all__ = ["WINDOW", "Fleet", "Request"]

#: Seconds over which a group's load is averaged.
WINDOW = 10.0
#: Largest chance that a request reads an expert: a factor of 1 - chance can be taken out again.
MOST = 0.95
#: Joins and leaves after which a group's products are made anew, against rounding.
REFRESH = 256
#: Weight of a new request in the mean request, at least.
NEWEST = 1 / 512
#: Waiting requests of which it is kept what they would add.
MOST_WAITING = 1024
#: Weight of a new request in its group's profile.
PROFILE = 1 / 24


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of a request before it is sent.

    Attributes:
        id: names it until it ends.
        expected_use: float32 [L, E], the share of a layer's picks that each expert is expected to get (each layer sums
            to 1); None: not known.
        scores: float [groups], how well each group suits it by a plan's router (higher is better); None: not known.
        session, prefix: equal for requests of one session, and for prompts that share a cached prefix; None: neither.
        prompt_tokens, expected_output_tokens: of the cache.
    """

    id: Hashable
    expected_use: Float32Array | None = None
    scores: FloatArray | None = None
    session: Hashable | None = None
    prefix: Hashable | None = None
    prompt_tokens: float = 0.0
    expected_output_tokens: float = 0.0

    @property
    def cache_tokens(self) -> float:
        """Tokens that it holds in a cache, mean over its life."""
        return self.prompt_tokens + self.expected_output_tokens / 2

    @property
    def affinity(self) -> Hashable | None:
        """What earlier requests it goes with: the session, else the prefix."""
        return self.session if self.session is not None else self.prefix


@dataclass(slots=True)
class _Live:
    group: int
    chance: Float32Array | None
    tokens: float
    prompt: bool = True


@dataclass(slots=True)
class _Waiting:
    """What a request would add to each group, float64 [G], and which state of the fleet that is of; -1: none."""

    chance: Float32Array
    added: FloatArray
    version: int


@dataclass
class Fleet:
    """The groups as a gateway sees them.

    A group's `missed` is, for each expert, the chance that no live request reads it in a step: the product of 1 - p
    over its live requests, with p = min(1, picks per token x expected share). What a further request would add to the
    group's distinct experts is then sum(p x missed).

    Attributes:
        groups: how many. top_k: picks per token and layer. slots: requests that a group takes at a time; 0: any number.
        window: seconds of the load averages.
        profile: how many requests the group's profile (the mean use of those it got lately) counts as. It keeps a group
            to one kind of requests while few are live.
        live: int64 [G], requests of each group now. tokens: float64 [G], expected tokens in its cache.
        prompts: int64 [G], live requests whose first token has not come.
        open: bool [G], whether the group takes requests (a worker may drain, or fail).

    Examples:
        >>> fleet = Fleet(2, top_k=1)
        >>> use = np.array([[1.0, 0.0]], np.float32)
        >>> fleet.join(Request("a", use), 0, now=0.0)
        >>> fleet.added(Request("b", use)).round(2)
        array([0.05, 0.95])
    """

    groups: int
    top_k: int = 1
    slots: int = 0
    window: float = WINDOW
    profile: float = 1.0
    live: Int64Array = field(init=False)
    tokens: FloatArray = field(init=False)
    prompts: Int64Array = field(init=False)
    open: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        if self.groups < 1 or self.top_k < 1 or self.slots < 0:
            raise UsageError("a fleet needs at least one group, one pick per token, and slots of 0 or more")
        self.live, self.tokens = np.zeros(self.groups, np.int64), np.zeros(self.groups)
        self.prompts = np.zeros(self.groups, np.int64)
        self.open = np.ones(self.groups, np.bool_)
        self._means, self._time = np.zeros((2, self.groups)), -math.inf
        self._members: dict[Hashable, _Live] = {}
        self._missed: FloatArray | None = None
        self._profile = self._blend = np.zeros((0, 0), np.float32)
        self._mean: Float32Array | None = None
        self._typical = np.zeros(self.groups)
        self._changes = np.zeros(self.groups, np.int64)
        self._waiting: dict[Hashable, _Waiting] = {}
        self._version, self._changed, self._typical_mean = 0, list[int](), 1.0
        self._seen = 0

    @property
    def free(self) -> BoolArray:
        """bool [G]: groups that take one more request."""
        return self.open & (self.live < self.slots) if self.slots else self.open.copy()

    def chance(self, request: Request) -> Float32Array | None:
        """float32 [L * E]: the chance that the request reads each expert in a step."""
        if request.expected_use is None:
            return None
        flat = np.asarray(request.expected_use, np.float32).reshape(-1)
        return np.asarray(np.minimum(flat * np.float32(self.top_k), MOST), np.float32)

    def added(self, request: Request) -> FloatArray:
        """float64 [G]: distinct experts that a request is expected to add to a step of each group, over all layers."""
        chance = self.chance(request)
        if chance is None:
            return np.zeros(self.groups)
        return np.asarray(self._of(chance) @ chance, np.float64)

    def surprise(self, request: Request) -> FloatArray:
        """float64 [G]: distinct experts that a request would add beyond what the mean request adds, as a share.

        Groups with fewer live requests do not look worse for it; 0 where nothing is known. Of a request that waits,
        only groups that changed are looked at again.
        """
        if request.expected_use is None:
            return np.zeros(self.groups)
        found = self._waiting.get(request.id)
        if found is None:
            chance = self.chance(request)
            assert chance is not None
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.clear()
            found = self._waiting[request.id] = _Waiting(chance, np.zeros(self.groups), -1)
        self._of(found.chance)
        if found.version < 0:
            found.added[:] = self._blend @ found.chance
        elif found.version < self._version:  # groups that changed since, each once
            for group in set(self._changed[found.version - self._version :]):
                found.added[group] = self._blend[group] @ found.chance
        found.version = self._version
        return np.asarray((found.added - self._typical) / self._typical_mean, np.float64)

    def loads(self, now: float) -> FloatArray:
        """float64 [2, G]: live requests and cached tokens of each group, mean over about the last `window` seconds."""
        self._pass(now)
        return self._means

    def join(self, request: Request, group: int, now: float) -> None:
        """A request goes to a group.

        Raises:
            UsageError: the id is live already.
        """
        if request.id in self._members:
            raise UsageError(f"request {request.id!r} is live already", hint="give each request its own id")
        self._pass(now)
        waited = self._waiting.pop(request.id, None)
        chance = self.chance(request) if waited is None else waited.chance
        self._members[request.id] = _Live(group, chance, request.cache_tokens)
        self.live[group] += 1
        self.prompts[group] += 1
        self.tokens[group] += request.cache_tokens
        if chance is not None:
            self._enter(chance, group, leaving=False)

    def first_token(self, request_id: Hashable) -> None:
        """A request's first token has come; saying it again changes nothing."""
        member = self._members.get(request_id)
        if member is not None and member.prompt:
            member.prompt = False
            self.prompts[member.group] -= 1

    def leave(self, request_id: Hashable, now: float) -> int:
        """A request has ended, or was given up; the group that it leaves.

        Raises:
            UsageError: no such request is live.
        """
        member = self._members.pop(request_id, None)
        if member is None:
            raise UsageError(f"no request {request_id!r} is live")
        self._pass(now)
        group = member.group
        self.live[group] -= 1
        self.prompts[group] -= member.prompt
        self.tokens[group] = max(self.tokens[group] - member.tokens, 0.0) if self.live[group] else 0.0
        if member.chance is not None:
            self._enter(member.chance, group, leaving=True)
        return group

    def _pass(self, now: float) -> None:
        """Let the load averages decay to the time given."""
        if now > self._time:
            kept = math.exp((self._time - now) / self.window) if self._time > -math.inf else 0.0
            self._means = kept * self._means + (1 - kept) * np.stack([self.live, self.tokens])
            self._time = now

    def _of(self, chance: Float32Array) -> FloatArray:
        """float64 [G, L * E]: `missed`, made when the first use is seen."""
        if self._missed is None:
            self._missed = np.ones((self.groups, chance.shape[-1]))
            self._profile = np.zeros(self._missed.shape, np.float32)
            self._blend = np.ones(self._missed.shape, np.float32)
        return self._missed

    def _enter(self, chance: Float32Array, group: int, *, leaving: bool) -> None:
        """After a join or a leave: the mean request (of all, later of the last few hundred), and the group's arrays."""
        missed = self._of(chance)[group]
        if self._mean is None:
            self._mean = chance.copy()
        self._seen += not leaving
        self._changes[group] += 1
        newest = 0.0 if leaving else max(1 / self._seen, NEWEST)
        weights = newest, 0.0 if leaving else PROFILE, self.profile
        if not self.live[group] or self._changes[group] % REFRESH == 0:  # made anew, against rounding
            missed[:] = 1.0
            for member in self._members.values():
                if member.group == group and member.chance is not None and member.chance is not chance:
                    missed *= 1 - member.chance
            if leaving:  # it is in none of them any more
                chance, leaving = np.zeros_like(chance), False
        enter(chance, leaving, weights, self._mean, missed, self._profile[group], self._blend[group])
        self._typical[group] = float(self._blend[group] @ self._mean)
        self._typical_mean = max(float(self._typical.mean()), 1e-9)
        self._version += 1
        self._changed.append(group)
        if len(self._changed) > 4 * MOST_WAITING:  # who waited that long is scored anew
            del self._changed[:-MOST_WAITING]
            for waiting in self._waiting.values():
                waiting.version = -1
