"""`moeplan compare`: the table of strategies on unseen requests."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli import options as o
from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    check_places,
    claim_stdout,
    echo,
    emit_json,
    parse_layers,
    progress,
)

if TYPE_CHECKING:
    from moeplan.replay import Comparison
    from moeplan.trace import Trace


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(
        help="Compare strategies on requests they never saw. Each group (a node; a GPU with --home gpu) needs 3 usable "
        "requests to measure on (8), beside those that plans are fitted on: 48 in all for 8 nodes and --fit 0.5."
    )
    def compare(
        trace: o.TraceArgument,
        nodes: o.Nodes = 8,
        gpus_per_node: o.GpusPerNode = 8,
        redundant: o.Redundant = 0,
        strategies: Annotated[
            str, typer.Option("--strategies", metavar="A,B,..", help="Strategies, separated by commas.")
        ] = "random,linear,eplb,affinity,paper,moeplan",
        home: o.Home_ = o.HomeChoice.node,
        dispatch: o.Dispatch_ = o.DispatchChoice.pick,
        replica_rule: o.Rule = o.RuleChoice.nearest_static,
        signature_tokens: o.SignatureTokens = None,
        phase: o.Phase = o.PhaseChoice.decode,
        fit: Annotated[float, typer.Option("--fit", help="Share of the requests that plans may see.")] = 0.5,
        folds: Annotated[int, typer.Option("--folds", metavar="F", help="Repeated splits.")] = 4,
        block: o.Block = 1,
        steps: Annotated[int, typer.Option("--steps", help="Decode steps replayed in each fold.")] = 500,
        clusters: o.Clusters = None,
        hidden: o.Hidden = None,
        hardware: o.Hardware_ = None,
        model: o.Model = None,
        context: o.Context = None,
        without_layers: WithoutLayers = "",
        seed: o.Seed = 0,
        json: JsonOption = None,
        output: Annotated[
            str | None, typer.Option("-o", "--output", metavar="HTML", help="Also write a report page.")
        ] = None,
    ) -> None:
        claim_stdout(json)
        check_places(output)
        from moeplan.cluster import check_slots
        from moeplan.planning import read_requests
        from moeplan.planning.strategies.paper import PaperParams
        from moeplan.replay import Setup
        from moeplan.replay import compare as run
        from moeplan.replay.comparison import strategy_names
        from moeplan.trace import open_trace

        cluster, mode, rule = o.cluster_of(nodes, gpus_per_node, home, dispatch, replica_rule)
        paper = {params.name: params for params in (PaperParams(clusters), PaperParams(clusters, equal=False))}
        chosen = tuple(paper.get(name, name) for name in strategy_names(strategies))
        setup = Setup(
            cluster, chosen, redundant, rule, mode,
            fit, folds, seed, block, steps, hidden=hidden,
        )  # fmt: skip
        opened = open_trace(trace, without_layers=parse_layers(without_layers))
        check_slots(opened.shape.num_experts, redundant, cluster)  # before a large trace is read
        setup = dataclasses.replace(setup, timing=o.timing_of(opened.shape, cluster, mode, hardware, model, context))
        start = time.perf_counter()
        with progress("compare") as report:
            requests = read_requests(opened, signature_tokens=signature_tokens, phase=phase.value)
            table = run(requests, setup, report)
        show(table, opened, time.perf_counter() - start)
        emit_json(json, {"trace": opened.label, "synthetic": opened.synthetic, **table.to_dict()})
        if output is not None:
            from moeplan.report.compare_page import write_compare_page

            write_compare_page(Path(output), table, opened)
            echo(f"wrote {output}")
        else:
            echo("a page with figures: add -o compare.html")


def show(table: Comparison, trace: Trace, seconds: float) -> None:
    """The table for people."""
    from moeplan.cli.table import table_lines
    from moeplan.report.compare_page import verdict

    setup, shape = table.head["setup"], trace.shape
    echo(
        f"{trace.label}: {shape.num_layers} layers x {shape.num_experts} experts, top-{shape.top_k}, on "
        f"{setup['nodes']} nodes x {setup['gpus_per_node']} GPUs, {setup['redundant']} redundant slots, "
        f"dispatch per {setup['dispatch']}"
    )
    count = table.head["requests"]
    done = f"measured on {count['test'][0]} requests"
    if count["fit"][0]:
        folds = f"{setup['folds']} fold{'s' * (setup['folds'] != 1)}"
        done = f"fit on {count['fit'][0]} requests, measured on {count['test'][0]} unseen ones, {folds}"
    echo(f"{done} ({table.head['column']}), {seconds:.1f} s")
    for note in table.notes:
        echo(f"note: {note}")
    echo()
    for line in table_lines(table):
        echo(line)
    echo()
    echo(verdict(table))
    echo()
    for note in table.method:
        echo(f"  - {note}")
