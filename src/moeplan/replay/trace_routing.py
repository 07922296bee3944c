"""Real routing for the platform model: decode steps of a trace under a plan, counted, as `moeplan.perf` takes them.

The steps are those of a replay: in each group some requests are live, drawn in proportion to their decode length, each
at a uniform position, grouped as the plan's router groups them.

Names: S steps, L MoE layers, P GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplan.cluster import Cluster, Dispatch
from moeplan.errors import UsageError
from moeplan.perf.collectives import Messages
from moeplan.perf.routing import Routing
from moeplan.planning.requests import RequestSet
from moeplan.planning.store import StoredPlan
from moeplan.replay.comparison import Setup, group_test
from moeplan.replay.measure import measure_requests, measure_steps
from moeplan.replay.split import draw_steps, live_requests
from moeplan.replay.timing import StepTimes, Timing, routing_of

__all__ = ["TraceRouting", "real_routing"]


@dataclass(frozen=True)
class TraceRouting:
    """What the requests of a trace do to a cluster under a plan.

    Attributes:
        routing: of S steps, as `moeplan.replay.timing.routing_of` gives it.
        live: requests of each group in a step. steps: S.
        local_share: picks served on the token's own node, over all rows of all usable requests.
    """

    routing: Routing
    live: int
    steps: int
    local_share: float

    @property
    def experts_per_gpu(self) -> float:
        """Distinct experts that a GPU touches in a layer, mean over steps, layers and GPUs."""
        return float(self.routing.experts.mean())


@dataclass(frozen=True)
class _Counter(Timing):
    """Stands where steps are timed, and keeps what was counted instead."""

    redundant: int = 0
    counted: list[Routing] = field(default_factory=list)

    def times(self, cluster: Cluster, mode: Dispatch, links: Any, picks: Any, touched: Any) -> StepTimes:
        self.counted.append(routing_of(cluster, self.spec, links, picks, touched, self.redundant))
        nothing = np.zeros(len(picks))
        return StepTimes(nothing, nothing)


def real_routing(
    requests: RequestSet, stored: StoredPlan, timing: Timing, mode: Dispatch, *, live: int | None = None, seed: int = 0
) -> TraceRouting:
    """Replay `timing.steps` steps of all usable requests under a plan.

    Args:
        timing: the model that the trace is of, checked against it (`Timing.check`).
        live: requests of each group in a step; None: as many as a replay takes, at most 128.

    Raises:
        PlanError: too few requests for the plan's groups.
        UsageError: more live requests than a group has; a plan whose groups are of unlike size.
    """
    cluster, result = stored.cluster, stored.result
    if not result.equal_groups:
        raise UsageError(
            f"{result.strategy} makes groups of unlike size, and a step takes as many requests of each",
            hint="use a plan of another strategy",
        )
    most = live_requests([len(requests)], cluster)
    live = most if live is None else live
    if not 1 <= live <= most:
        raise UsageError(
            f"--batch {live}: the trace's {len(requests)} usable requests give each of {cluster.num_groups} groups at "
            f"most {most} that are live at a time",
            hint=f"leave --batch out, or give 1 to {most}",
        )
    setup = Setup(cluster, (), stored.redundant, stored.rule, mode, folds=1, seed=seed, steps=timing.steps)
    everyone, rng = np.arange(len(requests)), np.random.default_rng([seed, 0, 2])
    group = group_test(requests, everyone, everyone, result, "prefill", rng)
    figures = measure_requests(requests, everyone, group, result.who, mode)
    counter = _Counter(timing.spec, timing.machine, timing.context, timing.steps, redundant=stored.redundant)
    draws = draw_steps(requests.measured_span, setup.steps, rng)
    measure_steps(requests, draws, group, live, result.who, mode, counter)
    local = 1 - float(figures.remote.sum() / figures.picks.sum())
    return TraceRouting(_joined(counter.counted), live, timing.steps, local)


def _joined(parts: list[Routing]) -> Routing:
    """Steps counted in several runs, as one."""
    messages = [part.messages for part in parts if part.messages is not None]
    together = [np.concatenate([getattr(m, f.name) for m in messages]) for f in dataclasses.fields(Messages)]
    picks, experts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("picks", "experts"))
    return Routing(picks, experts, Messages(*together), parts[0].slots, parts[0].source)
