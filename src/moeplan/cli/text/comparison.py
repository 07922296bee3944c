"""The table of strategies as text, for `demo`, `compare` and `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeplan.cli.terminal import echo, plural

if TYPE_CHECKING:
    from moeplan.replay.table import Comparison
    from moeplan.trace import Trace

__all__ = ["show_comparison"]


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
