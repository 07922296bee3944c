"""The page of `estimate`: where one step's time goes, what bounds each operator, and what skew costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeplan.perf.estimate import Estimate
from moeplan.perf.step_model import StepModel
from moeplan.report.page import Section, Table, render
from moeplan.report.perf_sections import ERROR, UNIFORM, can_skew, skew_section, skewed, time_section

__all__ = ["estimate_html"]


def estimate_html(found: Estimate) -> str:
    """The whole page as HTML."""
    facts, layout, load, step = found.to_dict(), found.step_model, found.workload, found.step
    batch, context, prefill = found.batch, found.context, found.phase == "prefill"
    gpus = f"{layout.parallel.gpus} x {layout.hardware.name} ({layout.layout}, {batch:,} requests per rank)"
    sections = [_figures(facts, layout), time_section(f"{facts['phase']} step", f"On {gpus}", {facts["phase"]: step})]
    if can_skew(layout):
        line = skewed(layout, batch, context, load=load, prefill=prefill, up_to=facts["load_ratio"])
        curve = {f"{batch:,} requests per rank": line}
        mark = {"this plan": (facts["load_ratio"], facts["tpot_ms"])} if "real" in facts else None
        sections.append(skew_section("TTFT" if prefill else "TPOT", curve, mark))
    notices = [ERROR]
    if "real" in facts:
        real = facts["real"]
        notices.append(f"Routing is real: {real['steps']} steps of {real['trace']} under {real['plan']}.")
        notices += [f"{note[0].upper()}{note[1:]}." for note in real["notes"]]
    elif layout.spec.moe:
        notices.append(UNIFORM)
    if not facts["memory"]["fits"]:
        notices.append("This set-up does not fit in memory; its times are hypothetical.")
    return render(f"One {facts['phase']} step of {layout.spec.name}", gpus, notices, sections)


def _figures(facts: Mapping[str, Any], layout: StepModel) -> Section:
    """The step, its tokens and costs; beside uniform routing, where a plan was given."""
    memory, real = facts["memory"], facts.get("real")
    time = "TTFT" if facts["phase"] == "prefill" else "TPOT"
    sentence = (
        f"A step takes {facts['step_ms']:.2f} ms: {facts['tokens_per_s_per_gpu']:,.0f} tokens/s per GPU, "
        f"{facts['usd_per_million_tokens']:.3f} USD and {facts['kwh_per_million_tokens']:.3f} kWh per million tokens."
    )
    rows = [
        [f"{time}, ms", f"{facts['tpot_ms'] or facts['ttft_ms']:.2f}"],
        ["tokens/s of all GPUs", f"{facts['tokens_per_s_per_gpu'] * layout.parallel.gpus:,.0f}"],
        ["memory used per GPU, GB", f"{memory['weights_gb'] + memory['kv_gb'] + memory['activations_gb']:.1f}"],
        ["memory usable per GPU, GB", f"{memory['usable_gb']:.1f}"],
        ["maximum requests per rank", f"{memory['largest_batch']:,}"],
    ]
    if real is None:
        return Section("Time, throughput and cost", sentence, table=Table(["figure", "value"], rows))
    flat = real["uniform"]
    sentence += (
        f" Routing is that of {real['trace']} under {real['plan']} ({real['strategy']}), {real['steps']} steps; "
        f"uniform routing would take {flat['step_ms']:.2f} ms."
    )
    compared = [
        ["step, ms", f"{facts['step_ms']:.2f}", f"{flat['step_ms']:.2f}"],
        ["load of the busiest GPU / mean", f"{real['load_ratio']:.2f}", f"{flat['load_ratio']:.2f}"],
        [
            "picks served on the token's own node, %",
            f"{100 * real['local_share']:.1f}",
            f"{100 * flat['local_share']:.1f}",
        ],
        ["experts read per GPU and layer", f"{real['experts_per_gpu']:.2f}", f"{flat['experts_per_gpu']:.2f}"],
    ]
    rest = [[*row, ""] for row in rows[1:]]
    return Section(
        "Time, throughput and cost",
        sentence,
        table=Table(["figure", "real routing", "uniform routing"], [*compared, *rest]),
    )
