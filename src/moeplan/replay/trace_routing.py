"""Real routing for the platform model: decode steps of a trace under a plan, counted, as `moeplan.perf` takes them.

The steps are those of a replay: in each group some requests are live, drawn in proportion to their decode length, each
at a uniform position, grouped as the plan's router groups them.

Names: S steps, L MoE layers, P GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from moeplan.errors import UsageError
from moeplan.model.spec import ModelSpec
from moeplan.perf.collectives import Messages
from moeplan.perf.estimate import Estimate, EstimateSettings, MeasuredRouting, estimate_step
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.routing import Routing
from moeplan.perf.step_model import StepModel
from moeplan.planning import Plan, RequestSet, read_requests
from moeplan.replay.evaluator import FoldEvaluator, check_inputs
from moeplan.replay.measure import measure_requests
from moeplan.replay.split import live_requests
from moeplan.replay.timing import CONTEXT, Timing, cluster_parallel, find_model, step_routing
from moeplan.trace import Trace

__all__ = ["TraceRouting", "estimate_plan", "real_routing"]


@dataclass(frozen=True)
class TraceRouting:
    """What the requests of a trace do to a cluster under a plan.

    Attributes:
        routing: of S steps, as `moeplan.replay.timing.step_routing` gives it.
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


def estimate_plan(
    plan: Plan,
    requests: Trace | RequestSet,
    hardware: str | Hardware,
    *,
    model: str | ModelSpec | None = None,
    batch: int | None = None,
    context: int = CONTEXT,
    settings: EstimateSettings | None = None,
    seed: int = 0,
) -> Estimate:
    """Estimate a decode step of a plan's cluster, with the routing that the requests of a trace have under the plan.

    Args:
        requests: a trace, or the requests of one.
        model: a name of the catalogue, the path of a config.json, or a description; None: the trace's own.
        batch: requests of each group in a step; None: as many as a replay takes, at most 128.
        context: tokens that each holds. settings: as for `moeplan.perf.estimate.estimate`, without a layout.

    Raises:
        UsageError: a model that is not the trace's; settings that the plan answers; more requests than a group has.
        PlanError: too few requests for the plan's groups.
    """
    check_inputs(plan, requests)
    spec, machine = find_model(requests.shape, model), load_hardware(hardware)
    settings = settings or EstimateSettings()
    plan = dataclasses.replace(plan, dispatch=settings.dispatch or plan.dispatch)
    settings = dataclasses.replace(settings, dispatch=plan.dispatch)
    timing = Timing(spec, machine, context)
    timing.check(requests.shape, plan.cluster, plan.dispatch)  # before a large trace is read
    requests = read_requests(requests, signature_tokens=plan.signature.tokens)
    parallel = cluster_parallel(plan.cluster, spec, plan.redundant)
    step_model = settings.step_model(spec, machine, parallel, plan.cluster.gpus_per_node)
    steps = real_routing(requests, plan, timing, live=batch, seed=seed)
    found = estimate_step(step_model, steps.live, context, settings, steps.routing)
    return dataclasses.replace(found, measured=_measured(step_model, steps, requests, plan, context))


def _measured(model: StepModel, steps: TraceRouting, requests: RequestSet, plan: Plan, context: int) -> MeasuredRouting:
    """What the routing did, beside uniform routing."""
    moe, cluster = model.spec.moe, plan.cluster
    assert moe is not None
    ms = 1e3 * np.asarray(model.decode(steps.live, context, routing=steps.routing).seconds)
    ms = ms if ms.ndim == 1 else ms.mean(axis=1)
    flat = model.decode(steps.live, context)
    per_gpu = (moe.experts + plan.redundant) / cluster.num_gpus
    missed = (1 - moe.top_k / (moe.experts + plan.redundant)) ** (steps.live * cluster.num_groups)
    uniform = {
        "step_ms": 1e3 * float(flat.seconds),
        "load_ratio": flat.load_ratio,
        "local_share": 1 / cluster.nodes,
        "experts_per_gpu": per_gpu * (1 - missed),
    }
    notes = []
    if requests.shape.num_layers < len(moe.layers):
        notes.append(
            f"the trace gives {requests.shape.num_layers} of {model.spec.name}'s {len(moe.layers)} MoE layers; their "
            "mean stands for all"
        )
    if seen := requests.fitted(plan):
        notes.append("the plan was fitted on this trace: these are not figures on held-out requests")
    return MeasuredRouting(
        trace=requests.trace.label if requests.trace else "",
        plan="",
        strategy=plan.strategy,
        fitted_on_this_trace=seen,
        steps=steps.steps,
        local_share=steps.local_share,
        experts_per_gpu=steps.experts_per_gpu,
        load_ratio=steps.routing.load_ratio,
        step_ms_p5=float(np.quantile(ms, 0.05)),
        step_ms_p95=float(np.quantile(ms, 0.95)),
        uniform=uniform,
        notes=tuple(notes),
    )


def real_routing(
    requests: RequestSet, plan: Plan, timing: Timing, *, live: int | None = None, seed: int = 0
) -> TraceRouting:
    """Replay `timing.steps` steps of all usable requests under a plan.

    Args:
        timing: the model that the trace is of, checked against it (`Timing.check`).
        live: requests of each group in a step; None: as many as a replay takes, at most 128.

    Raises:
        PlanError: too few requests for the plan's groups.
        UsageError: more live requests than a group has; a plan whose groups are of unlike size.
    """
    cluster = plan.cluster
    if not plan.equal_groups:
        raise UsageError(
            f"{plan.strategy} makes groups of unlike size, and a step takes as many requests of each",
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
    everyone = np.arange(len(requests))
    fold = FoldEvaluator(requests, everyone, everyone, live, timing.steps, seed)
    grouping = fold.group(plan, "prefill")
    figures = measure_requests(requests, everyone, grouping.group, plan)
    counts = fold.sample(plan, grouping).counts(timing.steps)
    counted = [step_routing(cluster, timing.spec, step, plan.redundant) for step in counts]
    local = 1 - float(figures.remote.sum() / figures.picks.sum())
    return TraceRouting(_joined(counted), live, timing.steps, local)


def _joined(parts: list[Routing]) -> Routing:
    """Steps counted in several runs, as one."""
    messages = [part.messages for part in parts if part.messages is not None]
    together = [np.concatenate([getattr(m, f.name) for m in messages]) for f in dataclasses.fields(Messages)]
    picks, experts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("picks", "experts"))
    return Routing(picks, experts, Messages(*together), parts[0].slots, parts[0].source)
