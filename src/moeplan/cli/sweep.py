"""`moeplan sweep`: many set-ups of one model, and those that no other one beats."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import JsonOption, check_places, claim_stdout, echo, emit_json, progress
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeplan.model.spec import ModelSpec
    from moeplan.perf.sweep import Point

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
        from moeplan.model.spec import model as find_model
        from moeplan.perf.sweep import Choice, node_parts, precision_of
        from moeplan.perf.sweep import sweep as run

        spec, found = find_model(model), o.machines(hardware, hardware_file, usd_per_hour, watts, gpus_per_node)
        counts = _numbers("--gpus", gpus) if gpus else None
        nodes_ = _numbers("--nodes", nodes)
        tried = []
        for machine in found:
            per_node = gpus_per_node or machine.scale_up_size
            parts = node_parts(per_node) if 1 in nodes_ else []
            tried.append((machine, counts or sorted({*parts, *(n * per_node for n in nodes_)})))
        if not tpot > 0:
            raise UsageError(f"--tpot {tpot:g} is not above 0", hint="give milliseconds")
        choice = Choice(
            *(_numbers(flag, text) if text else None for flag, text in zip(_CHOICES, (tp, pp, ep), strict=True))
        )
        contexts = _numbers("--context", context)
        precision = precision_of(spec, weights, experts, kv)
        start = time.perf_counter()
        with progress("sweep") as report:
            swept = run(
                spec, tried, precision, batches=_numbers("--batch", batch), contexts=contexts, choice=choice,
                gpus_per_node=gpus_per_node, overlap=overlap, usd_per_hour=usd_per_hour, watts=watts, report=report,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        if not swept.points:
            raise UsageError(
                f"{spec.name} fits none of the {swept.unfit} set-ups", hint="use more GPUs, or smaller dtypes"
            )
        facts = _facts(spec, swept.points, swept.unfit, contexts, tpot)
        dtypes = o.dtypes(spec, precision)
        echo(
            f"{spec.name}, decode: {len(swept.points):,} set-ups in {seconds:.1f} s, {swept.unfit:,} more do not fit; "
            f"{dtypes}"
        )
        if spec.moe:
            echo("routing: uniform (no trace was given), the busiest GPU by chance alone")
        for tokens in contexts:
            _show([p for p in swept.points if p.context == tokens], tokens, tpot)
        emit_json(json, facts)
        if output is not None:
            from moeplan.report.perf_page import write_sweep_page

            write_sweep_page(Path(output), spec, swept, tpot / 1e3, dtypes)
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


def _show(points: list[Point], context: int, tpot: float) -> None:
    from moeplan.perf.sweep import best_within, pareto, thinned, ways, where

    echo()
    echo(f"Pareto front at {context:,} tokens of context")
    front = pareto(points)
    shown = thinned(front, SHOWN)
    rows = [
        [
            f"{1e3 * p.tpot_s:.2f}", f"{p.per_gpu_s:,.0f}", p.layout.hardware.name, f"{p.layout.parallel.gpus:,}",
            ways(p.layout), f"{p.batch:,}", f"{p.usd:,.3f}", f"{p.kwh:,.3f}", p.bound,
        ]
        for p in shown
    ]  # fmt: skip
    head = ["TPOT ms", "tokens/s/GPU", "hardware", "GPUs", "layout", "batch", "USD/M", "kWh/M", "bound by"]
    for line in o.aligned(head, rows, left=(2, 4, 8)):
        echo(line)
    if len(shown) < len(front):
        echo(f"({len(front)} in all; --json has every one)")
    best = best_within(points, tpot / 1e3)
    if best is None:
        echo(f"no set-up keeps TPOT within {tpot:g} ms")
        return
    echo(f"within {tpot:g} ms: {best.per_gpu_s:,.0f} tokens/s a GPU on {where(best)}, TPOT {1e3 * best.tpot_s:.2f} ms")
    cheap = min((p for p in points if p.tpot_s <= tpot / 1e3), key=lambda p: p.usd)
    if cheap.layout.hardware.name != best.layout.hardware.name:
        echo(f"cheapest: {cheap.usd:.3f} USD per million tokens on {where(cheap)}, TPOT {1e3 * cheap.tpot_s:.2f} ms")


def _facts(
    spec: ModelSpec, points: Sequence[Point], unfit: int, contexts: Sequence[int], tpot: float
) -> dict[str, Any]:
    """Everything, as JSON."""
    from moeplan.perf.sweep import best_within, pareto

    fronts = {id(p) for tokens in contexts for p in pareto([q for q in points if q.context == tokens])}
    best = {tokens: best_within([p for p in points if p.context == tokens], tpot / 1e3) for tokens in contexts}
    return {
        "model": spec.name,
        "phase": "decode",
        "routing": "uniform" if spec.moe else None,
        "set_ups": len(points),
        "do_not_fit": unfit,
        "tpot_limit_ms": tpot,
        "best": {str(tokens): _point_facts(p, True) if p else None for tokens, p in best.items()},
        "points": [_point_facts(p, id(p) in fronts) for p in points],
    }


def _point_facts(p: Point, front: bool) -> dict[str, Any]:
    """One set-up, as JSON."""
    return {
        **o.layout_facts(p.layout),
        "batch": p.batch,
        "context": p.context,
        "tpot_ms": 1e3 * p.tpot_s,
        "tokens_per_s_per_gpu": p.per_gpu_s,
        "bound": p.bound,
        "usd_per_million_tokens": p.usd,
        "kwh_per_million_tokens": p.kwh,
        "pareto": front,
    }
