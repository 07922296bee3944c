"""`moeplan replay`: one plan's figures on a trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli import options as o
from moeplan.cli import placement_options as p
from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    claim_stdout,
    echo,
    emit_json,
    parse_layers,
    progress,
)
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.model.spec import ModelSpec
    from moeplan.planning import Plan
    from moeplan.trace import Trace


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Replay a trace under a plan, or under a placement that an engine serves with, beside linear.")
    def replay(
        trace: o.TraceArgument,
        plan: Annotated[
            str | None, typer.Option("--plan", metavar="PLAN", help="A plan made by 'moeplan plan'.")
        ] = None,
        placement: Annotated[
            Path | None,
            typer.Option("--placement", metavar="FILE", help="In place of a plan: an engine's placement file."),
        ] = None,
        engine: Annotated[
            p.EngineChoice | None, typer.Option("--engine", help="With --placement: whose file it is.")
        ] = None,
        config: p.Config = None,
        num_layers: p.Layers = None,
        ep_size: p.EpSize = None,
        nnodes: p.Nnodes = None,
        home: Annotated[
            o.HomeChoice | None,
            typer.Option("--home", help="With --placement: attention in a node [default], or on one GPU."),
        ] = None,
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
        p.keep_inputs(json, trace, plan, placement, config, hardware, model)
        if plan is not None and placement is not None:
            raise UsageError("--plan and --placement are two placements", hint="give one of the two")
        if plan is None and placement is None:
            raise UsageError(
                "replay needs a plan or a placement",
                hint="give one of the two: --plan PLAN, or --placement FILE --engine E",
            )
        if placement is None and any(flag is not None for flag in (engine, config, num_layers, ep_size, nnodes, home)):
            raise UsageError(
                "--engine, --config, --num-layers, --ep-size, --nnodes and --home go with --placement",
                hint="leave them out: the plan says how it is served",
            )
        from moeplan.cli.compare import show
        from moeplan.cluster import Dispatch
        from moeplan.planning import read_requests
        from moeplan.planning.store import load_plan
        from moeplan.replay import Setup
        from moeplan.replay import replay as run
        from moeplan.replay.comparison import check_shape
        from moeplan.trace import open_trace

        if plan is not None:
            p.refuse_trace(plan)
        if placement is not None:
            p.refuse_plan(placement)
        opened = open_trace(trace, without_layers=parse_layers(without_layers))
        if placement is None:
            stored = load_plan(plan or "")
            check_shape(opened.shape, stored.shape, str(plan))
        else:
            spec = p.model_from(config, opened.shape.num_experts, num_layers, None)
            stored = _placed(placement, engine, spec, opened, ep_size, nnodes, home)
        mode = stored.dispatch if dispatch is None else Dispatch(dispatch.value)
        setup = Setup(
            stored.cluster, (), stored.redundant, stored.rule, mode, folds=1, seed=seed, block=block, steps=steps,
            hidden=hidden, timing=o.timing_of(opened.shape, stored.cluster, mode, hardware, model, context),
        )  # fmt: skip
        start = time.perf_counter()
        with progress("replay"):
            requests = read_requests(opened, signature_tokens=signature_tokens, phase=phase.value)
            table = run(requests, stored, setup)
        show(table, opened, time.perf_counter() - start)
        seen = stored.trace_checksum == opened.checksum
        if seen:
            echo("  - the plan was fitted on this very trace: these are not figures on unseen requests")
        emit_json(
            json,
            {"trace": opened.label, "plan": plan or str(placement), "fitted_on_this_trace": seen, **table.to_dict()},
        )


def _placed(
    file: Path, engine: p.EngineChoice | None, spec: ModelSpec, trace: Trace,
    ep_size: int | None, nnodes: int | None, home: o.HomeChoice | None,
) -> Plan:  # fmt: skip
    """An engine's file as the plan it amounts to, for the trace's model; what config leaves open, the trace says."""
    from moeplan.cluster import Dispatch
    from moeplan.engines.files import ExpertLayout, examine
    from moeplan.engines.from_placement import deployed, rule_of

    if engine is None:
        raise UsageError("--placement needs to know whose file it is", where=str(file), hint="give --engine")
    if spec.moe_layers is None:
        spec = spec.override(moe_layers=trace.shape.layer_ids)
    read = examine(file, engine.value, spec, ExpertLayout(ep_size, nnodes)).need()
    return deployed(
        read, trace.shape, deployment=o.deployment_of(home), rule=rule_of(engine.value, read.nodes),
        dispatch=Dispatch.PICK, where=str(file),
    )  # fmt: skip
