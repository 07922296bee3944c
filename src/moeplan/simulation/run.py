"""`simulate`: policies on simulated traffic, with the routing of the very requests in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan._kernels.serving import Clock, Limits
from moeplan.arrays import Int64Array
from moeplan.errors import UsageError
from moeplan.gateway.fleet import Fleet, Request
from moeplan.gateway.policies import ExpertPolicy, LeastLoaded, Policy, make_policy
from moeplan.perf.hardware import Hardware
from moeplan.planning.assignment import equal_groups
from moeplan.planning.plan import Plan
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.progress import Progress, silent
from moeplan.replay.evaluator import check_shape
from moeplan.simulation.clock import NOT_VALIDATED, unit_clock
from moeplan.simulation.engine import Engine, Events
from moeplan.simulation.figures import run_figures
from moeplan.simulation.loop import serve
from moeplan.simulation.result import PolicyFigures, Simulation
from moeplan.simulation.server import Server, find_server
from moeplan.simulation.settings import SIGNATURES, SimulationSettings
from moeplan.simulation.stream import Stream
from moeplan.simulation.traffic import Traffic, prompt_lengths
from moeplan.trace import Trace

__all__ = ["simulate"]

#: Requests that an instance runs at a time where nothing limits them: vLLM's default.
MOST_RUNNING = 256
#: Live requests of an instance, where nothing is said.
LIVE = 8.0


def simulate(
    requests: Trace | RequestSet,
    settings: SimulationSettings = SimulationSettings(),
    *,
    hardware: str | Hardware | None = None,
    model: str | None = None,
    plan: Plan | None = None,
    progress: Progress = silent,
) -> Simulation:
    """Serve requests of a trace as they arrive, under several policies.

    Each run splits the requests into a part that policies learn from and a part that arrives, drawn with replacement.
    All policies get the same stream. Each step reads the experts that its own requests picked in the trace.

    Args:
        requests: a trace, or `read_requests` of one.
        hardware: accelerators of the instances; None: each step takes one unit of time, and only counts are given.
        model: of the catalogue, a config.json, or `embedded`; None: as the trace calls it.
        plan: groups are the nodes or GPUs of its cluster, and `experts` goes by its router; None: independent
            instances.

    Raises:
        UsageError: unknown names, a trace that is too small, rows that it has no facts for, requests that no instance
            can hold. PlanError: an impossible layout.

    Examples:
        >>> import moeplan
        >>> settings = moeplan.SimulationSettings(("experts",), instances=2, live=4, requests=100, seeds=1)
        >>> moeplan.simulate(moeplan.open_trace("embedded"), settings).keys
        ('experts_per_step', 'live', 'waited_share', 'preempted')
    """
    if isinstance(requests, Trace):
        tokens = plan.signature.tokens if plan is not None else None
        requests = read_requests(requests, signature_tokens=tokens)
    if plan is not None:
        check_shape(requests.shape, plan.model, "plan")
    server = None if hardware is None else find_server(requests.shape, settings, hardware, model, plan)
    setup = _Setup.of(requests, settings, server, plan)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings.rows}
    done, total = 0, settings.seeds * len(settings.rows)
    for number in range(settings.seeds):
        traffic = Traffic.of(requests, settings, number, setup.prompt, plan)
        stream = setup.arrivals(traffic)
        for name in settings.rows:
            progress(done, total, f"run {number + 1}, {name}")
            events = setup.run(name, traffic, stream)
            figures = run_figures(stream, events, settings, server is not None)
            if plan is not None:
                figures["remote_share"] = _remote_share(requests, plan, stream, events.group)
            found[name].append(figures)
            done += 1
        if plan is not None:
            found.setdefault(_OFFLINE, []).append(setup.offline(traffic, stream))
    rows = tuple(
        PolicyFigures(name, {key: np.array([run[key] for run in runs]) for key in runs[0]})
        for name, runs in found.items()
        if name != _OFFLINE
    )
    head = setup.head()
    if plan is not None:
        head["offline_remote_share"] = float(np.mean([run["remote_share"] for run in found[_OFFLINE]]))
    return Simulation(rows, head, setup.notes())


_OFFLINE = "offline"


@dataclass(frozen=True)
class _Setup:
    """What all runs share."""

    requests: RequestSet
    settings: SimulationSettings
    server: Server | None
    plan: Plan | None
    prompt: Int64Array
    said: str
    limits: Limits
    clock: Clock

    @classmethod
    def of(cls, requests: RequestSet, settings: SimulationSettings, server: Server | None, plan: Plan | None) -> _Setup:
        if requests.sums is not None:
            raise UsageError("an aggregated trace has no steps", hint="use a trace made without --aggregate")
        _check_rows(requests, settings)
        prompt, said = prompt_lengths(requests, settings.prompt_tokens)
        first, end = requests.spans.use
        longest = int((prompt + end - first).max()) + 1
        mean = int(np.ceil((prompt + (end - first) / 2).mean()))
        slots = settings.slots or MOST_RUNNING
        cache = settings.cache_tokens
        if cache is None:
            cache = server.cache_tokens(mean, settings.budget) if server else 1 << 50
        if longest > cache:
            raise UsageError(
                f"the longest request takes {longest:,} tokens, the cache of an instance has {cache:,}",
                hint="use a larger --cache-tokens, more GPUs, or shorter prompts",
            )
        limits = Limits(slots, max(settings.budget, slots), cache, settings.mixed)
        shape = requests.shape
        clock = server.clock(slots, longest, limits.budget) if server else unit_clock(shape.num_experts, shape.top_k)
        return cls(requests, settings, server, plan, prompt, said, limits, clock)

    @property
    def groups(self) -> int:
        return self.settings.instances if self.plan is None else self.plan.cluster.num_groups

    def arrivals(self, traffic: Traffic) -> Stream:
        """The stream of a run, with its times."""
        settings, stream = self.settings, traffic.stream()
        live = settings.live if settings.live is not None else LIVE
        if settings.arrivals == "closed":
            return stream.closed(self._in_system(stream, live))
        rate = settings.rate
        if settings.arrivals == "recorded":
            if rate is None and settings.live is None and settings.load is None:
                return stream
            raise UsageError("recorded arrivals have their own rate", hint="leave --rate, --load and --live out")
        if rate is None:
            share = settings.load if settings.load is not None else 1.0
            held = float(settings.slots) if settings.load is not None else live
            rate = share * self._throughput(stream, self._in_system(stream, held))
        return traffic.timed(stream, rate)

    def _in_system(self, stream: Stream, live: float) -> int:
        wanted = max(1, round(live * self.groups))
        if len(stream) < 4 * wanted:
            raise UsageError(
                f"{len(stream)} requests are too few for {wanted} at a time", hint=f"use --requests {8 * wanted}"
            )
        return wanted

    def _throughput(self, stream: Stream, concurrency: int) -> float:
        """Requests per second with so many in the system, the least loaded instance taking each."""
        part = stream.first(max(400, 6 * concurrency))
        engine = self._engine(part)
        fleet = Fleet(self.groups, self.requests.shape.top_k, self.settings.slots)
        events = serve(part.closed(concurrency), engine, LeastLoaded(fleet), [Request(i) for i in range(len(part))])
        ends = np.sort(events.end)
        low, high = int(0.2 * len(ends)), int(0.8 * len(ends))
        return float((high - low) / (ends[high] - ends[low]))

    def _engine(self, stream: Stream) -> Engine:
        shape = self.requests.shape
        return Engine(stream, self.groups, self.limits, self.clock, self.requests.experts, shape.num_experts)

    def policy(self, row: str, seed: int) -> Policy:
        """A row's policy on an empty fleet."""
        fleet = Fleet(self.groups, self.requests.shape.top_k, self.settings.slots)
        if row == "experts" or row in SIGNATURES:
            return ExpertPolicy(fleet, seed, self.settings.choice)
        return make_policy(row, fleet, seed)

    def run(self, row: str, traffic: Traffic, stream: Stream) -> Events:
        """One policy on a stream."""
        return serve(stream, self._engine(stream), self.policy(row, traffic.seed), traffic.known(row, stream))

    def offline(self, traffic: Traffic, stream: Stream) -> dict[str, float]:
        """What the equal assignment of the whole stream, known beforehand, would give."""
        assert self.plan is not None
        scores = traffic.scores("experts")
        assert scores is not None
        group = equal_groups(scores[stream.source])
        return {"remote_share": _remote_share(self.requests, self.plan, stream, group)}

    def head(self) -> dict[str, Any]:
        """What was simulated, for JSON."""
        s, shape = self.settings, self.requests.shape
        return {
            "trace": self.requests.trace.label if self.requests.trace else shape.name,
            "deployment": "instances" if self.plan is None else self.plan.cluster.deployment.value,
            "groups": self.groups, "slots": s.slots, "arrivals": s.arrivals, "rate": s.rate, "load": s.load,
            "live": s.live if s.live is not None or s.rate or s.load else LIVE, "mix": s.mix,
            "requests": s.requests, "seeds": s.seeds, "seed": s.seed,
            "server": None if self.server is None else self.server.to_dict(),
            "validated": False,
        }  # fmt: skip

    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        out = [*self.requests.notes, self.said]
        if self.server is None:
            out.append("no hardware is named: each step takes one unit of time, so only counts are given")
        else:
            out.append(f"times are {NOT_VALIDATED}: {self.server.describe()}")
            if not self.server.layers:
                out.append("steps of a plan's groups are timed with uniform routing, each group by itself")
        if self.plan is not None:
            trace = self.requests.trace
            if trace is not None and trace.checksum == self.plan.provenance.trace_checksum:
                out.append("the plan was fitted on these very requests: results are optimistic")
        else:
            out.append(
                f"{self.settings.fit:.0%} of the requests are learnt from, the others arrive, drawn anew each time"
            )
        return tuple(out)


def _check_rows(requests: RequestSet, settings: SimulationSettings) -> None:
    if "domain" in settings.rows and len(np.unique(requests.domain)) < 2:
        raise UsageError("the trace has one domain, so none can be told apart", hint="leave domain out of --policies")
    if "prompt-tokens" in settings.rows and (requests.trace is None or requests.trace.prompts is None):
        raise UsageError("the trace keeps no prompts to predict from", hint="record it with --keep-prompt-tokens")


def _remote_share(requests: RequestSet, plan: Plan, stream: Stream, group: Int64Array) -> float:
    """Share of the stream's picks that another node serves, each request decoding in its group."""
    n, groups = len(requests), plan.cluster.num_groups
    use = requests.use.reshape(n, -1).astype(np.float64)
    local = use @ plan.routes.local_share.reshape(groups, -1).T
    return float(1 - local[stream.source, group].sum() / use.sum(axis=1)[stream.source].sum())
