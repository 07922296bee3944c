"""The pages of `sweep` and `size`: what the figures show, in one sentence each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeplan.perf.sensitivity import KNOBS, needs
from moeplan.perf.sizing import Sizing, SizingResult
from moeplan.perf.sweep import Point, Sweep, pareto, thinned
from moeplan.perf.use_cases import UseCase
from moeplan.report.page import Section, Table, render
from moeplan.report.perf_sections import (
    ERROR,
    UNIFORM,
    breakdown_figure,
    can_skew,
    elasticity_figure,
    pareto_figure,
    skew_section,
    skewed,
    time_section,
)

__all__ = ["size_html", "sweep_html"]

#: Rows of a front in the page.
_ROWS = 16
#: Columns that describe a set-up.
_COLUMNS: dict[str, Callable[[Point], str]] = {
    "TPOT, ms": lambda p: f"{1e3 * p.tpot_s:.2f}",
    "tokens/s per GPU": lambda p: f"{p.per_gpu_s:,.0f}",
    "hardware": lambda p: p.hardware.name,
    "GPUs": lambda p: f"{p.gpus:,}",
    "layout": lambda p: p.layout,
    "requests per rank": lambda p: f"{p.batch:,}",
    "bound by": lambda p: p.bound.replace("_", "-"),
    "USD / M": lambda p: f"{p.usd:,.3f}",
    "kWh / M": lambda p: f"{p.kwh:,.3f}",
}


# ---------------------------------------------------------------------------------------------------------------------
# Sweep


def sweep_html(swept: Sweep) -> str:
    """The whole page as HTML; its details are of the set-up that gives most within the limit."""
    limit_s, dtypes = swept.settings.tpot_ms / 1e3, swept.precision.describe(swept.spec)
    hardware = list(dict.fromkeys(p.hardware.name for p in swept.points))
    subtitle = f"decode; {len(swept.points):,} set-ups on {', '.join(hardware)}; {dtypes}"
    notices = [ERROR] + ([UNIFORM] if swept.spec.moe else [])
    sections = []
    for context in sorted({p.context for p in swept.points}):
        points = swept.at(context)
        chosen = swept.best(context) or min(points, key=lambda p: p.tpot_s)
        sections += [_front(points, context, chosen, limit_s), _cheapest(points, limit_s), *_detail(chosen)]
    return render(f"Set-ups of {swept.spec.name}", subtitle, notices, [s for s in sections if s is not None])


def _front(points: Sequence[Point], context: int, chosen: Point, limit_s: float) -> Section:
    front = pareto(points)
    kept = chosen.tpot_s <= limit_s
    sentence = (
        f"Of {len(points):,} set-ups with {context:,} tokens of context, {len(front)} are on the Pareto front: from "
        f"{front[0].per_gpu_s:,.0f} tokens/s per GPU at {1e3 * front[0].tpot_s:.1f} ms to {front[-1].per_gpu_s:,.0f} "
        f"at {1e3 * front[-1].tpot_s:.1f} ms. "
    )
    sentence += (
        f"The best within {1e3 * limit_s:g} ms is {chosen.per_gpu_s:,.0f} tokens/s per GPU, on {chosen}."
        if kept
        else f"No set-up has a TPOT within {1e3 * limit_s:g} ms; the fastest is {chosen}."
    )
    shown = thinned(front, _ROWS)
    table = _points(shown, tuple(_COLUMNS), strong=[i for i, p in enumerate(shown) if p is chosen])
    return Section(
        f"Throughput against TPOT at {context:,} tokens of context",
        sentence,
        [pareto_figure(points, chosen, limit_s, f"Pareto fronts of {len(points)} set-ups")],
        table,
        note="Lines: the front of each hardware. Dots: all set-ups. Dotted line: the TPOT limit. Star: the set-up "
        "shown below. Figures are of one decode step, without prefill. USD and kWh per million output tokens, from the "
        "catalogue's prices and board power.",
    )


def _cheapest(points: Sequence[Point], limit_s: float) -> Section | None:
    """Per hardware, the cheapest set-up within the limit."""
    names = list(dict.fromkeys(p.hardware.name for p in points))
    within = [p for p in points if p.tpot_s <= limit_s]
    if len(names) < 2 or not within:
        return None
    best = [min((p for p in within if p.hardware.name == name), key=lambda p: p.usd, default=None) for name in names]
    found = sorted((p for p in best if p), key=lambda p: p.usd)
    none = [name for name, p in zip(names, best, strict=True) if p is None]
    sentence = (
        f"Within {1e3 * limit_s:g} ms {found[0].hardware.name} is cheapest: {found[0].usd:.3f} USD per million tokens"
    )
    sentence += f"; {', '.join(none)} cannot meet the limit." if none else "."
    head = ("hardware", "USD / M", "kWh / M", "TPOT, ms", "tokens/s per GPU", "GPUs", "layout", "requests per rank")
    return Section("Cost per million tokens", sentence, table=_points(found, head))


def _points(points: Sequence[Point], head: Sequence[str], strong: Sequence[int] = ()) -> Table:
    """Set-ups, one per row, with these columns."""
    return Table(head, [[_COLUMNS[name](p) for name in head] for p in points], strong=strong)


def _detail(p: Point) -> list[Section]:
    """Breakdown, roofline and skew of one set-up."""
    decode = p.step_model.decode(p.batch, p.context)
    prefill = p.step_model.prefill(1, p.context)
    hollow = f"hollow marks are the prefill of a prompt of {p.context:,} tokens"
    sections = [time_section("decode step", f"On {p}", {"decode": decode, "prefill": prefill}, hollow)]
    if can_skew(p.step_model):
        batches = sorted({max(p.batch // 4, 2 * p.step_model.parallel.pp), p.batch}, reverse=True)
        curves = {f"{batch:,} requests per rank": skewed(p.step_model, batch, p.context) for batch in batches}
        sections.append(skew_section("TPOT", curves))
    return sections


# ---------------------------------------------------------------------------------------------------------------------
# Size


def size_html(sized: Sizing) -> str:
    """The whole page as HTML: per use case the clusters, what the others would need, and details of the cheapest."""
    cases, requests = sized.cases, sized.settings.requests
    dtypes = sized.precision.describe(sized.spec)
    subtitle = f"{', '.join(case.name for case in cases)}; {requests} request{'s' * (requests > 1)} at a time; {dtypes}"
    notices = [ERROR] + ([UNIFORM] if sized.spec.moe else [])
    sections = []
    for case in cases:
        mine = sized.of(case)
        detail = _sized_detail(case, mine, sized.settings.sensitivity)
        sections += [_clusters(case, mine), *_misses(case, mine), *detail]
    return render(f"Clusters for {sized.spec.name}", subtitle, notices, sections)


def _clusters(case: UseCase, answers: Sequence[SizingResult]) -> Section:
    met = [a for a in answers if a.meets]
    limits = f"TTFT within {1e3 * case.ttft_s:,.0f} ms and TPOT within {1e3 * case.tpot_s:g} ms"
    sentence = f"{case.prompt:,} tokens in, {case.output:,} out, {case.beams} beam{'s' * (case.beams > 1)}: {limits} "
    if met:
        few, cheap = min(met, key=lambda a: a.gpus), min(met, key=lambda a: a.usd)
        sentence += f"are met by {few.gpus} x {few.hardware.name}, the smallest cluster; "
        same = "it is also" if few is cheap else f"{cheap.gpus} x {cheap.hardware.name} is"
        sentence += f"{same} the cheapest, with {cheap.usd:,.2f} USD per million output tokens."
        missing = [a.hardware.name for a in answers if not a.meets]
        sentence += f" No cluster of {', '.join(missing)} that was tried meets them." if missing else ""
    else:
        sentence += "are met by no cluster that was tried."
    rows = [_cluster_row(a) for a in answers]
    head = ["hardware", "GPUs", "layout", "TTFT, ms", "TPOT, ms", "bound by"]
    head += ["maximum concurrency", "USD / M", "kWh / M", "why not smaller"]
    close = [a.hardware.name for a in answers if a.close]
    note = (
        f"{case.source[0].upper()}{case.source[1:]}. Bound by: prefill, decode. Maximum concurrency: the most requests "
        "in flight within the limits, and what limits them; costs are at this concurrency, per million output tokens."
    )
    if close:
        note += f" May be off by one size, being within 15 % of a limit (about the model's error): {', '.join(close)}."
    return Section(f"Use case {case.name}", sentence, table=Table(head, rows), note=note)


def _cluster_row(a: SizingResult) -> list[str]:
    if a.step_model is None or a.serving is None:
        return [a.hardware.name, "–", "", "", "", "", "", "", "", f"with {a.tried:,}: {a.why}"]
    bound = f"{next(iter(a.bounds[1]))}, {next(iter(a.bounds[0]))}".replace("_", "-")
    times = [a.layout, f"{1e3 * a.serving.ttft_s:,.0f}", f"{1e3 * a.serving.tpot_s:.1f}", bound]
    if not a.meets:
        return [a.hardware.name, "–", *times, "", "", "", f"nearest: {a.gpus:,}"]
    full = f"{a.max_requests:,} ({a.limited_by})"
    smaller = f"with {a.smaller:,}: {a.why}" if a.smaller else "there is none"
    return [a.hardware.name, f"{a.gpus:,}", *times, full, f"{a.usd:,.2f}", f"{a.kwh:,.2f}", smaller]


def _misses(case: UseCase, answers: Sequence[SizingResult]) -> list[Section]:
    """What hardware that misses the limits would need."""
    rows = []
    for a in answers:
        if a.meets:
            continue
        if a.step_model is None:
            rows.append([a.hardware.name, "does not fit", f"{a.memory_ratio:.2f} x the memory", "", ""])
            continue
        rows.append([a.hardware.name, f"{a.layout} on {a.gpus:,} GPUs", *needs(a.would_need)])
    if not rows:
        return []
    head = ["hardware", "nearest", "one change that is enough", "or the whole GPU", "or GPU and overhead"]
    return [
        Section(
            f"Hardware that {case.name} would need",
            f"How much better {len(rows)} kind{'s' * (len(rows) > 1)} of hardware would have to be for the nearest "
            "cluster to meet the limits.",
            table=Table(head, rows),
            note="Overhead: launches, small kernels, and the engine between steps.",
        )
    ]


def _sized_detail(case: UseCase, answers: Sequence[SizingResult], sensitivity: bool) -> list[Section]:
    """Breakdown and elasticities of the cheapest, or of the nearest miss."""
    able = [a for a in answers if a.step_model is not None and a.serving is not None]
    if not able:
        return []
    a = min(able, key=lambda a: (not a.meets, a.usd if a.meets else a.miss))
    assert a.step_model is not None and a.serving is not None
    table = a.elasticities
    best = {what: min(table, key=lambda knob: -abs(table[knob][what])) for what in ("ttft", "tpot")}
    kind = "the cheapest" if a.meets else "the nearest miss"
    sentence = (
        f"On {a.gpus} x {a.hardware.name} ({a.layout}), {kind}, TTFT is most sensitive to {KNOBS[best['ttft']]} "
        f"({table[best['ttft']]['ttft']:+.2f} % for 1 % more) and TPOT to {KNOBS[best['tpot']]} "
        f"({table[best['tpot']]['tpot']:+.2f} %)."
    )
    decode = breakdown_figure(a.serving.decode, f"Milliseconds of a decode step of {case.name} by operator")
    bars = elasticity_figure(table, KNOBS, f"Elasticities of TTFT and TPOT of {case.name}")
    rows = []
    for b in able if sensitivity else []:
        rows += [
            [b.hardware.name, what.upper(), *(f"{b.elasticities[knob][what]:+.2f}" for knob in KNOBS)]
            for what in ("ttft", "tpot")
        ]
    return [
        Section(
            f"Bottlenecks of {case.name}",
            sentence,
            [decode, bars],
            Table(["hardware", "of", *KNOBS.values()], rows) if rows else None,
            note="Left: a decode step. Right: at the given load. Capacity does not change the times of what fits.",
        )
    ]
