"""`moeplan replay`: one plan's figures on a trace."""

from __future__ import annotations

import time
from typing import Annotated

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
from moeplan.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Replay a trace under a plan, beside linear.")
    def replay(
        trace: o.TraceArgument,
        plan: Annotated[str, typer.Option("--plan", metavar="PLAN", help="A plan made by 'moeplan plan'.")],
        dispatch: Annotated[
            o.DispatchChoice | None, typer.Option("--dispatch", help="What one message is; else as planned.")
        ] = None,
        signature_tokens: o.SignatureTokens = None,
        phase: o.Phase = o.PhaseChoice.decode,
        block: o.Block = 1,
        steps: Annotated[int, typer.Option("--steps", help="Decode steps replayed.")] = 500,
        hidden: o.Hidden = None,
        hardware: o.Hardware_ = None,
        model: o.Model = None,
        context: o.Context = None,
        without_layers: WithoutLayers = "",
        seed: o.Seed = 0,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        check_places(json)
        from moeplan.cli.compare import show
        from moeplan.cluster import Dispatch
        from moeplan.plan import read_requests
        from moeplan.plan.store import load_plan
        from moeplan.replay import Setup
        from moeplan.replay import replay as run
        from moeplan.trace import open_trace

        stored = load_plan(plan)
        opened = open_trace(trace, without_layers=parse_layers(without_layers))
        ours, theirs = opened.shape, stored.shape
        for label, a, b in (
            ("experts", ours.num_experts, theirs.num_experts),
            ("picks per token", ours.top_k, theirs.top_k),
            ("layers", ours.layer_ids, theirs.layer_ids),
        ):
            if a != b:
                count = (f"{len(a)} layers", f"{len(b)}") if isinstance(a, tuple) and isinstance(b, tuple) else (a, b)
                raise UsageError(
                    f"the trace and the plan differ in {label}: {count[0]} and {count[1]}",
                    where=plan,
                    mend="use the trace of the same model, and --without-layers as in the plan",
                )
        mode = stored.dispatch if dispatch is None else Dispatch(dispatch.value)
        setup = Setup(
            stored.cluster, (), stored.redundant, stored.rule, mode, folds=1, seed=seed, block=block, steps=steps,
            hidden=hidden, timing=o.timing_of(ours, stored.cluster, mode, hardware, model, context),
        )  # fmt: skip
        start = time.perf_counter()
        with progress("replay"):
            requests = read_requests(opened, signature_tokens=signature_tokens, phase=phase.value)
            table = run(requests, stored.result, setup)
        show(table, opened, time.perf_counter() - start)
        seen = stored.trace_checksum == opened.checksum
        if seen:
            say("  - the plan was fitted on this very trace: these are not figures on unseen requests")
        emit_json(json, {"trace": opened.label, "plan": plan, "fitted_on_this_trace": seen, **table.to_dict()})
