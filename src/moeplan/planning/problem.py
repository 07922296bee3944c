"""What a strategy is given, and what it must give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_pairs
from moeplan.cluster import Cluster, Dispatch, ReplicaRule, check_slots
from moeplan.errors import PlanError, UsageError
from moeplan.planning.router import Router
from moeplan.types import Int32Array, ModelShape

__all__ = ["GUARD", "OBJECTIVES", "Decision", "Options", "Problem", "StepCost", "Strategy", "Stream"]

#: A row is guarded, and counts, when its node_load_ratio is at most this many times linear's.
GUARD = 1.05
OBJECTIVES = ("bytes", "balance", "time")
MOST_MOVES = 1_000_000
#: Milliseconds of a step, from its messages [L, P, P], picks and distinct experts [L, P].
StepCost = Callable[[Int32Array, Int32Array, Int32Array], float]

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Stream:
    """Token rows of the fit requests, for what counts cannot say (co-activation).

    Attributes:
        experts: unsigned [T, L, k]; none where a trace holds sums of requests.
        starts, stops: int64 [n], each request's rows.
    """

    experts: npt.NDArray[np.unsignedinteger]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """Choices that a strategy may take.

    Attributes:
        clusters: K of the `paper` strategy; None picks it on the fit requests.
        guard: most that `moeplan` lets node_load_ratio be, in multiples of linear's; infinite to leave load alone.
        objective: what `moeplan` weighs: bytes (locality, load within the guard), balance (load first), or
            time (the one of several such plans whose steps cost least).
        without: parts of `moeplan` to leave out, for ablations (`moeplan.planning.planner.PARTS`).
        cost: what `time` goes by.
        max_moves: most copies of a layer that may be elsewhere than in the problem's old plan.
    """

    clusters: int | None = None
    guard: float = GUARD
    objective: str = "bytes"
    without: tuple[str, ...] = ()
    max_moves: int = 0
    cost: StepCost | None = None

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"--clusters {self.clusters} is not positive")
        if not self.guard >= 1.0:
            raise UsageError(f"--guard {self.guard:g} is below 1", hint=f"e.g. {GUARD:g}, or inf to leave load alone")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.objective == "time" and self.cost is None:
            raise UsageError("--objective time needs to know what a step costs", hint="give --hardware and --model")
        if not 0 <= self.max_moves <= MOST_MOVES:
            raise UsageError(f"--max-moves {self.max_moves} is outside 0..{MOST_MOVES}")


@dataclass(frozen=True)
class Problem:
    """Place experts, and group requests, for what the fit requests did.

    Attributes:
        shape, cluster: the model and where it runs.
        redundant: R, extra slots per layer.
        use: uint32 [n, L, E], picks of each fit request in the rows that the plan is for (decode).
        signature: uint32 [n, L, E], picks of each fit request in the rows known before (prefill, or what stands in).
        stream: the token rows behind `use`.
        rule, dispatch: how a replica is chosen, and what a message is.
        old: int32 [L, S], the slots of an older plan to improve by few moves (`moeplan` only).
    """

    shape: ModelShape
    cluster: Cluster
    redundant: int
    use: Counts
    signature: Counts
    stream: Stream
    rule: ReplicaRule = ReplicaRule.NEAREST_STATIC
    dispatch: Dispatch = Dispatch.PICK
    options: Options = field(default_factory=Options)
    old: Int32Array | None = None

    def __post_init__(self) -> None:
        check_slots(self.shape.num_experts, self.redundant, self.cluster)
        expected = (len(self.use), self.shape.num_layers, self.shape.num_experts)
        if self.use.shape != expected or self.signature.shape != expected:
            raise PlanError(f"counts of shape {self.use.shape} and {self.signature.shape}, expected {expected}")
        if len(self.use) < self.cluster.num_groups:
            raise PlanError(
                f"{self.cluster.num_groups} groups for {len(self.use)} fit requests",
                hint="use fewer nodes, or a trace with more requests",
            )
        if self.old is not None and self.old.shape != (self.shape.num_layers, self.num_slots):
            raise PlanError(f"an old plan of {self.old.shape} slots for {(self.shape.num_layers, self.num_slots)}")

    @property
    def num_slots(self) -> int:
        """S, slots per layer."""
        return self.shape.num_experts + self.redundant

    @cached_property
    def load(self) -> npt.NDArray[np.float64]:
        """float64 [L, E], picks of every expert over all fit requests."""
        return np.asarray(self.use.sum(axis=0, dtype=np.float64))

    @cached_property
    def pairs(self) -> npt.NDArray[np.uint32]:
        """uint32 [L, E, E], how often two experts served the same token.

        Raises:
            PlanError: there are no token rows to tell.
        """
        if not len(self.stream.experts):
            raise PlanError(
                "the trace holds sums of requests, which do not tell what one token picks together",
                hint="use another strategy, or the trace that the sums were made of",
            )
        out = np.zeros((self.shape.num_layers, self.shape.num_experts, self.shape.num_experts), np.uint32)
        count_pairs(self.stream.experts, self.stream.starts, self.stream.stops, out)
        return out


@dataclass(frozen=True)
class Decision:
    """What a strategy decides.

    Attributes:
        slots: int32 [L, S], the expert in each slot.
        router: how a new request finds its group; None for the locality router that every placement brings along.
        notes: choices worth printing, one line each.
    """

    slots: Int32Array
    router: Router | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Strategy:
    """A way to plan.

    Attributes:
        decide: (problem, seed) -> decision; the same seed, the same decision.
        routed: it groups requests by signature; the others only place experts, and are shown with random groups.
        equal: its groups are equal in size; False marks every figure of it, and none of them counts.
    """

    decide: Callable[[Problem, int], Decision]
    routed: bool = False
    equal: bool = True
