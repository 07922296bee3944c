"""`moeplan`: groups, placement and spare copies planned together, for requests not yet seen (docs/strategies.md).

Alternate, from several starts: given the groups, each layer's placement is improved by swaps and replacements, at a
price on uneven load; given the placement, a regression foretells each fit request's home share from its signature with
that request left out, and the groups are the exact equal assignment of these. So the plan is made for what its own
router will do, not for what an oracle could. Then the price of unevenness rises until steps replayed on the fit
requests keep the guard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan._kernels.holding import improve
from moeplan.cluster import routes
from moeplan.plan.assignment import equal_groups
from moeplan.plan.foresight import Foresight
from moeplan.plan.guard import Steps
from moeplan.plan.packing import slots_from_nodes
from moeplan.plan.problem import Decision, Problem, Strategy
from moeplan.plan.router import LinearRouter, normalised
from moeplan.plan.strategies.linear import linear
from moeplan.plan.strategies.paper import in_span, kmeans, place_by_use
from moeplan.types import Int32Array, Placement

__all__ = ["soft_groups"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

STARTS, ROUNDS, SWEEPS = 4, 10, 30
PRICE, DEARER, RAISES = 0.02, 2.0, 6  # of unevenness: the first price, and how it rises while the guard is broken
MARGIN = 0.99  # of the guard, since unseen requests will not load nodes quite as the fit requests do
SOFTNESS = 0.3  # of memberships, in standard deviations of the score
MOST_CLUSTERED = 1000  # requests that K-means looks at for a start


@dataclass
class _State:
    """One start: who decodes where, and which node holds what."""

    group: Int64Array  # [n]
    score: FloatArray  # [n, D], what `group` was assigned by
    held: BoolArray | None = None  # [L, N, E]
    router: LinearRouter | None = None
    value: float = 0.0  # share of all picks foretold to be served at home


class _Planner:
    """What stays the same while a plan is made."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.cluster, self.seed = problem, problem.cluster, seed
        self.flat = problem.use.reshape(len(problem.use), -1).astype(np.float32)
        self.picks = np.maximum(self.flat.sum(axis=1, dtype=np.float64), 1.0)
        self.node = self.cluster.home_node(np.arange(self.cluster.num_groups))
        self.room = problem.num_slots // self.cluster.nodes
        self.foresight = Foresight(problem.signature, seed)
        others = np.ones(len(self.flat), np.bool_)
        others[self.foresight.chosen] = False
        self.others = np.flatnonzero(others)

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
            states.append(_State(equal_groups(score), score))
        return states

    def alternate(self, state: _State, price: float, rounds: int) -> None:
        """Placement for the groups, groups for the placement, until neither changes."""
        for _ in range(rounds):
            self.place(state, price)
            before = state.group
            self.assign(state)
            if (before == state.group).all():
                break
        self.place(state, price)
        self.assign(state)

    def place(self, state: _State, price: float) -> None:
        use = self.use_by_node(state)
        if state.held is None:
            state.held = np.zeros(use.shape, np.bool_)
            np.put_along_axis(state.held, place_by_use(use, self.room), True, axis=2)
        improve(use, state.held, price, SWEEPS)

    def use_by_node(self, state: _State) -> FloatArray:
        """float64 [L, N, E]: expected picks of each expert by the requests at each node."""
        by_group = soft_groups(state.score, SOFTNESS).astype(np.float32).T @ self.flat
        shape = self.problem.shape
        by_node = np.zeros((self.cluster.nodes, shape.num_layers, shape.num_experts))
        np.add.at(by_node, self.node, by_group.reshape(len(by_group), shape.num_layers, shape.num_experts))
        return np.ascontiguousarray(by_node.transpose(1, 0, 2))

    def assign(self, state: _State) -> None:
        """Equal groups by what the router foretells; a request's own decode has no say in its own forecast."""
        assert state.held is not None
        home = state.held.transpose(1, 0, 2).reshape(self.cluster.nodes, -1).astype(np.float32)
        share = ((self.flat @ home.T) / self.picks[:, None])[:, self.node]
        state.router, foretold = self.foresight.fit(share[self.foresight.chosen], home[self.node])
        state.score = np.empty(share.shape)
        state.score[self.foresight.chosen] = foretold
        if len(self.others):
            state.score[self.others] = state.router.scores(self.problem.signature[self.others])
        state.group = equal_groups(state.score)
        at_home = share[np.arange(len(share)), state.group]
        state.value = float((at_home * self.picks).sum() / self.picks.sum())

    def slots(self, state: _State) -> Int32Array:
        """Experts of each node dealt to its GPUs by load: its own requests', and a share of those without a copy."""
        assert state.held is not None
        use, held = self.use_by_node(state), state.held
        experts = np.nonzero(held)[2].reshape(len(held), self.cluster.nodes, self.room)
        shared = (use * ~held).sum(axis=1, keepdims=True) / held.sum(axis=1, keepdims=True)
        load = np.take_along_axis(use + shared, experts, axis=2)
        return slots_from_nodes(experts, load, self.cluster.gpus_per_node)


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
    states = planner.starts()
    for state in states:
        planner.alternate(state, PRICE, ROUNDS)
    best = max(states, key=lambda state: state.value)
    if not len(problem.stream.experts):
        note = "moeplan: sums of requests have no rows to replay; the guard on node load was not checked"
        return Decision(planner.slots(best), best.router, (note,))

    steps = Steps(problem, seed)
    allowed = (
        MARGIN * problem.options.guard * _steps_of(problem, linear(problem, seed).slots, steps, steps.random_groups)
    )
    price = PRICE
    notes: tuple[str, ...] = ()
    slots = planner.slots(best)
    for _ in range(RAISES):
        if _steps_of(problem, slots, steps, best.group) <= allowed:
            break
        price *= DEARER
        planner.alternate(best, price, 2)
        slots = planner.slots(best)
    else:
        notes = ("moeplan: the guard on node load could not be kept on the fit requests",)
    return Decision(slots, best.router, (*notes, f"moeplan: price of uneven load {price:g}"))


def _steps_of(problem: Problem, slots: Int32Array, steps: Steps, group: Int64Array) -> float:
    cluster = problem.cluster
    placement = Placement(slots, problem.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
    return steps.node_load_ratio(routes(placement, cluster, problem.rule), group)


STRATEGIES = {"moeplan": Strategy(moeplan, routed=True)}
