"""The pages of `sweep` and `size`: what the figures show, in one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeplan.model.spec import ModelSpec
from moeplan.perf.sensitivity import KNOBS, elasticities, improvements, needs
from moeplan.perf.sizing import SizingResult, UseCase
from moeplan.perf.sweep import Point, Sweep, best_within, pareto, thinned, ways, where
from moeplan.report.page import Section, Table, render, write_page
from moeplan.report.perf_figures import breakdown_figure, elasticity_figure, pareto_figure
from moeplan.report.perf_sections import ERROR, UNIFORM, can_skew, skew_section, skewed, time_section

__all__ = ["size_html", "sweep_html", "write_size_page", "write_sweep_page"]

#: Rows of a front in the page.
_ROWS = 16


def write_sweep_page(path: Path, spec: ModelSpec, swept: Sweep, limit_s: float, dtypes: str) -> None:
    """Write the page of a sweep, whole or not at all."""
    write_page(path, sweep_html(spec, swept, limit_s, dtypes))


def write_size_page(
    path: Path, spec: ModelSpec, answers: Sequence[SizingResult], dtypes: str, requests: int, sensitivity: bool
) -> None:
    """Write the page of sized clusters, whole or not at all."""
    write_page(path, size_html(spec, answers, dtypes, requests, sensitivity))


# ---------------------------------------------------------------------------------------------------------------------
# Sweep


def sweep_html(spec: ModelSpec, swept: Sweep, limit_s: float, dtypes: str) -> str:
    """The whole page as HTML; its details are of the set-up that gives most within `limit_s` seconds per token."""
    hardware = list(dict.fromkeys(p.layout.hardware.name for p in swept.points))
    subtitle = f"decode; {len(swept.points):,} set-ups on {', '.join(hardware)}; {dtypes}"
    notices = [ERROR] + ([UNIFORM] if spec.moe else [])
    sections = []
    for context in sorted({p.context for p in swept.points}):
        points = [p for p in swept.points if p.context == context]
        chosen = best_within(points, limit_s) or min(points, key=lambda p: p.tpot_s)
        sections += [_front(points, context, chosen, limit_s), _cheapest(points, limit_s), *_detail(chosen)]
    return render(f"Set-ups of {spec.name}", subtitle, notices, [s for s in sections if s is not None])


def _front(points: Sequence[Point], context: int, chosen: Point, limit_s: float) -> Section:
    front = pareto(points)
    kept = chosen.tpot_s <= limit_s
    sentence = (
        f"Of {len(points):,} set-ups with {context:,} tokens of context, {len(front)} are beaten by no other: from "
        f"{front[0].per_gpu_s:,.0f} tokens/s a GPU at {1e3 * front[0].tpot_s:.1f} ms to {front[-1].per_gpu_s:,.0f} at "
        f"{1e3 * front[-1].tpot_s:.1f} ms. "
    )
    sentence += (
        f"Within {1e3 * limit_s:g} ms most is {chosen.per_gpu_s:,.0f} tokens/s a GPU, on {where(chosen)}."
        if kept
        else f"None keeps TPOT within {1e3 * limit_s:g} ms; the quickest is {where(chosen)}."
    )
    shown = thinned(front, _ROWS)
    head = [
        "TPOT, ms", "tokens/s a GPU", "hardware", "GPUs", "layout", "requests a rank", "bound by", "USD / M", "kWh / M",
    ]  # fmt: skip
    rows = [
        [
            f"{1e3 * p.tpot_s:.2f}", f"{p.per_gpu_s:,.0f}", p.layout.hardware.name, f"{p.layout.parallel.gpus:,}",
            ways(p.layout), f"{p.batch:,}", p.bound.replace("_", "-"), f"{p.usd:,.3f}", f"{p.kwh:,.3f}",
        ]
        for p in shown
    ]  # fmt: skip
    return Section(
        f"Throughput against TPOT at {context:,} tokens of context",
        sentence,
        [pareto_figure(points, chosen, limit_s, f"Pareto fronts of {len(points)} set-ups")],
        Table(head, rows, strong=[i for i, p in enumerate(shown) if p is chosen]),
        note="Lines: the front of each hardware. Dots: all set-ups. Dotted: the TPOT limit. Star: the one shown below. "
        "Figures are of one decode step; prefill is left out. USD and kWh per million output tokens, from the "
        "catalogue's prices and board power.",
    )


def _cheapest(points: Sequence[Point], limit_s: float) -> Section | None:
    """Per hardware, the cheapest set-up within the limit."""
    names = list(dict.fromkeys(p.layout.hardware.name for p in points))
    within = [p for p in points if p.tpot_s <= limit_s]
    if len(names) < 2 or not within:
        return None
    best = [
        min((p for p in within if p.layout.hardware.name == name), key=lambda p: p.usd, default=None) for name in names
    ]
    found = sorted((p for p in best if p), key=lambda p: p.usd)
    rows = [
        [
            p.layout.hardware.name, f"{p.usd:,.3f}", f"{p.kwh:,.3f}", f"{1e3 * p.tpot_s:.1f}", f"{p.per_gpu_s:,.0f}",
            f"{p.layout.parallel.gpus:,}", ways(p.layout), f"{p.batch:,}",
        ]
        for p in found
    ]  # fmt: skip
    none = [name for name, p in zip(names, best, strict=True) if p is None]
    sentence = (
        f"Within {1e3 * limit_s:g} ms {found[0].layout.hardware.name} costs least: {found[0].usd:.3f} USD per million "
        f"tokens"
    )
    sentence += f"; {', '.join(none)} cannot keep it." if none else "."
    head = ["hardware", "USD / M", "kWh / M", "TPOT, ms", "tokens/s a GPU", "GPUs", "layout", "requests a rank"]
    return Section("What a million tokens cost", sentence, table=Table(head, rows))


def _detail(p: Point) -> list[Section]:
    """Breakdown, roofline and skew of one set-up."""
    decode = p.layout.decode(p.batch, p.context)
    prefill = p.layout.prefill(1, p.context)
    hollow = f"hollow ones the prefill of a prompt of {p.context:,} tokens"
    sections = [time_section("decode step", f"On {where(p)}", {"decode": decode, "prefill": prefill}, hollow)]
    if can_skew(p.layout):
        batches = sorted({max(p.batch // 4, 2 * p.layout.parallel.pp), p.batch}, reverse=True)
        curves = {f"{batch:,} requests a rank": skewed(p.layout, batch, p.context) for batch in batches}
        sections.append(skew_section("TPOT", curves))
    return sections


# ---------------------------------------------------------------------------------------------------------------------
# Size


def size_html(
    spec: ModelSpec, answers: Sequence[SizingResult], dtypes: str, requests: int, sensitivity: bool = False
) -> str:
    """The whole page as HTML: per use case the clusters, what the others would need, and details of the cheapest.

    Args:
        sensitivity: with the elasticities of all hardware.
    """
    cases = list(dict.fromkeys(answer.case for answer in answers))
    subtitle = f"{', '.join(case.name for case in cases)}; {requests} request{'s' * (requests > 1)} at a time; {dtypes}"
    notices = [ERROR] + ([UNIFORM] if spec.moe else [])
    sections = []
    for case in cases:
        mine = [answer for answer in answers if answer.case is case]
        sections += [_clusters(case, mine), *_misses(case, mine), *_sized_detail(case, mine, sensitivity)]
    return render(f"Clusters for {spec.name}", subtitle, notices, sections)


def _clusters(case: UseCase, answers: Sequence[SizingResult]) -> Section:
    met = [a for a in answers if a.meets]
    limits = f"TTFT within {1e3 * case.ttft_s:,.0f} ms and TPOT within {1e3 * case.tpot_s:g} ms"
    sentence = f"{case.prompt:,} tokens in, {case.output:,} out, {case.beams} beam{'s' * (case.beams > 1)}: {limits} "
    if met:
        few, cheap = min(met, key=_gpus), min(met, key=lambda a: a.usd)
        sentence += f"are kept by {_gpus(few)} x {few.hardware.name}, the smallest cluster; "
        same = "which also" if few is cheap else f"{_gpus(cheap)} x {cheap.hardware.name}"
        sentence += f"{same} costs least, {cheap.usd:,.2f} USD per million output tokens."
        missing = [a.hardware.name for a in answers if not a.meets]
        sentence += f" No cluster tried of {', '.join(missing)} keeps them." if missing else ""
    else:
        sentence += "are kept by no cluster that was tried."
    rows = [_cluster_row(a) for a in answers]
    head = [
        "hardware", "GPUs", "layout", "TTFT, ms", "TPOT, ms", "bound by", "full at", "USD / M", "kWh / M",
        "why not smaller",
    ]  # fmt: skip
    close = [a.hardware.name for a in answers if a.close]
    note = (
        f"{case.source[0].upper()}{case.source[1:]}. Bound by: prefill, decode. Full at: the most requests at a time "
    )
    note += "within the limits, and what keeps it from more; cost is with those, per million output tokens."
    if close:
        note += f" Within 15 % of a limit, about the model's error, and so a size more or less: {', '.join(close)}."
    return Section(f"Use case {case.name}", sentence, table=Table(head, rows), note=note)


def _cluster_row(a: SizingResult) -> list[str]:
    if a.layout is None or a.serving is None:
        return [a.hardware.name, "–", "", "", "", "", "", "", "", f"with {a.tried:,}: {a.why}"]
    bound = f"{next(iter(a.bounds[1]))}, {next(iter(a.bounds[0]))}".replace("_", "-")
    times = [ways(a.layout), f"{1e3 * a.serving.ttft_s:,.0f}", f"{1e3 * a.serving.tpot_s:.1f}", bound]
    if not a.meets:
        return [a.hardware.name, "–", *times, "", "", "", f"nearest: {_gpus(a):,}"]
    full = f"{a.most * a.layout.parallel.dp:,} ({a.limited})"
    smaller = f"with {a.smaller:,}: {a.why}" if a.smaller else "there is none"
    return [a.hardware.name, f"{_gpus(a):,}", *times, full, f"{a.usd:,.2f}", f"{a.kwh:,.2f}", smaller]


def _misses(case: UseCase, answers: Sequence[SizingResult]) -> list[Section]:
    """What hardware that misses would need."""
    rows = []
    for a in answers:
        if a.meets:
            continue
        if a.layout is None:
            rows.append([a.hardware.name, "does not fit", f"{a.short:.2f} x the memory", "", ""])
            continue
        found = improvements(a.layout, case.load, a.each, lambda serving: case.miss(serving) <= 1)
        rows.append([a.hardware.name, f"{ways(a.layout)} on {_gpus(a):,} GPUs", *needs(found)])
    if not rows:
        return []
    head = ["hardware", "nearest", "enough alone", "all of the hardware", "hardware and overhead"]
    return [
        Section(
            f"What {case.name} would need",
            f"How much better {len(rows)} kind{'s' * (len(rows) > 1)} of hardware would have to be for the nearest "
            "cluster to keep the limits.",
            table=Table(head, rows),
            note="x: so many times more of it; /: so many times less. Overhead: launches, small kernels, and the "
            "engine between steps.",
        )
    ]


def _gpus(a: SizingResult) -> int:
    return a.layout.parallel.gpus if a.layout else 0


def _sized_detail(case: UseCase, answers: Sequence[SizingResult], sensitivity: bool) -> list[Section]:
    """Breakdown and elasticities of the cheapest, or of the nearest miss."""
    able = [a for a in answers if a.layout is not None and a.serving is not None]
    if not able:
        return []
    a = min(able, key=lambda a: (not a.meets, a.usd if a.meets else a.miss))
    assert a.layout is not None and a.serving is not None
    table = elasticities(a.layout, case.load, a.each)
    best = {what: min(table, key=lambda knob: -abs(table[knob][what])) for what in ("ttft", "tpot")}
    kind = "the cheapest" if a.meets else "the nearest miss"
    sentence = (
        f"On {_gpus(a)} x {a.hardware.name} ({ways(a.layout)}), {kind}, TTFT answers most to {KNOBS[best['ttft']]} "
        f"({table[best['ttft']]['ttft']:+.2f} % for 1 % more) and TPOT to {KNOBS[best['tpot']]} "
        f"({table[best['tpot']]['tpot']:+.2f} %)."
    )
    decode = breakdown_figure(a.serving.decode, f"Milliseconds of a decode step of {case.name} by operator")
    bars = elasticity_figure(table, KNOBS, f"Elasticities of TTFT and TPOT of {case.name}")
    rows = []
    for b in able if sensitivity else []:
        assert b.layout is not None
        all_ = table if b is a else elasticities(b.layout, case.load, b.each)
        rows += [
            [b.hardware.name, what.upper(), *(f"{all_[knob][what]:+.2f}" for knob in KNOBS)]
            for what in ("ttft", "tpot")
        ]
    return [
        Section(
            f"What bounds {case.name}",
            sentence,
            [decode, bars],
            Table(["hardware", "of", *KNOBS.values()], rows) if rows else None,
            note="Left: a decode step. Right: at the load asked for. Capacity changes no time of requests that fit.",
        )
    ]
