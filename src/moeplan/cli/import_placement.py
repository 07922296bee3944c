"""`moeplan import placement`: an engine's placement file back into a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.cli import options as o
from moeplan.cli import placement_options as p
from moeplan.cli.common import JsonOption, claim_stdout, echo, emit_json
from moeplan.cli.import_engines import TopK
from moeplan.errors import OutputError, UsageError


def placement(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A placement file of an engine.")],
    engine: p.Engine,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PLAN", help="The plan's directory.")],
    config: p.Config = None,
    num_experts: p.Experts = None,
    num_layers: p.Layers = None,
    dense_layers: p.DenseLayers = None,
    top_k: TopK = None,
    ep_size: p.EpSize = None,
    nnodes: p.Nnodes = None,
    home: o.Home_ = o.HomeChoice.node,
    dispatch: o.Dispatch_ = o.DispatchChoice.pick,
    name: Annotated[str | None, typer.Option("--name", help="The model's name.")] = None,
    json: JsonOption = None,
) -> None:
    """A placement file of SGLang, vLLM, TensorRT-LLM or vLLM-Ascend: a plan, not a trace."""
    claim_stdout(json)
    p.keep_inputs(json, file, output, config)
    p.refuse_plan(file)
    if Path(output).exists():
        raise OutputError("already exists", where=output, hint="choose another place, or remove it")
    from moeplan.cluster import Dispatch
    from moeplan.engines.files import ExpertLayout, examine
    from moeplan.engines.from_placement import deployed, rule_of

    spec = p.model_from(config, num_experts, num_layers, dense_layers, top_k)
    report = examine(file, engine.value, spec, ExpertLayout(ep_size, nnodes))
    if config is None and report.good and None in (report.model.num_experts, report.model.moe_layers):
        cluster = [
            flag for flag, at in (("--ep-size", report.layout.ep_size), ("--nnodes", report.layout.nodes)) if not at
        ]
        raise UsageError(
            "does not say all of its model",
            where=str(file),
            hint="give --config, or all of --num-experts, --num-layers, --dense-layers and --top-k"
            + (f"; and {' and '.join(cluster)}" if cluster else ""),
        )
    read = report.need()
    shape = spec.moe_shape(name=name or "", num_experts=read.num_experts, layer_ids=read.layer_ids, where=str(file))
    plan = deployed(
        read, shape, deployment=o.deployment_of(home), rule=rule_of(engine.value, read.nodes),
        dispatch=Dispatch(dispatch.value), where=str(file),
    )  # fmt: skip
    plan.save(output)
    place = plan.placement
    echo(
        f"{file}: {place.num_layers} layers x {place.num_experts} experts, {place.redundant} redundant slots, on "
        f"{place.nodes} nodes x {place.gpus_per_node} GPUs"
    )
    echo(f"wrote {output}; next: moeplan replay TRACE --plan {output}, and")
    echo(f"moeplan plan TRACE --from {output} --max-moves M -o NEW, to improve it by few moves")
    emit_json(
        json,
        {
            "plan": output,
            "layers": place.num_layers,
            "experts": place.num_experts,
            "redundant": place.redundant,
            "nodes": place.nodes,
            "gpus_per_node": place.gpus_per_node,
            "replica_rule": plan.replica_rule.value,
        },
    )
