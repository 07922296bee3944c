"""`moeplan import vllm`, `sglang`, ..: what serving engines and Megatron leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli.common import JsonOption, WithoutLayers, claim_stdout, echo, emit_json, parse_layers, progress
from moeplan.cli.import_ import (
    Domain,
    ExpertBytes,
    Hidden,
    KvBytes,
    Name,
    Out,
    RoutingGroups,
    Sources,
    say_summary,
    trace_summary,
)
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.trace.counts import CountsProfile
    from moeplan.trace.reader import Trace

__all__ = ["counts_summary", "dense_layers_of", "register_engines"]

CountsOut = Annotated[Path, typer.Option("-o", "--output", metavar="COUNTS", help="The counts profile to make.")]
RecorderOut = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="The trace, or the counts profile, to make.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The model's config.json: experts, k, dense layers.")
]
Experts = Annotated[int | None, typer.Option("--num-experts", help="Routed experts per layer, if not from --config.")]
Layers = Annotated[
    int | None, typer.Option("--num-layers", help="Hidden layers, dense ones included, if not from --config.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Picks per token and layer, if not from --config.")]
DenseLayers = Annotated[
    str | None,
    typer.Option("--dense-layers", metavar="IDS", help="Layers without experts, e.g. 0,1,2, or none; top-1 needs it."),
]
Start = Annotated[
    int,
    typer.Option("--start", min=0, help="Start length that the requests asked for (rows before it are absent)."),
]
Stage = Annotated[
    str, typer.Option("--stage", metavar="STAGE", help="What was counted: prefill, decode, mixed or unknown.")
]


def vllm(
    sources: Sources,
    output: Out,
    config: Config = None,
    num_experts: Experts = None,
    dense_layers: DenseLayers = None,
    start: Start = 0,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """Stored responses of vLLM with routed_experts, JSON or JSONL."""
    from moeplan.importers.options import ImportOptions
    from moeplan.importers.vllm_responses import import_vllm
    from moeplan.model.config import described

    claim_stdout(json)
    dense = dense_layers_of(dense_layers)
    model = described(
        config,
        num_experts=num_experts,
        dense_layers=dense,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, dense, domain, parse_layers(without_layers))
    with progress("importing responses") as tick:
        trace = import_vllm(sources, output, options, start=start, progress=tick)
    _report_trace(trace, json)


def sglang(
    sources: Sources,
    output: Out,
    config: Config = None,
    num_experts: Experts = None,
    num_layers: Layers = None,
    top_k: TopK = None,
    dense_layers: DenseLayers = None,
    start: Start = 0,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """Stored responses of SGLang with routed_experts, JSON or JSONL."""
    from moeplan.importers.options import ImportOptions
    from moeplan.importers.sglang_responses import import_sglang
    from moeplan.model.config import described

    claim_stdout(json)
    dense = dense_layers_of(dense_layers)
    model = described(
        config,
        num_experts=num_experts,
        num_layers=num_layers,
        top_k=top_k,
        dense_layers=dense,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, dense, domain, parse_layers(without_layers))
    with progress("importing responses") as tick:
        trace = import_sglang(sources, output, options, start=start, progress=tick)
    _report_trace(trace, json)


def sglang_recorder(
    sources: Sources,
    output: RecorderOut,
    counts: Annotated[
        bool, typer.Option("--counts", help="Count a per_token dump instead of rebuilding its requests.")
    ] = False,
    stage: Stage = "unknown",
    config: Config = None,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """Dumps (.pt) of SGLang's expert recorder: stat and per_pass become counts, per_token a trace if it can."""
    from moeplan.importers.options import ImportOptions
    from moeplan.importers.sglang_recorder import import_sglang_recorder
    from moeplan.model.config import described
    from moeplan.trace.counts import CountsProfile

    claim_stdout(json)
    model = described(
        config,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, domain=domain, without_layers=parse_layers(without_layers))
    with progress("importing dumps") as tick:
        made = import_sglang_recorder(sources, output, options, counts=counts, phase=_stage(stage), progress=tick)
    if isinstance(made, CountsProfile):
        _report_counts(made, json)
    else:
        _report_trace(made, json)


def megatron(
    sources: Sources,
    output: Out,
    config: Config = None,
    num_experts: Experts = None,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """Router traces (.jsonl) of Megatron-LM; a step becomes a pseudo-request."""
    from moeplan.importers.megatron import import_megatron
    from moeplan.importers.options import ImportOptions
    from moeplan.model.config import described

    claim_stdout(json)
    model = described(
        config,
        num_experts=num_experts,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    dropped = parse_layers(without_layers)
    options = ImportOptions(model, domain=domain, without_layers=dropped)
    with progress("importing files") as tick:
        trace = import_megatron(sources, output, options, progress=tick)
    _report_trace(trace, json)


def tensorrt_llm(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="meta_info.json and rank*.safetensors.")],
    output: CountsOut,
    stage: Stage = "unknown",
    name: Name = None,
    json: JsonOption = None,
) -> None:
    """Expert statistics of TensorRT-LLM: counts, not a trace."""
    from moeplan.importers.options import ImportOptions
    from moeplan.importers.tensorrt_llm import import_tensorrt_llm
    from moeplan.model.config import described

    claim_stdout(json)
    options = ImportOptions(described(name=name))
    _report_counts(import_tensorrt_llm(folder, output, options, phase=_stage(stage)), json)


def logical_count(
    source: Annotated[Path, typer.Argument(metavar="FILE.json", help='A JSON object with "logical_count".')],
    output: CountsOut,
    stage: Stage = "unknown",
    top_k: TopK = None,
    name: Name = None,
    json: JsonOption = None,
) -> None:
    """SGLang's logical_count JSON: counts, not a trace."""
    from moeplan.importers.logical_count import import_logical_count
    from moeplan.importers.options import ImportOptions
    from moeplan.model.config import described

    claim_stdout(json)
    options = ImportOptions(described(top_k=top_k, name=name))
    _report_counts(import_logical_count(source, output, options, phase=_stage(stage)), json)


def counts_summary(profile: CountsProfile) -> dict[str, Any]:
    """What is in a counts profile, as plain values."""
    from moeplan.profile.imbalance import imbalance_factor

    factors = imbalance_factor(profile.counts)
    return {
        "counts": str(profile.path),
        "model": profile.name,
        "layers": len(profile.layer_ids),
        "layer_ids": list(profile.layer_ids),
        "experts": profile.counts.shape[1],
        "top_k": profile.top_k,
        "stage": profile.phase,
        "picks": int(profile.counts.sum()),
        "imbalance": [float(factor) for factor in factors],
        "mean_imbalance": float(factors.mean()),
        "largest_expert": [int(expert) for expert in profile.counts.argmax(axis=1)],
        "notes": list(profile.source.get("notes", ())),
        "checksum": profile.checksum,
    }


def dense_layers_of(text: str | None) -> tuple[int, ...] | None:
    """'0,1,2' as layers, 'none' as no layer, nothing as not known."""
    if text is None or text.strip().lower() == "none":
        return None if text is None else ()
    try:
        return tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        raise UsageError(f"--dense-layers {text!r} is not a list of layers", hint="e.g. 0,1,2 or none") from None


def _stage(text: str) -> str:
    from moeplan.trace.counts import COUNTED_PHASES

    if text not in COUNTED_PHASES:
        raise UsageError(f"--stage {text!r} is no stage", hint=f"choose one of {', '.join(COUNTED_PHASES)}")
    return text


def _report_trace(trace: Trace, json: str | None) -> None:
    facts = {**trace_summary(trace), "notes": list(trace.source.get("notes", ()))}
    say_summary(facts)
    for note in facts["notes"]:
        echo(f"note: {note}")
    echo(f"wrote {trace.path}; next: moeplan profile {trace.path}")
    emit_json(json, facts)


def _report_counts(profile: CountsProfile, json: str | None) -> None:
    from moeplan.trace.counts import WITHOUT_REQUESTS

    facts = counts_summary(profile)
    layers = "layer" if facts["layers"] == 1 else "layers"
    echo(f"{facts['model'] or 'unnamed model'}: {facts['layers']} {layers} x {facts['experts']} experts")
    echo(f"{facts['picks']} picks counted, stage: {facts['stage']}")
    echo(f"imbalance (largest over mean), mean {facts['mean_imbalance']:.2f}; by layer:")
    cells = [f"{layer:>5} {factor:6.2f}" for layer, factor in zip(facts["layer_ids"], facts["imbalance"], strict=True)]
    for first in range(0, len(cells), 6):
        echo("".join(cells[first : first + 6]))
    for note in facts["notes"]:
        echo(f"note: {note}")
    echo(f"note: {WITHOUT_REQUESTS}")
    echo(f"wrote {profile.path}, a counts profile, not a trace")
    emit_json(json, facts)


def register_engines(app: typer.Typer) -> None:
    """Add the sub-verbs to `import`."""
    for name, command in (
        ("vllm", vllm),
        ("sglang", sglang),
        ("sglang-recorder", sglang_recorder),
        ("megatron", megatron),
        ("tensorrt-llm", tensorrt_llm),
        ("logical-count", logical_count),
    ):
        app.command(name)(command)
