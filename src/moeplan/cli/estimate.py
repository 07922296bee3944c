"""`moeplan estimate`: the time of one step of one set-up, what bounds it, and what it costs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from moeplan.cli.estimate_text import facts_of, lines_of
from moeplan.cli.options import DispatchChoice, Seed, SignatureTokens
from moeplan.cli.real import read_real
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.model.spec import ModelSpec
    from moeplan.perf.memory import Parallel
    from moeplan.perf.serving import Layout


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
        from moeplan.model.spec import model as find_model
        from moeplan.perf import hardware as machines
        from moeplan.perf.serving import Layout, Load
        from moeplan.perf.sweep import precision_of

        machine = machines.hardware(hardware, hardware_file)
        mode = Dispatch(dispatch.value) if dispatch else None
        real = None
        if trace is not None or plan is not None:
            own = [flag for flag in _OF_THE_PLAN if given(ctx, flag)]
            real = read_real(
                trace, plan, machine, model, mode, context, given=own, without_layers=parse_layers(without_layers),
                signature_tokens=signature_tokens,
            )  # fmt: skip
            spec, parallel, per_node = real.spec, real.parallel, real.stored.cluster.gpus_per_node
            mode = mode or real.stored.dispatch
        elif model is None:
            raise UsageError("--model is missing", hint="give a name of the catalogue, or a config.json")
        else:
            spec, per_node = find_model(model), gpus_per_node or machine.scale_up_size
            if nodes < 1 or per_node < 1:
                raise UsageError("--nodes and --gpus-per-node must be at least 1")
            gpus = nodes * per_node if gpus_per_node or nodes > 1 else None
            parallel = _parallel(spec, gpus, tp, pp, dp, ep, redundant, per_node)
        if context < 1 or (batch is not None and batch < 1):
            raise UsageError("--batch and --context must be at least 1")
        layout = Layout(
            spec, machine, parallel, precision_of(spec, weights, experts, kv), mode, overlap, per_node, balanced, skew
        )  # fmt: skip
        _check_ranges(layout, phase, mtp, usd_per_hour)
        load = Load(context, 1, drafts=mtp, accepted=o.accepted_of(mtp, accepted))
        if real is not None:
            steps = real.steps(layout, context, batch, seed)
            facts = facts_of(layout, load, steps.live, context, False, usd_per_hour, steps.routing)
            facts |= {"routing": "real", "real": real.facts(steps, layout, context)}
        else:
            facts = facts_of(layout, load, batch or 128, context, phase is StepPhase.prefill, usd_per_hour)
        for line in lines_of(layout, facts, per_node):
            echo(line)
        emit_json(json, facts)
        if output is not None:
            from moeplan.report.perf_estimate import write_estimate_page

            write_estimate_page(Path(output), layout, load, facts, steps.routing if real else None)
            echo(f"wrote {output}")


#: What a plan says itself, and what real steps do not come with.
_OF_THE_PLAN = (
    "nodes", "gpus_per_node", "tp", "pp", "dp", "ep", "redundant", "skew", "balanced", "mtp", "accepted", "phase",
)  # fmt: skip


def _parallel(
    spec: ModelSpec, gpus: int | None, tp: int, pp: int, dp: int | None, ep: int | None, redundant: int, per_node: int
) -> Parallel:
    """What was asked for, the rest filled in: all accelerators are used."""
    from moeplan.perf.memory import Parallel, check_parallel

    if min(tp, pp, dp or 1, ep or 1) < 1:
        raise UsageError("--tp, --pp, --dp and --ep must be at least 1")
    if gpus is None:
        gpus = per_node if dp is None and spec.moe is not None else tp * pp * (dp or 1)
    if dp is None:
        if gpus % (tp * pp):
            raise UsageError(f"tp {tp} x pp {pp} does not divide the {gpus} GPUs", hint="choose tp and pp that do")
        dp = gpus // (tp * pp)
    if tp * dp * pp != gpus:
        raise UsageError(
            f"tp {tp} x dp {dp} x pp {pp} = {tp * dp * pp} GPUs, but there are {gpus}",
            hint=f"make their product {gpus}, or leave --dp out",
        )
    parallel = Parallel(tp=tp, dp=dp, pp=pp, ep=ep or (tp * dp if spec.moe else 1), redundant=redundant)
    check_parallel(spec, parallel)
    return parallel


def _check_ranges(layout: Layout, phase: StepPhase, mtp: int, usd_per_hour: float | None) -> None:
    shared = layout.parallel.ep
    if not layout.skew >= 1:
        raise UsageError(f"--skew {layout.skew:g} is below 1", hint="it is the busiest GPU's load over the mean")
    if layout.skew > 1 and layout.skew > shared:
        raise UsageError(f"--skew {layout.skew:g} is more than the {shared} GPUs that share the experts")
    if layout.skew > 1 and layout.balanced:
        raise UsageError("--skew and --balanced exclude each other")
    if mtp < 0 or (mtp and phase is StepPhase.prefill):
        raise UsageError("--mtp is of decode, and at least 0")
    o.check_price("--usd-per-hour", usd_per_hour)
