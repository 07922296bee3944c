"""`moeplan simulate`: requests of a trace as they arrive, under several policies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli import perf_options as p
from moeplan.cli.files import File
from moeplan.cli.terminal import echo, emit_json, progress

if TYPE_CHECKING:
    from moeplan.planning import Plan
    from moeplan.simulation.result import Simulation
    from moeplan.simulation.settings import SimulationSettings

__all__ = ["simulate"]


@Parameter(name="*", group=Group("Instances", sort_key=2))
@dataclass(frozen=True)
class InstanceFlags:
    """What serves the requests."""

    instances: o.Int = 8
    """Independent instances. With --plan, the groups are the plan's."""
    gpus_per_instance: o.Int = 1
    """GPUs of each instance; they split attention."""
    expert_parallel: bool = False
    """Each expert is whole on one GPU of an instance, in place of split over all."""
    slots: o.Int = 0
    """Requests that an instance runs at a time; 0: any number."""
    budget: o.Int = 8192
    """Tokens of a step, prompts and decoding requests together."""
    cache_tokens: o.Int | None = None
    """Tokens of an instance's KV cache. Default: what memory leaves, with --hardware."""
    separate_prefill: bool = False
    """Prompts have steps of their own."""


@Parameter(name="*", group=Group("Traffic", sort_key=3))
@dataclass(frozen=True)
class TrafficFlags:
    """Which requests come, and when."""

    arrivals: Literal["poisson", "bursty", "recorded", "closed"] = "poisson"
    """How requests arrive: closed keeps a number in the system."""
    rate: float | None = None
    """Requests per second over all instances."""
    load: float | None = None
    """Share of what full slots can serve, e.g. 0.8."""
    live: float | None = None
    """Live requests of an instance, on average. Default: 8, where neither --rate nor --load is given."""
    mix: Literal["trace", "one-domain", "drift"] = "trace"
    """Mix of requests: as in the trace, four fifths of one kind, or a kind that changes midway."""
    requests: o.Int = 2000
    """Number of requests, in each run."""
    seeds: o.Int = 3
    """Runs, each with its own split, requests and arrivals."""
    prompt_tokens: o.Int | None = None
    """Tokens of a prompt. Default: as the trace says, else 512."""


@Parameter(name="*", group=Group("Policies", sort_key=4))
@dataclass(frozen=True)
class PolicyFlags:
    """Where requests go."""

    policies: Annotated[str, Parameter(metavar="A,B,..")] = (
        "random,round-robin,power-of-two,least-loaded,domain,experts,oracle"
    )
    """Policies, separated by commas."""
    look_ahead: o.Int = 16
    """Waiting requests among which a free slot chooses."""
    extra_wait: float = 0.16
    """Later requests that may be sent before a waiting one, in shares of those before it beyond --look-ahead."""
    prefix_weight: float = 0.0
    """Share of distinct experts that a request's earlier instance is worth."""
    fit: float = 0.5
    """Share of the requests that plans are fitted on, and that policies learn from."""


@Parameter(name="*", group=o.TIMES)
@dataclass(frozen=True)
class ServerFlags:
    """The hardware to model times on, and their limits."""

    hardware: str | None = None
    """Hardware: also model times on it, e.g. H100."""
    model: Annotated[str | None, File("input")] = None
    """The model: a name of the catalogue, or a config.json. Default: the model of the trace."""
    ttft: p.Milliseconds | None = None
    """Limit on the time to the first token, for goodput."""
    tpot: p.Milliseconds | None = None
    """Limit on the time per output token, for goodput."""


def simulate(
    trace: o.TraceIn,
    /,
    *,
    plan: o.PlanIn = None,
    instances: InstanceFlags = InstanceFlags(),
    traffic: TrafficFlags = TrafficFlags(),
    policies: PolicyFlags = PolicyFlags(),
    server: ServerFlags = ServerFlags(),
    requests: o.TraceFlags = o.TraceFlags(),
    block: o.Block = 1,
    seed: o.Seed = 0,
    output: o.PageOut = None,
    json: o.Json = None,
) -> None:
    """Simulate serving: requests arrive one by one, and policies choose their instances.

    Without --hardware only counts are given. Modelled times are not validated on a GPU.
    """
    from moeplan.planning.store import load_plan
    from moeplan.report.simulation_page import write_simulation_page
    from moeplan.simulation import run

    opened, start = requests.open(trace), time.perf_counter()
    settings = _settings(instances, traffic, policies, server, block=block, seed=seed)
    made: Plan | None = None if plan is None else load_plan(o.refuse_trace(plan))
    with progress("simulate") as tick:
        read = requests.read(opened, made)
        found = run.simulate(read, settings, hardware=server.hardware, model=server.model, plan=made, progress=tick)
    _show(found, time.perf_counter() - start)
    emit_json(json, found.to_dict())
    if output is not None:
        write_simulation_page(output, found)
    echo(f"wrote {output}" if output else "a page with figures: add -o simulate.html")


def _settings(
    instances: InstanceFlags, traffic: TrafficFlags, policies: PolicyFlags, server: ServerFlags, **more: Any
) -> SimulationSettings:
    from moeplan.gateway.policies import ExpertSettings
    from moeplan.simulation.settings import SimulationSettings

    names = tuple(name.strip() for name in policies.policies.split(",") if name.strip())
    own = {key: value for key, value in vars(instances).items() if key != "separate_prefill"}
    choice = ExpertSettings(
        look_ahead=policies.look_ahead, extra_wait=policies.extra_wait, prefix_weight=policies.prefix_weight
    )
    return SimulationSettings(
        policies=names, fit=policies.fit, ttft_ms=server.ttft, tpot_ms=server.tpot, choice=choice,
        mixed=not instances.separate_prefill, **own, **vars(traffic), **more,
    )  # fmt: skip


def _show(found: Simulation, seconds: float) -> None:
    head = found.head
    echo(
        f"{head['trace']}: {head['groups']} {head['deployment']}, {head['requests']} requests in each of "
        f"{head['seeds']} runs, {head['arrivals']} arrivals, mix {head['mix']}, took {seconds:.1f} s"
    )
    for note in found.notes:
        echo(f"note: {note}")
    for line in ("", *repr(found).splitlines(), "", found.verdict()):
        echo(line)
    if "offline_remote_share" in head:
        echo(f"equal groups made of all requests at once: remote share {head['offline_remote_share']:.3f}")
