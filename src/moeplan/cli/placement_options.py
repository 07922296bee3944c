"""Flags that `export`, `check`, `import placement` and `replay --placement` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.errors import FormatError, UsageError

if TYPE_CHECKING:
    from moeplan.model.spec import ModelSpec


class EngineChoice(StrEnum):
    """The engines, named here so that the command line's help needs no array library."""

    sglang = "sglang"
    vllm = "vllm"
    tensorrt_llm = "tensorrt-llm"
    vllm_ascend = "vllm-ascend"


Engine = Annotated[EngineChoice, typer.Option("--engine", help="Whose file it is.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The model's config.json: experts, layers, which are dense."),
]
Experts = Annotated[int | None, typer.Option("--num-experts", help="Routed experts per layer, if not from --config.")]
Layers = Annotated[
    int | None, typer.Option("--num-layers", help="Hidden layers, dense ones included, if not from --config.")
]
DenseLayers = Annotated[
    str | None, typer.Option("--dense-layers", metavar="IDS", help="Layers without experts, e.g. 0,1,2, or none.")
]
EpSize = Annotated[
    int | None, typer.Option("--ep-size", metavar="P", help="GPUs that share the experts, over all nodes.")
]
Nnodes = Annotated[int | None, typer.Option("--nnodes", metavar="N", help="Nodes that they fill.")]


def keep_inputs(json: str | None, *others: str | Path | None) -> None:
    """Refuse a `--json` that would be written over another file of the command, or into a directory that it reads."""
    if json is None or json == "-":
        return
    target = Path(json).resolve()
    for other in others:
        if other is None:
            continue
        place = Path(other).resolve()
        same = target == place or (target.exists() and place.exists() and target.samefile(place))
        if same or (place.is_dir() and place in target.parents):
            raise UsageError(
                f"--json {json} would be written over {other}", hint="give --json a place of its own, or - to print it"
            )


def refuse_trace(source: str) -> None:
    """Say so where a trace stands in place of a plan."""
    if (Path(source) / "plan.json").is_file():
        return
    if source == "embedded" or (Path(source) / "trace.json").is_file():
        raise FormatError("is a trace, not a plan", where=source, hint=f"make a plan of it: moeplan plan {source}")


def refuse_plan(file: Path) -> None:
    """Say so where a plan stands in place of a placement file."""
    if (file / "plan.json").is_file():
        hint = f"write the engine's file first: moeplan export {file} --engine E -o FILE"
        raise FormatError("is a plan, not an engine's placement file", where=str(file), hint=hint)
    if file.is_dir():
        raise FormatError("is a directory, not a placement file", where=str(file), hint="give the file itself")


def model_from(
    config: Path | None,
    num_experts: int | None,
    num_layers: int | None,
    dense_layers: str | None,
    top_k: int | None = None,
) -> ModelSpec:
    """What config and flags say of the model."""
    from moeplan.cli.import_engines import dense_layers_of
    from moeplan.model.config import described

    dense = dense_layers_of(dense_layers)
    return described(config, num_experts=num_experts, num_layers=num_layers, top_k=top_k, dense_layers=dense)
