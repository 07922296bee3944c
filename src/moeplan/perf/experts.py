"""The routed experts of a step, and the way to them and back: the slowest GPU, the busiest link, what overlap hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.perf.collectives import UNITS_GIVEN, all_reduce, expert_exchange
from moeplan.perf.context import StepContext
from moeplan.perf.layers import Batch
from moeplan.perf.operators import UNITS, Number, Time, expert_gemm
from moeplan.perf.routing import Array, Routing
from moeplan.perf.step import Operator

__all__ = ["MoeTimes", "slowdown"]

Way = Literal["dispatch", "combine"]


def slowdown(context: StepContext) -> float:
    """How much longer compute takes beside DeepEP's normal kernels, which keep units to themselves."""
    beside = context.prefill and context.options.overlap and context.dispatch is not Dispatch.PICK
    return UNITS / (UNITS - UNITS_GIVEN) if beside else 1.0


@dataclass(frozen=True)
class MoeTimes:
    """One part of the batch at the MoE layers; arrays [..., L], L being 1 where all layers are alike.

    Attributes:
        experts: seconds of the slowest GPU. wait: of a GPU, on average, for it, summed over layers [...].
        ways: seconds of dispatch and combine; empty where tokens do not travel.
        repeat: layers that one entry stands for.
        parts: what bounds each, [..., L] too.
    """

    context: StepContext
    experts: Array
    wait: Number
    ways: dict[Way, Array]
    repeat: int
    parts: dict[str, dict[str, Array]]

    @classmethod
    def of(cls, context: StepContext, batch: Batch, routing: Routing) -> MoeTimes:
        """The times of a part of the batch.

        Raises:
            UsageError: routing of another number of layers.
        """
        spec, layers = context.spec, routing.picks.shape[-2]
        assert spec.moe is not None
        if layers not in (1, context.moe_layers):
            raise UsageError(f"routing of {layers} layers for a model with {context.moe_layers} MoE layers")
        repeat = context.moe_layers if layers == 1 else 1
        time = expert_gemm(
            context.device,
            routing.picks,
            routing.experts,
            spec.hidden,
            spec.moe.width / context.parallel.moe_tp,
            context.dtypes.experts,
            kernel="contiguous" if context.dispatch in (Dispatch.NODE, Dispatch.GPU) else "deepgemm",
        )
        small = context.device.constants.engine.expert_layer_s
        seconds = np.asarray(time.seconds) * slowdown(context) + small
        bounds = {**time.parts, "overhead": time.parts["overhead"] + small}
        slowest = seconds.argmax(axis=-1)[..., None]

        def of_slowest(values: Number) -> Array:
            return np.asarray(np.take_along_axis(np.broadcast_to(values, seconds.shape), slowest, -1)[..., 0])

        parts = {"experts": {name: of_slowest(values) for name, values in bounds.items()}}
        longest = seconds.max(axis=-1)
        wait = (longest - seconds.mean(axis=-1)).sum(axis=-1) * repeat
        ways: dict[Way, Array] = {}
        for way in _WAYS if context.dispatch else ():
            moved = _exchange(context, batch, routing, way)
            ways[way] = np.broadcast_to(np.asarray(moved.seconds), longest.shape)
            parts[way] = {name: np.broadcast_to(value, longest.shape) for name, value in moved.parts.items()}
        return cls(context, longest, wait, ways, repeat, parts)

    def operators(self, stage: dict[str, float]) -> list[Operator]:
        """Of all halves and layers, with what hides behind `stage` seconds of the same layer."""
        halves, out = self.context.halves, []
        for way, moved in self.ways.items():
            travel = np.maximum(moved - self._kernel(way), 0.0)
            covers = self._behind(way, stage) if self.context.options.overlap else [0.0]
            hidden = sum((np.minimum(travel, cover) for cover in covers), start=np.zeros_like(moved))
            out.append(self._operator(way, moved * halves, hidden))
        out.insert(1, self._operator("experts", self.experts * halves, np.zeros_like(self.experts)))
        return out

    def _kernel(self, way: Way) -> float:
        """What of a message's time is a kernel on the accelerator, which hides behind nothing."""
        family = "low_latency" if self.context.dispatch is Dispatch.PICK else "normal"
        return float(getattr(self.context.device.constants, f"{family}_{way}").launch_s)

    def _behind(self, way: Way, stage: dict[str, float]) -> list[Number]:
        """What the messages of the first and of the second half hide behind (see `moeplan.perf.step`)."""
        shared, attention = stage["shared"], stage["prepare"] + stage["core"]
        if self.context.dispatch is Dispatch.PICK:
            return [shared + stage["prepare"] if way == "dispatch" else stage["core"]] * 2
        if way == "dispatch":
            return [attention + shared + 0 * self.experts, self.experts]
        return [self.experts + shared, attention + 2 * shared + 0 * self.experts]

    def _operator(self, name: str, seconds: Array, hidden: Array) -> Operator:
        def added(values: Array) -> Number:
            return np.asarray(values.sum(axis=-1) * self.repeat, np.float64)[()]

        parts = {part: added(value) * self.context.halves for part, value in self.parts[name].items()}
        return Operator(name, added(seconds), added(hidden), parts)


_WAYS: tuple[Way, Way] = ("dispatch", "combine")


def _exchange(context: StepContext, batch: Batch, routing: Routing, way: Way) -> Time:
    """Dispatch or combine of one layer."""
    spec, parallel, device = context.spec, context.parallel, context.device
    assert spec.moe is not None and context.dispatch is not None
    if context.dispatch is Dispatch.ALLGATHER or routing.messages is None:
        rows = batch.rows * parallel.dp * spec.hidden * 2
        return all_reduce(device, rows, parallel.tp * parallel.dp) * 0.5
    return expert_exchange(device, context.dispatch, routing.messages, spec.hidden, spec.moe.top_k, context.nodes, way)
