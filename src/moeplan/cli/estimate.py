"""`moeplan estimate`: the time of one step of one set-up, what bounds it, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli import perf_options as p
from moeplan.cli.files import File
from moeplan.cli.terminal import echo, show
from moeplan.cli.text.perf import estimate_lines
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.perf.estimate import Estimate, EstimateSettings
    from moeplan.perf.hardware import Hardware

__all__ = ["estimate"]


@Parameter(name="*", group=o.CLUSTER)
@dataclass(frozen=True)
class LayoutFlags:
    """How the model is spread over the GPUs. None: not given."""

    nodes: o.Int | None = None
    """Nodes of the cluster. Default: 1."""
    gpus_per_node: o.Int | None = None
    """GPUs in each node, on one scale-up network. Default: the hardware's."""
    tp: o.Int | None = None
    """Tensor-parallel ranks of attention. Default: 1."""
    pp: o.Int | None = None
    """Pipeline stages. Default: 1."""
    dp: o.Int | None = None
    """Data-parallel ranks of attention. Default: GPUs / (tp x pp): all GPUs, without --tp and --pp."""
    ep: o.Int | None = None
    """Expert-parallel ranks. Default: all of a stage."""
    redundant: o.Int | None = None
    """Redundant experts in each layer, over all GPUs. Default: 0."""


@Parameter(name="*", group=Group("Step", sort_key=3))
@dataclass(frozen=True)
class StepFlags:
    """What the step computes."""

    batch: o.Int | None = None
    """Requests that decode together, on each data-parallel rank or instance. Default: 128, or all of --trace."""
    context: o.Int = 4096
    """Context tokens of each request (prefill: tokens to prefill)."""
    phase: Literal["prefill", "decode"] | None = None
    """Inference phase: the step to estimate. Default: decode."""
    dispatch: o.DispatchMode | None = None
    """Dispatch mode, as in plan. Default: pick (prefill: node), or the plan's."""
    overlap: bool = False
    """Two-batch overlap (SGLang --enable-two-batch-overlap; vLLM DBO)."""
    balanced: bool = False
    """Give every GPU the same load."""
    skew: float | None = None
    """Load of the busiest GPU over the mean. Default: 1, or the trace's."""


@Parameter(name="*", group=Group("Routing of a trace, in place of uniform routing", sort_key=4))
@dataclass(frozen=True)
class RoutingFlags:
    """A trace under a plan."""

    trace: Annotated[Path | None, File("input")] = None
    """A moeplan trace: use its routing (needs --plan)."""
    plan: Annotated[Path | None, File("input")] = None
    """A plan made by 'moeplan plan' (needs --trace). It defines the cluster."""
    seed: o.Seed = 0
    """Random seed."""


def estimate(
    *,
    hardware: str,
    model: p.ModelIn | None = None,
    layout: LayoutFlags = LayoutFlags(),
    step: StepFlags = StepFlags(),
    routing: RoutingFlags = RoutingFlags(),
    requests: o.TraceFlags = o.TraceFlags(),
    precision: p.PrecisionFlags = p.PrecisionFlags(),
    drafts: p.DraftFlags = p.DraftFlags(),
    prices: p.PriceFlags = p.PriceFlags(),
    output: o.PageOut = None,
    json: o.Json = None,
) -> None:
    """Estimate one set-up: time of a step by operator, memory, throughput, cost.

    Args:
        hardware: Hardware: a name of the catalogue, e.g. H100.
        model: The model: a name of the catalogue, or a config.json. Default: the model of --trace.
    """
    from moeplan.perf.estimate import estimate as uniform
    from moeplan.report.page import write_page
    from moeplan.report.perf_estimate import estimate_html

    settings, machine = _settings(layout, step, precision, drafts), prices.one(hardware)
    if routing.trace is not None or routing.plan is not None:
        _refuse_layout(layout, step, drafts)
        found = _with_trace(routing, requests, machine, model, step, settings)
    elif model is None:
        raise UsageError("--model is missing", hint="give a name of the catalogue, or a config.json")
    else:
        given = {name: getattr(layout, name) for name in ("nodes", "gpus_per_node", "redundant")}
        given |= {"batch": step.batch, "context": step.context}
        found = uniform(model, machine, settings=settings, **_not_none(given))
    show(estimate_lines(found), json, found.to_dict())
    if output is not None:
        write_page(output, estimate_html(found))
        echo(f"wrote {output}")


def _not_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settings(
    layout: LayoutFlags, step: StepFlags, precision: p.PrecisionFlags, drafts: p.DraftFlags
) -> EstimateSettings:
    """The flags as the library's value."""
    from moeplan.perf.estimate import EstimateSettings

    given = {name: getattr(layout, name) for name in ("tp", "pp", "dp", "ep")}
    given |= {name: getattr(step, name) for name in ("phase", "skew", "dispatch", "overlap", "balanced")}
    given |= {"drafts": drafts.mtp, "accepted": drafts.accepted}
    return EstimateSettings(**precision.values(), **_not_none(given))


def _refuse_layout(layout: LayoutFlags, step: StepFlags, drafts: p.DraftFlags) -> None:
    """Refuse flags that a plan answers, or that real steps do not come with."""
    given: dict[str, Any] = asdict(layout) | {"skew": step.skew, "phase": step.phase, "accepted": drafts.accepted}
    given |= {"balanced": step.balanced or None, "mtp": drafts.mtp or None}
    for name in _not_none(given):
        flag = "--" + name.replace("_", "-")
        raise UsageError(
            f"{flag} does not go with --plan, which has its own cluster and decode steps", hint=f"leave {flag} out"
        )


def _with_trace(
    routing: RoutingFlags,
    requests: o.TraceFlags,
    machine: Hardware,
    model: str | None,
    step: StepFlags,
    settings: EstimateSettings,
) -> Estimate:
    """With the routing of a trace under a plan of it."""
    from moeplan.planning.store import load_plan
    from moeplan.replay.trace_routing import estimate_plan

    if routing.trace is None or routing.plan is None:
        raise UsageError("--trace and --plan go together", hint="give both, or neither for uniform routing")
    plan, opened = load_plan(o.refuse_trace(routing.plan)), requests.open(routing.trace)
    read = opened if requests.signature_tokens is None else requests.read(opened)
    found = estimate_plan(
        plan,
        read,
        machine,
        model=model,
        batch=step.batch,
        context=step.context,
        settings=settings,
        seed=routing.seed,
    )
    assert found.measured is not None
    return replace(found, measured=replace(found.measured, trace=str(routing.trace), plan=str(routing.plan)))
