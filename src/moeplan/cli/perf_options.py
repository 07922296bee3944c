"""Flags that `estimate`, `sweep` and `size` share, what becomes of them, and how their answers are set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeplan.model.spec import ModelSpec
    from moeplan.perf.hardware import Hardware
    from moeplan.perf.memory import Precision
    from moeplan.perf.serving import Layout

Model = Annotated[str, typer.Option("--model", help="A name of the catalogue, or a config.json.")]
HardwareList = Annotated[str, typer.Option("--hardware", metavar="A,B,..", help="Names of the catalogue, or all.")]
GpusPerNode = Annotated[
    int | None,
    typer.Option("--gpus-per-node", metavar="G", help="GPUs that the fast network joins [default: the hardware's]."),
]
Drafts = Annotated[int, typer.Option("--mtp", metavar="N", help="Draft tokens per step, by the model's own module.")]
Accepted = Annotated[
    float | None,
    typer.Option("--accepted", metavar="X", help="Tokens that a step yields [default: 1 + 0.8 x drafts]."),
]
Weights = Annotated[str | None, typer.Option("--weights", help="Dtype of matrices [default: the checkpoint's].")]
Experts = Annotated[str | None, typer.Option("--experts", help="Dtype of routed experts [default: as published].")]
Kv = Annotated[str, typer.Option("--kv", help="Dtype of the KV cache: bf16 or fp8.")]
UsdPerHour = Annotated[float | None, typer.Option("--usd-per-hour", help="Of one GPU [default: the catalogue's].")]
Watts = Annotated[float | None, typer.Option("--watts", help="Of one GPU [default: the catalogue's].")]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware-file", metavar="JSON", help="More hardware, or other prices.")
]
Page = Annotated[str | None, typer.Option("-o", "--output", metavar="HTML", help="Also write a page with figures.")]


def accepted_of(drafts: int, accepted: float | None) -> float:
    """Tokens that a step yields: as given, else 1 and four fifths of the drafts."""
    return 1 + 0.8 * drafts if accepted is None else accepted


def check_price(flag: str, value: float | None) -> None:
    """Refuse a negative price or power."""
    if value is not None and not value >= 0:
        raise UsageError(f"{flag} {value:g} is negative")


def machines(
    names: str, file: Path | None, usd_per_hour: float | None, watts: float | None, gpus_per_node: int | None
) -> list[Hardware]:
    """The hardware of a list of names, or all."""
    from moeplan.perf.hardware import hardware, hardware_names

    listed = list(hardware_names(file)) if names.strip().lower() == "all" else names.split(",")
    found = list({machine.name: machine for machine in (hardware(name.strip(), file) for name in listed)}.values())
    for flag, value in (("--usd-per-hour", usd_per_hour), ("--watts", watts)):
        check_price(flag, value)
        if value is not None and len(found) > 1:
            raise UsageError(
                f"{flag} is of one kind of hardware, but {len(found)} are given", hint="use --hardware-file"
            )
    if gpus_per_node is not None and gpus_per_node < 1:
        raise UsageError("--gpus-per-node must be at least 1")
    return found


def dtypes(spec: ModelSpec, precision: Precision) -> str:
    """Dtypes in words: "fp8 weights, bf16 KV cache"; experts only where they have another."""
    own = spec.moe is not None and precision.experts not in (None, precision.weights)
    return f"{precision.weights} weights{f', {precision.experts} experts' * own}, {precision.kv} KV cache"


def layout_facts(layout: Layout) -> dict[str, Any]:
    """Accelerators and how the model is spread over them, as JSON."""
    p = layout.parallel
    per_node = layout.gpus_per_node or layout.hardware.scale_up_size
    return {
        "hardware": layout.hardware.name,
        "gpus": p.gpus,
        "nodes": -(-p.gpus // per_node),
        "tp": p.tp,
        "dp": p.dp,
        "ep": p.ep,
        "pp": p.pp,
        "redundant": p.redundant,
        "overlap": layout.overlap,
    }


def aligned(head: list[str], rows: list[list[str]], *, left: Sequence[int]) -> list[str]:
    """A table as lines; the columns of `left` are set to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        put = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(put).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(line(row) for row in rows)]
