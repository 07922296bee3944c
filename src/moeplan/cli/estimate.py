"""`moeplan estimate`: the time of one step of one set-up, what bounds it, and what it costs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    check_places,
    claim_stdout,
    echo,
    emit_json,
    given,
    parse_layers,
)  # fmt: skip
from moeplan.cli.estimate_text import lines_of
from moeplan.cli.options import DispatchChoice, Seed, SignatureTokens
from moeplan.cli.real import estimate_real
from moeplan.errors import UsageError


class StepPhase(StrEnum):
    """Which step."""

    prefill = "prefill"
    decode = "decode"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Estimate one set-up: time of a step by operator, memory, throughput, cost.")
    def estimate(
        ctx: typer.Context,
        hardware: Annotated[str, typer.Option("--hardware", help="A name of the catalogue, e.g. H100.")],
        model: Annotated[
            str | None,
            typer.Option("--model", help="A name of the catalogue, or a config.json [default: the trace's model]."),
        ] = None,
        nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="Nodes of one worker.")] = 1,
        gpus_per_node: o.GpusPerNode = None,
        tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks of attention.")] = 1,
        pp: Annotated[int, typer.Option("--pp", help="Pipeline stages.")] = 1,
        dp: Annotated[
            int | None, typer.Option("--dp", help="Data-parallel ranks of attention [default: the rest].")
        ] = None,
        ep: Annotated[
            int | None, typer.Option("--ep", help="Ranks that share the experts [default: all of a stage].")
        ] = None,
        redundant: Annotated[int, typer.Option("--redundant", metavar="R", help="Extra expert slots per layer.")] = 0,
        batch: Annotated[
            int | None,
            typer.Option(
                "--batch", metavar="B", help="Requests of each data-parallel rank [default: 128, or all of --trace]."
            ),
        ] = None,
        context: Annotated[
            int,
            typer.Option("--context", max=100_000_000, metavar="N", help="Tokens of a request: held, or to prefill."),
        ] = 4096,
        phase: Annotated[StepPhase, typer.Option("--phase", help="Which step.")] = StepPhase.decode,
        dispatch: Annotated[
            DispatchChoice | None, typer.Option("--dispatch", help="What one message is [default: pick, prefill node].")
        ] = None,
        overlap: Annotated[bool, typer.Option("--overlap", help="Two-batch overlap.")] = False,
        balanced: Annotated[bool, typer.Option("--balanced", help="Every GPU gets the same load.")] = False,
        skew: Annotated[
            float, typer.Option("--skew", metavar="X", help="Load of the busiest GPU over the mean.")
        ] = 1.0,
        mtp: o.Drafts = 0,
        accepted: o.Accepted = None,
        weights: o.Weights = None,
        experts: o.Experts = None,
        kv: o.Kv = "bf16",
        usd_per_hour: o.UsdPerHour = None,
        hardware_file: o.HardwareFile = None,
        trace: Annotated[
            str | None, typer.Option("--trace", metavar="TRACE", help="With --plan: real routing instead of uniform.")
        ] = None,
        plan: Annotated[
            str | None, typer.Option("--plan", metavar="PLAN", help="With --trace: a plan made by 'moeplan plan'.")
        ] = None,
        signature_tokens: SignatureTokens = None,
        without_layers: WithoutLayers = "",
        seed: Seed = 0,
        json: JsonOption = None,
        output: o.Page = None,
    ) -> None:
        claim_stdout(json)
        check_places(output)
        from moeplan.cluster import Dispatch
        from moeplan.perf.estimate import EstimateSettings
        from moeplan.perf.estimate import estimate as run
        from moeplan.perf.hardware import load_hardware as find_hardware

        machine = find_hardware(hardware, hardware_file).priced(usd_per_hour)
        settings = EstimateSettings(
            phase.value, tp, pp, dp, ep, weights, experts, kv, Dispatch(dispatch.value) if dispatch else None, overlap,
            balanced, skew, mtp, accepted,
        )  # fmt: skip
        if trace is not None or plan is not None:
            own = [flag for flag in _OF_THE_PLAN if given(ctx, flag)]
            found = estimate_real(
                trace, plan, machine, model, settings, batch=batch, context=context, given=own,
                without_layers=parse_layers(without_layers), signature_tokens=signature_tokens, seed=seed,
            )  # fmt: skip
        elif model is None:
            raise UsageError("--model is missing", hint="give a name of the catalogue, or a config.json")
        else:
            found = run(
                model, machine, nodes=nodes, gpus_per_node=gpus_per_node, redundant=redundant,
                batch=128 if batch is None else batch, context=context, settings=settings,
            )  # fmt: skip
        for line in lines_of(found):
            echo(line)
        emit_json(json, found.to_dict())
        if output is not None:
            from moeplan.report.perf_estimate import write_estimate_page

            write_estimate_page(Path(output), found)
            echo(f"wrote {output}")


#: What a plan says itself, and what real steps do not come with.
_OF_THE_PLAN = (
    "nodes", "gpus_per_node", "tp", "pp", "dp", "ep", "redundant", "skew", "balanced", "mtp", "accepted", "phase",
)  # fmt: skip
