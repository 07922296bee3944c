"""Flags that `estimate`, `sweep` and `size` share, what becomes of them, and how their answers are set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def aligned(head: list[str], rows: list[list[str]], *, left: Sequence[int]) -> list[str]:
    """A table as lines; the columns of `left` are set to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        put = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(put).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(line(row) for row in rows)]
