"""`moeplan estimate`: the time of one step of one set-up, what bounds it, and what it costs."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import JsonOption, check_places, claim_stdout, emit_json, say
from moeplan.cli.options import DispatchChoice
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.perf.memory import Parallel
    from moeplan.perf.models import ModelSpec
    from moeplan.perf.serving import Layout, Load
    from moeplan.perf.step import Step


class StepPhase(StrEnum):
    """Which step."""

    prefill = "prefill"
    decode = "decode"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="Estimate one set-up: time of a step by operator, memory, throughput, cost.")
    def estimate(
        model: o.Model,
        hardware: Annotated[str, typer.Option("--hardware", help="A name of the catalogue, e.g. H100.")],
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
        batch: Annotated[int, typer.Option("--batch", metavar="B", help="Requests of each data-parallel rank.")] = 128,
        context: Annotated[
            int, typer.Option("--context", metavar="N", help="Tokens of a request: held, or to prefill.")
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
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        check_places(json)
        from moeplan.cluster import Dispatch
        from moeplan.perf import hardware as machines
        from moeplan.perf.models import model as find_model
        from moeplan.perf.serving import Layout, Load
        from moeplan.perf.sweep import precision_of

        spec, machine = find_model(model), machines.hardware(hardware, hardware_file)
        per_node = gpus_per_node or machine.scale_up_size
        if nodes < 1 or per_node < 1 or batch < 1 or context < 1:
            raise UsageError("--nodes, --gpus-per-node, --batch and --context must be at least 1")
        layout = Layout(
            spec,
            machine,
            _parallel(
                spec, nodes * per_node if gpus_per_node or nodes > 1 else None, tp, pp, dp, ep, redundant, per_node
            ),
            precision_of(spec, weights, experts, kv),
            Dispatch(dispatch.value) if dispatch else None,
            overlap,
            per_node,
            balanced,
            skew,
        )
        _check_ranges(layout, phase, mtp, usd_per_hour)
        load = Load(context, 1, drafts=mtp, accepted=o.accepted_of(mtp, accepted))
        facts = _facts(layout, load, batch, context, phase is StepPhase.prefill, usd_per_hour)
        for line in _lines(layout, facts, per_node):
            say(line)
        emit_json(json, facts)


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
            raise UsageError(f"tp {tp} x pp {pp} does not divide the {gpus} GPUs", mend="choose tp and pp that do")
        dp = gpus // (tp * pp)
    if tp * dp * pp != gpus:
        raise UsageError(
            f"tp {tp} x dp {dp} x pp {pp} = {tp * dp * pp} GPUs, but there are {gpus}",
            mend=f"make their product {gpus}, or leave --dp out",
        )
    parallel = Parallel(tp=tp, dp=dp, pp=pp, ep=ep or (tp * dp if spec.moe else 1), redundant=redundant)
    check_parallel(spec, parallel)
    return parallel


def _check_ranges(layout: Layout, phase: StepPhase, mtp: int, usd_per_hour: float | None) -> None:
    shared = layout.parallel.ep
    if not layout.skew >= 1:
        raise UsageError(f"--skew {layout.skew:g} is below 1", mend="it is the busiest GPU's load over the mean")
    if layout.skew > 1 and layout.skew > shared:
        raise UsageError(f"--skew {layout.skew:g} is more than the {shared} GPUs that share the experts")
    if layout.skew > 1 and layout.balanced:
        raise UsageError("--skew and --balanced exclude each other")
    if mtp < 0 or (mtp and phase is StepPhase.prefill):
        raise UsageError("--mtp is of decode, and at least 0")
    o.check_price("--usd-per-hour", usd_per_hour)


def _facts(
    layout: Layout, load: Load, batch: int, context: int, prefill: bool, usd_per_hour: float | None
) -> dict[str, Any]:
    """Everything that the text says, as JSON."""
    from moeplan.perf.memory import largest_batch, memory
    from moeplan.perf.serving import cost

    p, mtp = layout.parallel, load.drafts > 0
    step = layout.prefill(batch, context) if prefill else layout.decode(batch, context, load)
    seconds = float(step.seconds)
    yields = context if prefill else load.accepted
    per_gpu = batch * p.dp * yields / seconds / p.gpus
    usd, kwh = cost(layout.hardware, per_gpu, usd_per_hour=usd_per_hour)
    rows = batch * context if prefill else batch * (load.drafts + 1)
    used = memory(
        layout.spec, layout.hardware, p, layout.precision, batch=batch, context=context, prefill_tokens=rows, mtp=mtp
    )
    return {
        "model": layout.spec.name,
        "hardware": layout.hardware.name,
        "phase": "prefill" if prefill else "decode",
        "parallel": {"tp": p.tp, "dp": p.dp, "ep": p.ep, "pp": p.pp, "gpus": p.gpus, "redundant": p.redundant},
        "precision": {name: getattr(layout.precision, name) for name in ("weights", "experts", "kv")},
        "dispatch": step.mode.value if step.mode else None,
        "overlap": layout.overlap,
        "routing": step.routing,
        "load_ratio": step.load_ratio,
        "batch": batch,
        "context": context,
        "step_ms": 1e3 * seconds,
        "idle_share": float(step.idle_share),
        "operators": _operators(step),
        "tokens_per_step": yields,
        "tokens_per_s_per_gpu": per_gpu,
        "tpot_ms": None if prefill else 1e3 * seconds / load.accepted,
        "ttft_ms": 1e3 * seconds if prefill else None,
        "usd_per_million_tokens": usd,
        "kwh_per_million_tokens": kwh,
        "usd_per_gpu_hour": layout.hardware.usd_per_hour if usd_per_hour is None else usd_per_hour,
        "memory": {
            "weights_gb": sum(used.weights.values()) / 1e9,
            "kv_gb": used.kv / 1e9,
            "activations_gb": used.activations / 1e9,
            "usable_gb": used.usable / 1e9,
            "fits": used.fits,
            "largest_batch": largest_batch(
                layout.spec, layout.hardware, p, layout.precision, context=context, mtp=mtp,
                prefill_tokens=rows if prefill else 0,
            ),
        },
    }  # fmt: skip


def _operators(step: Step) -> list[dict[str, Any]]:
    return [
        {
            "name": op.name,
            "ms": 1e3 * float(op.seconds),
            "hidden_ms": 1e3 * float(op.hidden),
            "exposed_ms": 1e3 * float(op.exposed),
            "bound": op.bound,
        }
        for op in step.operators
    ]


def _lines(layout: Layout, facts: dict[str, Any], per_node: int) -> list[str]:
    """The same for people."""
    p, memory = facts["parallel"], facts["memory"]
    spec = layout.spec
    ways = ", ".join(f"{name} {p[name]}" for name in ("tp", "dp", "ep", "pp") if p[name] > 1) or "one GPU"
    held = f"{facts['context']:,} tokens {'each to prefill' if facts['phase'] == 'prefill' else 'of context'}"
    nodes = -(-p["gpus"] // per_node)
    where = f"{p['gpus']} x {layout.hardware.name}" + (f" ({nodes} nodes of {per_node})" if nodes > 1 else "")
    lines = [
        f"{spec.name}, {facts['phase']} on {where}: {ways}; {o.dtypes(spec, layout.precision)}",
        f"{facts['batch']} requests"
        + (f" on each of {p['dp']} data-parallel ranks" if p["dp"] > 1 else "")
        + f", {held}",
    ]
    if spec.moe:
        slots = spec.moe.experts + p["redundant"]
        via = f"dispatch {facts['dispatch']}" if facts["dispatch"] else "no dispatch"
        lines.append(
            f"routing: {facts['routing']} (no trace was given), busiest GPU {facts['load_ratio']:.2f} x the mean; "
            f"{slots} expert slots a layer; {via}{', two-batch overlap' if facts['overlap'] else ''}"
        )
    lines += ["", *_breakdown(facts), ""]
    lines.append(f"a GPU waits {facts['idle_share']:.1%} of the step for the network or for the slowest rank")
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    lines.append(
        f"memory of a GPU: weights {memory['weights_gb']:.1f} GB, KV cache {memory['kv_gb']:.1f} GB, activations "
        f"{memory['activations_gb']:.1f} GB, of {memory['usable_gb']:.1f} GB usable: {fits}; at most "
        f"{memory['largest_batch']:,} requests a rank"
    )
    each = facts["tokens_per_s_per_gpu"]
    time = f"TPOT {facts['tpot_ms']:.2f} ms" if facts["tpot_ms"] else f"TTFT {facts['ttft_ms']:.1f} ms without queueing"
    if facts["tpot_ms"] and facts["tokens_per_step"] != 1:
        time += f" at {facts['tokens_per_step']:g} tokens a step"
    lines.append(f"{time}; {each:,.0f} tokens/s a GPU, {each * p['gpus']:,.0f} in all")
    lines.append(
        f"{facts['usd_per_million_tokens']:.3f} USD and {facts['kwh_per_million_tokens']:.3f} kWh per million tokens "
        f"({facts['usd_per_gpu_hour']:.2f} USD an hour and {layout.hardware.watts:.0f} W a GPU)"
    )
    return lines


def _breakdown(facts: dict[str, Any]) -> list[str]:
    """One line per operator; the exposed times add up to the step."""
    lines = [f"{'operator':<18}{'ms':>10}{'hidden':>10}{'exposed':>10}{'share':>8}  bound by"]
    lines.append("-" * len(lines[0]))
    for op in facts["operators"]:
        share = op["exposed_ms"] / facts["step_ms"]
        hidden = f"{op['hidden_ms']:.3f}" if op["hidden_ms"] else ""
        times = f"{op['ms']:>10.3f}{hidden:>10}{op['exposed_ms']:>10.3f}"
        lines.append(f"{op['name']:<18}{times}{share:>8.1%}  {op['bound']}")
    lines.append(f"{'step':<18}{'':>20}{facts['step_ms']:>10.3f}{1:>8.0%}")
    return lines
