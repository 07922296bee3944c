"""Time of replayed decode steps: from counted messages, picks and distinct experts to milliseconds.

Counting is `moeplan.cluster`'s and time is `moeplan.perf`'s; here they meet. This module knows nothing of traces, plans
or the rest of the replay, so that whoever counts steps can time them.

Names: S steps, L MoE layers, P GPUs, B live requests of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moeplan.arrays import FloatArray, Int32Array
from moeplan.cluster import Cluster, Deployment, Dispatch, StepCounts
from moeplan.errors import MoeplanError, PlanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec, ModelSpec
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.memory import MemoryModel, ParallelLayout, Precision
from moeplan.perf.routing import Routing, counted_routing
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.types import ModelShape

__all__ = ["CONTEXT", "StepTimes", "Timing", "cluster_parallel", "find_model", "find_timing", "step_routing"]

#: Tokens that each live request holds, unless said otherwise: as `estimate` has it.
CONTEXT = 4096
#: Steps of each fold that are timed: messages of a whole step are kept for it, and step times differ little.
TIMED_STEPS = 50


class StepTimes(NamedTuple):
    """ms: float64 [S], of each step. idle_share: float64 [S], share of it in which a GPU waits, mean over GPUs."""

    ms: FloatArray
    idle_share: FloatArray


@dataclass(frozen=True)
class Timing:
    """What replayed steps are timed with.

    Weights are in the checkpoint's dtypes, the KV cache in bf16, without two-batch overlap.

    Attributes:
        spec: the model. hardware: the accelerator, in the cluster's nodes. context: tokens of each live request.
        steps: how many steps of each fold are timed: the first ones, since every step is an independent draw.
    """

    spec: CompleteSpec
    hardware: Hardware
    context: int = CONTEXT
    steps: int = TIMED_STEPS

    def step_model(self, cluster: Cluster, dispatch: Dispatch | None = None, redundant: int | None = None) -> StepModel:
        """The step model of a cluster; `redundant` as in `cluster_parallel`."""
        parallel, precision = cluster_parallel(cluster, self.spec, redundant), Precision.of_checkpoint(self.spec)
        options = StepOptions(dispatch, gpus_per_node=cluster.gpus_per_node)
        return StepModel(self.spec, self.hardware, parallel, precision, options)

    def check(self, shape: ModelShape, cluster: Cluster, dispatch: Dispatch) -> None:
        """Refuse a model that is not the trace's, and a set-up that is impossible.

        Raises:
            UsageError: no or other experts, picks or hidden size; more layers in the trace than in the model; dtypes
                that are not known. PlanError: attention that cannot be split over a group's GPUs.
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
            self.step_model(cluster, dispatch).decode(1, self.context)
        except PlanError as error:
            if cluster.deployment is not Deployment.NODES:
                raise
            raise PlanError(
                f"--deployment nodes splits attention over {cluster.gpus_per_node} GPUs of a node, but {error.what}",
                hint="time it with other --gpus-per-node, or with --deployment gpus",
            ) from None

    def times(self, cluster: Cluster, dispatch: Dispatch, counts: StepCounts, batch: float | None = None) -> StepTimes:
        """Decode steps as `moeplan.cluster.step_messages` counted them: arrays [S, L, P, P] and [S, L, P].

        All steps have as many tokens: `batch` in each group, else as many as the picks are of tokens with k each. Where
        fewer layers were counted than the model has MoE layers, their mean stands for each of the others.

        Raises:
            PlanError, UsageError: a set-up that is impossible.
        """
        assert self.spec.moe is not None
        if batch is None:
            per_layer = float(counts.picks.sum()) / np.prod(counts.picks.shape[:2])
            batch = per_layer / self.spec.moe.top_k / cluster.num_groups
        model = self.step_model(cluster, dispatch)
        routing = step_routing(cluster, self.spec, counts, model.parallel.redundant)
        step = model.decode(batch, self.context, routing=routing)
        seconds, waiting = np.asarray(step.seconds, np.float64), np.asarray(step.waiting, np.float64)
        if seconds.ndim > 1:
            seconds, waiting = seconds.mean(axis=1), waiting.mean(axis=1)
        return StepTimes(seconds * 1e3, waiting / seconds)

    def step_cost(self, cluster: Cluster, dispatch: Dispatch) -> Callable[[Int32Array, Int32Array, Int32Array], float]:
        """Milliseconds of one counted step, as the objective `time` of a plan takes them."""

        def cost(links: Int32Array, picks: Int32Array, touched: Int32Array) -> float:
            return float(self.times(cluster, dispatch, StepCounts(links[None], picks[None], touched[None])).ms[0])

        return cost

    def notes(self, cluster: Cluster, layers: int, redundant: int, live: int) -> list[str]:
        """What a reader must know before any time: layers that were not recorded, memory that does not suffice."""
        spec, model = self.spec, self.step_model(cluster, redundant=redundant)
        out, held = [], len(spec.moe.layers) if spec.moe else 0
        if layers < held:
            out.append(
                f"times: the trace gives {layers} of {spec.name}'s {held} MoE layers; their mean stands for each of "
                "the others"
            )
        need = MemoryModel(spec, self.hardware, model.parallel, model.precision).need(live, self.context)
        if not need.fits:
            out.append(
                f"times are of a set-up that does not fit: {live} requests of {self.context:,} tokens a group take "
                f"{need.used / 1e9:.1f} GB of a GPU's {need.usable / 1e9:.1f} GB"
            )
        return out

    def method(self, cluster: Cluster, steps: int, live: int, rows: str) -> str:
        """One line: what the times are of."""
        said = self.to_dict(cluster, steps)
        return (
            "times: decode of {model} on {hardware}, dp {dp} x tp {tp}, experts over {ep} GPUs, {weights} weights, "
            f"{{experts}} experts, {live} requests of {self.context:,} tokens a group; {{steps}} steps a fold with "
            f"their routing ({rows} rows), by the time model of docs/results/accuracy.md"
        ).format(**said)

    def to_dict(self, cluster: Cluster, steps: int) -> dict[str, Any]:
        """Plain values for JSON."""
        model = self.step_model(cluster)
        parallel, precision = model.parallel, model.precision
        return {
            "model": self.spec.name,
            "hardware": self.hardware.name,
            "context": self.context,
            "steps": min(self.steps, steps),
            "tp": parallel.tp,
            "dp": parallel.dp,
            "ep": parallel.ep,
            "weights": precision.weights,
            "experts": precision.experts or precision.weights,
            "kv": precision.kv,
        }


def step_routing(cluster: Cluster, spec: CompleteSpec, counts: StepCounts, redundant: int) -> Routing:
    """Counted steps as the time model takes them: arrays [S, L, P], so that a step's times are [S].

    Where not all of the model's MoE layers were counted, each layer is given as a step of which all layers are alike
    ([S, L, 1, P]): times are then [S, L], and their mean over L is the step's.

    Args:
        redundant: extra slots per layer; the time of a whole batch does not depend on them, that of its parts does.
    """
    assert spec.moe is not None
    links, picks, touched = counts
    if picks.shape[1] != len(spec.moe.layers):
        links, picks, touched = links[:, :, None], picks[:, :, None], touched[:, :, None]
    slots = (spec.moe.experts + redundant) / cluster.num_gpus
    return counted_routing(picks, touched, links, gpus_per_node=cluster.gpus_per_node, slots=slots)


def cluster_parallel(cluster: Cluster, spec: CompleteSpec, redundant: int | None = None) -> ParallelLayout:
    """Attention is split over the GPUs of a group; every group is a data-parallel rank; all GPUs share the experts.

    Args:
        redundant: extra slots; None: as few as make the slots divide. The time of counted steps does not depend on it.
    """
    gpus = cluster.num_gpus
    if redundant is None:
        redundant = -spec.moe.experts % gpus if spec.moe else 0
    return ParallelLayout(tp=cluster.gpus_per_group, dp=cluster.num_groups, ep=gpus, redundant=redundant)


def find_timing(
    shape: ModelShape,
    cluster: Cluster,
    dispatch: Dispatch,
    hardware: str | Hardware,
    model: str | None = None,
    context: int = CONTEXT,
) -> Timing:
    """From names as on the command line, checked.

    Args:
        hardware: of the catalogue. model: of the catalogue, a config.json, or `embedded`; None: as the trace calls it.

    Raises:
        UsageError: unknown names, or as in `Timing.check`. FormatError: a file that does not describe a model.
    """
    timing = Timing(find_model(shape, model), load_hardware(hardware), context)
    timing.check(shape, cluster, dispatch)
    return timing


def find_model(shape: ModelShape, given: str | ModelSpec | None = None) -> CompleteSpec:
    """The model of a trace: as given by name or description, else as the trace calls it.

    Raises:
        UsageError: not in the catalogue. FormatError: a file that does not describe a model.
    """
    if isinstance(given, ModelSpec):
        return given.complete()
    try:
        return load_model(given or shape.name)
    except MoeplanError:
        if given is not None:
            raise
        raise UsageError(
            f'the trace\'s model "{shape.name[:80]}" is not in the catalogue',
            hint="give --model with a name of the catalogue, or the path of its config.json",
        ) from None
