"""`moeplan export`: a plan, or counts of picks, into an engine's placement file, and the flags that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import options as o
from moeplan.cli import placement_options as p
from moeplan.cli.common import JsonOption, check_places, claim_stdout, echo, emit_json, given
from moeplan.errors import FormatError, OutputError, UsageError

if TYPE_CHECKING:
    from moeplan.engines.files import EnginePlacement
    from moeplan.engines.launch import Launch, Serving
    from moeplan.model.spec import ModelSpec
    from moeplan.planning import Plan

#: Flags that only counts need: a plan says them itself.
_COUNTS_ONLY = ("nodes", "gpus_per_node", "redundant", "measure", "hardware", "model", "context_tokens", "batch")
#: Flags that only a plan goes with.
_PLAN_ONLY = ("trace", "signature_tokens")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(
        help="Write an engine's placement file and print the flags to start the engine with. SOURCE is a plan, or "
        "counts of picks (SGLang's logical_count JSON, or a counts profile), which are balanced first."
    )
    def export(
        context: typer.Context,
        source: Annotated[str, typer.Argument(metavar="SOURCE", help="A plan, or counts.")],
        engine: p.Engine,
        output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")],
        config: p.Config = None,
        num_layers: p.Layers = None,
        dense_layers: p.DenseLayers = None,
        trace: Annotated[
            str | None, typer.Option("--trace", metavar="TRACE", help="Model what copies are worth on this traffic.")
        ] = None,
        signature_tokens: o.SignatureTokens = None,
        strategy: Annotated[
            str | None,
            typer.Option(
                "--expert-placement-strategy", metavar="S", help="vLLM without the plug-in: linear or round_robin."
            ),
        ] = None,
        nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="With counts: nodes.")] = None,
        gpus_per_node: Annotated[
            int | None, typer.Option("--gpus-per-node", metavar="G", help="With counts: GPUs in each node.")
        ] = None,
        redundant: Annotated[
            int, typer.Option("--redundant", metavar="R", help="With counts: extra slots per layer, in total.")
        ] = 0,
        measure: Annotated[
            str | None, typer.Option("--measure", metavar="COUNTS", help="With counts: measure on these, not the same.")
        ] = None,
        hardware: o.Hardware_ = None,
        model: o.Model = None,
        context_tokens: o.Context = None,
        batch: Annotated[
            int, typer.Option("--batch", metavar="B", help="With --hardware: requests of a node [default: 128].")
        ] = 128,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        check_places(output)
        p.keep_inputs(json, output, source, measure, config, trace, hardware, model)
        if output.exists():
            raise OutputError("already exists", where=str(output), hint="choose another place, or remove it")
        is_plan = _is_plan(source)
        _only(context, _COUNTS_ONLY if is_plan else _PLAN_ONLY, "a plan" if is_plan else "counts")
        from moeplan.engines.files import check_write, write
        from moeplan.engines.launch import launch
        from moeplan.engines.layer_axis import check_axis, left_out
        from moeplan.engines.unsupported_models import without_placement

        spec = p.model_from(config, None, num_layers, dense_layers)
        plan: Plan | None = None
        more: dict[str, Any] = {}
        said: list[str] = []
        if is_plan:
            placement, serving, plan = _of_plan(source)
            name = plan.shape.name
        else:
            from moeplan.cli.export_counts import from_counts

            placement, serving, spec, name, said, more = from_counts(
                source, engine.value, spec, nodes, gpus_per_node, redundant, measure, hardware, model,
                context_tokens, batch,
            )  # fmt: skip
        if strategy is not None:
            _own_strategy(engine.value, placement, strategy)
        layers = check_axis(placement, spec, engine.value, source, from_config=config is not None)
        check_write(output, engine.value, placement)
        how = launch(engine.value, placement, str(output), serving)
        if plan is not None:
            said, more = _copies(plan, how, trace, signature_tokens)
        missing = left_out(placement.layer_ids) if spec.moe_layers is None else ()
        write(output, engine.value, placement, num_layers=layers, model=name)
        for line in said:
            echo(line)
        _say(engine.value, output, placement, how, spec, layers)
        if missing:
            named = f"layer{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            echo(
                f"warning: {source} skips {named}: where the model has experts there, the engine will not start "
                "without rows for them; plan on a trace of all layers, and give --config to be sure"
            )
        ignored = without_placement(engine.value, spec.architectures)
        if ignored is not None:
            echo(f"warning: {ignored}")
        emit_json(
            json,
            {
                "file": str(output),
                "engine": engine.value,
                **_facts(how, layers, placement),
                **more,
                "ignored": ignored,
                "layers_left_out": list(missing),
            },
        )


def _is_plan(source: str) -> bool:
    """A plan (True), or counts (False)."""
    path = Path(source)
    if not path.exists() or path.is_dir():
        p.refuse_trace(source)
    if not path.exists():
        raise FormatError("does not exist", where=source, hint="give a plan, or counts")
    if path.is_dir() and not any((path / name).is_file() for name in ("plan.json", "counts.json")):
        raise FormatError(
            "is neither a plan (plan.json) nor a counts profile (counts.json)",
            where=source,
            hint="give what moeplan plan or moeplan import made",
        )
    return (path / "plan.json").is_file()


def _only(context: typer.Context, foreign: tuple[str, ...], what: str) -> None:
    for name in foreign:
        if given(context, name):
            flag = "--" + {"context_tokens": "context"}.get(name, name).replace("_", "-")
            raise UsageError(f"{flag} does not go with {what}", hint="leave it out, or give the other kind of source")


def _of_plan(source: str) -> tuple[EnginePlacement, Serving, Plan]:
    from moeplan.engines.files import EnginePlacement
    from moeplan.engines.launch import Serving
    from moeplan.planning.store import load_plan

    plan = load_plan(source)
    return EnginePlacement.of_plan(plan), Serving(plan.cluster.num_groups, plan.dispatch), plan


def _own_strategy(engine: str, placement: EnginePlacement, strategy: str) -> None:
    """Refuse a layout of vLLM's own that is not the plan's."""
    from moeplan.engines.vllm import own_strategy

    if engine != "vllm" or strategy not in ("linear", "round_robin"):
        raise UsageError(
            f"--expert-placement-strategy {strategy[:20]} is not one of vLLM's (linear, round_robin)",
            hint="leave it out",
        )
    if placement.has_copies:
        raise UsageError(
            f"vLLM has no {strategy} with redundant slots: with EPLB it starts from its own layout",
            hint="leave --expert-placement-strategy out and use the plug-in, or plan with --redundant 0",
        )
    if own_strategy(placement) != strategy:
        raise UsageError(f"the plan is not vLLM's {strategy} layout", hint="leave the flag out and use the plug-in")


def _copies(
    plan: Plan, how: Launch, trace: str | None, signature_tokens: int | None
) -> tuple[list[str], dict[str, Any]]:
    """What copies are worth under the engine's way of choosing one, as lines and for JSON."""
    from moeplan.cluster import ReplicaRule

    lost = how.rule is ReplicaRule.HASH and plan.redundant > 0
    worth, lines = None, []
    if trace is not None:
        from moeplan.planning import read_requests
        from moeplan.planning.replica_value import replica_locality
        from moeplan.trace import open_trace

        opened = open_trace(trace)
        if opened.shape.layer_ids != plan.shape.layer_ids:
            missing = tuple(i for i in opened.shape.layer_ids if i not in plan.shape.layer_ids)
            opened = open_trace(trace, without_layers=missing)
        if (opened.shape.layer_ids, opened.shape.num_experts) != (plan.shape.layer_ids, plan.shape.num_experts):
            raise UsageError("the trace is not of the plan's model", where=trace, hint="give a trace of the same model")
        worth = replica_locality(read_requests(opened, signature_tokens=signature_tokens), plan)
        seen = " (the plan was fitted on this very trace)" if plan.trace_checksum == opened.checksum else ""
        lines += [
            f"picks served on another node, modelled on {opened.label}{seen}:",
            f"  {worth.nearest:.3f} where the nearest copy is taken (SGLang)",
            f"  {worth.any_replica:.3f} where any copy is (vLLM, TensorRT-LLM, vLLM-Ascend)",
            f"  {worth.scattered:.3f} where requests and experts are scattered",
        ]
    if lost:
        lines.append(
            "warning: this engine takes a copy without looking where it is: copies balance load, but keep few picks at "
            "home" + ("" if worth else "; --trace TRACE models how many")
        )
    if how.rule is not plan.rule and plan.redundant > 0:
        figure = ((plan.expected or {}).get("remote_share") or {}).get("value")
        holds = f", so its expected remote_share of {figure:.3f} does not hold" if isinstance(figure, float) else ""
        lines.append(
            f"warning: the plan is made for {plan.rule.value}, this engine is modelled as {how.rule.value}{holds}"
        )
    return lines, {"remote_share": None if worth is None else worth.to_dict(), "replica_rule": how.rule.value}


def _say(
    engine: str, output: Path, placement: EnginePlacement, how: Launch, spec: ModelSpec, layers: int | None
) -> None:
    per_gpu = placement.num_slots // placement.ep_size
    echo(
        f"wrote {output}: {placement.num_slots} slots a layer ({placement.num_experts} experts + {placement.redundant}"
        f" redundant), {per_gpu} on each of {placement.ep_size} GPUs, {placement.nodes} nodes"
    )
    if engine == "sglang":
        echo(f"its rows are all {layers} hidden layers, {len(placement.layer_ids)} of them with experts")
    elif spec.moe_layers is None:
        echo(f"note: its {len(placement.layer_ids)} layers are the plan's; --config would hold them to the model's")
    echo("start the engine with:")
    echo()
    for line in how.text().split("\n"):
        echo(f"  {line}")
    echo()
    if how.extra is not None:
        echo(f"and {how.extra[0]}:")
        echo()
        for line in how.extra[1].rstrip().split("\n"):
            echo(f"  {line}")
        echo()
    for note in how.notes:
        echo(f"note: {note}")


def _facts(how: Launch, layers: int | None, placement: EnginePlacement) -> dict[str, Any]:
    return {
        "hidden_layers": layers,
        "layer_ids": list(placement.layer_ids),
        "num_experts": placement.num_experts,
        "flags": how.flags,
        "command": how.text(),
        "extra_file": None if how.extra is None else {"name": how.extra[0], "text": how.extra[1]},
        "notes": list(how.notes),
    }
