"""What `moeplan estimate` says: the figures of one set-up as JSON, and the same as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeplan.cli import perf_options as o

if TYPE_CHECKING:
    from moeplan.perf.routing import Routing
    from moeplan.perf.serving import Layout, Load
    from moeplan.perf.step import Step


def facts_of(
    layout: Layout, load: Load, batch: int, context: int, prefill: bool, usd_per_hour: float | None,
    routing: Routing | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the text says, as JSON; of several steps, their means.

    Args:
        batch: requests of each data-parallel rank. routing: of counted steps; None: uniform.
    """
    from moeplan.perf.memory import largest_batch, memory
    from moeplan.perf.serving import cost

    p, mtp = layout.parallel, load.drafts > 0
    step = (layout.prefill(batch, context) if prefill else layout.decode(batch, context, load, routing)).mean()
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


def lines_of(layout: Layout, facts: dict[str, Any], per_node: int) -> list[str]:
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
            f"routing: {_source(facts)}, busiest GPU {facts['load_ratio']:.2f} x the mean; "
            f"{slots} expert slots a layer; {via}{', two-batch overlap' if facts['overlap'] else ''}"
        )
        lines += _real_lines(facts)
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


def _source(facts: dict[str, Any]) -> str:
    if "real" not in facts:
        return f"{facts['routing']} (no trace was given)"
    real = facts["real"]
    return f"real, {real['steps']} steps of {real['trace']} under {real['plan']} ({real['strategy']})"


def _real_lines(facts: dict[str, Any]) -> list[str]:
    """What real routing did, beside what uniform routing would have done; how far the steps differ."""
    if "real" not in facts:
        return []
    real, flat = facts["real"], facts["real"]["uniform"]
    lines = [
        f"picks served on the token's own node: {real['local_share']:.1%} (uniform {flat['local_share']:.1%}); experts "
        f"that a GPU reads in a layer: {real['experts_per_gpu']:.2f} (uniform {flat['experts_per_gpu']:.2f})",
        f"with uniform routing, busiest GPU {flat['load_ratio']:.2f} x the mean, the step takes {flat['step_ms']:.3f} "
        f"ms; 9 in 10 real steps take {real['step_ms_p5']:.3f} to {real['step_ms_p95']:.3f} ms",
    ]
    return lines + [f"note: {note}" for note in real["notes"]]


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
