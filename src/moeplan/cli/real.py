"""`estimate --trace --plan`: the set-up that a plan is for, and the routing that a trace has under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeplan.cluster import Dispatch
    from moeplan.model.spec import ModelSpec
    from moeplan.perf.hardware import Hardware
    from moeplan.perf.memory import Parallel
    from moeplan.perf.serving import Layout
    from moeplan.planning import RequestSet
    from moeplan.planning.store import StoredPlan
    from moeplan.replay.trace_routing import TraceRouting


@dataclass(frozen=True)
class Real:
    """A trace, a plan, and the model and layout that they are of.

    Attributes:
        trace, plan: as given. seen: whether the plan was fitted on this very trace.
    """

    trace: str
    plan: str
    requests: RequestSet
    stored: StoredPlan
    spec: ModelSpec
    parallel: Parallel
    seen: bool

    def steps(self, layout: Layout, context: int, batch: int | None, seed: int) -> TraceRouting:
        """Decode steps of the trace under the plan."""
        from moeplan.replay.timing import Timing
        from moeplan.replay.trace_routing import real_routing

        mode = layout.mode or self.stored.dispatch
        timing = Timing(self.spec, layout.hardware, context)
        return real_routing(self.requests, self.stored, timing, mode, live=batch, seed=seed)

    def facts(self, steps: TraceRouting, layout: Layout, context: int) -> dict[str, Any]:
        """What the routing did, beside uniform routing, as JSON."""
        import numpy as np

        moe = self.spec.moe
        assert moe is not None
        cluster = self.stored.cluster
        ms = 1e3 * np.asarray(layout.decode(steps.live, context, routing=steps.routing).seconds)
        ms = ms if ms.ndim == 1 else ms.mean(axis=1)
        flat = layout.decode(steps.live, context)
        per_gpu = (moe.experts + self.stored.redundant) / cluster.num_gpus
        tokens = steps.live * cluster.num_groups
        missed = (1 - moe.top_k / (moe.experts + self.stored.redundant)) ** tokens
        return {
            "trace": self.trace, "plan": self.plan, "strategy": self.stored.result.strategy,
            "fitted_on_this_trace": self.seen, "steps": steps.steps, "local_share": steps.local_share,
            "experts_per_gpu": steps.experts_per_gpu, "load_ratio": steps.routing.load_ratio,
            "step_ms_p5": float(np.quantile(ms, 0.05)), "step_ms_p95": float(np.quantile(ms, 0.95)),
            "uniform": {
                "step_ms": 1e3 * float(flat.seconds), "load_ratio": flat.load_ratio,
                "local_share": 1 / cluster.nodes, "experts_per_gpu": per_gpu * (1 - missed),
            },
            "notes": self._notes(steps),
        }  # fmt: skip

    def _notes(self, steps: TraceRouting) -> list[str]:
        out = []
        recorded, held = self.requests.shape.num_layers, len(self.spec.moe.layers) if self.spec.moe else 0
        if recorded < held:
            out.append(f"the trace gives {recorded} of {self.spec.name}'s {held} MoE layers; their mean stands for all")
        if self.seen:
            out.append("the plan was fitted on this very trace: these are not figures of unseen requests")
        return out


def read_real(
    trace: str | None, plan: str | None, machine: Hardware, model: str | None, mode: Dispatch | None, context: int, *,
    given: Sequence[str], without_layers: tuple[int, ...], signature_tokens: int | None,
) -> Real:  # fmt: skip
    """Read a trace and a plan of it.

    Args:
        model: a name of the catalogue, or a config.json; None: the trace's. mode: None: the plan's.
        given: flags that a plan does not go with. signature_tokens: None: as the plan was made.

    Raises:
        UsageError: one without the other; flags that the plan answers; a trace of another model than the plan.
    """
    if trace is None or plan is None:
        raise UsageError("--trace and --plan go together", hint="give both, or neither for uniform routing")
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(
            f"{flag} does not go with --plan, which has its own cluster and decode steps", hint=f"leave {flag} out"
        )
    from moeplan.planning import read_requests
    from moeplan.planning.store import load_plan
    from moeplan.replay.comparison import check_shape
    from moeplan.replay.drift import signature_tokens_of
    from moeplan.replay.timing import Timing, model_of, parallel_of
    from moeplan.trace import open_trace

    stored = load_plan(plan)
    opened = open_trace(trace, without_layers=without_layers)
    spec = model_of(opened.shape, model)
    check_shape(opened.shape, stored.shape, plan)
    Timing(spec, machine, context).check(
        opened.shape, stored.cluster, mode or stored.dispatch
    )  # before a large trace is read
    if signature_tokens is None:
        signature_tokens = signature_tokens_of(stored)
    requests = read_requests(opened, signature_tokens=signature_tokens)
    seen = stored.trace_checksum == opened.checksum
    parallel = parallel_of(stored.cluster, spec, stored.redundant)
    return Real(trace, plan, requests, stored, spec, parallel, seen)
