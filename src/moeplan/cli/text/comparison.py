"""The table of strategies as text, for `demo`, `compare` and `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeplan.cli.terminal import aligned, echo, plural

if TYPE_CHECKING:
    from moeplan.replay import Comparison, TableRow
    from moeplan.trace import Trace

__all__ = ["show_comparison", "table_lines"]

#: (heading, key, format); the load columns carry their noise floor in the last line.
_COLUMNS = (
    ("remote", "remote_share", "{:.3f}"),
    ("nodes", "remote_nodes_per_token", "{:.2f}"),
    ("KB/token", "inter_node_bytes_per_token", "{:,.0f}"),
    ("padded", "padded_ratio", "{:.2f}"),
    ("GPU load", "gpu_load_ratio", "{:.2f}"),
    ("node load", "node_load_ratio", "{:.2f}"),
)


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
    for line in ("", *table_lines(table), "", verdict(table), ""):
        echo(line)
    for note in table.method:
        echo(f"  - {note}")


def table_lines(table: Comparison) -> list[str]:
    """Lines of about 110 characters, 130 with times: one row per strategy, then the noise floors."""
    head = ["strategy", "groups by", *(name for name, _, _ in _COLUMNS[:1]), "vs linear [95 %]"]
    times = table.head["setup"]["timing"] is not None
    head += [name for name, _, _ in _COLUMNS[1:]] + ["step ms, change", "idle"] * times + ["guard"]
    lines = [head, *(_line(row, times) for row in table.rows)]
    floors = (
        ["  (noise floor)", "", "", ""] + [_floor(table, key) for _, key, _ in _COLUMNS[1:]] + [""] * (1 + 2 * times)
    )
    lines.append(floors)
    first, *rest = lines
    return aligned(first, rest, left=(0, 1))


def _line(row: TableRow, times: bool) -> list[str]:
    cells = []
    for _, key, form in _COLUMNS:
        value = row.figures[key].value
        if value is not None and key == "inter_node_bytes_per_token":
            value /= 1000.0
        cells.append("-" if value is None else form.format(value))
    versus = row.versus_linear["remote_share"]
    change = ""
    if versus is not None and row.name != "linear":
        low, high = versus["ci95"] or (versus["value"], versus["value"])
        change = f"{100 * versus['value']:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
    from moeplan.report.compare_page import GROUPS_BY

    guard = "ok" if row.guarded else ("unequal groups" if not row.equal_groups else "over")
    by = GROUPS_BY.get(row.signature, row.signature)
    return [row.name, by, cells[0], change, *cells[1:], *(_times(row) if times else []), guard]


def _times(row: TableRow) -> list[str]:
    """The modelled step with its change against linear, and the idle share."""
    ms, idle = row.figures["modelled_step_ms"].value, row.figures["modelled_idle_share"].value
    if ms is None or idle is None:
        return ["-", "-"]
    versus = row.versus_linear["modelled_step_ms"]
    change = f"{100 * versus['value']:+.1f} %" if versus and row.name != "linear" else ""
    return [f"{ms:.2f} {change:>8}", f"{100 * idle:.0f} %"]


def _floor(table: Comparison, key: str) -> str:
    extra = dict(table.rows[0].figures[key].extra)
    return f"{extra['noise_floor']:.2f}" if "noise_floor" in extra else ""
