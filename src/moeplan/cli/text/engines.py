"""Placement files of engines as text: written, balanced from counts, checked, read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.cli.terminal import echo, plural

if TYPE_CHECKING:
    from moeplan.cluster import ReplicaRule
    from moeplan.engines.balancing import Balanced
    from moeplan.engines.exporting import ExportReport
    from moeplan.engines.report import Report
    from moeplan.planning import Plan
    from moeplan.planning.replica_value import ReplicaLocality
    from moeplan.trace import Trace

__all__ = [
    "balanced_lines",
    "check_facts",
    "check_lines",
    "placement_facts",
    "placement_lines",
    "replica_lines",
    "show_export",
]

#: Findings that are printed; all of them are in the JSON.
SHOWN = 40


def show_export(report: ExportReport, source: Path) -> None:
    """What was written, and the command to start the engine with."""
    placement, start = report.placement, report.launch
    per_gpu, moe = placement.num_slots // placement.ep_size, len(placement.layer_ids)
    echo(
        f"wrote {report.path}: {placement.num_slots} slots a layer ({placement.num_experts} experts + "
        f"{placement.redundant} redundant), {per_gpu} on each of {placement.ep_size} GPUs, {placement.nodes} nodes"
    )
    if report.engine == "sglang":
        echo(f"its rows are all {report.hidden_layers} hidden layers, {moe} of them with experts")
    elif not report.checked_layers:
        echo(f"note: its {moe} layers are the plan's; with --config they are checked against the model's")
    _show_block("start the engine with:", start.text())
    if start.extra is not None:
        _show_block(f"and {start.extra[0]}:", start.extra[1].rstrip())
    for note in start.notes:
        echo(f"note: {note}")
    if report.layers_left_out:
        named = f"layer{'s' * (len(report.layers_left_out) > 1)} {', '.join(map(str, report.layers_left_out))}"
        echo(
            f"warning: {source} skips {named}: if the model has experts there, the engine will not start without rows "
            "for them; plan on a trace of all layers, and give --config to be sure"
        )
    if report.ignored is not None:
        echo(f"warning: {report.ignored}")


def _show_block(head: str, text: str) -> None:
    for line in (head, "", *(f"  {line}" for line in text.split("\n")), ""):
        echo(line)


def replica_lines(plan: Plan, rule: ReplicaRule, value: tuple[ReplicaLocality, Trace] | None) -> Iterator[str]:
    """The value of replicas under the engine's way of choosing one; `value`: on a trace."""
    from moeplan.cluster import ReplicaRule

    if value is not None:
        locality, trace = value
        seen = " (the plan was fitted on this trace)" * (plan.provenance.trace_checksum == trace.checksum)
        yield f"picks served on another node, modelled on {trace.label}{seen}:"
        yield f"  {locality.nearest:.3f} where the nearest replica is used (SGLang)"
        yield f"  {locality.any_replica:.3f} where any replica is used (vLLM, TensorRT-LLM, vLLM-Ascend)"
        yield f"  {locality.scattered:.3f} where groups and placement are random"
    if rule is ReplicaRule.HASH and plan.redundant > 0:
        yield (
            "warning: this engine does not prefer a near replica: replicas balance load, but keep few picks on the "
            "token's own node" + ("" if value else "; --trace TRACE models how many")
        )
    if rule is not plan.replica_rule and plan.redundant > 0:
        figure = ((plan.expected or {}).get("remote_share") or {}).get("value")
        holds = f", so its expected remote_share of {figure:.3f} does not hold" if isinstance(figure, float) else ""
        yield f"warning: the plan is made for {plan.replica_rule.value}, this engine is modelled as {rule.value}{holds}"


def balanced_lines(found: Balanced, source: Path, engine: str, others: Path | None) -> Iterator[str]:
    """Ways to balance counts with their load ratios, and the modelled step."""
    from moeplan.engines.balancing import LACKS

    counts, cluster = found.counts, found.cluster
    layers, experts = counts.counts.shape
    yield (
        f"{source}: {layers} layers x {experts} experts, {int(counts.counts.sum())} picks ({counts.phase}); on "
        f"{cluster.nodes} nodes x {cluster.gpus_per_node} GPUs, {found.best.placement.redundant} redundant slots, "
        f"replicas selected as {engine} does ({found.replica_rule.value})"
    )
    yield from (f"note: {note}" for note in counts.source.get("notes", ()))
    yield "picks of the busiest GPU over the mean, mean over layers (1 is even):"
    yield f"  {'':12s} {'fitted on':>10s}" + (f"  {'measured on ' + others.name}" if others else "")
    for way in found.candidates:
        measured = f"  {found.measured[way.name]:.3f}" if found.measured else ""
        yield f"  {way.name:12s} {way.ratio:10.3f}" + measured + " <- written" * (way is found.best)
    if found.measured is None:
        yield "  measured on the counts that it was made from; use --measure OTHER for other counts"
    if found.step is not None:
        yield _step_line(found, found.step)
    yield from (f"note: {line}" for line in LACKS)


def _step_line(found: Balanced, step: dict[str, Any]) -> str:
    linear = found.candidates[0].name
    before, after = step["ms"][linear], step["ms"][found.best.name]
    return (
        f"modelled decode step of {step['model']} on {step['hardware']}, {step['batch']} requests a node of "
        f"{step['context']:,} tokens: {before:.2f} ms with {linear}, {after:.2f} ms with {found.best.name} "
        f"({100 * (after / before - 1):+.1f} %), tokens drawn by these counts (docs/results/accuracy.md)"
    )


def placement_lines(plan: Plan, file: Path, output: Path) -> Iterator[str]:
    """An engine's file that was imported as a plan."""
    place = plan.placement
    yield (
        f"{file}: {place.num_layers} layers x {place.num_experts} experts, {place.redundant} redundant slots, on "
        f"{place.nodes} nodes x {place.gpus_per_node} GPUs"
    )
    yield f"wrote {output}; next: moeplan evaluate TRACE --plan {output}, and"
    yield f"moeplan rebalance TRACE --plan {output} --max-moves M -o NEW, to improve it by a few moves"


def placement_facts(plan: Plan, output: Path) -> dict[str, Any]:
    """The same as JSON."""
    place = plan.placement
    return {
        "plan": str(output),
        "layers": place.num_layers,
        "experts": place.num_experts,
        "redundant": place.redundant,
        "nodes": place.nodes,
        "gpus_per_node": place.gpus_per_node,
        "replica_rule": plan.replica_rule.value,
    }


def check_lines(report: Report) -> Iterator[str]:
    """Every finding with its location and a suggested fix, and the verdict."""
    shape = "" if report.rows is None else f": {report.rows} layers of {report.slots} slots"
    yield f"{report.path}, {report.engine}{shape}"
    for finding in report.findings[:SHOWN]:
        yield f"{'warning' if finding.legal else 'error'}: {finding.line(report.path)}"
    if len(report.findings) > SHOWN:
        yield f".. and {len(report.findings) - SHOWN} more findings (--json has them all)"
    if report.ok:
        yield from (f"not checked: {line}" for line in dict.fromkeys(report.unchecked))
        yield "valid" + (", as far as it could be checked" if report.unchecked else "")
    else:
        yield f"invalid: {plural(len(report.errors), 'error')}"


def check_facts(report: Report) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "file": str(report.path),
        "engine": report.engine,
        "good": report.ok,
        "layers": report.rows,
        "slots": report.slots,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "not_checked": list(dict.fromkeys(report.unchecked)),
    }
