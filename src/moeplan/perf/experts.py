"""The routed experts of a step, and the way to them and back: the slowest GPU, the busiest link, what overlap hides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.perf.collectives import UNITS_GIVEN, all_reduce, expert_exchange
from moeplan.perf.layers import Rows
from moeplan.perf.operators import UNITS, Number, Time, expert_gemm
from moeplan.perf.routing import Array, Routing
from moeplan.perf.setup import Operator, Setup

__all__ = ["MoeTimes", "slower"]


def slower(s: Setup, part: Rows) -> float:
    """How much longer compute takes beside DeepEP's normal kernels, which keep units to themselves."""
    beside = part.prefill and s.overlap and s.mode is not Dispatch.PICK
    return UNITS / (UNITS - UNITS_GIVEN) if beside else 1.0


@dataclass(frozen=True)
class MoeTimes:
    """One part of the batch at the MoE layers; arrays [..., L], L being 1 where all layers are alike.

    Attributes:
        experts: seconds of the slowest GPU. wait: of a GPU, on average, for it, summed over layers [...].
        dispatch, combine: seconds; None where tokens do not travel. repeat: layers that one entry stands for.
        parts: what bounds each, [..., L] too.
    """

    experts: Array
    wait: Number
    dispatch: Array | None
    combine: Array | None
    repeat: int
    parts: dict[str, dict[str, Array]]

    @classmethod
    def of(cls, s: Setup, part: Rows, routing: Routing) -> MoeTimes:
        spec, p = s.spec, s.parallel
        assert spec.moe is not None
        length = routing.picks.shape[-2]
        if length not in (1, s.moe_layers):
            raise UsageError(f"routing of {length} layers for a model with {s.moe_layers} MoE layers")
        repeat = s.moe_layers if length == 1 else 1
        kernel = "contiguous" if s.mode in (Dispatch.NODE, Dispatch.GPU) else "deepgemm"
        time = expert_gemm(
            s.hardware, routing.picks, routing.experts, spec.hidden, spec.moe.width / p.moe_tp, s.kinds.experts,
            kernel=kernel, c=s.c,
        )  # fmt: skip
        seconds = np.asarray(time.seconds) * slower(s, part) + s.c.engine.expert_layer_s
        bounds = {**time.parts, "overhead": time.parts["overhead"] + s.c.engine.expert_layer_s}
        slowest = seconds.argmax(axis=-1)[..., None]
        parts = {"experts": {
            name: np.take_along_axis(np.broadcast_to(value, seconds.shape), slowest, -1)[..., 0]
            for name, value in bounds.items()
        }}  # fmt: skip
        longest = seconds.max(axis=-1)
        wait = (longest - seconds.mean(axis=-1)).sum(axis=-1) * repeat
        ways: dict[str, Array | None] = {"dispatch": None, "combine": None}
        for way in ways if s.mode else ():
            moved = _exchange(s, part, routing, way)
            ways[way] = np.broadcast_to(np.asarray(moved.seconds), longest.shape)
            parts[way] = {name: np.broadcast_to(value, longest.shape) for name, value in moved.parts.items()}
        return cls(longest, wait, ways["dispatch"], ways["combine"], repeat, parts)

    def operators(self, s: Setup, stage: dict[str, float], halves: int) -> list[Operator]:
        """Of all halves and layers, with what hides behind `stage` seconds of the same layer."""
        out = [self._operator("experts", self.experts * halves, np.zeros_like(self.experts), halves)]
        if self.dispatch is None or self.combine is None:
            return out
        behind = self._behind(stage) if s.overlap else {"dispatch": [0.0], "combine": [0.0]}
        if s.overlap and s.mode is Dispatch.PICK:
            behind = {"dispatch": [stage["shared"] + stage["prepare"]] * 2, "combine": [stage["core"]] * 2}
        for way, moved in (("dispatch", self.dispatch), ("combine", self.combine)):
            travel = np.maximum(moved - self._kernel(s, way), 0.0)
            hidden = sum((np.minimum(travel, cover) for cover in behind[way]), start=np.zeros_like(moved))
            out.append(self._operator(way, moved * halves, hidden, halves))
        return [out[1], out[0], out[2]]

    def _kernel(self, s: Setup, way: str) -> float:
        """What of a message's time is a kernel on the accelerator, which hides behind nothing."""
        fit = getattr(s.c, f"{'low_latency' if s.mode is Dispatch.PICK else 'normal'}_{way}")
        return float(fit.launch_s)

    def _behind(self, stage: dict[str, float]) -> dict[str, list[Array]]:
        """Prefill: what the messages of the first and of the second half hide behind."""
        attention, shared = stage["prepare"] + stage["core"], stage["shared"]
        return {
            "dispatch": [attention + shared + 0 * self.experts, self.experts],
            "combine": [self.experts + shared, attention + 2 * shared + 0 * self.experts],
        }

    def _operator(self, name: str, seconds: Array, hidden: Array, halves: int) -> Operator:
        def added(values: Array) -> Number:
            return np.asarray(values.sum(axis=-1) * self.repeat, np.float64)[()]

        parts = {part: added(value) * halves for part, value in self.parts[name].items()}
        return Operator(name, added(seconds), added(hidden), parts)


def _exchange(s: Setup, part: Rows, routing: Routing, way: str) -> Time:
    """Dispatch or combine of one layer."""
    p, spec = s.parallel, s.spec
    assert spec.moe is not None and s.mode is not None
    if s.mode is Dispatch.ALLGATHER or routing.messages is None:
        rows = part.rows * p.dp * spec.hidden * 2
        return all_reduce(s.hardware, rows, p.tp * p.dp, s.c) * 0.5
    return expert_exchange(
        s.hardware, s.mode, routing.messages, spec.hidden, spec.moe.top_k, s.nodes,
        "dispatch" if way == "dispatch" else "combine", c=s.c,
    )  # fmt: skip
