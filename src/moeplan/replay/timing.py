"""Time of replayed decode steps: from counted messages, picks and distinct experts to milliseconds.

Counting is `moeplan.cluster`'s and time is `moeplan.perf`'s; here they meet. This module knows nothing of traces, plans
or the rest of the replay, so that whoever counts steps can time them: `step_times` alone needs no `Timing`.

Names: S steps, L MoE layers, P GPUs, B live requests of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int32Array
from moeplan.cluster import Cluster, Deployment, Dispatch
from moeplan.errors import MoeplanError, PlanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec, ModelSpec
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.memory import MemoryModel, Parallel, Precision
from moeplan.perf.routing import Routing, counted_routing
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.types import ModelShape

__all__ = [
    "CONTEXT", "TIMED_STEPS", "StepTimes", "Timing", "model_of", "parallel_of", "routing_of", "step_times", "timing_of",
]  # fmt: skip

FloatArray = npt.NDArray[np.float64]

#: Tokens that each live request holds, unless said otherwise: as `estimate` has it.
CONTEXT = 4096
#: Steps of each fold that are timed: messages of a whole step are kept for it, and step times differ little.
TIMED_STEPS = 50


class StepTimes(NamedTuple):
    """ms: float64 [S], of each step. idle_share: float64 [S], share of it in which a GPU waits, mean over GPUs."""

    ms: FloatArray
    idle_share: FloatArray


def step_times(
    cluster: Cluster, mode: Dispatch, spec: CompleteSpec, machine: Hardware, links: npt.ArrayLike, picks: npt.ArrayLike,
    touched: npt.ArrayLike, *, context: int = CONTEXT,
) -> StepTimes:  # fmt: skip
    """Decode steps as `moeplan.cluster.step_messages` counted them, timed by `moeplan.perf.step_model.StepModel`.

    All steps have as many tokens; B follows from the picks. Weights are in the checkpoint's dtypes, the KV cache in
    bf16, without two-batch overlap. Where fewer layers were counted than the model has MoE layers, their mean stands
    for each of the others.

    Args:
        spec, machine: `moeplan.model.spec.model("..")` and `moeplan.perf.hardware.hardware("..")`.
        links: [S, L, P, P], messages from GPU to GPU in dispatch. picks, touched: [S, L, P].
        context: tokens that each request holds before the step.

    Raises:
        PlanError, UsageError: a set-up that cannot be (see `Timing.check` for the words of a command line).
    """
    assert spec.moe is not None
    picks = np.asarray(picks)
    batch = float(picks.sum()) / np.prod(picks.shape[:2]) / spec.moe.top_k / cluster.num_groups
    parallel = parallel_of(cluster, spec)
    routing = routing_of(cluster, spec, links, picks, touched, parallel.redundant)
    options = StepOptions(mode, gpus_per_node=cluster.gpus_per_node)
    step = StepModel(spec, machine, parallel, Precision.of_checkpoint(spec), options).decode(
        batch, context, routing=routing
    )
    seconds, waiting = np.asarray(step.seconds, np.float64), np.asarray(step.waiting, np.float64)
    if seconds.ndim > 1:
        seconds, waiting = seconds.mean(axis=1), waiting.mean(axis=1)
    return StepTimes(seconds * 1e3, waiting / seconds)


def routing_of(
    cluster: Cluster, spec: CompleteSpec, links: npt.ArrayLike, picks: npt.ArrayLike, touched: npt.ArrayLike,
    redundant: int,
) -> Routing:  # fmt: skip
    """Counted steps as the time model takes them: arrays [S, L, P], so that a step's times are [S].

    Where not all of the model's MoE layers were counted, each layer is given as a step of which all layers are alike
    ([S, L, 1, P]): times are then [S, L], and their mean over L is the step's.

    Args:
        redundant: extra slots per layer; the time of a whole batch does not depend on them, that of its parts does.
    """
    assert spec.moe is not None
    arrays = [np.asarray(links), np.asarray(picks), np.asarray(touched)]
    if arrays[1].shape[1] != len(spec.moe.layers):
        arrays = [values[:, :, None] for values in arrays]
    slots = (spec.moe.experts + redundant) / cluster.num_gpus
    return counted_routing(arrays[1], arrays[2], arrays[0], gpus_per_node=cluster.gpus_per_node, slots=slots)


def parallel_of(cluster: Cluster, spec: CompleteSpec, redundant: int | None = None) -> Parallel:
    """Attention is split over the GPUs of a home; every home is a data-parallel rank; all GPUs share the experts.

    Args:
        redundant: extra slots; None: as few as make the slots divide. The time of counted steps does not depend on it.
    """
    gpus = cluster.num_gpus
    if redundant is None:
        redundant = -spec.moe.experts % gpus if spec.moe else 0
    return Parallel(tp=cluster.gpus_per_group, dp=cluster.num_groups, ep=gpus, redundant=redundant)


@dataclass(frozen=True)
class Timing:
    """What replayed steps are timed with.

    Attributes:
        spec: the model. machine: the accelerator, in the cluster's nodes. context: tokens that each live request holds.
        steps: how many steps of each fold are timed: the first ones, since every step is an independent draw.
    """

    spec: CompleteSpec
    machine: Hardware
    context: int = CONTEXT
    steps: int = TIMED_STEPS

    def check(self, shape: ModelShape, cluster: Cluster, mode: Dispatch) -> None:
        """Refuse a model that is not the trace's, and a set-up that cannot be.

        Raises:
            UsageError: no or other experts, picks or hidden size; more layers in the trace than in the model; dtypes
                that are not known. PlanError: attention that cannot be split over a home.
        """
        spec, moe = self.spec, self.spec.moe
        hint = "give the --model that the trace was recorded from"
        if moe is None:
            raise UsageError(f"{spec.name} has no experts", hint=hint)
        pairs = [("experts", shape.num_experts, moe.experts), ("picks per token", shape.top_k, moe.top_k)]
        pairs += [("hidden size", shape.hidden, spec.hidden)] if shape.hidden else []
        for label, ours, theirs in pairs:
            if ours != theirs:
                raise UsageError(f"the trace and {spec.name} differ in {label}: {ours} and {theirs}", hint=hint)
        if shape.num_layers > len(moe.layers):
            what = f"the trace has {shape.num_layers} MoE layers, but {spec.name} {len(moe.layers)}"
            raise UsageError(what, hint=hint)
        if spec.checkpoint is None:
            raise UsageError(
                f"the configuration of {spec.name} does not tell its weights' dtype",
                hint="describe the model in the catalogue's form (docs/reference/catalogue.md), with its checkpoint",
            )
        if self.context < 1:
            raise UsageError(f"--context {self.context} is not positive")
        try:
            options = StepOptions(mode, gpus_per_node=cluster.gpus_per_node)
            precision = Precision.of_checkpoint(spec)
            StepModel(spec, self.machine, parallel_of(cluster, spec), precision, options).decode(1, self.context)
        except PlanError as error:
            if cluster.deployment is not Deployment.NODES:
                raise
            raise PlanError(
                f"--deployment nodes splits attention over {cluster.gpus_per_node} GPUs of a node, but {error.what}",
                hint="time it with other --gpus-per-node, or with --deployment gpus",
            ) from None

    def times(self, cluster: Cluster, mode: Dispatch, links: Any, picks: Any, touched: Any) -> StepTimes:
        """`step_times` of this model, hardware and context."""
        return step_times(cluster, mode, self.spec, self.machine, links, picks, touched, context=self.context)

    def step_cost(self, cluster: Cluster, dispatch: Dispatch) -> Callable[[Int32Array, Int32Array, Int32Array], float]:
        """Milliseconds of one counted step, as the objective `time` of a plan takes them."""

        def cost(links: Int32Array, picks: Int32Array, touched: Int32Array) -> float:
            return float(self.times(cluster, dispatch, links[None], picks[None], touched[None]).ms[0])

        return cost

    def notes(self, cluster: Cluster, layers: int, redundant: int, live: int) -> list[str]:
        """What a reader must know before any time: layers that were not recorded, memory that does not suffice."""
        spec, parallel = self.spec, parallel_of(cluster, self.spec, redundant)
        out, held = [], len(spec.moe.layers) if spec.moe else 0
        if layers < held:
            out.append(
                f"times: the trace gives {layers} of {spec.name}'s {held} MoE layers; their mean stands for each of "
                "the others"
            )
        precision = Precision.of_checkpoint(spec)
        need = MemoryModel(spec, self.machine, parallel, precision).need(live, self.context)
        if not need.fits:
            out.append(
                f"times are of a set-up that does not fit: {live} requests of {self.context:,} tokens a group take "
                f"{need.used / 1e9:.1f} GB of a GPU's {need.usable / 1e9:.1f} GB"
            )
        return out

    def method(self, cluster: Cluster, steps: int, live: int, rows: str) -> str:
        """One line: what the times are of."""
        parallel, precision = parallel_of(cluster, self.spec), Precision.of_checkpoint(self.spec)
        return (
            f"times: decode of {self.spec.name} on {self.machine.name}, dp {parallel.dp} x tp {parallel.tp}, experts "
            f"over {parallel.ep} GPUs, {precision.weights} weights, {precision.experts or precision.weights} experts, "
            f"{live} requests of {self.context:,} tokens a group; {min(self.steps, steps)} steps a fold with their "
            f"routing ({rows} rows), by the time model of docs/accuracy.md"
        )

    def to_dict(self, cluster: Cluster, steps: int) -> dict[str, Any]:
        """Plain values for JSON."""
        parallel, precision = parallel_of(cluster, self.spec), Precision.of_checkpoint(self.spec)
        return {
            "model": self.spec.name, "hardware": self.machine.name, "context": self.context,
            "steps": min(self.steps, steps), "tp": parallel.tp, "dp": parallel.dp, "ep": parallel.ep,
            "weights": precision.weights, "experts": precision.experts or precision.weights, "kv": precision.kv,
        }  # fmt: skip


def timing_of(
    shape: ModelShape, cluster: Cluster, mode: Dispatch, machine: str, name: str | None = None, context: int = CONTEXT
) -> Timing:
    """From names as on the command line, checked.

    Args:
        machine: of the hardware catalogue. name: a model of the catalogue, a config.json, or `embedded`; None: the
            model by which the trace calls itself.

    Raises:
        UsageError: unknown names, or as in `Timing.check`. FormatError: a file that does not describe a model.
    """
    timing = Timing(model_of(shape, name), load_hardware(machine), context)
    timing.check(shape, cluster, mode)
    return timing


def model_of(shape: ModelShape, name: str | ModelSpec | None = None) -> CompleteSpec:
    """The model of a trace: by `name`, or, where that is None, as the trace calls it; a description as it is.

    Raises:
        UsageError: not in the catalogue. FormatError: a file that does not describe a model.
    """
    try:
        return load_model(name or shape.name)
    except MoeplanError:
        if name is not None:
            raise
        raise UsageError(
            f'the trace\'s model "{shape.name[:80]}" is not in the catalogue',
            hint="give --model with a name of the catalogue, or the path of its config.json",
        ) from None
