"""`moeplan export COUNTS`: a balanced placement where counts are all that is known, and its modelled effect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.errors import FormatError, UsageError

if TYPE_CHECKING:
    from moeplan.cluster import Cluster
    from moeplan.engines.files import EnginePlacement
    from moeplan.engines.launch import Serving
    from moeplan.model.spec import ModelSpec
    from moeplan.planning.balance import Candidate
    from moeplan.trace.counts import CountsProfile

_WHAT_THEY_LACK = (
    "counts tell which experts are busy, not who asks for them: this placement balances load, and leaves traffic "
    "between nodes as it is",
    "a request-level trace (SGLang or vLLM with --enable-return-routed-experts, then moeplan import or record) would "
    "add groups, copies where they are asked for, and figures on unseen requests (remote_share, step times)",
)


def from_counts(
    source: str, engine: str, spec: ModelSpec, nodes: int | None, gpus_per_node: int | None,
    redundant: int, measure: str | None, hardware: str | None, model: str | None, context: int | None, batch: int,
) -> tuple[EnginePlacement, Serving, ModelSpec, str, list[str], dict[str, Any]]:  # fmt: skip
    """Balance the counts; what there is to write, and what it comes to, as lines and for JSON."""
    from moeplan.cluster import Cluster
    from moeplan.engines.files import EnginePlacement
    from moeplan.engines.from_placement import rule_of
    from moeplan.engines.launch import Serving
    from moeplan.planning.balance import candidates, gpu_load_ratio

    if nodes is None or gpus_per_node is None:
        raise UsageError("counts do not say the cluster", where=source, hint="give --nodes and --gpus-per-node")
    if hardware is None and (model is not None or context is not None):
        raise UsageError("--model and --context are for step times", hint="give --hardware too, e.g. --hardware H100")
    if hardware is not None and model is None:
        raise UsageError("step times need the model", hint="give --model: a name of the catalogue, or a config.json")
    counts = _read(source)
    other = None if measure is None else _read(measure)
    if other is not None and (other.counts.shape, other.layer_ids) != (counts.counts.shape, counts.layer_ids):
        raise UsageError("has other layers or experts", where=measure, hint="measure on counts of the same model")
    hidden = counts.source.get("hidden_layers")
    if spec.layers is None and type(hidden) is int:
        spec = dataclasses.replace(spec, layers=hidden)
        spec = spec if spec.moe_layers else spec.override(moe_layers=counts.layer_ids)
    cluster, rule = Cluster(nodes, gpus_per_node), rule_of(engine, nodes)
    groups = spec.moe.groups if spec.moe else 1
    found = candidates(counts.counts, cluster, redundant, rule, routing_groups=groups, distinct=engine == "vllm-ascend")
    best, linear = found[1], found[0]
    layers, experts = counts.counts.shape
    lines = [
        f"{source}: {layers} layers x {experts} experts, {int(counts.counts.sum())} picks ({counts.phase}); on {nodes} "
        f"nodes x {gpus_per_node} GPUs, {redundant} redundant slots, copies chosen as {engine} does ({rule.value})"
    ]
    lines += [f"note: {note}" for note in counts.source.get("notes", ())]
    lines.append("picks of the busiest GPU over the mean, mean over layers (1 is even):")
    lines.append(f"  {'':12s} {'fitted on':>10s}" + (f"  {'measured on ' + Path(str(measure)).name}" if other else ""))
    held_out = {}
    for way in found:
        if other is not None:
            held_out[way.name] = gpu_load_ratio(other.counts, way.placement, cluster, rule)
        mark = " <- written" if way is best else ""
        measured = f"  {held_out[way.name]:.3f}" if other else ""
        lines.append(f"  {way.name:12s} {way.ratio:10.3f}" + measured + mark)
    if other is None:
        lines.append("  these are the counts that it was fitted on: --measure OTHER shows it on others")
    steps = None
    if hardware is not None and model is not None:
        steps = _step_ms(counts, [linear, best], cluster, hardware, model, context, batch)
        before, after = (steps["ms"][way.name] for way in (linear, best))
        lines.append(
            f"modelled decode step of {steps['model']} on {steps['hardware']}, {batch} requests a node of "
            f"{steps['context']:,} tokens: {before:.2f} ms with {linear.name}, {after:.2f} ms with {best.name} "
            f"({100 * (after / before - 1):+.1f} %), tokens drawn by these counts (docs/accuracy.md)"
        )
    lines += [f"note: {line}" for line in _WHAT_THEY_LACK]
    facts_out = {
        "strategy": best.name,
        "replica_rule": rule.value,
        "load_ratio": {way.name: way.ratio for way in found},
        "load_ratio_measured": held_out or None,
        "modelled_step": steps,
        "lacks": list(_WHAT_THEY_LACK),
    }
    return EnginePlacement.of(best.placement, counts.layer_ids), Serving(), spec, counts.name, lines, facts_out


def _read(source: str) -> CountsProfile:
    """Counts from a JSON of SGLang's, or from a counts profile; layers without a pick are left out as dense."""
    from moeplan.importers.logical_count import read_logical_count
    from moeplan.trace.counts import read_counts

    path = Path(source)
    if path.is_dir():
        return read_counts(path)
    try:
        return read_logical_count(path)
    except FormatError:
        if not _is_placement(path):
            raise
    raise FormatError(
        "is a placement, not counts", where=source, hint="moeplan import placement reads it, as a plan to export"
    )


def _is_placement(path: Path) -> bool:
    """Whether a file that holds no counts looks like an engine's placement."""
    from moeplan.engines.loading import load_json
    from moeplan.engines.report import Report

    if path.suffix in (".yaml", ".yml"):
        return True
    data = load_json(Report(path, ""))
    return isinstance(data, dict) and bool({"physical_to_logical_map", "layer_list"} & data.keys())


def _step_ms(
    counts: CountsProfile, ways: list[Candidate], cluster: Cluster, hardware: str, model: str,
    context: int | None, batch: int,
) -> dict[str, Any]:  # fmt: skip
    """Modelled milliseconds of a decode step under each placement."""
    import numpy as np

    from moeplan.cluster import Dispatch
    from moeplan.embedded import MODEL, named
    from moeplan.model.catalogue import load_model
    from moeplan.perf.hardware import load_hardware as machine_of
    from moeplan.perf.memory import Precision
    from moeplan.perf.routing import ExpertRanks, routing_from_counts
    from moeplan.perf.step_model import StepModel, StepOptions
    from moeplan.replay.timing import CONTEXT, parallel_of

    if batch < 1:
        raise UsageError(f"--batch {batch} is not positive")
    spec, machine = load_model(named(model, MODEL)), machine_of(hardware)
    moe, tokens = spec.moe, context or CONTEXT
    layers, experts = counts.counts.shape
    if moe is None or (len(moe.layers), moe.experts) != (layers, experts):
        raise UsageError(
            f"{spec.name} does not have {layers} MoE layers of {experts} experts", hint="give the counts' own --model"
        )
    ms = {}
    for way in ways:
        parallel = parallel_of(cluster, spec, way.placement.redundant)
        ranks = ExpertRanks(cluster.num_gpus, cluster.nodes, dispatch=Dispatch.PICK)
        routing = routing_from_counts(moe, counts.counts, way.placement.slots, batch * cluster.num_groups, ranks)
        options = StepOptions(Dispatch.PICK, gpus_per_node=cluster.gpus_per_node)
        timed = StepModel(spec, machine, parallel, Precision.of_checkpoint(spec), options)
        step = timed.decode(batch, tokens, routing=routing)
        ms[way.name] = float(np.mean(step.seconds)) * 1e3
    return {"model": spec.name, "hardware": machine.name, "context": tokens, "batch": batch, "ms": ms}
