"""Frozen, validated values that every room shares: the model's shape, a placement of experts.

Names: L MoE layers, E experts per layer, k picks per token, S slots per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeplan.arrays import BoolArray, Int32Array
from moeplan.errors import FormatError, PlanError

__all__ = ["Int32Array", "ModelShape", "Placement", "expert_dtype", "has_duplicate_experts"]

#: Bounds against hostile input: far above any real model, far below what would exhaust memory.
MAX_LAYERS, MAX_EXPERTS, MAX_K = 4096, 65535, 256


def expert_dtype(num_experts: int, *, fewer_picks: bool = False) -> type[np.uint8] | type[np.uint16]:
    """The narrowest unsigned type that holds ids 0 .. num_experts - 1, and num_experts where picks may be missing."""
    return np.uint8 if num_experts + fewer_picks <= 256 else np.uint16


@dataclass(frozen=True)
class ModelShape:
    """The MoE dimensions of a model that a trace or a plan holds.

    Attributes:
        name: the model's name, as the trace gives it.
        num_layers: L, MoE layers only.
        num_experts: E, routed experts per layer.
        top_k: k, picks per token and layer.
        layer_ids: the model's own index of each MoE layer, rising, length L.
        hidden: width of a token's hidden state; None when unknown (then byte figures are null, never guessed).
        routing_groups: `n_group`, groups of consecutive experts that the gate chooses first (DeepSeek-V3: 8); 1: none.
        expert_bytes: weights of one expert in one layer, in bytes; None when unknown.
        kv_bytes_per_token: KV cache of one token over all layers, in bytes; None when unknown.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...] = ()
    hidden: int | None = None
    routing_groups: int = 1
    expert_bytes: int | None = None
    kv_bytes_per_token: int | None = None

    def __post_init__(self) -> None:
        if not self.layer_ids:
            object.__setattr__(self, "layer_ids", tuple(range(self.num_layers)))
        for label, value, top in (
            ("layers", self.num_layers, MAX_LAYERS),
            ("experts", self.num_experts, MAX_EXPERTS),
            ("picks per token", self.top_k, MAX_K),
        ):
            if not 1 <= value <= top:
                raise FormatError(f"{value} {label} is outside 1..{top}")
        if self.top_k > self.num_experts:
            raise FormatError(f"top-{self.top_k} of {self.num_experts} experts is impossible")
        if len(self.layer_ids) != self.num_layers:
            raise FormatError(f"{len(self.layer_ids)} layer ids for {self.num_layers} layers")
        if any(b <= a for a, b in zip(self.layer_ids, self.layer_ids[1:], strict=False)):
            raise FormatError("layer ids must rise")
        if self.routing_groups < 1 or self.num_experts % self.routing_groups:
            raise FormatError(f"{self.num_experts} experts do not divide into {self.routing_groups} expert groups")
        for label, number in (
            ("hidden", self.hidden),
            ("expert_bytes", self.expert_bytes),
            ("kv_bytes_per_token", self.kv_bytes_per_token),
        ):
            if number is not None and number < 1:
                raise FormatError(f"{label} is {number}, but must be positive")

    def without_layers(self, dropped: tuple[int, ...]) -> ModelShape:
        """The shape with the model's layers `dropped` (the model's own indices) left out."""
        kept = tuple(i for i in self.layer_ids if i not in dropped)
        return replace(self, num_layers=len(kept), layer_ids=kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `trace.json` and `plan.json` store them."""
        return {
            "name": self.name,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "layer_ids": list(self.layer_ids),
            "hidden": self.hidden,
            "routing_groups": self.routing_groups,
            "expert_bytes": self.expert_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }

    @classmethod
    def from_dict(cls, data: Any, *, where: str) -> ModelShape:
        """Read what `to_dict` wrote; a missing or ill-typed field names itself."""
        if not isinstance(data, dict):
            raise FormatError("the model's shape is not an object", where=where)

        def number(key: str, *, optional: bool = False) -> Any:
            value = data.get(key)
            if value is None and optional:
                return None
            if isinstance(value, bool) or not isinstance(value, int):
                raise FormatError(f"model.{key} is {value!r}, not a whole number", where=where)
            return value

        layer_ids = data.get("layer_ids")
        if not isinstance(layer_ids, list) or not all(type(i) is int for i in layer_ids):
            raise FormatError("model.layer_ids is not a list of whole numbers", where=where)
        try:
            return cls(
                name=str(data.get("name", "")),
                num_layers=number("num_layers"),
                num_experts=number("num_experts"),
                top_k=number("top_k"),
                layer_ids=tuple(layer_ids),
                hidden=number("hidden", optional=True),
                routing_groups=number("routing_groups", optional=True) or 1,
                expert_bytes=number("expert_bytes", optional=True),
                kv_bytes_per_token=number("kv_bytes_per_token", optional=True),
            )
        except FormatError as error:
            raise FormatError(error.what, where=error.where or where, hint=error.hint) from None


@dataclass(frozen=True)
class Placement:
    """Where every expert and every replica lives.

    Slot s of a layer is on GPU s // (S / GPUs); GPU g is on node g // gpus_per_node: the engines' own numbering
    (SGLang 0.5.23 `expert_location.py`, vLLM 0.33.0, TensorRT-LLM: slot j on rank j // (slots / ep_size)).

    Attributes:
        slots: int32 [L, S], the logical expert in each slot.
        num_experts: E.
        nodes, gpus_per_node: the cluster.
    """

    slots: Int32Array
    num_experts: int
    nodes: int
    gpus_per_node: int
    replica_count: Int32Array = field(init=False, repr=False, compare=False)  # [L, E]
    replica_slots: Int32Array = field(init=False, repr=False, compare=False)  # [L, E, most replicas], rising, -1 after

    def __post_init__(self) -> None:
        slots = np.ascontiguousarray(self.slots, dtype=np.int32)
        if slots.ndim != 2:
            raise PlanError(f"a placement is [layers, slots], not an array of {slots.ndim} dimensions")
        layers, num_slots = slots.shape
        if num_slots % self.num_gpus:
            raise PlanError(f"{num_slots} slots do not divide over {self.num_gpus} GPUs")
        bad = np.argwhere((slots < 0) | (slots >= self.num_experts))
        if len(bad):
            layer, slot = bad[0]
            raise PlanError(
                f"slot {slot} of layer row {layer} holds expert {slots[layer, slot]}, outside 0..{self.num_experts - 1}"
            )
        count = np.zeros((layers, self.num_experts), np.int32)
        for layer in range(layers):
            count[layer] = np.bincount(slots[layer], minlength=self.num_experts)
        missing = np.argwhere(count == 0)
        if len(missing):
            layer, expert = missing[0]
            raise PlanError(f"expert {expert} has no slot in layer row {layer}")
        # A stable sort by expert lists each expert's slots in rising order; its rank within the expert is the replica.
        replicas = np.full((layers, self.num_experts, int(count.max())), -1, np.int32)
        for layer in range(layers):
            order = np.argsort(slots[layer], kind="stable")
            expert = slots[layer][order]
            first = np.concatenate(([0], np.cumsum(count[layer])[:-1]))
            replicas[layer, expert, np.arange(num_slots) - first[expert]] = order
        for name, array in (("slots", slots), ("replica_count", count), ("replica_slots", replicas)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def num_layers(self) -> int:
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        """S, slots per layer over all GPUs."""
        return int(self.slots.shape[1])

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.num_gpus

    @property
    def redundant(self) -> int:
        """R, extra slots per layer: S - E."""
        return self.num_slots - self.num_experts


def has_duplicate_experts(slots: Int32Array, units: int) -> BoolArray:
    """bool [L, units]: whether a GPU (or node), S / units of the slots [L, S], holds an expert twice."""
    held = np.sort(slots.reshape(len(slots), units, -1), axis=2)
    return np.asarray((np.diff(held, axis=2) == 0).any(axis=2))
