"""`estimate --trace --plan`: the trace and the plan, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.perf.estimate import Estimate, EstimateSettings
    from moeplan.perf.hardware import Hardware


def estimate_real(
    trace: str | None, plan: str | None, machine: Hardware, model: str | None, settings: EstimateSettings, *,
    batch: int | None, context: int, given: Sequence[str], without_layers: tuple[int, ...],
    signature_tokens: int | None, seed: int,
) -> Estimate:  # fmt: skip
    """Estimate with the routing of a trace under a plan of it.

    Args:
        model: a name of the catalogue, or a config.json; None: the trace's. given: flags that a plan does not go with.
        signature_tokens: None: as the plan was made.

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
    from moeplan.replay.timing import Timing, model_of
    from moeplan.replay.trace_routing import estimate_plan
    from moeplan.trace import open_trace

    stored = load_plan(plan)
    opened = open_trace(trace, without_layers=without_layers)
    spec = model_of(opened.shape, model)
    check_shape(opened.shape, stored.model, plan)
    dispatch = settings.dispatch or stored.dispatch
    Timing(spec, machine, context).check(opened.shape, stored.cluster, dispatch)  # before a large trace is read
    if signature_tokens is None:
        signature_tokens = stored.signature.tokens
    requests = read_requests(opened, signature_tokens=signature_tokens)
    found = estimate_plan(
        stored, requests, machine, model=spec, batch=batch, context=context, settings=settings, seed=seed
    )
    assert found.measured is not None
    seen, notes = stored.provenance.trace_checksum == opened.checksum, found.measured.notes
    if seen:
        notes = (*notes, "the plan was fitted on this very trace: these are not figures of unseen requests")
    measured = replace(found.measured, trace=trace, plan=plan, fitted_on_this_trace=seen, notes=notes)
    return replace(found, measured=measured)
