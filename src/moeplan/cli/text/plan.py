"""A new plan as text and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.cli.terminal import echo

if TYPE_CHECKING:
    from moeplan.planning import Plan, RequestSet
    from moeplan.planning.plan import Moves

__all__ = ["plan_facts", "show_moves", "show_plan"]


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
    size = "" if moves.bytes is None else f", {_size(moves.bytes)} of weights"
    echo(
        f"moved against {old}: {moves.replicas} of {moves.slots} expert replicas{size}; at most "
        f"{moves.most_in_a_layer} in a layer"
    )
    if moves.replicas:
        echo(f"to see the gain: moeplan evaluate TRACE --plan {output}, and the same for {old}")
    else:
        echo("no improvement within --max-moves: the placement is unchanged, the router is new")


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
