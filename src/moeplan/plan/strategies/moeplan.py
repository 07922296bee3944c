"""`moeplan`: groups, placement and spare copies planned together, for requests not yet seen (docs/strategies.md).

Alternate, from several starts: given the groups, each layer's slots are improved by swaps and replacements, at a price
on uneven load; given the placement, a regression foretells from each fit request's signature, with that request left
out, what it would keep at home in each group, and the groups are the exact equal assignment of these. So the plan is
made for what its own router will do, not for what an oracle could. Then the price of unevenness rises until steps
replayed on the fit requests keep the guard.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplan._kernels import placing
from moeplan.cluster import Cluster, Dispatch, Home, ReplicaRule, routes
from moeplan.plan.assignment import equal_groups
from moeplan.plan.foresight import Foresight
from moeplan.plan.guard import Steps
from moeplan.plan.packing import slots_from_nodes
from moeplan.plan.problem import Decision, Problem, Strategy
from moeplan.plan.router import LinearRouter, normalised
from moeplan.plan.strategies.affinity import affinity
from moeplan.plan.strategies.linear import linear
from moeplan.plan.strategies.paper import in_span, kmeans, place_by_use
from moeplan.types import Int32Array, Placement

__all__ = ["soft_groups"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Prices = tuple[float, float]  # of uneven nodes and of uneven GPUs

STARTS, TRIAL, ROUNDS, SWEEPS = 4, 3, 8, 30  # rounds of each start, and of the best of them
PRICE, DEARER, RAISES = 0.02, 2.0, 8  # of uneven nodes: the first price, and how it rises while the guard is broken
PRICE_GPU = 0.2  # of uneven GPUs, where a node has several
HALVINGS = 3  # of the last rise of the price
STEP = 0.5  # of a round towards the slopes of load that it found
MARGIN = 0.99  # of the guard, since unseen requests will not load nodes quite as the fit requests do
SOFTNESS = 0.3  # of memberships, in standard deviations of the score
MOST_CLUSTERED = 1000  # requests that K-means looks at for a start
NEAR = 0.1  # of a message between nodes: what one inside a node costs (links of 50 against 450 GB/s)
MOST_ROWS = 8192  # token rows that the search looks at in modes other than `pick`
_BY = {Dispatch.NODE: placing.BY_NODE, Dispatch.GPU: placing.BY_GPU}


@dataclass
class _State:
    """One start: who decodes where, and which slot holds what."""

    group: Int64Array  # [n]
    score: FloatArray  # [n, D], what `group` was assigned by
    slots: Int64Array  # [L, S]; empty before the first placement
    router: LinearRouter | None = None
    dear: npt.NDArray[np.float32] | None = None  # [D, L * E], what the load of a pick costs, in messages
    value: float = -np.inf  # picks found at home, as a share of all, less the price of their load


class _Planner:
    """What stays the same while a plan is made."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.cluster, self.seed = problem, problem.cluster, seed
        self.flat = problem.use.reshape(len(problem.use), -1).astype(np.float32)
        self.picks = np.maximum(self.flat.sum(axis=1, dtype=np.float64), 1.0)
        self.node = self.cluster.home_node(np.arange(self.cluster.num_groups))
        self.room = problem.num_slots // self.cluster.nodes
        self.nearest = problem.rule is not ReplicaRule.HASH
        self.foresight = Foresight(problem.signature, seed)
        others = np.ones(len(self.flat), np.bool_)
        others[self.foresight.chosen] = False
        self.others = np.flatnonzero(others)
        self.by = placing.BY_PICK

    def by_token(self) -> None:
        """From now on messages are counted as the dispatch mode does, on a sample of token rows."""
        self.by = _BY[self.problem.dispatch]
        stream, rng = self.problem.stream, np.random.default_rng([self.seed, 0x50])
        length = stream.stops - stream.starts
        at = np.sort(rng.choice(int(length.sum()), min(MOST_ROWS, int(length.sum())), replace=False))
        end = np.cumsum(length)
        self.request = np.searchsorted(end, at, side="right")
        row = stream.starts[self.request] + at - (end - length)[self.request]
        picked = stream.experts[row]
        self.rows = [np.ascontiguousarray(picked[:, i]) for i in range(picked.shape[1])]
        self.draw = rng.random(len(row))

    def starts(self) -> list[_State]:
        """Groups around the centres of K-means of what requests used, from several seeds."""
        rng = np.random.default_rng([self.seed, 0x3A])
        n, groups = len(self.flat), self.cluster.num_groups
        some = np.arange(n) if n <= MOST_CLUSTERED else rng.choice(n, MOST_CLUSTERED, replace=False)
        points = normalised(self.problem.use)
        spanned = in_span(points[some])
        states = []
        for _ in range(STARTS):
            label = kmeans(spanned, min(groups, len(some)), int(rng.integers(1 << 31)))
            centres = np.stack([points[some[label == k % (label.max() + 1)]].mean(axis=0) for k in range(groups)])
            score = (points @ centres.T).astype(np.float64)
            states.append(_State(equal_groups(score), score, np.zeros((0, 0), np.int64)))
        return states

    def alternate(self, state: _State, prices: Prices, rounds: int, start: Int32Array | None = None) -> _State:
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

    def place(self, state: _State, prices: Prices, start: Int32Array | None = None) -> FloatArray:
        """Improve the slots for the groups as they are; returns the use [L, N, E] that it was done for.

        A layer that ends better from `start` is taken from there.
        """
        member = soft_groups(state.score, SOFTNESS)
        by_group = self.use_by_group(member)  # [D, L, E]
        use = self.by_node(by_group)
        if not state.slots.size:
            held = place_by_use(use, self.room)
            load = np.take_along_axis(use, held, axis=2)
            state.slots = slots_from_nodes(held, load, self.cluster.gpus_per_node).astype(np.int64)
        near = None
        if self.cluster.home is Home.GPU and self.cluster.gpus_per_node > 1:
            near = np.ascontiguousarray(NEAR * by_group.transpose(1, 0, 2))
            near /= np.maximum(use.sum(axis=(1, 2)), 1e-12)[:, None, None]
        rows = None
        if self.by != placing.BY_PICK:
            home = self.node[(np.cumsum(member[self.request], axis=1) < self.draw[:, None]).sum(axis=1)]
            rows = [(of, home) for of in self.rows]
        improve = partial(
            placing.improve, use, gpus_per_node=self.cluster.gpus_per_node, price_node=prices[0], price_gpu=prices[1],
            sweeps=SWEEPS, nearest=self.nearest, near=near, rows=rows, by=self.by,
        )  # fmt: skip
        value = improve(slots=state.slots)
        if start is not None:
            other = self.facing(start, use)
            better = improve(slots=other) > value
            state.slots[better] = other[better]
        return use

    def facing(self, slots: Int32Array, use: FloatArray) -> Int64Array:
        """The same experts together, each node's share of them where it is asked for most: [L, S]."""
        out = slots.astype(np.int64)
        nodes = self.cluster.nodes
        for layer, of in zip(out, use, strict=True):
            parts = layer.reshape(nodes, -1).copy()
            part, node = linear_sum_assignment(of[:, parts].sum(axis=2).T, maximize=True)
            layer.reshape(nodes, -1)[node] = parts[part]
        return out

    def by_node(self, by_group: FloatArray) -> FloatArray:
        """float64 [L, N, E] from [D, L, E]."""
        use = np.zeros((self.cluster.nodes, *by_group.shape[1:]))
        np.add.at(use, self.node, by_group)
        return np.ascontiguousarray(use.transpose(1, 0, 2))

    def use_by_group(self, member: FloatArray) -> FloatArray:
        """float64 [D, L, E]: expected picks of each expert by the requests of each group."""
        by_group = (member.astype(np.float32).T @ self.flat).astype(np.float64)
        return by_group.reshape(-1, self.problem.shape.num_layers, self.problem.shape.num_experts)

    def assign(self, state: _State, use: FloatArray, prices: Prices) -> None:
        """Equal groups by what the router foretells; a request's own decode has no say in its own forecast."""
        served = _Served(self.cluster, state.slots, self.problem.shape.num_experts, self.nearest)
        kept = served.kept[self.node]
        if self.cluster.home is Home.GPU and self.nearest:
            kept = kept + NEAR * served.on.transpose(1, 0, 2)
        kept = kept.reshape(len(self.node), -1).astype(np.float32)
        share = (self.flat @ kept.T) / self.picks[:, None]
        if self.by != placing.BY_PICK:
            sent = placing.messages(
                state.slots, self.cluster.nodes, self.cluster.gpus_per_node, self.problem.shape.num_experts,
                nearest=self.nearest, rows=self.rows, request=self.request, requests=len(share), by=self.by,
            )  # fmt: skip
            seen = np.bincount(self.request, minlength=len(share))[:, None] * self.problem.shape.num_layers
            share = (1.0 - sent / np.maximum(seen * self.problem.shape.top_k, 1))[:, self.node]
        # Load enters by its slope, and the slope by little steps, or all who are alike would move at once.
        dear = served.slope(use, prices)[self.node].reshape(len(self.node), -1).astype(np.float32)
        state.dear = dear if state.dear is None else state.dear + np.float32(STEP) * (dear - state.dear)
        target = share - (self.flat @ state.dear.T) / self.picks[:, None]
        state.router, foretold = self.foresight.fit(target[self.foresight.chosen], kept - state.dear)
        state.score = np.empty(share.shape)
        state.score[self.foresight.chosen] = foretold
        if len(self.others):
            state.score[self.others] = state.router.scores(self.problem.signature[self.others])
        state.group = equal_groups(state.score)
        found = share[np.arange(len(share)), state.group]
        member = np.zeros(share.shape)
        member[np.arange(len(share)), state.group] = 1.0
        uneven = served.uneven(self.by_node(self.use_by_group(member)))
        state.value = float((found * self.picks).sum() / self.picks.sum() - np.dot(prices, uneven))


class _Served:
    """Who serves what in a placement, by the expectation of the replica rule.

    Attributes:
        on: float64 [L, P, E], 1 where a GPU holds an expert; kept: [N, L, E], share of a node's picks served there.
    """

    def __init__(self, cluster: Cluster, slots: Int64Array, experts: int, nearest: bool) -> None:
        layers, gpus = len(slots), cluster.num_gpus
        self.cluster = cluster
        self.on = np.zeros((layers, gpus, experts))
        gpu = np.repeat(np.arange(gpus), slots.shape[1] // gpus)
        self.on[np.arange(layers)[:, None], gpu[None], slots] = 1.0
        at = self.on.reshape(layers, cluster.nodes, -1, experts).sum(axis=2)
        self.copies = at.sum(axis=1)
        self.near = (at > 0) & nearest  # [L, N, E], a node whose own copy serves all it asks for
        self.kept = np.where(self.near, 1.0, at / self.copies[:, None]).transpose(1, 0, 2)

    def loads(self, use: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[L, N] and [L, P], the picks that nodes and GPUs serve of use [L, N, E]."""
        shared = (use * ~self.near).sum(axis=1) / self.copies
        own = np.where(self.near, use, 0.0).repeat(self.cluster.gpus_per_node, axis=1)
        by_gpu = (self.on * (own + shared[:, None])).sum(axis=2)
        return by_gpu.reshape(*use.shape[:2], -1).sum(axis=2), by_gpu

    def uneven(self, use: FloatArray) -> list[float]:
        """Unevenness of nodes and of GPUs, mean over layers."""
        return [float(_norm(load).mean()) for load in self.loads(use)]

    def slope(self, use: FloatArray, prices: Prices) -> FloatArray:
        """[N, L, E]: what one more pick of an expert, asked at a node, adds to the price of load, in messages."""
        by_node, by_gpu = self.loads(use)
        steep = prices[1] * _steep(by_gpu) + prices[0] * _steep(by_node).repeat(self.cluster.gpus_per_node, axis=1)
        paid = self.on * steep[:, :, None]
        own = paid.reshape(*use.shape[:2], -1, use.shape[2]).sum(axis=2)
        anyone = (paid.sum(axis=1) / self.copies)[:, None]
        return np.asarray(np.where(self.near, own, anyone).transpose(1, 0, 2))


def _norm(load: FloatArray) -> FloatArray:
    """The 16-norm of load / mean over the last axis, as `placing` has it."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio**16).mean(axis=-1) ** (1 / 16))


def _steep(load: FloatArray) -> FloatArray:
    """Its slope, times the picks of the layer."""
    ratio = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-12)
    return np.asarray((ratio / np.maximum(_norm(load), 1e-12)[..., None]) ** 15)


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


def moeplan(problem: Problem, seed: int) -> Decision:
    """The best of several starts, held to the guard."""
    cluster, shape = problem.cluster, problem.shape
    planner = _Planner(problem, seed)
    if planner.room >= shape.num_experts:  # every node holds every expert: nothing crosses, copies go to the busiest
        use = np.repeat(problem.load[:, None, :], cluster.nodes, axis=1)
        held = place_by_use(use, planner.room, cluster.gpus_per_node)
        load = np.take_along_axis(use, held, axis=2)
        return Decision(slots_from_nodes(held, load, cluster.gpus_per_node))
    at_gpu = PRICE_GPU if cluster.gpus_per_node > 1 else 0.0
    prices = (PRICE, at_gpu)
    tried = [planner.alternate(state, prices, TRIAL) for state in planner.starts()]
    best = planner.alternate(max(tried, key=lambda state: state.value), prices, ROUNDS)
    if not len(problem.stream.experts):
        note = "moeplan: sums of requests have no rows to replay; the guard on node load was not checked"
        return Decision(best.slots.astype(np.int32), best.router, (note,))
    if problem.dispatch in _BY:
        planner.by_token()
        best.value = -np.inf
        best = planner.alternate(best, prices, 2, affinity(problem, seed).slots)
    best, notes = _guarded(planner, best, prices)
    return Decision(best.slots.astype(np.int32), best.router, notes)


def _guarded(planner: _Planner, state: _State, prices: Prices) -> tuple[_State, tuple[str, ...]]:
    """The least price of uneven nodes at which steps of the fit requests keep the guard, and the plan that it gives."""
    problem, seed = planner.problem, planner.seed
    if np.isinf(problem.options.guard):
        return state, ()
    steps = Steps(problem, seed)
    allowed = MARGIN * problem.options.guard
    allowed *= _steps_of(problem, linear(problem, seed).slots, steps, steps.random_groups)

    def keeps(state: _State) -> bool:
        return _steps_of(problem, state.slots.astype(np.int32), steps, state.group) <= allowed

    def at(state: _State, price: float) -> _State:
        fresh = dataclasses.replace(state, slots=state.slots.copy(), value=-np.inf)
        return planner.alternate(fresh, (price, prices[1]), 2)

    price = low = prices[0]
    kept = keeps(state)
    loose = state
    for _ in range(RAISES):
        if kept:
            break
        loose, low, price = state, price, price * DEARER
        state = at(state, price)
        kept = keeps(state)
    if not kept:
        return state, ("moeplan: the guard on node load could not be kept on the fit requests",)
    for _ in range(HALVINGS if price > low else 0):
        middle = float(np.sqrt(low * price))
        tried = at(loose, middle)
        if keeps(tried):
            state, price = tried, middle
        else:
            loose, low = tried, middle
    return state, (f"moeplan: price of uneven load {price:.3g}",)


def _steps_of(problem: Problem, slots: Int32Array, steps: Steps, group: Int64Array) -> float:
    cluster = problem.cluster
    placement = Placement(slots, problem.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
    return steps.node_load_ratio(routes(placement, cluster, problem.rule), group)


STRATEGIES = {"moeplan": Strategy(moeplan, routed=True)}
