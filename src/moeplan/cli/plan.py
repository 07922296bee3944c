"""`moeplan plan`: fit a plan on a whole trace and write it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import options as o
from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    check_places,
    claim_stdout,
    emit_json,
    parse_layers,
    progress,
    say,
)
from moeplan.errors import OutputError, PlanError

if TYPE_CHECKING:
    from moeplan.plan import RequestSet
    from moeplan.replay import Setup

_EXPECTED = ("remote_share", "remote_nodes_per_token", "gpu_load_ratio", "node_load_ratio", "experts_per_gpu")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Fit a plan on all usable requests of a trace.")
    def plan(
        trace: o.TraceArgument,
        output: Annotated[str, typer.Option("-o", "--output", metavar="PLAN", help="The plan's directory.")],
        nodes: o.Nodes = 8,
        gpus_per_node: o.GpusPerNode = 8,
        redundant: o.Redundant = 0,
        strategy: Annotated[str, typer.Option("--strategy", metavar="NAME", help="How to plan.")] = "moeplan",
        home: o.Home_ = o.HomeChoice.node,
        dispatch: o.Dispatch_ = o.DispatchChoice.pick,
        replica_rule: o.Rule = o.RuleChoice.nearest_static,
        signature_tokens: o.SignatureTokens = None,
        clusters: o.Clusters = None,
        without_layers: WithoutLayers = "",
        seed: o.Seed = 0,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        check_places(json)
        if Path(output).exists():
            raise OutputError("already exists", where=output, mend="choose another place, or remove it")
        import numpy as np

        from moeplan.cluster import check_slots
        from moeplan.plan import Options, read_requests, solve
        from moeplan.plan.store import save_plan
        from moeplan.replay import Setup
        from moeplan.replay.comparison import fit_problem
        from moeplan.trace import open_trace

        cluster, mode, rule = o.cluster_of(nodes, gpus_per_node, home, dispatch, replica_rule)
        setup = Setup(
            cluster, (strategy,), redundant, rule, mode, fit=0.75, folds=1, seed=seed, steps=100, draws=200,
            options=Options(clusters),
        )  # fmt: skip
        opened = open_trace(trace, without_layers=parse_layers(without_layers))
        check_slots(opened.shape.num_experts, redundant, cluster)  # before a large trace is read
        with progress("plan") as report:
            requests = read_requests(opened, signature_tokens=signature_tokens, rows=False)
            problem = fit_problem(requests, setup, np.arange(len(requests)))
            report(1, 3, "solving")
            result = solve(problem, strategy, seed)
            report(2, 3, "expected figures on an unseen quarter")
            expected = _expected(requests, setup, strategy)
        save_plan(
            output, result, problem, trace_checksum=opened.checksum, synthetic=opened.synthetic, expected=expected,
            stands_in=requests.stands_in,
        )  # fmt: skip
        say(f"{opened.label}: {strategy} on {len(requests)} {opened.unit} in {result.seconds:.2f} s -> {output}")
        for note in (*requests.notes, *result.notes):
            say(f"  - {note}")
        if not result.equal_groups:
            say("  - its groups are unequal in size: such a plan is for comparison and does not count")
        if expected is None:
            why = "too few requests to hold a quarter back" if requests.sums is None else "they take token rows"
            say(f"  - expected figures are not given: {why}")
        else:
            say("expected on unseen requests (fitted on three quarters, measured on the last):")
            for key in _EXPECTED:
                if expected[key]["value"] is None:
                    say(f"  {key:24s} - (per-step figures need groups of equal size)")
                    continue
                versus = expected[key].get("vs_linear")
                change = f"  ({100 * versus['value']:+.1f} % against linear)" if versus else ""
                say(f"  {key:24s} {expected[key]['value']:.3f}{change}")
        emit_json(
            json,
            {"plan": output, "strategy": strategy, "fit_seconds": result.seconds, "expected": expected},
        )


def _expected(requests: RequestSet, setup: Setup, strategy: str) -> dict[str, Any] | None:
    """The strategy's figures on a held-out quarter; None where the trace is too small for one, or has no rows."""
    from moeplan.replay import compare

    if requests.sums is not None:
        return None
    try:
        row = compare(requests, setup).row(strategy).to_dict()
    except PlanError:
        return None
    return {key: row[key] for key in _EXPECTED}
