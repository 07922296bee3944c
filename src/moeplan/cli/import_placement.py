"""`moeplan import placement`: an engine's placement file as a plan."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import echo, emit_json
from moeplan.cli.text.engines import placement_facts, placement_lines

__all__ = ["placement"]


def placement(
    file: o.PlacementIn,
    /,
    *,
    engine: o.Engine,
    output: o.PlanOut,
    model: o.PlacedModelFlags = o.PlacedModelFlags(),
    top_k: o.TopK = None,
    name: o.ModelName = None,
    served: o.ServedFlags = o.ServedFlags(),
    deployment: Annotated[o.Deployment, Parameter(group=o.CLUSTER)] = "nodes",
    dispatch: Annotated[o.DispatchMode, Parameter(group=o.CLUSTER)] = "pick",
    json: o.Json = None,
) -> None:
    """Import a placement file of SGLang, vLLM, TensorRT-LLM or vLLM-Ascend: a plan, not a trace.

    Args:
        deployment: What a request group is: the requests decoded on one node, or on one GPU.
        dispatch: Dispatch mode: what one message carries.
    """
    from moeplan.cluster import Deployment, Dispatch
    from moeplan.engines.from_placement import import_placement

    o.refuse_plan(file)
    plan = import_placement(
        file,
        engine,
        model.spec(top_k=top_k, name=name),
        served.layout(),
        deployment=Deployment(deployment),
        dispatch=Dispatch(dispatch),
    )
    plan.save(output)
    for line in placement_lines(plan, file, output):
        echo(line)
    emit_json(json, placement_facts(plan, output))
