"""The page of a comparison: what each strategy gives on held-out requests, in one sentence a figure."""

from __future__ import annotations

import numpy as np

from moeplan.planning.problem import GUARD
from moeplan.replay.split import MAX_LIVE
from moeplan.replay.table import SIGNATURES, Comparison, TableRow, bar_height, draw_bars
from moeplan.report.figures import GREY, PALETTE, STYLES, Image, canvas, legend_below, to_image
from moeplan.report.page import Section, Table, render
from moeplan.trace import Trace

__all__ = ["compare_html", "verdict"]

#: key, heading, scale, format: all keys of the full table.
_KEYS = (
    ("remote_share", "remote share", 1.0, "{:.4f}"),
    ("remote_nodes_per_token", "remote nodes per token", 1.0, "{:.3f}"),
    ("inter_node_bytes_per_token", "inter-node KB per token", 1e-3, "{:,.1f}"),
    ("intra_node_bytes_per_token", "intra-node KB per token", 1e-3, "{:,.1f}"),
    ("padded_ratio", "busiest node pair / linear's", 1.0, "{:.3f}"),
    ("padded_rank_ratio", "busiest rank / linear's", 1.0, "{:.3f}"),
    ("gpu_load_total", "GPU load, total", 1.0, "{:.2f}"),
    ("node_load_total", "node load, total", 1.0, "{:.2f}"),
    ("gpu_load_ratio", "GPU load, per step", 1.0, "{:.2f}"),
    ("node_load_ratio", "node load, per step", 1.0, "{:.2f}"),
    ("experts_per_gpu", "experts per GPU", 1.0, "{:.2f}"),
    ("modelled_step_ms", "modelled step, ms", 1.0, "{:.3f}"),
    ("modelled_idle_share", "idle share of the step, %", 100.0, "{:.1f}"),
    ("group_size_ratio", "group size", 1.0, "{:.3f}"),
    ("group_token_ratio", "group tokens", 1.0, "{:.3f}"),
    ("expert_weight_gb_per_gpu", "expert weights, GB per GPU", 1.0, "{:.2f}"),
    ("kv_tokens_lost", "KV-cache tokens lost", 1.0, "{:,.0f}"),
    ("kv_handover_bytes_per_request", "KV hand-over, MB per request", 1e-6, "{:.2f}"),
    ("fit_seconds", "fit time, s", 1.0, "{:.2f}"),
)


def compare_html(table: Comparison, trace: Trace) -> str:
    """The whole page as HTML."""
    setup, shape, count = table.head["setup"], trace.shape, table.head["requests"]
    subtitle = (
        f"{shape.num_layers} MoE layers x {shape.num_experts} experts, top-{shape.top_k}, on {setup['nodes']} nodes x "
        f"{setup['gpus_per_node']} GPUs with {setup['redundant']} redundant slots per layer; dispatch per "
        f"{setup['dispatch']}, replicas {setup['replica_rule']}, deployment {setup['deployment']}; seed {setup['seed']}"
    )
    notices = [f"{note[0].upper()}{note[1:]}." for note in table.notes]
    if trace.synthetic:
        notices.insert(0, "Synthetic: this workload is generated; its figures say nothing about a real model.")
    if count["fit"][0]:
        notices.insert(
            0,
            f"Plans were fitted on {count['fit'][0]} requests and measured on {count['test'][0]} held-out requests "
            f"({table.head['column']}); number of random splits: {setup['folds']}.",
        )
    main = [row for row in table.rows if "/" not in row.name]
    sections = [
        _volume(table, main),
        _nodes(table, main),
        _split(table),
        _gpu_load(table, main),
        _step_load(table, main),
        _step_time(table, main),
        _all_keys(table),
        _method(table),
    ]
    return render(f"Strategies on {trace.label}", subtitle, notices, [s for s in sections if s is not None])


def verdict(table: Comparison) -> str:
    """The answer in one sentence: which eligible row lowers the remote share, and the step time, most."""
    said = _outcome(list(table.rows), "remote_share", "the remote share")
    if table.row("linear").figures["modelled_step_ms"].value is not None:
        said += " " + _outcome(list(table.rows), "modelled_step_ms", "the modelled step time")
    return said


def _change(row: TableRow, key: str) -> str:
    """'-6.6 % (interval -8.3 to -4.9)' against linear."""
    versus = row.versus_linear.get(key)
    if versus is None:
        return "unknown"
    text = f"{100 * versus['value']:+.1f} %"
    if versus["ci95"]:
        low, high = versus["ci95"]
        text += f" (interval {100 * low:+.1f} to {100 * high:+.1f})"
    return text


def _best(rows: list[TableRow], key: str) -> TableRow | None:
    """The guarded row that is lowest on a key, other than linear."""
    known = [row for row in rows if row.within_guard and row.name != "linear" and row.figures[key].value is not None]
    return min(known, key=lambda row: row.figures[key].value or 0.0, default=None)


def _outcome(rows: list[TableRow], key: str, what: str) -> str:
    """One sentence on who wins among the eligible rows, and what an unguarded row would have given."""
    rows = [row for row in rows if row.signature != "oracle"]
    best = _best(rows, key)
    if best is None:
        text = f"Only linear is within the load guard, so no row that changes {what} is eligible"
    else:
        versus = best.versus_linear[key] or {}
        interval = versus.get("ci95")
        sure = interval is not None and interval[1] < 0
        if versus.get("value", 0.0) > -0.0005:
            text = f"No eligible row lowers {what}"
        else:
            verb = f"lowers {what} most" if sure else f"has the lowest value of {what[4:]}, but not beyond noise"
            text = f"Among the eligible rows, {best.name} {verb}: {_change(best, key)} against linear"
    over = [row for row in rows if not row.within_guard and row.figures[key].value is not None]
    lowest = min(over, key=lambda row: row.figures[key].value or 0.0, default=None)
    if lowest is not None:
        value, limit = lowest.figures[key].value or 0.0, (best.figures[key].value if best else None)
        if limit is None or value < limit:
            node = lowest.figures["node_load_ratio"].value
            cost = f"a node load of {node:.2f}" if node is not None else "groups of unequal size"
            text += f"; {lowest.name} changes it by {_change(lowest, key)}, but has {cost} and is not eligible"
    return text + "."


def _volume(table: Comparison, rows: list[TableRow]) -> Section:
    linear = table.row("linear").figures["remote_share"].value or 0.0
    sentence = f"With linear, {100 * linear:.1f} % of all picks are served on another node than the token's. "
    sentence += _outcome(list(table.rows), "remote_share", "the remote share")
    key, alt = "inter_node_bytes_per_token", "Inter-node bytes by strategy"
    figures = _bars(rows, table, "remote_share", "remote share of picks", "Remote share by strategy")
    figures += _bars(rows, table, key, "KB between nodes per token", alt, 1e-3)
    note = (
        f"Solid bars: eligible (equal groups, node load at most {GUARD:g} times linear's). Hatched bars: not eligible. "
        "Dashed line: linear. Black lines: 95 % intervals over requests. Percentages: paired change against linear."
    )
    return Section("Volume between nodes", sentence, figures, note=note)


def _nodes(table: Comparison, rows: list[TableRow]) -> Section:
    linear = table.row("linear").figures["remote_nodes_per_token"].value or 0.0
    sentence = f"With linear, a token is sent to {linear:.2f} other nodes in each layer. "
    sentence += _outcome(list(table.rows), "remote_nodes_per_token", "the number of nodes reached")
    padded = [row for row in rows if row.name != "linear" and row.figures["padded_ratio"].value is not None]
    if padded:
        worst = max(padded, key=lambda row: row.figures["padded_ratio"].value or 0.0)
        least = min(padded, key=lambda row: row.figures["padded_ratio"].value or 0.0)
        sentence += (
            " A kernel that pads all node pairs to the largest one would send "
            f"{least.figures['padded_ratio'].value:.2f} times linear's volume under {least.name} and "
            f"{worst.figures['padded_ratio'].value:.2f} times under {worst.name}."
        )
    figures = _bars(rows, table, "remote_nodes_per_token", "other nodes per token and layer", "Nodes reached")
    figures += _bars(rows, table, "padded_ratio", "padded volume / linear's", "Padded volume by strategy")
    return Section("Nodes reached, and padded volume", sentence, figures)


def _split(table: Comparison) -> Section | None:
    """The share of the gain that comes from grouping and from placement, and the effect of each signature."""
    families: dict[str, list[TableRow]] = {}
    for row in table.rows:
        families.setdefault(row.strategy, []).append(row)
    shown = [row for rows in families.values() if len(rows) > 1 for row in rows]
    if not shown:
        return None
    parts = []
    for name, rows in families.items():
        by = {row.signature: row for row in rows}
        if "none" not in by or "prefill" not in by or len(rows) < 2:
            continue
        alone, routed = by["none"].versus_linear["remote_share"], by["prefill"].versus_linear["remote_share"]
        if alone is None or routed is None:
            continue
        text = f"{name}'s placement gives {100 * alone['value']:+.1f} % with random groups"
        text += f" and {100 * routed['value']:+.1f} % with groups by prefill"
        if oracle := by.get("oracle"):
            text += " (an oracle that knows the decode: "
            text += f"{100 * (oracle.versus_linear['remote_share'] or {'value': 0.0})['value']:+.1f} %)"
        parts.append(text)
    figures = _bars(shown, table, "remote_share", "remote share of picks", "Remote share by signature")
    note = f"The signature is the picks of a request's {table.head['signature_stands_in'] or 'prefill'}."
    sentence = "No strategy has rows with both random groups and groups by prefill."
    if parts:
        sentence = "On the remote share, " + "; ".join(parts) + "."
    return Section("Effect of grouping and placement", sentence, figures, note=note)


def _gpu_load(table: Comparison, rows: list[TableRow]) -> Section:
    best = min(rows, key=lambda row: row.figures["gpu_load_total"].value or 0.0)
    linear = table.row("linear").figures["gpu_load_total"]
    idle = [float((row.gpu_load < 0.5).mean()) for row in (table.row("linear"), best)]
    if (best.figures["gpu_load_total"].value or 0.0) <= 0.999 * (linear.value or 0.0):
        sentence = (
            f"Over the held-out requests the busiest GPU of a layer serves {linear.value:.2f} times the mean under "
            f"linear and {best.figures['gpu_load_total'].value:.2f} times under {best.name}, the lowest; "
            f"{100 * idle[0]:.0f} % and {100 * idle[1]:.0f} % of the GPUs serve less than half the mean."
        )
    else:
        sentence = (
            f"Over the held-out requests the busiest GPU of a layer serves {linear.value:.2f} times the mean, and "
            f"{100 * idle[0]:.0f} % of the GPUs serve less than half the mean. No strategy has a lower load imbalance "
            "than linear."
        )
        slots = table.head["model"]["num_experts"] + table.head["setup"]["redundant"]
        if slots == len(best.gpu_load):
            sentence += " With one expert per GPU and no replicas, a placement cannot change it."
    return Section(
        "Load by GPU",
        sentence,
        [_gpu_loads(rows, "Load of each GPU, busiest first")],
        note="The GPUs of each layer are sorted by load; loads are then averaged over layers and folds.",
    )


def _step_load(table: Comparison, rows: list[TableRow]) -> Section | None:
    known = [row for row in rows if row.figures["gpu_load_ratio"].value is not None]
    if not known:
        return None
    live = table.head["setup"]["live_per_group"]
    linear = table.row("linear").figures["gpu_load_ratio"]
    floor = dict(linear.extra).get("noise_floor") or 0.0
    over = [row.name for row in known if not row.within_guard]
    sentence = (
        f"In a step with {live} live requests per group the busiest GPU serves {linear.value:.2f} times the mean under "
        f"linear, with a noise floor of {floor:.2f} (uniformly random routing); "
    )
    verb = "exceeds" if len(over) == 1 else "exceed"
    sentence += f"{', '.join(over) or 'no strategy'} {verb if over else 'exceeds'} the node-load guard."
    note = "Dotted line: noise floor, the load imbalance of as many uniformly random picks."
    figures = _load_dots(known, "gpu_load_ratio", "GPU load, max / mean", "GPU load per step")
    figures += _load_dots(known, "node_load_ratio", "node load, max / mean", "Node load per step")
    return Section("Load in a decode step", sentence, figures, note=note)


def _step_time(table: Comparison, rows: list[TableRow]) -> Section | None:
    """Only where steps were timed."""
    timing, linear = table.head["setup"]["timing"], table.row("linear").figures
    ms, idle = linear["modelled_step_ms"].value, linear["modelled_idle_share"].value
    if timing is None or ms is None or idle is None:
        return None
    sentence = (
        f"With linear, a decode step of {timing['model']} on {timing['hardware']} takes {ms:.2f} ms by the time model; "
        f"for {100 * idle:.0f} % of it a GPU waits for the network or for the slowest GPU. "
    )
    sentence += _outcome(list(table.rows), "modelled_step_ms", "the step time")
    figures = _bars(rows, table, "modelled_step_ms", "modelled decode step, ms", "Step time by strategy")
    figures += _bars(rows, table, "modelled_idle_share", "% of the step that a GPU waits", "Idle share", 100.0)
    live = table.head["setup"]["live_per_group"]
    limit = " (the most that this trace allows)" if live < MAX_LIVE else ""
    note = (
        f"{live} live requests per group{limit} of {timing['context']:,} tokens each; "
        f"{timing['steps']} steps per fold. Intervals are over steps and do not include the error of the time model."
    )
    return Section("Time of a decode step", sentence, figures, note=note)


def _all_keys(table: Comparison) -> Section:
    keys = [entry for entry in _KEYS if any(row.figures[entry[0]].value is not None for row in table.rows)]
    head = ["strategy", "groups by", "guard", *(name for _, name, _, _ in keys)]
    body = []
    for row in table.rows:
        cells = [row.name, SIGNATURES.get(row.signature, row.signature), _mark(row).strip(" ()") or "ok"]
        for key, _, scale, form in keys:
            value = row.figures[key].value
            cells.append("–" if value is None else form.format(value * scale))
        body.append(cells)
    wins = [f"{row.name}{_mark(row)}" for row in table.rows if "linear" in row.beats["remote_share"]]
    count = sum(row.within_guard for row in table.rows)
    sentence = f"{count} of {len(table.rows)} rows are eligible. "
    sentence += f"Lower remote share than linear, beyond noise: {', '.join(wins) or 'none'}."
    note = f"ok: eligible. over: node load above {GUARD:g} x linear's. unequal: group sizes. Loads and groups: max / "
    note += "mean. Busiest node pair, rank: volume if all are padded to it. "
    note += "All figures are defined in docs/reference/metrics.md."
    return Section("All figures", sentence, table=Table(head, body), note=note)


def _mark(row: TableRow) -> str:
    """Why a row is not eligible, in brackets; empty if it is."""
    return "" if row.within_guard else " (over)" if row.equal_groups else " (unequal)"


def _method(table: Comparison) -> Section:
    rows = [[line] for line in table.method]
    sentence = "Measurement and settings of all figures above."
    return Section("How this was measured", sentence, table=Table(["note"], rows))


# ---- figures


def _bars(rows: list[TableRow], table: Comparison, key: str, label: str, alt: str, scale: float = 1.0) -> list[Image]:
    """Horizontal bars of one key (times `scale`); nothing where no row has a value."""
    shown = [row for row in rows if row.figures[key].value is not None]
    baseline = table.row("linear").figures[key].value
    if not shown or baseline is None:
        return []
    with canvas(height=bar_height(len(shown))) as (figure, axes):
        draw_bars(axes, shown, key, label, baseline, scale, PALETTE)
        return [to_image(figure, alt)]


def _load_dots(rows: list[TableRow], key: str, label: str, alt: str) -> list[Image]:
    """Dots with intervals of a load ratio, and the noise floor; nothing without a value."""
    shown = [row for row in rows if row.figures[key].value is not None]
    if not shown:
        return []
    floor = dict(shown[0].figures[key].extra).get("noise_floor")
    with canvas(height=bar_height(len(shown))) as (figure, axes):
        for i, row in enumerate(reversed(shown)):
            found, colour = row.figures[key], PALETTE[0 if row.within_guard else 1]
            if interval := found.interval():
                axes.plot(interval, [i, i], color=colour, linewidth=2.2)
            axes.plot(found.value, i, "o" if row.within_guard else "D", color=colour, markersize=6)
        if floor is not None:
            axes.axvline(floor, color=GREY, linewidth=1.2, linestyle=":")
        axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)])
        axes.set_xlabel(label)
        axes.set_xlim(left=1.0)
        return [to_image(figure, alt)]


def _gpu_loads(rows: list[TableRow], alt: str) -> Image:
    """GPU loads over the held-out requests, busiest first, relative to the mean."""
    with canvas() as (figure, axes):
        for number, row in enumerate(rows):
            rank = np.arange(1, len(row.gpu_load) + 1)
            colour, dash = PALETTE[number % len(PALETTE)], STYLES[number % len(STYLES)]
            axes.plot(rank, row.gpu_load, label=row.name, color=colour, linestyle=dash)
        axes.axhline(1.0, color=GREY, linewidth=1.0)
        axes.set_xlabel("GPU, busiest first")
        axes.set_ylabel("picks served / mean")
        axes.set_ylim(bottom=0)
        axes.set_xlim(1 - 0.02 * len(rows[0].gpu_load), len(rows[0].gpu_load))
        legend_below(figure, axes, columns=3)
        return to_image(figure, alt)
