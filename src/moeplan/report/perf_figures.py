"""Figures of the time model: where a step's time goes, rooflines, Pareto fronts, load skew, elasticities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moeplan.perf.pictures import breakdown_bars, breakdown_height, draw_breakdown, draw_pareto
from moeplan.perf.step import Step
from moeplan.perf.sweep import Point, fronts_by_hardware
from moeplan.report.figures import PALETTE, STYLES, Image, canvas, legend_below, to_image

__all__ = ["breakdown_figure", "elasticity_figure", "pareto_figure", "roofline_figure", "skew_figure"]

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def breakdown_figure(step: Step, alt: str) -> Image:
    """One bar per operator: milliseconds that the step waits for it, by what bounds it; hatched: hidden elsewhere."""
    with canvas(height=breakdown_height(breakdown_bars(step))) as (figure, axes):
        draw_breakdown(axes, step, PALETTE)
        legend_below(figure, axes, columns=3)
        return to_image(figure, alt)


def roofline_figure(steps: Mapping[str, Step], alt: str) -> Image:
    """Operators under the roof, both axes relative to the rates that kernels reach.

    x: time of an operator's operations alone over that of its memory traffic alone: its operations per byte over those
    at which both take equally long. y: the share of its time that its operations alone would take. The first of `steps`
    has filled marks, the second hollow ones.
    """
    names = [o.name for step in steps.values() for o in step.operators if _work(o.parts)]
    order = list(dict.fromkeys(names))
    lowest, highest = 0.1, 10.0
    with canvas(height=4.1) as (figure, axes):
        for hollow, (_, step) in enumerate(steps.items()):
            for o in step.operators:
                work = _work(o.parts)
                if work is None:
                    continue
                x, y = work[0] / work[1], work[0] / float(o.seconds)
                lowest, highest = min(lowest, x), max(highest, x)
                number = order.index(o.name)
                colour = PALETTE[number % len(PALETTE)]
                axes.plot(
                    x, y, _MARKS[number % len(_MARKS)], color=colour, markersize=7, linestyle="none",
                    markerfacecolor="#ffffff" if hollow else colour, label="" if hollow else o.name,
                )  # fmt: skip
        roof = np.geomspace(lowest / 2, highest * 2, 200)
        axes.plot(roof, np.minimum(roof, 1.0), color="#1b1f24", linewidth=1.4, zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=1.6)
        axes.set_xlabel("operations per byte / balance of the accelerator")
        axes.set_ylabel("share of the peak operation rate")
        legend_below(figure, axes, columns=2)
        return to_image(figure, alt)


def _work(parts: Mapping[str, object]) -> tuple[float, float] | None:
    """Seconds of operations and of memory traffic alone, of what has both."""
    compute, memory = (float(np.mean(np.asarray(parts.get(name, 0.0), np.float64))) for name in ("compute", "memory"))
    return (compute, memory) if compute > 0 and memory > 0 else None


def pareto_figure(points: Sequence[Point], chosen: Point | None, limit_s: float, alt: str) -> Image:
    """The front of each hardware, all set-ups as faint dots, the TPOT limit, and the set-up chosen under it."""
    fronts = fronts_by_hardware(points)
    with canvas(height=3.6 + 0.12 * len(fronts)) as (figure, axes):
        draw_pareto(axes, fronts, chosen, 1e3 * limit_s, PALETTE)
        legend_below(figure, axes)
        return to_image(figure, alt)


def skew_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], alt: str, *, what: str = "TPOT",
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Image:  # fmt: skip
    """A time (ms) against the load of the busiest GPU over the mean; {label: (loads, ms)}.

    Args:
        what: the time's name. marks: {label: (load, ms)}, single set-ups to point out.
    """
    with canvas() as (figure, axes):
        for number, (label, (loads, ms)) in enumerate(curves.items()):
            axes.plot(
                loads, ms, label=label, color=PALETTE[number % len(PALETTE)], linestyle=STYLES[number % len(STYLES)],
                marker="o", markersize=3.2,
            )  # fmt: skip
        for (label, (load, at)), mark in zip((marks or {}).items(), "*Pp", strict=False):
            axes.plot(load, at, mark, label=label, color="#1b1f24", markersize=12, linestyle="none", zorder=3)
        axes.set_xlabel("load of the busiest GPU / mean")
        axes.set_ylabel(f"{what}, ms")
        highest = max([*(max(ms) for _, ms in curves.values()), *(at for _, at in (marks or {}).values())])
        axes.set_ylim(0, 1.1 * highest)
        axes.set_xlim(left=1)
        legend_below(figure, axes, columns=1)
        return to_image(figure, alt)


def elasticity_figure(table: Mapping[str, Mapping[str, float]], names: Mapping[str, str], alt: str) -> Image:
    """Bars of how TTFT and TPOT answer to each knob, in per cent for one per cent more of it."""
    knobs = [knob for knob in table if any(abs(table[knob][what]) >= 0.005 for what in ("ttft", "tpot"))]
    with canvas(height=1.2 + 0.42 * len(knobs)) as (figure, axes):
        for offset, (what, colour) in enumerate((("tpot", PALETTE[1]), ("ttft", PALETTE[0]))):
            rows = [len(knobs) - 1 - i + 0.36 * offset - 0.18 for i in range(len(knobs))]
            axes.barh(rows, [table[knob][what] for knob in knobs], height=0.34, color=colour, label=what.upper())
        axes.axvline(0, color="#57606a", linewidth=1.0)
        axes.set_yticks(range(len(knobs)), [names[knob] for knob in reversed(knobs)])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("change in %, for 1 % more")
        legend_below(figure, axes)
        return to_image(figure, alt)
