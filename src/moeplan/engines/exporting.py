"""Write a plan, or a placement, as an engine's file, with the flags to start the engine with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.engines.launch import Launch, Serving, launch
from moeplan.engines.layer_axis import check_axis, left_out
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.placement_files import check_write, write
from moeplan.engines.unsupported_models import without_placement
from moeplan.engines.vllm import own_strategy
from moeplan.errors import UsageError
from moeplan.model.spec import ModelSpec
from moeplan.types import Placement

if TYPE_CHECKING:
    from moeplan.planning import Plan

__all__ = ["ExportReport", "export"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how to start the engine with it.

    Attributes:
        path, engine, placement: the file, and what it holds.
        launch: the command to start the engine with.
        hidden_layers: of the model; None where nothing says it.
        checked_layers: whether config or flags say which layers have experts, and the placement was held to them.
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
        return f"{self.path}: {layers} layers of {slots} slots for {self.engine}\n{self.launch.text()}"

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
    from_config: bool = False,
    where: str = "",
    name: str = "",
    vllm_strategy: str | None = None,
) -> ExportReport:
    """Write an engine's placement file, whole or not at all.

    Args:
        source: a plan, or a placement, whose rows are all of the model's layers unless `model` says otherwise.
        engine: sglang, vllm, tensorrt-llm or vllm-ascend.
        model: what its config.json (`from_config`) and flags say of it. where: the source, for messages.
        name: the model's name, for the plug-in's file; a plan has its own.
        vllm_strategy: refuse a placement that is not this layout of vLLM's own: linear or round_robin.

    Raises:
        UsageError: layers that are not the model's; what the engine cannot do; a file name that it would not read.
        OutputError: the place is taken or cannot be written.

    Examples:
        >>> import moeplan
        >>> placement = moeplan.balance([[4, 3, 2, 1]], moeplan.Cluster(1, 2))
        >>> report = moeplan.export(placement, "sglang", "placement.json")  # doctest: +SKIP
    """
    spec, serving, path = model or ModelSpec(), Serving(), Path(path)
    if isinstance(source, Placement):
        placement = EnginePlacement.of(source, tuple(range(source.num_layers)))
        if model is None:
            spec = spec.override(num_experts=source.num_experts, num_layers=source.num_layers, dense_layers=())
    elif isinstance(source, EnginePlacement):
        placement = source
    else:
        name, serving = source.model.name, Serving(source.cluster.num_groups, source.dispatch)
        placement = EnginePlacement.of_plan(source)
    if vllm_strategy is not None:
        _check_vllm_strategy(engine, placement, vllm_strategy)
    layers = check_axis(placement, spec, engine, where, from_config=from_config)
    check_write(path, engine, placement)
    start = launch(engine, placement, str(path), serving)
    checked = spec.moe_layers is not None
    write(path, engine, placement, num_layers=layers, model=name)
    return ExportReport(
        path,
        engine,
        placement,
        start,
        layers,
        checked,
        () if checked else left_out(placement.layer_ids),
        without_placement(engine, spec.architectures),
    )


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
