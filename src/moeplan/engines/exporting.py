"""Write a plan, or a placement, as an engine's file, with the flags to start the engine with."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeplan.engines.launch import Launch, Serving, launch
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.placement_files import check_write, without_placement, write
from moeplan.engines.vllm import own_strategy
from moeplan.errors import UsageError, expect
from moeplan.model.spec import GIVE_MODEL, ModelSpec
from moeplan.planning.plan import Plan
from moeplan.types import Placement

__all__ = ["ExportReport", "export", "left_out"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how to start the engine with it.

    Attributes:
        path, engine, placement: the file, and what it holds.
        launch: the command to start the engine with.
        hidden_layers: of the model; None where nothing says it.
        checked_layers: whether the model given says which layers have experts; the placement was checked against it.
        layers_left_out: layers that the placement skips where nothing says whether they have experts.
        ignored: why the engine would ignore any placement of this model; None where it would not.
    """

    path: Path
    engine: str
    placement: EnginePlacement
    launch: Launch
    hidden_layers: int | None
    checked_layers: bool
    layers_left_out: tuple[int, ...]
    ignored: str | None

    def __repr__(self) -> str:
        layers, slots = self.placement.physical_to_logical.shape
        head = f"{self.path}: {layers} layers of {slots} slots for {self.engine}"
        return "\n".join([head, self.launch.text(), *(f"note: {note}" for note in self.launch.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        extra = self.launch.extra
        return {
            "file": str(self.path),
            "engine": self.engine,
            "hidden_layers": self.hidden_layers,
            "layer_ids": list(self.placement.layer_ids),
            "num_experts": self.placement.num_experts,
            "flags": self.launch.flags,
            "command": self.launch.text(),
            "extra_file": None if extra is None else {"name": extra[0], "text": extra[1]},
            "notes": list(self.launch.notes),
            "ignored": self.ignored,
            "layers_left_out": list(self.layers_left_out),
        }


def export(
    source: Plan | Placement | EnginePlacement,
    engine: str,
    path: str | Path,
    *,
    model: ModelSpec | None = None,
    where: str = "",
    name: str = "",
    vllm_strategy: str | None = None,
) -> ExportReport:
    """Write an engine's placement file, whole or not at all.

    Args:
        source: a plan, or a placement with a row for each of the model's MoE layers.
        engine: sglang, vllm, tensorrt-llm or vllm-ascend.
        model: `load_model` of its name or config.json. SGLang needs it for a plan, and for a placement unless every
            hidden layer is a MoE layer. where: the source, for messages.
        name: the model's name, for the plug-in's file; a plan has its own.
        vllm_strategy: refuse a placement that is not this layout of vLLM's own: linear or round_robin.

    Raises:
        UsageError: layers that are not the model's; what the engine cannot do; a file name that it would not read.
        OutputError: the place is taken or cannot be written.

    Examples:
        >>> import moeplan
        >>> import numpy as np
        >>> counts = np.random.default_rng(0).integers(1, 100, (58, 256))  # picks in each MoE layer
        >>> placement = moeplan.balance(counts, moeplan.Cluster(4, 8), redundant=32)
        >>> deepseek = moeplan.load_model("deepseek-v3")
        >>> report = moeplan.export(placement, "sglang", "placement.json", model=deepseek)  # doctest: +SKIP
    """
    spec, serving, path, assumed = model or ModelSpec(), Serving(), Path(path), ""
    if isinstance(source, Placement):
        placement = _place_rows(source, spec)
        if model is None:
            spec = spec.override(num_experts=source.num_experts, num_layers=source.num_layers, dense_layers=())
            assumed = f"no model given: assumed that every hidden layer is one of the {source.num_layers} MoE layers"
    elif isinstance(source, EnginePlacement):
        placement = source
    else:
        expect(source, Plan, "a plan or a placement")
        name, serving = source.model.name, Serving(source.cluster.num_groups, source.dispatch)
        placement = EnginePlacement.of_plan(source)
    if vllm_strategy is not None:
        _check_vllm_strategy(engine, placement, vllm_strategy)
    layers = _check_axis(placement, spec, engine, where)
    check_write(path, engine, placement)
    start = launch(engine, placement, str(path), serving)
    if assumed:
        start = replace(start, notes=(*start.notes, assumed))
        warnings.warn(assumed, stacklevel=2)
    write(path, engine, placement, num_layers=layers, model=name)
    checked, ignored = spec.moe_layers is not None, without_placement(engine, spec.architectures)
    skipped = () if checked else left_out(placement.layer_ids)
    return ExportReport(path, engine, placement, start, layers, checked, skipped, ignored)


def _check_vllm_strategy(engine: str, placement: EnginePlacement, strategy: str) -> None:
    if engine != "vllm" or strategy not in ("linear", "round_robin"):
        raise UsageError(
            f"--expert-placement-strategy {strategy[:20]} is not one of vLLM's (linear, round_robin)",
            hint="leave it out",
        )
    if placement.has_replicas:
        raise UsageError(
            f"vLLM has no {strategy} with redundant slots: with EPLB it starts from its own layout",
            hint="leave --expert-placement-strategy out and use the plug-in, or plan with --redundant 0",
        )
    if own_strategy(placement) != strategy:
        raise UsageError(f"the plan is not vLLM's {strategy} layout", hint="leave the flag out and use the plug-in")


def left_out(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers missing from a sequence with a regular step, e.g. 45 from 41, 43, 47."""
    steps = [b - a for a, b in itertools.pairwise(layers)]
    if not steps:
        return ()
    usual = max(set(steps), key=lambda step: (steps.count(step), -step))
    gaps = ((a, b) for a, b in itertools.pairwise(layers) if (b - a) > usual and (b - a) % usual == 0)
    return tuple(layer for a, b in gaps for layer in range(a + usual, b, usual))


def _place_rows(source: Placement, model: ModelSpec) -> EnginePlacement:
    """A placement whose rows are the model's MoE layers, or all of its hidden layers.

    Raises:
        UsageError: another number of rows.
    """
    rows, moe = source.num_layers, model.moe_layers
    if moe is None or rows == len(moe):
        return EnginePlacement.of(source, moe or tuple(range(rows)))
    if rows != model.layers:
        what = f"the placement has {rows} rows, the model given {len(moe)} MoE layers of {model.layers} hidden layers"
        raise UsageError(what, hint="give a row for each MoE layer")
    return EnginePlacement.of(source, tuple(range(rows))).rows_of(moe, "")


def _check_axis(placement: EnginePlacement, model: ModelSpec, engine: str, where: str) -> int | None:
    """Check a placement's layers against the model's; returns the number of hidden layers, if known.

    Raises:
        UsageError: other experts or layers than the model's; for SGLang, the number of hidden layers is not known.
    """
    layers, experts = placement.layer_ids, placement.num_experts
    moe = layers if model.moe_layers is None else model.moe_layers

    def refuse(wrong: object, what: str, hint: str = "give the model that the plan was made for") -> None:
        if wrong:
            raise UsageError(what, where=where, hint=hint)

    refuse(
        model.num_experts not in (None, experts),
        f"the plan is for {experts} experts, the model given has {model.num_experts}",
    )
    refuse(
        model.layers is not None and layers[-1] >= model.layers,
        f"the plan places layer {layers[-1]}, but the model given has {model.layers} hidden layers, from 0",
    )
    missing, surplus = sorted(set(moe) - set(layers)), sorted(set(layers) - set(moe))
    refuse(
        missing,
        f"the plan places no experts in layer {min(missing, default=0)}, which has experts in the model given",
        "plan on a trace of all layers, without --without-layers, or give the model that the plan was made for",
    )
    refuse(surplus, f"the plan places experts in layer {min(surplus, default=0)}, which has none in the model given")
    if engine == "sglang":
        what = "SGLang's file has a row for every hidden layer, and the plan knows only those with experts"
        refuse(model.layers is None, what, GIVE_MODEL)
        what = f"the plan has {len(layers)} of {model.layers} layers, and the model does not say which have experts"
        refuse(model.moe_layers is None and len(layers) < (model.layers or 0), what, GIVE_MODEL)
    return model.layers
