"""`moeplan import`: other people's recordings into traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli.common import (
    Aggregate,
    JsonOption,
    MinTokens,
    WithoutLayers,
    claim_stdout,
    echo,
    emit_json,
    parse_layers,
    progress,
)

if TYPE_CHECKING:
    from moeplan.trace.reader import Trace

__all__ = ["register", "say_summary", "trace_summary"]

Out = Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="The trace directory to make.")]
Name = Annotated[str | None, typer.Option("--name", help="The model's name.")]
Hidden = Annotated[int | None, typer.Option("--hidden", help="Width of a token's hidden state; byte figures need it.")]
ExpertBytes = Annotated[int | None, typer.Option("--expert-bytes", help="Weights of one expert in one layer, bytes.")]
KvBytes = Annotated[
    int | None, typer.Option("--kv-bytes-per-token", help="KV cache of one token over all layers, bytes.")
]
RoutingGroups = Annotated[
    int,
    typer.Option("--routing-groups", help="Groups of experts that the router first chooses among (DeepSeek-V3: 8)."),
]
NumExperts = Annotated[int | None, typer.Option("--num-experts", help="Routed experts per layer; needed here.")]
Domain = Annotated[
    str | None, typer.Option("--domain", help="Label of every request [default: file name up to its trailing number].")
]
Sources = Annotated[list[Path], typer.Argument(metavar="FILE..", help="Files, or folders of them.")]

_app = typer.Typer(help="Turn recordings of other tools into a trace.", no_args_is_help=True, rich_markup_mode=None)


@_app.command("arrays")
def arrays(
    source: Annotated[Path, typer.Argument(metavar="FILE.npz", help="Request-level arrays.")],
    output: Out,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """An .npz with experts, request_offsets, prefill_lengths, domain, layer_ids, num_experts."""
    from moeplan.importers.arrays import import_arrays
    from moeplan.importers.options import ImportOptions
    from moeplan.model.config import described

    claim_stdout(json)
    model = described(
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, without_layers=parse_layers(without_layers))
    with progress("importing requests") as tick:
        trace = import_arrays(source, output, options, progress=tick)
    _report(trace, json)


@_app.command("expert-selection")
def expert_selection(
    sources: Sources,
    output: Out,
    num_experts: NumExperts = None,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """JSON files, one request each: a list of steps, each a map from layer to [tokens][k]."""
    from moeplan.importers.expert_selection import import_expert_selection
    from moeplan.importers.options import ImportOptions
    from moeplan.model.config import described

    claim_stdout(json)
    model = described(
        num_experts=num_experts,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, domain=domain, without_layers=parse_layers(without_layers))
    with progress("importing files") as tick:
        trace = import_expert_selection(sources, output, options, progress=tick)
    _report(trace, json)


@_app.command("moe-beyond")
def moe_beyond(
    sources: Sources,
    output: Out,
    num_experts: NumExperts = None,
    domain: Domain = None,
    name: Name = None,
    hidden: Hidden = None,
    expert_bytes: ExpertBytes = None,
    kv_bytes_per_token: KvBytes = None,
    routing_groups: RoutingGroups = 1,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """CSV files of prompts: Layer ID, Batch Number, Token, Activated Expert IDs (the token's text is dropped)."""
    from moeplan.importers.moe_beyond import import_moe_beyond
    from moeplan.importers.options import ImportOptions
    from moeplan.model.config import described

    claim_stdout(json)
    model = described(
        num_experts=num_experts,
        name=name,
        hidden=hidden,
        expert_bytes=expert_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        routing_groups=routing_groups,
    )
    options = ImportOptions(model, domain=domain, without_layers=parse_layers(without_layers))
    with progress("importing files") as tick:
        trace = import_moe_beyond(sources, output, options, progress=tick)
    _report(trace, json)


@_app.command("trace")
def of_trace(
    source: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace with token rows.")],
    output: Out,
    min_tokens: MinTokens = 1,
    aggregate: Aggregate = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Label of every request [default: its own].")] = None,
    without_layers: WithoutLayers = "",
    json: JsonOption = None,
) -> None:
    """A trace into one that leaks less: without short requests, or sums in place of token rows."""
    from moeplan.importers.options import ImportOptions
    from moeplan.importers.trace import import_trace
    from moeplan.trace.retention import RetentionPolicy

    claim_stdout(json)
    options = ImportOptions(
        domain=domain,
        without_layers=parse_layers(without_layers),
        retention=RetentionPolicy(min_tokens, aggregate),
    )
    with progress("copying requests") as tick:
        made = import_trace(source, output, options, progress=tick)
    _report(made, json)


def trace_summary(trace: Trace) -> dict[str, Any]:
    """What is in a trace, as plain values: the JSON of `import` and `generate`."""
    requests, shape = trace.requests, trace.shape
    unknown = requests.prefill < 0
    tokens = int(requests.rows.sum())
    counts = [(requests.domain == i).sum() for i in range(len(requests.domains))]
    return {
        "trace": str(trace.path),
        "model": shape.name,
        "synthetic": trace.synthetic,
        "requests": len(requests),
        "tokens": tokens,
        "picks": tokens * shape.num_layers * shape.top_k,
        "layers": shape.num_layers,
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "hidden": shape.hidden,
        "without_layers": list(trace.without_layers),
        "domains": {label: int(count) for label, count in zip(requests.domains, counts, strict=True)},
        "prefill_tokens": int(requests.prefill_known.sum()),
        "decode_tokens": int(requests.decode.sum()),
        "unknown_tokens": int(requests.rows[unknown].sum()),
        "requests_with_unknown_phases": int(unknown.sum()),
        "requests_without_prefill": int((requests.prefill == 0).sum()),
        "requests_without_decode": int(((requests.decode == 0) & ~unknown).sum()),
        "aggregate": trace.aggregate,
        "dropped": trace.dropped,
        "left_over": trace.left_over,
        "min_tokens": trace.source.get("min_tokens", 1),
        "checksum": trace.checksum,
    }


def say_summary(facts: dict[str, Any]) -> None:
    """The same, for people."""
    label = " (synthetic)" if facts["synthetic"] else ""
    layers = "layer" if facts["layers"] == 1 else "layers"
    form = f"{facts['layers']} {layers} x {facts['experts']} experts, top-{facts['top_k']}"
    echo(f"{facts['model'] or 'unnamed model'}{label}: {form}")
    what = "requests"
    if facts["aggregate"] > 1:
        what = f"sum{'s' * (facts['requests'] != 1)} of {facts['aggregate']} requests"
    echo(f"{facts['requests']} {what}, {facts['tokens']} tokens, {_phases(facts)}")
    echo(_domains(facts["domains"]))
    if facts["dropped"]:
        echo(f"not stored: {facts['dropped']} requests of fewer than {facts['min_tokens']} tokens")
    if facts["left_over"]:
        echo(f"not stored: {facts['left_over']} requests that filled no sum of {facts['aggregate']} of their domain")
    for key, what in (
        ("requests_with_unknown_phases", "have unknown phases"),
        (
            "requests_without_prefill",
            "have no prefill rows: --signature-tokens N lets their first decode tokens stand in",
        ),
        ("requests_without_decode", "have no decode rows"),
    ):
        if facts[key]:
            echo(f"note: {facts[key]} of {facts['requests']} requests {what}")
    if facts["hidden"] is None:
        echo("note: the hidden width is not known, so byte figures will be null: --hidden sets it")


def _phases(facts: dict[str, Any]) -> str:
    parts = [f"{facts[f'{phase}_tokens']} {phase}" for phase in ("prefill", "decode", "unknown")]
    return ", ".join(part for part in parts if not part.startswith("0 "))


def _domains(domains: dict[str, int]) -> str:
    """The largest domains and their requests, on one line."""
    largest = sorted(domains.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{label or '(none)'} {count}" for label, count in largest[:8])
    more = f", and {len(largest) - 8} more" if len(largest) > 8 else ""
    return f"{len(domains)} {'domain' if len(domains) == 1 else 'domains'}: {shown}{more}"


def _report(trace: Trace, json: str | None) -> None:
    facts = trace_summary(trace)
    say_summary(facts)
    echo(f"wrote {trace.path}; next: moeplan profile {trace.path}")
    emit_json(json, facts)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    from moeplan.cli.import_engines import register_engines
    from moeplan.cli.import_placement import placement

    register_engines(_app)
    _app.command("placement")(placement)
    app.add_typer(_app, name="import")
