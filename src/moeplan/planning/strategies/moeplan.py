"""`moeplan`: groups, placement and replicas planned together, for held-out requests (docs/concepts/method.md).

From several starts, alternate: given the groups, each layer's slots are improved by swaps and replacements, with a
penalty for load imbalance; given the placement, a regression predicts from each fit request's signature, with that
request left out, what share of its picks would stay on each group's node, and the groups are the exact equal assignment
of these predictions. So the plan is made for what its own router will do, not for what an oracle could. Then the
penalty rises until steps replayed on the fit requests keep the load guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from moeplan.arrays import Int32Array
from moeplan.errors import FormatError, PlanError, UsageError
from moeplan.planning.balance import eplb_slots, linear_slots
from moeplan.planning.guard import GuardSettings, StepSampler, keep_guard
from moeplan.planning.initial_placement import by_router_group, coactivation_slots, orient_to_demand, place_by_use
from moeplan.planning.packing import slots_from_nodes
from moeplan.planning.planner import PARTS, Planner, SearchSettings, Start, State
from moeplan.planning.pricing import BALANCE, BOTH, LOCALITY, Pricing, TokenSample
from moeplan.planning.problem import GUARD, MoveLimit, PlanningProblem, Solution, StepCost, Strategy, TokenRows
from moeplan.types import has_duplicate_experts

__all__ = ["OBJECTIVES", "PARTS", "MoeplanStrategy"]

OBJECTIVES = ("bytes", "balance", "time")
#: Load penalties whose plans the objective `time` compares; the other objectives have one each.
PENALTIES = {"bytes": LOCALITY, "both": BOTH, "balance": BALANCE}

Candidate = tuple[State, tuple[str, ...]]


@dataclass(frozen=True)
class MoeplanStrategy(Strategy):
    """Groups, placement and replicas planned together.

    Attributes:
        guard: the most node load (node_load_ratio), in multiples of linear's; infinite to leave load alone.
        objective: bytes (locality, load within the guard), balance (load first), or time (of plans
            at three pairs of load penalties, the one whose steps cost least).
        step_cost: milliseconds of a step, for the objective time.
        without: parts to leave out, of `PARTS`, to measure what they are worth.
        search, guard_search: how long and how smoothly to search, and how to hold the plan to the guard.

    Raises:
        UsageError: a value out of range.
    """

    guard: float = GUARD
    objective: str = "bytes"
    step_cost: StepCost | None = None
    without: tuple[str, ...] = ()
    search: SearchSettings = field(default_factory=SearchSettings)
    guard_search: GuardSettings = field(default_factory=GuardSettings)
    name = "moeplan"
    routed = True

    def __post_init__(self) -> None:
        if not self.guard >= 1.0:
            raise UsageError(f"guard {self.guard:g} is below 1", hint=f"e.g. {GUARD:g}, or inf to leave load alone")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.objective == "time" and self.step_cost is None:
            raise UsageError(
                "the objective time needs to know what a step costs", hint="give --hardware and --model, or step_cost"
            )
        if self.objective != "time" and self.step_cost is not None:
            raise UsageError(f"--hardware is for the objective time, not {self.objective}", hint="leave it out")
        for part in self.without:
            if part not in PARTS:
                raise UsageError(f"moeplan has no part {part!r} to leave out", hint=f"one of {', '.join(PARTS)}")

    @classmethod
    def of_plan(
        cls,
        stored: Mapping[str, Any],
        *,
        guard: float | None = None,
        objective: str | None = None,
        step_cost: StepCost | None = None,
    ) -> MoeplanStrategy:
        """The parameters that a plan was made with, as far as it keeps them; what is given goes before them.

        Args:
            stored: `Plan.params`. step_cost: for the objective time, which a plan does not keep.

        Raises:
            FormatError: the plan's guard or objective is invalid. UsageError: a given one is; the plan was made for
                time, and neither another objective nor `step_cost` is given.
        """
        kept, limit = stored.get("objective") or cls.objective, stored.get("guard", GUARD)
        try:
            limit = float("inf") if limit is None else float(limit)
            cls(limit, "bytes" if kept == "time" else kept)
        except (TypeError, ValueError, UsageError):
            what = f"guard {str(limit)[:20]!r} or objective {str(kept)[:20]!r} is invalid"
            raise FormatError(what, where="plan.json", hint="plan again") from None
        if kept == "time" and objective is None and step_cost is None:
            raise UsageError(
                "the plan was made with --objective time",
                hint="give --hardware and --model again, or --objective bytes",
            )
        return cls(limit if guard is None else guard, objective or kept, step_cost)

    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        return _solve(self, problem, None, seed)

    def rebalance(self, problem: PlanningProblem, limit: MoveLimit, seed: int) -> Solution:
        expected = (problem.shape.num_layers, problem.num_slots)
        if limit.slots.shape != expected:
            raise PlanError(f"a deployed placement of {limit.slots.shape} slots, expected {expected}")
        return _solve(self, problem, limit, seed)


STRATEGIES = (MoeplanStrategy(),)


def _solve(params: MoeplanStrategy, problem: PlanningProblem, limit: MoveLimit | None, seed: int) -> Solution:
    """The best of several starts, held to the guard; with a move limit, the best that few moves reach."""
    total, most = len(problem.use), params.search.max_requests
    if total > most:
        problem = _sample(problem, most, seed)
    if limit is None and problem.num_slots // problem.cluster.nodes >= problem.shape.num_experts:
        return _full_replication(problem)
    planner = Planner(problem, params.search, params.without, limit, seed)
    if params.objective == "time":
        state, notes = _least_step_cost(params, planner)
    else:
        state, notes = _plan(params, planner, PENALTIES[params.objective])
    if total > most:
        notes = (*notes, f"moeplan: planned on {most} of {total} fit requests, drawn by seed")
    return Solution(state.slots.astype(np.int32), state.router, notes)


def _sample(problem: PlanningProblem, count: int, seed: int) -> PlanningProblem:
    """The same problem with some of its requests."""
    chosen = np.sort(np.random.default_rng([seed, 0x5A]).choice(len(problem.use), count, replace=False))
    rows = problem.rows
    if len(rows.experts):
        rows = TokenRows(rows.experts, rows.starts[chosen], rows.stops[chosen])
    return replace(problem, use=problem.use[chosen], signature=problem.signature[chosen], rows=rows)


def _full_replication(problem: PlanningProblem) -> Solution:
    """Every node holds every expert: no pick leaves its node; redundant slots go to the experts of highest load."""
    cluster = problem.cluster
    use = np.repeat(problem.load[:, None, :], cluster.nodes, axis=1)
    held = place_by_use(use, problem.num_slots // cluster.nodes, cluster.gpus_per_node)
    return Solution(slots_from_nodes(held, np.take_along_axis(use, held, axis=2), cluster.gpus_per_node))


def _plan(params: MoeplanStrategy, planner: Planner, pricing: Pricing) -> Candidate:
    """The plan at given first penalties."""
    problem, search = planner.problem, params.search
    if problem.cluster.gpus_per_node == 1 or "gpus" in params.without:
        pricing = replace(pricing, gpu_penalty=0.0)
    if planner.limit is not None:
        best = planner.alternate(planner.from_placement(planner.limit.slots), pricing, search.trial_rounds)
    else:
        trial_rounds, rounds = (1, 1) if "joint" in params.without else (search.trial_rounds, search.rounds)
        # Load of GPUs waits until a start is chosen: it says little about which groups are good, and takes long.
        nodes_only = replace(pricing, gpu_penalty=0.0)
        tried = [planner.alternate(start, nodes_only, trial_rounds) for start in planner.starts()]
        best = planner.alternate(max(tried, key=lambda state: state.value), pricing, rounds)
    if not len(problem.rows.experts):
        return best, ("moeplan: the trace is aggregated, so the guard on node load was not checked",)
    rows = TokenSample.of(problem, search.max_rows, planner.seed)
    if rows is not None:
        pricing = replace(pricing, rows=rows)
        best = planner.alternate(best, pricing, 2, _start_for_tokens(planner))
    if np.isinf(params.guard) or "guard" in params.without:
        return best, ("moeplan: node load was not guarded",)
    best, note = keep_guard(planner, best, pricing, params.guard, params.guard_search)
    return best, (f"moeplan: {note}",)


def _start_for_tokens(planner: Planner) -> Start | None:
    """Another placement to search from where tokens share messages: one that keeps a token's experts together."""
    problem = planner.problem
    groups, nodes = problem.shape.routing_groups, problem.cluster.nodes
    if planner.limit is not None:
        return None
    if groups > 1 and groups % nodes == 0:
        gpus_per_node = problem.cluster.gpus_per_node
        return partial(by_router_group, slots_per_node=planner.slots_per_node, gpus_per_node=gpus_per_node)
    return partial(orient_to_demand, coactivation_slots(problem, planner.seed))


def _least_step_cost(params: MoeplanStrategy, planner: Planner) -> Candidate:
    """Of plans at three pairs of load penalties, and of `linear` and `eplb` with a router fitted to them, the one
    whose steps, replayed on the fit requests, cost least.

    A plan that reads more distinct experts reads more weights: that can cost more than the messages that it saves.
    """
    problem, cost = planner.problem, params.step_cost
    if cost is None or not len(problem.rows.experts):
        raise PlanError("the objective time needs token rows to replay", hint="use a trace that is not aggregated")
    made: dict[str, Callable[[], Candidate]] = {
        name: partial(_plan, params, planner, pricing) for name, pricing in PENALTIES.items()
    }
    if planner.limit is None:
        for name, slots in _balanced(problem).items():
            made[name] = partial(_with_router, planner, slots)
    steps = StepSampler(problem, planner.seed)
    plans, costs = {}, {}
    for name, make in made.items():
        plans[name] = make()
        state = plans[name][0]
        costs[name] = steps.mean_cost(state.slots, state.group, cost)
    best = min(costs, key=lambda name: costs[name])
    tie = ", though all cost the same" if max(costs.values()) <= 1.001 * costs[best] else ""
    listed = ", ".join(f"{name} {ms:.3f}" for name, ms in costs.items())
    state, notes = plans[best]
    return state, (*notes, f"moeplan: step time on the fit requests in ms: {listed}; chosen: {best}{tie}")


def _balanced(problem: PlanningProblem) -> dict[str, Int32Array]:
    """Slots of `linear` and `eplb`, unless a GPU would hold an expert twice."""
    shape, cluster = problem.shape, problem.cluster
    slots = {
        "linear": linear_slots(shape.num_layers, shape.num_experts, problem.num_slots),
        "eplb": eplb_slots(problem.load, problem.num_slots, cluster, shape.routing_groups)[0],
    }
    return {name: each for name, each in slots.items() if not has_duplicate_experts(each, cluster.num_gpus).any()}


def _with_router(planner: Planner, slots: Int32Array) -> Candidate:
    return planner.from_placement(slots), ()
