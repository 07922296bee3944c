"""`moeplan sweep`: many set-ups of one model, and those that no other one beats."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli import perf_options as p
from moeplan.cli.terminal import echo, progress, show
from moeplan.cli.text.perf import sweep_lines

__all__ = ["sweep"]


@Parameter(name="*", group=o.CLUSTER)
@dataclass(frozen=True)
class LayoutFlags:
    """Numbers of GPUs, and ways to spread the model over them."""

    nodes: o.Numbers = (1,)
    """Nodes of the cluster. 1 includes parts of a node."""
    gpus: o.Numbers | None = None
    """Numbers of GPUs, instead of --nodes."""
    gpus_per_node: o.Int | None = None
    """GPUs in each node, on one scale-up network. Default: the hardware's."""
    tp: o.Numbers | None = None
    """Tensor-parallel ranks of attention. Default: all that fit."""
    pp: o.Numbers | None = None
    """Pipeline stages. Default: all that fit."""
    ep: o.Numbers | None = None
    """Expert-parallel ranks. Default: all of a stage, or 1."""


@Parameter(name="*", group=Group("Load", sort_key=3))
@dataclass(frozen=True)
class LoadFlags:
    """What each set-up serves."""

    batch: o.Numbers = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Requests that decode together, on each data-parallel rank or instance."""
    context: o.Numbers = (4096,)
    """Context tokens of each request."""
    overlap: bool = False
    """Two-batch overlap: also try each set-up with it."""
    tpot: p.Milliseconds = 50.0
    """Limit on the time per output token. The best set-up within the limit is shown in detail."""


def sweep(
    *,
    model: p.ModelIn,
    hardware: p.HardwareList,
    layout: LayoutFlags = LayoutFlags(),
    load: LoadFlags = LoadFlags(),
    precision: p.PrecisionFlags = p.PrecisionFlags(),
    prices: p.PriceFlags = p.PriceFlags(),
    output: o.PageOut = None,
    json: o.Json = None,
) -> None:
    """Estimate many set-ups (layouts, batches, contexts) and show the Pareto front of throughput per GPU and TPOT."""
    from moeplan.perf import sweep as perf
    from moeplan.perf.layouts import LayoutChoice
    from moeplan.report.page import write_page
    from moeplan.report.perf_page import sweep_html

    settings = perf.SweepSettings(
        layout.nodes,
        layout.gpus,
        layout.gpus_per_node,
        LayoutChoice(layout.tp, layout.pp, layout.ep),
        load.batch,
        load.context,
        load.overlap,
        load.tpot,
        **precision.values(),
    )
    start = time.perf_counter()
    with progress("sweep") as tick:
        swept = perf.sweep(model, prices.hardware(hardware), settings, tick)
    show(sweep_lines(swept, time.perf_counter() - start), json, swept.to_dict())
    if output is not None:
        write_page(output, sweep_html(swept))
    echo(f"wrote {output}" if output else "a page with figures: add -o sweep.html")
