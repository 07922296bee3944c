"""What a strategy is given, what it gives back, and what a strategy is.

Names: n fit requests, L layers, E experts, k picks per token, S slots per layer, P GPUs, D groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_pairs
from moeplan.arrays import CountArray, ExpertArray, FloatArray, Int32Array, Int64Array
from moeplan.cluster import Cluster, Dispatch, ReplicaRule, Routes, check_slots, routes
from moeplan.errors import PlanError, UsageError
from moeplan.planning.router import Router
from moeplan.types import ModelShape, Placement

__all__ = ["GUARD", "MAX_MOVES", "MoveLimit", "PlanningProblem", "Solution", "StepCost", "Strategy", "TokenRows"]

#: The load guard: a row is eligible when its node_load_ratio is at most this many times linear's.
GUARD = 1.05
MAX_MOVES = 1_000_000
#: Milliseconds of a decode step, from its messages int32 [L, P, P], picks served and distinct experts int32 [L, P].
StepCost = Callable[[Int32Array, Int32Array, Int32Array], float]


@dataclass(frozen=True)
class TokenRows:
    """Token rows of the fit requests, for what counts cannot say (which experts a token picks together).

    Attributes:
        experts: unsigned [T, L, k]; empty where the trace is aggregated.
        starts, stops: int64 [n], each request's rows.
    """

    experts: ExpertArray
    starts: Int64Array
    stops: Int64Array


@dataclass(frozen=True)
class PlanningProblem:
    """Place experts, and group requests, given the routing of the fit requests.

    Attributes:
        shape, cluster: the model and where it runs.
        redundant: R, extra slots per layer.
        use: uint32 [n, L, E], picks of each fit request in the rows that the plan is for (decode).
        signature: uint32 [n, L, E], picks of each fit request in the rows known before (prefill, or its substitute).
        rows: the token rows behind `use`.
        replica_rule, dispatch: how a replica is chosen, and what a message is.

    Raises:
        PlanError: slots that do not divide over the GPUs, counts of another shape, more groups than requests.
    """

    shape: ModelShape
    cluster: Cluster
    redundant: int
    use: CountArray
    signature: CountArray
    rows: TokenRows
    replica_rule: ReplicaRule = ReplicaRule.NEAREST_STATIC
    dispatch: Dispatch = Dispatch.PICK

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", Dispatch(self.dispatch))
        object.__setattr__(self, "replica_rule", ReplicaRule(self.replica_rule))
        check_slots(self.shape.num_experts, self.redundant, self.cluster)
        expected = (len(self.use), self.shape.num_layers, self.shape.num_experts)
        if self.use.shape != expected or self.signature.shape != expected:
            raise PlanError(f"counts of shape {self.use.shape} and {self.signature.shape}, expected {expected}")
        if len(self.use) < self.cluster.num_groups:
            raise PlanError(
                f"{self.cluster.num_groups} groups for {len(self.use)} fit requests",
                hint="use fewer nodes, or a trace with more requests",
            )

    @property
    def num_slots(self) -> int:
        """S, slots per layer."""
        return self.shape.num_experts + self.redundant

    @cached_property
    def load(self) -> FloatArray:
        """float64 [L, E], picks of every expert over all fit requests."""
        return np.asarray(self.use.sum(axis=0, dtype=np.float64))

    @cached_property
    def pairs(self) -> CountArray:
        """uint32 [L, E, E], how often a token picked both experts.

        Raises:
            PlanError: the trace is aggregated, so there are no token rows.
        """
        if not len(self.rows.experts):
            raise PlanError(
                "the trace is aggregated, which does not show what one token picks together",
                hint="use another strategy, or the trace that the sums were made of",
            )
        out = np.zeros((self.shape.num_layers, self.shape.num_experts, self.shape.num_experts), np.uint32)
        count_pairs(self.rows.experts, self.rows.starts, self.rows.stops, out)
        return out

    def routes(self, slots: npt.NDArray[np.integer], seed: int = 0) -> Routes:
        """The replica rule applied to slots [L, S].

        Raises:
            PlanError, FormatError: the slots are no placement for this problem.
        """
        if slots.shape != (self.shape.num_layers, self.num_slots):
            raise PlanError(f"slots of shape {slots.shape}, expected {(self.shape.num_layers, self.num_slots)}")
        cluster = self.cluster
        placement = Placement(slots.astype(np.int32), self.shape.num_experts, cluster.nodes, cluster.gpus_per_node)
        return routes(placement, cluster, self.replica_rule, seed)


@dataclass(frozen=True)
class Solution:
    """What a strategy gives back.

    Attributes:
        slots: int32 [L, S], the expert in each slot.
        router: the request router; None for the locality router, which any placement has.
        notes: choices worth printing, one line each.
    """

    slots: Int32Array
    router: Router | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MoveLimit:
    """A placement to start from, and how far a new one may be from it.

    Attributes:
        slots: int32 [L, S], the placement that is deployed.
        max_moves: in each layer, the most replicas that may be on a GPU which did not hold their expert.

    Raises:
        UsageError: `max_moves` is out of range.
    """

    slots: Int32Array
    max_moves: int

    def __post_init__(self) -> None:
        if not 0 <= self.max_moves <= MAX_MOVES:
            raise UsageError(f"max_moves {self.max_moves} is outside 0..{MAX_MOVES}")


class Strategy(ABC):
    """A way to plan. A strategy is a frozen dataclass derived from this; its fields are its parameters.

    Attributes:
        name: unique among the strategies.
        routed: it groups requests by signature. The others only place experts, and are shown with random groups.
        equal_groups: its groups are equal in size; if not, every figure of it is marked and never eligible.
    """

    routed = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def equal_groups(self) -> bool:
        return True

    def to_dict(self) -> dict[str, float | str | None]:
        """Its parameters that are numbers or words, for a plan's record; infinity is None."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (bool, int, float, str))}
        return {name: None if value == np.inf else value for name, value in plain.items()}

    @abstractmethod
    def solve(self, problem: PlanningProblem, seed: int) -> Solution:
        """Plan; the same seed gives the same solution."""

    def rebalance(self, problem: PlanningProblem, limit: MoveLimit, seed: int) -> Solution:
        """Improve a deployed placement by few moves.

        Raises:
            UsageError: this strategy cannot.
        """
        raise UsageError(
            f"the strategy {self.name} cannot start from an older plan",
            hint="use the strategy moeplan, or make a new plan",
        )
