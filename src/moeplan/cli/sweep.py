"""`moeplan sweep`: many set-ups of one model, and those that no other one beats."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import JsonOption, check_places, claim_stdout, echo, emit_json, progress
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.perf.sweep import Sweep

#: Rows of a front that the text shows; `--json` has all.
SHOWN = 14


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Sweep set-ups: layouts, batches, contexts; the best trade of throughput per GPU against TPOT.")
    def sweep(
        model: o.Model,
        hardware: o.HardwareList,
        nodes: Annotated[
            str, typer.Option("--nodes", metavar="N,..", help="Nodes; 1 stands for parts of a node, too.")
        ] = "1",
        gpus: Annotated[
            str | None, typer.Option("--gpus", metavar="N,..", help="Numbers of GPUs, instead of --nodes.")
        ] = None,
        gpus_per_node: o.GpusPerNode = None,
        tp: Annotated[str | None, typer.Option("--tp", metavar="N,..", help="Only these [default: all].")] = None,
        pp: Annotated[str | None, typer.Option("--pp", metavar="N,..", help="Only these [default: all].")] = None,
        ep: Annotated[
            str | None, typer.Option("--ep", metavar="N,..", help="Only these [default: all ranks of a stage, or 1].")
        ] = None,
        batch: Annotated[
            str, typer.Option("--batch", metavar="N,..", help="Requests of each data-parallel rank.")
        ] = "1,2,4,8,16,32,64,128,256,512",
        context: Annotated[str, typer.Option("--context", metavar="N,..", help="Tokens that each holds.")] = "4096",
        overlap: Annotated[bool, typer.Option("--overlap", help="Also with two-batch overlap.")] = False,
        tpot: Annotated[
            float, typer.Option("--tpot", metavar="MS", help="Limit for the set-up shown in detail.")
        ] = 50.0,
        weights: o.Weights = None,
        experts: o.Experts = None,
        kv: o.Kv = "bf16",
        usd_per_hour: o.UsdPerHour = None,
        watts: o.Watts = None,
        hardware_file: o.HardwareFile = None,
        json: JsonOption = None,
        output: o.Page = None,
    ) -> None:
        claim_stdout(json)
        check_places(output)
        from moeplan.perf.hardware import hardware_list
        from moeplan.perf.sweep import LayoutChoice, SweepSettings
        from moeplan.perf.sweep import sweep as run

        found = hardware_list(hardware, hardware_file, usd_per_hour, watts)
        choice = LayoutChoice(
            *(_numbers(flag, text) if text else None for flag, text in zip(_CHOICES, (tp, pp, ep), strict=True))
        )
        settings = SweepSettings(
            _numbers("--nodes", nodes), _numbers("--gpus", gpus) if gpus else None, gpus_per_node, choice,
            _numbers("--batch", batch), _numbers("--context", context), overlap, tpot, weights, experts, kv,
        )  # fmt: skip
        start = time.perf_counter()
        with progress("sweep") as report:
            swept = run(model, found, settings, report)
        seconds = time.perf_counter() - start
        spec, dtypes = swept.spec, swept.precision.describe(swept.spec)
        echo(
            f"{spec.name}, decode: {len(swept.points):,} set-ups in {seconds:.1f} s, {swept.unfit:,} more do not fit; "
            f"{dtypes}"
        )
        if spec.moe:
            echo("routing: uniform (no trace was given), the busiest GPU by chance alone")
        for tokens in settings.contexts:
            _show(swept, tokens, tpot)
        emit_json(json, swept.to_dict())
        if output is not None:
            from moeplan.report.perf_page import write_sweep_page

            write_sweep_page(Path(output), swept)
            echo(f"wrote {output}")
        else:
            echo("a page with figures: add -o sweep.html")


_CHOICES = ("--tp", "--pp", "--ep")


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """'1,2,8' as numbers of at least 1, each once, rising."""
    try:
        found = sorted({int(item) for item in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UsageError(f'{flag} "{text[:60]}" is not a list of numbers of at least 1', hint=f"e.g. {flag} 1,2,8")
    return tuple(found)


def _show(swept: Sweep, context: int, tpot: float) -> None:
    from moeplan.perf.sweep import pareto, thinned

    points = swept.at(context)
    echo()
    echo(f"Pareto front at {context:,} tokens of context")
    front = pareto(points)
    shown = thinned(front, SHOWN)
    rows = [
        [
            f"{1e3 * p.tpot_s:.2f}", f"{p.per_gpu_s:,.0f}", p.hardware.name, f"{p.gpus:,}",
            p.layout, f"{p.batch:,}", f"{p.usd:,.3f}", f"{p.kwh:,.3f}", p.bound,
        ]
        for p in shown
    ]  # fmt: skip
    head = ["TPOT ms", "tokens/s/GPU", "hardware", "GPUs", "layout", "batch", "USD/M", "kWh/M", "bound by"]
    for line in o.aligned(head, rows, left=(2, 4, 8)):
        echo(line)
    if len(shown) < len(front):
        echo(f"({len(front)} in all; --json has every one)")
    best = swept.best(context)
    if best is None:
        echo(f"no set-up keeps TPOT within {tpot:g} ms")
        return
    echo(f"within {tpot:g} ms: {best.per_gpu_s:,.0f} tokens/s a GPU on {best}, TPOT {1e3 * best.tpot_s:.2f} ms")
    cheap = min((p for p in points if p.tpot_s <= tpot / 1e3), key=lambda p: p.usd)
    if cheap.hardware.name != best.hardware.name:
        echo(f"cheapest: {cheap.usd:.3f} USD per million tokens on {cheap}, TPOT {1e3 * cheap.tpot_s:.2f} ms")
