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
        experts: of the slowest GPU. wait: seconds of a GPU, on average, for it, summed over layers [...].
        ways: dispatch and combine; empty where tokens do not travel.
        repeat: layers that one entry stands for.
    """

    context: StepContext
    experts: Time
    wait: Number
    ways: dict[Way, Time]
    repeat: int

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

        longest = seconds.max(axis=-1)
        experts = Time(longest, {name: of_slowest(values) for name, values in bounds.items()})
        wait = (longest - seconds.mean(axis=-1)).sum(axis=-1) * repeat
        ways = {way: _exchange(context, batch, routing, way) for way in (_WAYS if context.dispatch else ())}
        return cls(context, experts, wait, ways, repeat)

    def operators(self, stage: dict[str, float]) -> list[Operator]:
        """Of all halves and layers, with what hides behind `stage` seconds of the same layer."""
        out = []
        for way, time in self.ways.items():
            travel = np.maximum(time.seconds - self._kernel(way), 0.0)
            covers = self._behind(way, stage) if self.context.options.overlap else [0.0]
            out.append(self._operator(way, time, sum(np.minimum(travel, cover) for cover in covers)))
        out.insert(1, self._operator("experts", self.experts, 0.0))
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
            return [attention + shared, self.experts.seconds]
        return [self.experts.seconds + shared, attention + 2 * shared]

    def _operator(self, name: str, time: Time, hidden: Number) -> Operator:
        shape, halves = np.shape(self.experts.seconds), self.context.halves

        def added(values: Number) -> Number:
            return np.asarray(np.broadcast_to(values, shape).sum(axis=-1) * self.repeat, np.float64)[()]

        parts = {part: added(value) * halves for part, value in time.parts.items()}
        return Operator(name, added(np.broadcast_to(time.seconds, shape) * halves), added(hidden), parts)


_WAYS: tuple[Way, Way] = ("dispatch", "combine")


def _exchange(context: StepContext, batch: Batch, routing: Routing, way: Way) -> Time:
    """Dispatch or combine of one layer."""
    spec, parallel, device = context.spec, context.parallel, context.device
    assert spec.moe is not None and context.dispatch is not None
    if context.dispatch is Dispatch.ALLGATHER or routing.messages is None:
        rows = batch.rows * parallel.dp * spec.hidden * 2
        return all_reduce(device, rows, parallel.tp * parallel.dp) * 0.5
    return expert_exchange(device, context.dispatch, routing.messages, spec.hidden, spec.moe.top_k, context.nodes, way)
