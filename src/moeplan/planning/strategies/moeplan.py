"""`moeplan`: groups, placement and spare copies planned together, for requests not yet seen (docs/method.md).

Alternate, from several starts: given the groups, each layer's slots are improved by swaps and replacements, at a price
on uneven load; given the placement, a regression foretells from each fit request's signature, with that request left
out, what it would keep at home in each group, and the groups are the exact equal assignment of these. So the plan is
made for what its own router will do, not for what an oracle could. Then the price of uneven nodes rises until steps
replayed on the fit requests keep the guard.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from moeplan._kernels import local_search
from moeplan.cluster import Routes, routes
from moeplan.errors import PlanError, UsageError
from moeplan.planning.expected_load import Prices
from moeplan.planning.guard import StepSampler
from moeplan.planning.packing import slots_from_nodes
from moeplan.planning.planner import BY, PARTS, Planner, Start, State
from moeplan.planning.problem import Decision, Problem, Strategy, Stream
from moeplan.planning.strategies.affinity import affinity
from moeplan.planning.strategies.eplb import eplb
from moeplan.planning.strategies.linear import linear
from moeplan.planning.strategies.paper import place_by_use
from moeplan.types import Int32Array, Placement, has_duplicate_experts

__all__ = ["PARTS"]

MOST = 1000  # fit requests that are planned on: the regression's cost grows with their cube
TRIAL, ROUNDS = 3, 8  # rounds of each start, and of the best of them
#: The first price of uneven nodes, and that of uneven GPUs where a node has several, by objective.
PRICES: dict[str, Prices] = {"bytes": (0.02, 0.2), "both": (0.2, 1.0), "balance": (2.0, 2.0)}
DEARER, RAISES, HALVINGS = (
    2.0,
    8,
    3,
)  # how the first price rises while the guard is broken, and halvings of its last rise
MARGIN = 0.98  # of the guard, since unseen requests load nodes up to a few percent less evenly than the fit requests do


def moeplan(problem: Problem, seed: int) -> Decision:
    """The best of several starts, held to the guard; from an older plan, the best that few moves reach."""
    for part in problem.options.without:
        if part not in PARTS:
            raise UsageError(f"moeplan has no part {part!r} to leave out", hint=f"one of {', '.join(PARTS)}")
    whole = len(problem.use)
    if whole > MOST:
        problem = _sample(problem, seed)
    planner = Planner(problem, seed)
    if planner.room >= problem.shape.num_experts and problem.old is None:
        return _everything_everywhere(problem, planner)
    if problem.options.objective == "time":
        state, notes = _cheapest(planner)
    else:
        state, notes = _plan(planner, PRICES[problem.options.objective])
    if whole > MOST:
        notes = (*notes, f"moeplan: planned on {MOST} of {whole} fit requests, drawn by seed")
    return Decision(state.slots.astype(np.int32), state.router, notes)


def _sample(problem: Problem, seed: int) -> Problem:
    """The same with `MOST` of its requests."""
    chosen = np.sort(np.random.default_rng([seed, 0x5A]).choice(len(problem.use), MOST, replace=False))
    stream = problem.stream
    if len(stream.experts):
        stream = Stream(stream.experts, stream.starts[chosen], stream.stops[chosen])
    return dataclasses.replace(problem, use=problem.use[chosen], signature=problem.signature[chosen], stream=stream)


def _cheapest(planner: Planner) -> tuple[State, tuple[str, ...]]:
    """Of plans at several prices of load, and of `linear` and `eplb` with a router of ours, the one whose steps,
    replayed on the fit requests, cost least. (More copies touched are more weights read: that can cost more than the
    messages that they save.)"""
    problem, cost = planner.problem, planner.problem.options.cost
    if cost is None or not len(problem.stream.experts):
        raise PlanError("--objective time needs token rows to replay", hint="use a trace that is not of sums")
    steps = StepSampler(problem, planner.seed)
    best, least, said, dearest = None, np.inf, [], 0.0
    made: dict[str, Callable[[], tuple[State, tuple[str, ...]]]] = {
        name: partial(_plan, copy.copy(planner), prices) for name, prices in PRICES.items()
    }
    for other in (linear, eplb):
        slots = other(problem, planner.seed).slots
        if problem.old is None and not has_duplicate_experts(slots, problem.cluster.num_gpus).any():
            made[other.__name__] = partial(_routed, planner, slots)
    for name, make in made.items():
        plan = make()
        ms = steps.mean_cost(_routes(problem, plan[0].slots.astype(np.int32)), plan[0].group, cost)
        said.append(f"{name} {ms:.3f}")
        dearest = max(dearest, ms)
        if ms < least:
            best, least, won = plan, ms, name
    assert best is not None
    alike = ", though all cost the same" if dearest <= 1.001 * least else ""
    return best[0], (*best[1], f"moeplan: ms a step on the fit requests, {', '.join(said)}: {won} it is{alike}")


def _routed(planner: Planner, slots: Int32Array) -> tuple[State, tuple[str, ...]]:
    return planner.again(slots), ()


def _plan(planner: Planner, prices: Prices) -> tuple[State, tuple[str, ...]]:
    """At given first prices of uneven nodes and GPUs."""
    problem, seed = planner.problem, planner.seed
    if problem.cluster.gpus_per_node == 1 or "gpus" in problem.options.without:
        prices = (prices[0], 0.0)
    if problem.old is not None:
        best = planner.alternate(planner.again(problem.old), prices, TRIAL)
    else:
        # GPUs wait until a start is chosen: they say little about which groups are good, and cost most of the search.
        tried = [planner.alternate(state, (prices[0], 0.0), planner.rounds(TRIAL)) for state in planner.starts()]
        best = planner.alternate(max(tried, key=lambda state: state.value).afresh(), prices, planner.rounds(ROUNDS))
    if not len(problem.stream.experts):
        return best, ("moeplan: sums of requests have no rows to replay; the guard on node load was not checked",)
    if problem.dispatch in BY and problem.shape.top_k > 1:  # a token's only pick shares its message with none
        planner.by_token()
        start: Start | None = partial(planner.facing, affinity(problem, seed).slots)
        if problem.shape.routing_groups > 1 and problem.shape.routing_groups % problem.cluster.nodes == 0:
            start = planner.in_blocks
        if problem.old is not None:
            start = None
        best = planner.alternate(best.afresh(), prices, 2, start)
    return _guarded(planner, best, prices)


def _everything_everywhere(problem: Problem, planner: Planner) -> Decision:
    """Every node holds every expert: nothing crosses, and the slots left over go to the busiest."""
    cluster = problem.cluster
    use = np.repeat(problem.load[:, None, :], cluster.nodes, axis=1)
    held = place_by_use(use, planner.room, cluster.gpus_per_node)
    return Decision(slots_from_nodes(held, np.take_along_axis(use, held, axis=2), cluster.gpus_per_node))


def _guarded(planner: Planner, state: State, prices: Prices) -> tuple[State, tuple[str, ...]]:
    """The least price of uneven nodes at which steps of the fit requests keep the guard, and the plan that it gives."""
    problem, seed = planner.problem, planner.seed
    if np.isinf(problem.options.guard) or "guard" in problem.options.without:
        return state, ("moeplan: node load was not guarded",)
    steps = StepSampler(problem, seed)
    allowed = MARGIN * problem.options.guard
    allowed *= _steps_of(problem, linear(problem, seed).slots, steps, steps.random_groups)

    def load(state: State) -> float:
        return _steps_of(problem, state.slots.astype(np.int32), steps, state.group)

    def at(state: State, price: float) -> State:
        return planner.alternate(state.afresh(), (price, prices[1]), 2)

    raised = [(prices[0], load(state), state)]
    while raised[-1][1] > allowed and len(raised) <= RAISES:
        price = DEARER * raised[-1][0]
        state = at(raised[-1][2], price)
        raised.append((price, load(state), state))
    price, now, state = raised[-1]
    if now > allowed:
        price, now, state = min(raised, key=lambda one: one[1])
        return _apart(planner, state, price, allowed, partial(at, price=price), load)
    if len(raised) > 1:
        low, _, loose = raised[-2]
        for _ in range(HALVINGS):
            middle = float(np.sqrt(low * price))
            tried = at(loose, middle)
            if load(tried) <= allowed:
                state, price = tried, middle
            else:
                loose, low = tried, middle
    return state, (f"moeplan: price of uneven load {price:.3g}",)


def _apart(
    planner: Planner, state: State, price: float, allowed: float, at: Callable[[State], State],
    load: Callable[[State], float],
) -> tuple[State, tuple[str, ...]]:  # fmt: skip
    """Where even nodes are not enough: picks of a token that share a node come in bunches, which loads steps unevenly
    whatever the totals. The most credit for sharing at which steps of the fit requests keep the guard."""
    kept, most, low, high = None, 0.0, 0.0, 1.0
    for _ in range(HALVINGS + 1 if planner.by != local_search.BY_PICK else 0):
        planner.credit = (low + high) / 2
        tried = at(state)
        if load(tried) <= allowed:
            kept, most, low = tried, planner.credit, planner.credit
        else:
            high = planner.credit
    planner.credit = 1.0
    if kept is None:
        return state, (
            f"moeplan: the guard on node load could not be kept with a margin; price of uneven load {price:.3g}",
        )
    return kept, (f"moeplan: price of uneven load {price:.3g}, credit for sharing a node {most:.3g}",)


def _steps_of(problem: Problem, slots: Int32Array, steps: StepSampler, group: npt.NDArray[np.int64]) -> float:
    return steps.node_load_ratio(_routes(problem, slots), group)


def _routes(problem: Problem, slots: Int32Array) -> Routes:
    cluster = problem.cluster
    placement = Placement(slots, problem.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
    return routes(placement, cluster, problem.rule)


STRATEGIES = {"moeplan": Strategy(moeplan, routed=True)}
