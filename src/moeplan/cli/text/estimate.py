"""One step as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplan.perf.estimate import Estimate

__all__ = ["estimate_lines"]


def estimate_lines(found: Estimate) -> list[str]:
    """One step for people."""
    facts, layout = found.to_dict(), found.step_model
    p, per_node = facts["parallel"], layout.gpus_per_node
    spec = layout.spec
    ways = ", ".join(f"{name} {p[name]}" for name in ("tp", "dp", "ep", "pp") if p[name] > 1) or "one GPU"
    held = f"{facts['context']:,} tokens {'each to prefill' if facts['phase'] == 'prefill' else 'of context'}"
    nodes = -(-p["gpus"] // per_node)
    where = f"{p['gpus']} x {layout.hardware.name}" + (f" ({nodes} nodes of {per_node})" if nodes > 1 else "")
    lines = [
        f"{spec.name}, {facts['phase']} on {where}: {ways}; {layout.precision.describe(spec)}",
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
    return [*lines, "", *_breakdown(facts), "", *_costs(facts, layout.hardware.watts)]


def _costs(facts: dict[str, Any], watts: float) -> list[str]:
    """Waiting, memory, speed and price."""
    memory, each = facts["memory"], facts["tokens_per_s_per_gpu"]
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    time = f"TPOT {facts['tpot_ms']:.2f} ms" if facts["tpot_ms"] else f"TTFT {facts['ttft_ms']:.1f} ms without queueing"
    if facts["tpot_ms"] and facts["tokens_per_step"] != 1:
        time += f" at {facts['tokens_per_step']:g} tokens a step"
    return [
        f"a GPU waits {facts['idle_share']:.1%} of the step for the network or for the slowest rank",
        f"memory of a GPU: weights {memory['weights_gb']:.1f} GB, KV cache {memory['kv_gb']:.1f} GB, activations "
        f"{memory['activations_gb']:.1f} GB, of {memory['usable_gb']:.1f} GB usable: {fits}; at most "
        f"{memory['largest_batch']:,} requests a rank",
        f"{time}; {each:,.0f} tokens/s a GPU, {each * facts['parallel']['gpus']:,.0f} in all",
        f"{facts['usd_per_million_tokens']:.3f} USD and {facts['kwh_per_million_tokens']:.3f} kWh per million tokens "
        f"({facts['usd_per_gpu_hour']:.2f} USD an hour and {watts:.0f} W a GPU)",
    ]


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
