"""Plans as text: a new one, the comparison of strategies, and the verdict of drift on a stored one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.cli.terminal import echo, plural

if TYPE_CHECKING:
    from moeplan.planning import Plan, RequestSet
    from moeplan.planning.plan import Moves
    from moeplan.replay.drift import DriftReport
    from moeplan.replay.table import Comparison
    from moeplan.trace import Trace

__all__ = ["drift_lines", "plan_facts", "show_comparison", "show_moves", "show_plan"]


def plan_facts(plan: Plan, output: Path, moves: Moves | None = None) -> dict[str, Any]:
    """The JSON of `plan` and `rebalance`."""
    return {
        "plan": str(output),
        "strategy": plan.strategy,
        "fit_seconds": plan.provenance.fit_seconds,
        "expected": plan.expected,
        "moved": moves and vars(moves),
    }


def show_plan(plan: Plan, requests: RequestSet, output: Path) -> None:
    """What was planned, and its figures on a held-out quarter."""
    _show_head(plan, requests, output)
    if plan.expected is None:
        why = "too few requests to hold a quarter back" if requests.sums is None else "they need token rows"
        echo(f"  - expected figures are not given: {why}")
        return
    echo("expected on held-out requests (fitted on three quarters, measured on the last):")
    for key, figure in plan.expected.items():
        if figure["value"] is None:
            echo(f"  {key:24s} - (per-step figures need groups of equal size)")
            continue
        versus = figure.get("vs_linear")
        change = f"  ({100 * versus['value']:+.1f} % against linear)" if versus else ""
        echo(f"  {key:24s} {figure['value']:.3f}{change}")


def show_moves(plan: Plan, requests: RequestSet, moves: Moves, old: Path, output: Path) -> None:
    """What was moved against the older plan."""
    _show_head(plan, requests, output)
    layers, slots = plan.placement.slots.shape
    size = "" if moves.bytes is None else f", {_size(moves.bytes)} of weights"
    echo(
        f"moved against {old}: {moves.replicas} of {moves.slots} expert slots "
        f"({layers} layers x {slots}){size}; at most {moves.most_in_a_layer} in a layer"
    )
    if moves.replicas:
        echo(f"to see the gain: moeplan evaluate TRACE --plan {output}, and the same for {old}")
    else:
        echo("no improvement within --max-moves: the placement is unchanged, the request router is new")


def _show_head(plan: Plan, requests: RequestSet, output: Path) -> None:
    trace, seconds = requests.trace, plan.provenance.fit_seconds
    named = "" if trace is None else f"{trace.label}: "
    noun = "requests" if trace is None else trace.request_noun
    echo(f"{named}{plan.strategy} on {len(requests)} {noun} in {seconds:.2f} s -> {output}")
    for note in (*requests.notes, *plan.provenance.notes):
        echo(f"  - {note}")
    if not plan.equal_groups:
        echo("  - its groups are unequal in size: it is for comparison only, and not eligible")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def show_comparison(table: Comparison, trace: Trace, seconds: float) -> None:
    """What was measured, the table, and what it says."""
    from moeplan.report.compare_page import verdict

    setup, shape, count = table.head["setup"], trace.shape, table.head["requests"]
    echo(
        f"{trace.label}: {shape.num_layers} layers x {shape.num_experts} experts, top-{shape.top_k}, on "
        f"{setup['nodes']} nodes x {setup['gpus_per_node']} GPUs, {setup['redundant']} redundant slots, "
        f"dispatch per {setup['dispatch']}"
    )
    done = f"measured on {count['test'][0]} requests"
    if count["fit"][0]:
        folds = plural(setup["folds"], "fold")
        done = f"fitted on {count['fit'][0]} requests, measured on {count['test'][0]} held-out ones, {folds}"
    echo(f"{done} ({table.head['column']}), {seconds:.1f} s")
    for note in table.notes:
        echo(f"note: {note}")
    for line in ("", *repr(table).splitlines(), "", verdict(table), ""):
        echo(line)
    for note in table.method:
        echo(f"  - {note}")


def drift_lines(found: DriftReport, stored: Plan, requests: RequestSet, trace: Path, plan: Path) -> Iterator[str]:
    """What was measured, the figures, the verdict, and what follows."""
    opened = requests.trace
    assert opened is not None
    count, setup = found.table.head["requests"], found.table.head["setup"]
    by = "" if found.planner == stored.strategy else f" (new plans by {found.planner})"
    yield (
        f"{opened.label}: {count['fit'][0]} requests for new plans, {count['test'][0]} held out to measure on, "
        f"{setup['folds']} folds; {stored.strategy}{by} on {setup['nodes']} nodes x "
        f"{setup['gpus_per_node']} GPUs, {setup['redundant']} redundant slots, dispatch per {setup['dispatch']}"
    )
    yield from _figures(found)
    yield from _verdict(found, trace, plan)
    for note in requests.notes:
        yield f"  - {note}"
    if requests.known != stored.signature:
        yield f"  - signatures are taken from the {requests.known}; the plan was fitted on the {stored.signature}"
    if found.fitted_on_this_trace:
        yield "  - the plan was fitted on this trace, including the held-out requests: results are optimistic"


def _figures(found: DriftReport) -> Iterator[str]:
    from moeplan.planning.problem import GUARD
    from moeplan.replay.drift import FRESH, OLD, OLD_RANDOM

    yield f"{'':30s} {found.key + ' [95 %]':>30s}  node load  GPU load"
    names = {"linear": "linear, random groups", OLD_RANDOM: f"{OLD}, random groups", OLD: OLD, FRESH: "new plan"}
    for name, row in names.items():
        figures = found.table.row(name).figures
        low, high = figures[found.key].interval() or (0.0, 0.0)
        yield (
            f"{row:30s} {figures[found.key].value:13.3f} [{low:.3f}, {high:.3f}]"
            f"  {figures['node_load_ratio'].value:9.2f}  {figures['gpu_load_ratio'].value:8.2f}"
        )
    if found.change is not None:
        (a, b), (c, d) = found.change["ci95"], found.change["ci95_of_planning"]
        yield (
            f"a new plan would change {found.key} by {100 * found.change['value']:+.1f} %: [{100 * a:+.1f}, "
            f"{100 * b:+.1f}] over requests, [{100 * c:+.1f}, {100 * d:+.1f}] between folds"
        )
    low, high = found.load
    too = ", which new plans exceed too" if low > GUARD and not found.overloaded else ""
    yield f"node load is {found.node_load(OLD):.2f} x linear's [{low:.2f}, {high:.2f}]; the guard is {GUARD:g}{too}"


def _verdict(found: DriftReport, trace: Path, plan: Path) -> Iterator[str]:
    if found.stale:
        yield f"stale: {', and '.join(found.reasons)}"
        yield f"next: moeplan rebalance {trace} --plan {plan} --max-moves M -o NEW, or a new plan: moeplan plan {trace}"
    else:
        yield "still good: a new plan would change no more than noise"
