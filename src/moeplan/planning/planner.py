"""Groups and placement in turn: the planner behind the strategy `moeplan` (docs/concepts/method.md).

Names: n fit requests, L layers, E experts, S slots, N nodes, P GPUs, D groups, T sampled token rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from moeplan._kernels.local_search import improve, sampled_messages
from moeplan.arrays import Float32Array, FloatArray, Int32Array, Int64Array
from moeplan.cluster import Deployment, ReplicaRule
from moeplan.errors import UsageError
from moeplan.planning.assignment import equal_groups, in_span, kmeans, soft_groups
from moeplan.planning.expected_load import ExpectedLoad
from moeplan.planning.forecast import LocalityForecast
from moeplan.planning.initial_placement import place_quickly
from moeplan.planning.pricing import Pricing
from moeplan.planning.problem import MoveLimit, PlanningProblem
from moeplan.planning.router import LinearRouter, normalised

__all__ = ["PARTS", "Planner", "SearchSettings", "State"]

#: Slots [L, S] to search from besides the current ones, for a use [L, N, E].
Start = Callable[[FloatArray], Int64Array]

NO_SLOTS = np.zeros((0, 0), np.int64)
#: What can be left out (`without`), to measure what it is worth.
PARTS = ("forecast", "soft", "joint", "starts", "load-in-groups", "gpus", "guard")


@dataclass(frozen=True)
class SearchSettings:
    """How long the planner searches, and how it smooths.

    Attributes:
        starts: groupings to search from, each by K-means with another seed.
        trial_rounds, rounds: rounds of each start, and of the best start.
        sweeps: over all slots of a layer, at most.
        load_step: how far each round moves the load penalty of groups towards the new gradient of the imbalance
            penalty. Small steps, because similar requests would otherwise all change their group at once.
        softness: width of soft group memberships, in standard deviations of the score.
        same_gpu_value: what a pick served on its own GPU is worth, in messages between nodes, when each group is a
            GPU. About the ratio of link speeds, 50 against 450 GB/s.
        max_requests: fit requests that are planned on; the regression's cost grows with their cube.
        max_clustered: requests that K-means looks at for a start.
        max_rows: token rows that messages are counted on, where they are not counted by pick.
    """

    starts: int = 4
    trial_rounds: int = 3
    rounds: int = 8
    sweeps: int = 30
    load_step: float = 0.5
    softness: float = 0.3
    same_gpu_value: float = 0.1
    max_requests: int = 1000
    max_clustered: int = 1000
    max_rows: int = 8192

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"{name} {value} is not positive")


@dataclass(frozen=True)
class State:
    """Groups and a placement, after any round.

    Attributes:
        group: int64 [n]. score: float64 [n, D], what `group` was assigned by.
        slots: int64 [L, S]; empty before the first placement.
        router: predicts the score from a signature; None before the first round.
        load_penalty: float32 [D, L * E], what the load of a pick costs, in messages; None before the first round.
        value: share of picks that stay on their node, less the load penalty.
    """

    group: Int64Array
    score: FloatArray
    slots: Int64Array
    router: LinearRouter | None = None
    load_penalty: Float32Array | None = None
    value: float = -np.inf


class Planner:
    """Alternates between placement and groups. It holds what stays the same while a plan is made.

    Args:
        without: parts to leave out, of `PARTS`. limit: a deployed placement to improve by few moves.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        settings: SearchSettings,
        without: tuple[str, ...],
        limit: MoveLimit | None,
        seed: int,
    ) -> None:
        self.problem, self.settings, self.without, self.limit, self.seed = problem, settings, without, limit, seed
        self.cluster = problem.cluster
        self.slots_per_node = problem.num_slots // self.cluster.nodes
        self.nearest = problem.replica_rule is not ReplicaRule.HASH
        self.group_node = self.cluster.group_node(np.arange(self.cluster.num_groups))
        self.flat = problem.use.reshape(len(problem.use), -1).astype(np.float32)
        self.picks = np.maximum(self.flat.sum(axis=1, dtype=np.float64), 1.0)
        self.forecast = LocalityForecast(problem.signature)

    def starts(self) -> list[State]:
        """Groups around the centres of K-means of what requests used, from several seeds."""
        rng = np.random.default_rng([self.seed, 0x3A])
        n, groups, sample = len(self.flat), self.cluster.num_groups, self.settings.max_clustered
        chosen = np.arange(n) if n <= sample else rng.choice(n, sample, replace=False)
        points = normalised(self.problem.use)
        spanned = in_span(points[chosen])
        states = []
        for _ in range(1 if "starts" in self.without else self.settings.starts):
            label = kmeans(spanned, min(groups, len(chosen)), int(rng.integers(1 << 31)))
            centres = np.stack([points[chosen[label == k % (label.max() + 1)]].mean(axis=0) for k in range(groups)])
            score = (points @ centres.T).astype(np.float64)
            states.append(State(equal_groups(score), score, NO_SLOTS))
        return states

    def from_placement(self, slots: Int32Array) -> State:
        """The groups that a router fitted for the given placement makes."""
        n, groups = len(self.flat), self.cluster.num_groups
        state = State(np.arange(n) % groups, np.zeros((n, groups)), NO_SLOTS)
        use = self.by_node(self.use_by_group(self.members(state)))
        return self.assign(state, slots.astype(np.int64), use, Pricing(0.0, 0.0))

    def alternate(self, state: State, pricing: Pricing, rounds: int, start: Start | None = None) -> State:
        """Placement for the groups, groups for the placement, until the groups stay the same; the best state met."""
        best = state
        for turn in range(rounds):
            slots, use = self.place(state, pricing, start if turn == 0 else None)
            before, state = state, self.assign(state, slots, use, pricing)
            if turn == 0 or state.value > best.value:
                best = state
            if (before.group == state.group).all():
                break
        return best

    def place(self, state: State, pricing: Pricing, start: Start | None = None) -> tuple[Int64Array, FloatArray]:
        """Slots [L, S] improved for the groups as they are, and the use [L, N, E] that it was done for.

        A layer that ends better from `start` is taken from there.
        """
        member = self.members(state)
        by_group = self.use_by_group(member)  # [D, L, E]
        use = self.by_node(by_group)
        if self.limit is not None:  # moves are counted from the deployed placement, so each round begins there
            slots = self.limit.slots.astype(np.int64)
        elif state.slots.size:
            slots = state.slots.copy()
        else:
            slots = place_quickly(
                use, self.slots_per_node, self.cluster.gpus_per_node, pricing.node_penalty, self.settings.sweeps
            )
        search = partial(self._improve, use=use, by_group=by_group, member=member, pricing=pricing)
        value = search(slots)
        if start is not None:
            other = start(use)
            better = search(other) > value
            slots[better] = other[better]
        return slots, use

    def _improve(
        self, slots: Int64Array, use: FloatArray, by_group: FloatArray, member: FloatArray, pricing: Pricing
    ) -> FloatArray:
        """Local search from the slots, which are changed; returns the value of each layer."""
        same_gpu = None
        if self.cluster.deployment is Deployment.GPUS and self.cluster.gpus_per_node > 1:
            same_gpu = np.ascontiguousarray(self.settings.same_gpu_value * by_group.transpose(1, 0, 2))
            same_gpu /= np.maximum(use.sum(axis=(1, 2)), 1e-12)[:, None, None]
        rows = None if pricing.rows is None else pricing.rows.by_layer(member, self.group_node)
        budget = -1 if self.limit is None else self.limit.max_moves
        objective, sweeps = pricing.objective(self.nearest), max(self.settings.sweeps, budget)
        gpus_per_node = self.cluster.gpus_per_node
        return improve(use, slots, gpus_per_node, objective, sweeps, same_gpu=same_gpu, rows=rows, budget=budget)

    def assign(self, state: State, slots: Int64Array, use: FloatArray, pricing: Pricing) -> State:
        """Equal groups by what the router predicts of each request, with that request left out of the fit."""
        load = ExpectedLoad(self.cluster, slots, self.problem.shape.num_experts, self.nearest)
        local = load.local_share[self.group_node]
        if self.cluster.deployment is Deployment.GPUS and self.nearest:
            local = local + self.settings.same_gpu_value * load.on_gpu.transpose(1, 0, 2)
        local = local.reshape(len(self.group_node), -1).astype(np.float32)
        share = self._local_share(slots, local, pricing)
        # Load enters by its slope, so that requests leave a node that is too busy.
        penalty = load.penalty_slope(use, pricing)[self.group_node].reshape(len(local), -1).astype(np.float32)
        if "load-in-groups" in self.without:
            penalty[:] = 0.0
        if state.load_penalty is not None:
            penalty = state.load_penalty + np.float32(self.settings.load_step) * (penalty - state.load_penalty)
        if "forecast" in self.without:
            router = LinearRouter(local - penalty, np.zeros(len(local)))
            score = router.scores(self.problem.signature)
        else:
            target = share - (self.flat @ penalty.T) / self.picks[:, None]
            router, score = self.forecast.fit(target, local - penalty)
        group = equal_groups(score)
        chosen = share[np.arange(len(share)), group]
        member = np.zeros(share.shape)
        member[np.arange(len(share)), group] = 1.0
        imbalance = load.imbalance(self.by_node(self.use_by_group(member)))
        penalties = (pricing.node_penalty, pricing.gpu_penalty)
        value = float((chosen * self.picks).sum() / self.picks.sum() - np.dot(penalties, imbalance))
        return State(group, score, slots, router, penalty, value)

    def _local_share(self, slots: Int64Array, local: Float32Array, pricing: Pricing) -> FloatArray:
        """float64 [n, D], the share of each request's picks that sends no message, in each group."""
        rows = pricing.rows
        if rows is None:
            return np.asarray((self.flat @ local.T) / self.picks[:, None])
        shape = (len(self.flat), self.cluster.nodes, self.problem.shape.num_experts)
        objective = pricing.objective(self.nearest)
        sent = sampled_messages(slots, self.cluster.gpus_per_node, objective, rows.experts, rows.request, shape)
        picks = np.sum([(experts < self.problem.shape.num_experts).sum(axis=1) for experts in rows.experts], axis=0)
        sampled = np.bincount(rows.request, weights=picks, minlength=len(self.flat))[:, None]
        return np.asarray((1.0 - sent / np.maximum(sampled, 1))[:, self.group_node])

    def members(self, state: State) -> FloatArray:
        """float64 [n, D], how much of each request belongs to each group."""
        if "soft" in self.without:
            return np.asarray(np.eye(self.cluster.num_groups)[state.group])
        return soft_groups(state.score, self.settings.softness)

    def use_by_group(self, member: FloatArray) -> FloatArray:
        """float64 [D, L, E]: expected picks of each expert by the requests of each group."""
        by_group = (member.astype(np.float32).T @ self.flat).astype(np.float64)
        return by_group.reshape(-1, self.problem.shape.num_layers, self.problem.shape.num_experts)

    def by_node(self, by_group: FloatArray) -> FloatArray:
        """float64 [L, N, E] from [D, L, E]."""
        use = np.zeros((self.cluster.nodes, *by_group.shape[1:]))
        np.add.at(use, self.group_node, by_group)
        return np.ascontiguousarray(use.transpose(1, 0, 2))
