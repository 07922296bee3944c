"""`EnginePlacement`: the content of any engine's placement file, independent of its format.

Names: L MoE layers, E experts per layer, S slots per layer, P GPUs of the expert-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moeplan.errors import FormatError, PlanError, UsageError
from moeplan.types import Int32Array, ModelShape, Placement

if TYPE_CHECKING:
    from moeplan.planning import Plan

__all__ = ["EnginePlacement"]


@dataclass(frozen=True)
class EnginePlacement:
    """The placement of an engine, MoE layers only.

    Slot p is on expert-parallel rank p // (S / ep_size); ranks fill nodes in order, ep_size / nodes to each.

    Attributes:
        physical_to_logical: int32 [L, S], the logical expert in each slot.
        layer_ids: the model's own index of each row, increasing, length L.
        num_experts: E.
        ep_size: P. nodes: over which the P ranks are spread.

    Raises:
        PlanError: an invalid placement: ids out of range, an expert without a slot, slots that do not divide.
    """

    physical_to_logical: Int32Array
    layer_ids: tuple[int, ...]
    num_experts: int
    ep_size: int
    nodes: int

    def __post_init__(self) -> None:
        if self.ep_size < 1 or self.nodes < 1 or self.ep_size % self.nodes:
            raise PlanError(
                f"{self.ep_size} ranks do not divide over {self.nodes} nodes",
                hint="give the number of GPUs that share the experts, and of nodes",
            )
        rows = self.placement.slots  # made and checked here
        object.__setattr__(self, "physical_to_logical", rows)
        if len(self.layer_ids) != len(rows):
            raise PlanError(f"{len(self.layer_ids)} layer ids for {len(rows)} rows of slots")
        if any(b <= a for a, b in zip(self.layer_ids, self.layer_ids[1:], strict=False)):
            raise PlanError("layer ids must increase")

    @cached_property
    def placement(self) -> Placement:
        """As a `Placement`."""
        return Placement(self.physical_to_logical, self.num_experts, self.nodes, self.ep_size // self.nodes)

    @property
    def num_slots(self) -> int:
        """S, slots per layer over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def redundant(self) -> int:
        """R: S - E."""
        return self.num_slots - self.num_experts

    @property
    def has_replicas(self) -> bool:
        """Whether some expert has several slots."""
        return self.redundant > 0

    @classmethod
    def of(cls, placement: Placement, layer_ids: tuple[int, ...]) -> EnginePlacement:
        """From a `Placement` and the model's index of its layers."""
        return cls(placement.slots, layer_ids, placement.num_experts, placement.num_gpus, placement.nodes)

    @classmethod
    def of_plan(cls, plan: Plan) -> EnginePlacement:
        """From a plan."""
        return cls.of(plan.placement, plan.model.layer_ids)

    def rows_of(self, layer_ids: tuple[int, ...], where: str) -> EnginePlacement:
        """The rows of these layers, in their order.

        Raises:
            FormatError: the file places no experts in one of them.
        """
        row = {layer: i for i, layer in enumerate(self.layer_ids)}
        missing = [layer for layer in layer_ids if layer not in row]
        if missing:
            raise FormatError(
                f"places no experts in layer {missing[0]}",
                where=where,
                hint="use the file of the same model, or --config to say which layers have experts",
            )
        chosen = self.physical_to_logical[[row[layer] for layer in layer_ids]]
        return EnginePlacement(chosen, layer_ids, self.num_experts, self.ep_size, self.nodes)

    def fit(self, shape: ModelShape, where: str) -> Placement:
        """As a placement of a model's MoE layers, e.g. those of a trace.

        Raises:
            UsageError: another number of experts. FormatError: a layer that the file does not place.
        """
        if shape.num_experts != self.num_experts:
            raise UsageError(
                f"the file places {self.num_experts} experts, but the model has {shape.num_experts}",
                where=where,
                hint="use the file of the same model",
            )
        return self.rows_of(shape.layer_ids, where).placement

    def same_as(self, other: EnginePlacement) -> bool:
        """Equal in every slot, layer and number."""
        numbers = ("layer_ids", "num_experts", "ep_size", "nodes")
        return all(getattr(self, key) == getattr(other, key) for key in numbers) and np.array_equal(
            self.physical_to_logical, other.physical_to_logical
        )
