"""Groups and placement in turn: the planner behind the strategy `moeplan` (docs/method.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplan._kernels import local_search
from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule
from moeplan.planning.assignment import equal_groups
from moeplan.planning.expected_load import ExpectedLoad, Prices
from moeplan.planning.forecast import LocalityForecast
from moeplan.planning.packing import slots_from_nodes
from moeplan.planning.problem import Problem
from moeplan.planning.router import LinearRouter, normalised
from moeplan.planning.strategies.paper import in_span, kmeans, place_by_use
from moeplan.types import Int32Array

__all__ = ["PARTS", "Planner", "State", "place_quickly", "soft_groups"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
#: Slots [L, S] to begin from, for a use [L, N, E].
Start = Callable[[FloatArray], Int64Array]

#: What can be left out (`Options.without`), to see what it is worth.
PARTS = ("forecast", "soft", "joint", "starts", "load-in-groups", "gpus", "guard")

STARTS = 4
SWEEPS = 30  # over all slots of a layer
STEP = 0.5  # of a round towards the slopes of load that it found
SOFTNESS = 0.3  # of memberships, in standard deviations of the score
MOST_CLUSTERED = 1000  # requests that K-means looks at for a start
NEAR = 0.1  # of a message between nodes: what one inside a node costs (links of 50 against 450 GB/s)
MOST_ROWS = 8192  # token rows that the search looks at in modes other than `pick`
BY = {Dispatch.NODE: local_search.BY_NODE, Dispatch.GPU: local_search.BY_GPU}


@dataclass
class State:
    """One start: who decodes where, and which slot holds what."""

    group: Int64Array  # [n]
    score: FloatArray  # [n, D], what `group` was assigned by
    slots: Int64Array  # [L, S]; empty before the first placement
    router: LinearRouter | None = None
    load_penalty: npt.NDArray[np.float32] | None = None  # [D, L * E], what the load of a pick costs, in messages
    value: float = -np.inf  # picks found at home, as a share of all, less the price of their load

    def afresh(self) -> State:
        """The same, to go on from at other prices: values at different prices do not compare."""
        return dataclasses.replace(self, slots=self.slots.copy(), value=-np.inf)


class Planner:
    """What stays the same while a plan is made."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.cluster, self.seed = problem, problem.cluster, seed
        self.flat = problem.use.reshape(len(problem.use), -1).astype(np.float32)
        self.picks = np.maximum(self.flat.sum(axis=1, dtype=np.float64), 1.0)
        self.node = self.cluster.group_node(np.arange(self.cluster.num_groups))
        self.room = problem.num_slots // self.cluster.nodes
        self.nearest = problem.rule is not ReplicaRule.HASH
        self.foresight = LocalityForecast(problem.signature)
        self.by, self.credit = local_search.BY_PICK, 1.0
        self.without = problem.options.without

    def rounds(self, count: int) -> int:
        return 1 if "joint" in self.without else count

    def by_token(self) -> None:
        """From now on messages are counted as the dispatch mode does, on a sample of token rows."""
        self.by = BY[self.problem.dispatch]
        stream, rng = self.problem.stream, np.random.default_rng([self.seed, 0x50])
        length = stream.stops - stream.starts
        at = np.sort(rng.choice(int(length.sum()), min(MOST_ROWS, int(length.sum())), replace=False))
        end = np.cumsum(length)
        self.request = np.searchsorted(end, at, side="right")
        row = stream.starts[self.request] + at - (end - length)[self.request]
        picked = stream.experts[row]
        self.rows = [np.ascontiguousarray(picked[:, i]) for i in range(picked.shape[1])]
        self.draw = rng.random(len(row))

    def starts(self) -> list[State]:
        """Groups around the centres of K-means of what requests used, from several seeds."""
        rng = np.random.default_rng([self.seed, 0x3A])
        n, groups = len(self.flat), self.cluster.num_groups
        some = np.arange(n) if n <= MOST_CLUSTERED else rng.choice(n, MOST_CLUSTERED, replace=False)
        points = normalised(self.problem.use)
        spanned = in_span(points[some])
        states = []
        for _ in range(1 if "starts" in self.without else STARTS):
            label = kmeans(spanned, min(groups, len(some)), int(rng.integers(1 << 31)))
            centres = np.stack([points[some[label == k % (label.max() + 1)]].mean(axis=0) for k in range(groups)])
            score = (points @ centres.T).astype(np.float64)
            states.append(State(equal_groups(score), score, np.zeros((0, 0), np.int64)))
        return states

    def again(self, slots: Int32Array) -> State:
        """The groups that an older placement's router would make today."""
        n, groups = len(self.flat), self.cluster.num_groups
        state = State(np.arange(n) % groups, np.zeros((n, groups)), slots.astype(np.int64))
        use = self.by_node(self.use_by_group(self.members(state)))
        self.assign(state, use, (0.0, 0.0))
        return state.afresh()

    def alternate(self, state: State, prices: Prices, rounds: int, start: Start | None = None) -> State:
        """Placement for the groups, groups for the placement, until neither changes; the best state on the way."""
        best = state
        for turn in range(rounds):
            use = self.place(state, prices, start if turn == 0 else None)
            before = state.group
            self.assign(state, use, prices)
            if best is state or state.value > best.value:
                best = dataclasses.replace(state, slots=state.slots.copy())
            if (before == state.group).all():
                break
        return best

    def place(self, state: State, prices: Prices, start: Start | None = None) -> FloatArray:
        """Improve the slots for the groups as they are; returns the use [L, N, E] that it was done for.

        A layer that ends better from `start`, slots [L, S] for that use, is taken from there.
        """
        member = self.members(state)
        by_group = self.use_by_group(member)  # [D, L, E]
        use = self.by_node(by_group)
        if not state.slots.size:
            state.slots = place_quickly(use, self.room, self.cluster.gpus_per_node, prices[0])
        near = None
        if self.cluster.deployment is Deployment.GPUS and self.cluster.gpus_per_node > 1:
            near = np.ascontiguousarray(NEAR * by_group.transpose(1, 0, 2))
            near /= np.maximum(use.sum(axis=(1, 2)), 1e-12)[:, None, None]
        rows = None
        if self.by != local_search.BY_PICK:
            home = self.node[(np.cumsum(member[self.request], axis=1) < self.draw[:, None]).sum(axis=1)]
            rows = [(of, home) for of in self.rows]
        budget = -1
        if self.problem.old is not None:  # moves are counted from the old plan, so each round begins there
            state.slots, budget = self.problem.old.astype(np.int64), self.problem.options.max_moves
        improve = partial(
            local_search.improve, use, gpus_per_node=self.cluster.gpus_per_node, price_node=prices[0],
            price_gpu=prices[1],
            sweeps=max(SWEEPS, budget), nearest=self.nearest, near=near, rows=rows, by=self.by, credit=self.credit,
            budget=budget,
        )  # fmt: skip
        value = improve(slots=state.slots)
        if start is not None:
            other = start(use)
            better = improve(slots=other) > value
            state.slots[better] = other[better]
        return use

    def members(self, state: State) -> FloatArray:
        """float64 [n, D], how much each request counts for each group."""
        if "soft" in self.without:
            return np.asarray(np.eye(self.cluster.num_groups)[state.group])
        return soft_groups(state.score, SOFTNESS)

    def facing(self, slots: Int32Array, use: FloatArray) -> Int64Array:
        """The same experts together, each node's share of them where it is asked for most: [L, S]."""
        out = slots.astype(np.int64)
        nodes = self.cluster.nodes
        for layer, of in zip(out, use, strict=True):
            parts = layer.reshape(nodes, -1).copy()
            part, node = linear_sum_assignment(of[:, parts].sum(axis=2).T, maximize=True)
            layer.reshape(nodes, -1)[node] = parts[part]
        return out

    def in_blocks(self, use: FloatArray) -> Int64Array:
        """Slots [L, S]: each node holds the groups of the model's own router it asks for most, and copies it asks for.

        A router that chooses groups before experts (DeepSeek-V3: 4 of 8) then reaches few nodes by itself.
        """
        layers, nodes, experts = use.shape
        held = np.empty((layers, nodes, self.room), np.int64)
        block = np.arange(experts).reshape(nodes, -1)
        for of, into in zip(use, held, strict=True):
            asked = of.copy()
            part, node = linear_sum_assignment(of.reshape(nodes, nodes, -1).sum(axis=2).T, maximize=True)
            into[node, : block.shape[1]] = block[part]
            np.put_along_axis(asked, into[:, : block.shape[1]], -1.0, axis=1)
            into[:, block.shape[1] :] = np.argsort(-asked, axis=1, kind="stable")[:, : self.room - block.shape[1]]
        return on_gpus(held, use, self.cluster.gpus_per_node)

    def by_node(self, by_group: FloatArray) -> FloatArray:
        """float64 [L, N, E] from [D, L, E]."""
        use = np.zeros((self.cluster.nodes, *by_group.shape[1:]))
        np.add.at(use, self.node, by_group)
        return np.ascontiguousarray(use.transpose(1, 0, 2))

    def use_by_group(self, member: FloatArray) -> FloatArray:
        """float64 [D, L, E]: expected picks of each expert by the requests of each group."""
        by_group = (member.astype(np.float32).T @ self.flat).astype(np.float64)
        return by_group.reshape(-1, self.problem.shape.num_layers, self.problem.shape.num_experts)

    def assign(self, state: State, use: FloatArray, prices: Prices) -> None:
        """Equal groups by what the router foretells; a request's own decode has no say in its own forecast."""
        served = ExpectedLoad(self.cluster, state.slots, self.problem.shape.num_experts, self.nearest)
        kept = served.kept[self.node]
        if self.cluster.deployment is Deployment.GPUS and self.nearest:
            kept = kept + NEAR * served.on.transpose(1, 0, 2)
        kept = kept.reshape(len(self.node), -1).astype(np.float32)
        share = (self.flat @ kept.T) / self.picks[:, None]
        if self.by != local_search.BY_PICK:
            sent = local_search.messages(
                state.slots, self.cluster.nodes, self.cluster.gpus_per_node, self.problem.shape.num_experts,
                nearest=self.nearest, rows=self.rows, request=self.request, requests=len(share), by=self.by,
            )  # fmt: skip
            seen = np.bincount(self.request, minlength=len(share))[:, None] * self.problem.shape.num_layers
            share = (1.0 - sent / np.maximum(seen * self.problem.shape.top_k, 1))[:, self.node]
        # Load enters by its slope, and the slope by little steps, or all who are alike would move at once.
        load_penalty = served.slope(use, prices)[self.node].reshape(len(self.node), -1).astype(np.float32)
        if "load-in-groups" in self.without:
            load_penalty[:] = 0.0
        state.load_penalty = (
            load_penalty
            if state.load_penalty is None
            else state.load_penalty + np.float32(STEP) * (load_penalty - state.load_penalty)
        )
        if "forecast" in self.without:
            state.router = LinearRouter(kept - state.load_penalty, np.zeros(len(kept)))
            state.score = state.router.scores(self.problem.signature)
        else:
            target = share - (self.flat @ state.load_penalty.T) / self.picks[:, None]
            state.router, state.score = self.foresight.fit(target, kept - state.load_penalty)
        state.group = equal_groups(state.score)
        found = share[np.arange(len(share)), state.group]
        member = np.zeros(share.shape)
        member[np.arange(len(share)), state.group] = 1.0
        uneven = served.uneven(self.by_node(self.use_by_group(member)))
        state.value = float((found * self.picks).sum() / self.picks.sum() - np.dot(prices, uneven))


def place_quickly(use: FloatArray, room: int, gpus_per_node: int, price: float) -> Int64Array:
    """Slots [L, S] for the use [L, N, E] of a grouping: nodes by search, GPUs dealt by load.

    What an online balancer has time for: fractions of a second for a whole model. Each node holds `room` experts, one
    copy of an expert at most; a pick without a copy at home is shared by all copies.
    """
    held = place_by_use(use, room)
    slots = held.reshape(len(use), -1).astype(np.int64)
    local_search.improve(use, slots, 1, price, 0.0, SWEEPS)
    return on_gpus(slots.reshape(held.shape), use, gpus_per_node)


def on_gpus(held: Int64Array, use: FloatArray, gpus_per_node: int) -> Int64Array:
    """Slots [L, S] of what nodes hold [L, N, room]: GPUs dealt by load."""
    served = ExpectedLoad(Cluster(use.shape[1], 1), held.reshape(len(held), -1), use.shape[2], True)
    load = np.take_along_axis(served.by_copy(use), held, axis=2)
    return slots_from_nodes(held, load, gpus_per_node).astype(np.int64)


def soft_groups(score: FloatArray, softness: float) -> FloatArray:
    """Memberships [n, D] that fade with the score: each row sums to 1, each column to n / D (Sinkhorn).

    A new request will be like a group's members, not one of them. Counting neighbours in part keeps a placement from
    fitting the few requests that happened to be in each group.
    """
    n, groups = score.shape
    centred = score - score.mean(axis=1, keepdims=True)
    spread = float(centred.std())
    if spread <= 1e-12:
        return np.full((n, groups), 1.0 / groups)
    centred /= spread * softness
    member = np.exp(np.maximum(centred - centred.max(axis=1, keepdims=True), -60.0))
    for _ in range(50):
        member *= (n / groups) / member.sum(axis=0)
        member /= member.sum(axis=1, keepdims=True)
    return np.asarray(member)
