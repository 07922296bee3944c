"""What the pages of the time model share: its figures, where a step's time goes, and what skew costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeplan.perf.pictures import breakdown_bars, breakdown_height, draw_breakdown, draw_pareto
from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel, Workload
from moeplan.perf.sweep import Point, fronts_by_hardware
from moeplan.report.figures import PALETTE, STYLES, Image, canvas, legend_below, to_image
from moeplan.report.page import Section

__all__ = [
    "ERROR",
    "UNIFORM",
    "breakdown_figure",
    "can_skew",
    "elasticity_figure",
    "pareto_figure",
    "skew_section",
    "skewed",
    "time_section",
]

Curve = tuple[Sequence[float], Sequence[float]]
#: Loads of the busiest GPU over the mean at which a time is drawn.
SKEWS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
UNIFORM = "Routing is uniform (no trace was given). Real routing has more load imbalance."
ERROR = (
    "Error of the time model (docs/results/accuracy.md): median error of the TPOT of servers 3 to 25 %, by hardware "
    "and layout, from H100 to GB300. TTFT excludes queueing: on busy servers it is several times as long. Beams and "
    "other hardware were not checked."
)


def time_section(what: str, where: str, steps: Mapping[str, Step], hollow: str = "") -> Section:
    """Bars and roofline of a step, the first of `steps`; `hollow` says what the second one's marks are."""
    first = next(iter(steps.values()))
    marks = f"filled marks are {next(iter(steps))}, {hollow}. " if hollow else ""
    note = (
        "Left: the colour is the resource that bounds the operator; hatched time is hidden behind other work. Right: "
        f"{marks or 'one mark per operator. '}Operators under the slope are bound by memory, those under the flat roof "
        "by compute. The distance to the roof is due to launches, partial waves and imperfect overlap. Both axes are "
        "relative to the rates that kernels reach."
    )
    return Section(
        f"Where a {what}'s time goes",
        f"{where}: {_largest(first)}; a GPU waits {100 * float(first.idle_share):.0f} % of the step for the network or "
        "for the slowest rank.",
        [
            breakdown_figure(first, f"Milliseconds of a {what} by operator"),
            roofline_figure(steps, f"Roofline of the operators of {' and '.join(steps)}"),
        ],
        note=note,
    )


def _largest(step: Step) -> str:
    """The three operators that take most."""
    total = float(step.seconds)
    most = sorted(step.operators, key=lambda o: -float(o.exposed))[:3]
    return ", ".join(f"{o.name} {100 * float(o.exposed) / total:.0f} % ({o.bound.replace('_', '-')})" for o in most)


def can_skew(layout: StepModel) -> bool:
    """Whether several GPUs share experts, so that one can be busier than another."""
    return layout.spec.moe is not None and layout.parallel.ep > 1


def skewed(
    layout: StepModel,
    batch: float,
    context: int,
    *,
    load: Workload | None = None,
    prefill: bool = False,
    up_to: float = 4.0,
) -> Curve:
    """(loads of the busiest GPU over the mean, ms) as load imbalance grows, from uniform routing on.

    ms: per token of an answer, or of a prefill step. up_to: a load that the line must reach.
    """
    found, accepted = {}, load.accepted if load else 1.0
    last = next((skew for skew in SKEWS if skew >= max(up_to, 4.0)), SKEWS[-1])
    for skew in SKEWS:
        if skew <= min(last, layout.parallel.ep):
            at = replace(layout, options=replace(layout.options, skew=skew, balanced=False))
            step = at.prefill(batch, context) if prefill else at.decode(batch, context, load)
            found[step.load_ratio] = 1e3 * float(step.seconds) / accepted  # below what chance gives nothing changes
    return list(found), list(found.values())


def skew_section(
    what: str, curves: Mapping[str, Curve], marks: Mapping[str, tuple[float, float]] | None = None
) -> Section:
    """A time against the busiest GPU's load; the sentence is about the first curve.

    Args:
        what: the time's name. marks: {label: (load, ms)}, single set-ups to point out.
    """
    loads, ms = next(iter(curves.values()))
    marked = "".join(
        f" {name[0].upper()}{name[1:]}: {load:.2f} times the mean load, {value:.1f} ms."
        for name, (load, value) in (marks or {}).items()
    )
    return Section(
        f"{what} against the skew of expert load",
        f"If the busiest GPU has {max(loads):.1f} times the mean load, {what} is {ms[-1] / ms[0]:.2f} times that of "
        f"uniform routing.{marked}",
        [skew_figure(curves, f"{what} against the busiest GPU's load", what=what, marks=marks)],
        note="The other GPUs share the rest equally. The first point of a line is uniform routing, whose imbalance is "
        "the noise floor. A plan that lowers the skew moves a step to the left (see moeplan compare)."
        + (
            " The step of a plan is not on the line, because real routing also changes the number of messages."
            if marks
            else ""
        ),
    )


# ---- figures

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
                mark, colour = _MARKS[number % len(_MARKS)], PALETTE[number % len(PALETTE)]
                face, label = ("#ffffff", "") if hollow else (colour, o.name)
                axes.plot(x, y, mark, color=colour, markersize=7, markerfacecolor=face, label=label)
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
    curves: Mapping[str, Curve], alt: str, *, what: str = "TPOT", marks: Mapping[str, tuple[float, float]] | None = None
) -> Image:
    """A time (ms) against the load of the busiest GPU over the mean; {label: (loads, ms)}.

    Args:
        what: the time's name. marks: {label: (load, ms)}, single set-ups to point out.
    """
    with canvas() as (figure, axes):
        for number, (label, (loads, ms)) in enumerate(curves.items()):
            colour, dash = PALETTE[number % len(PALETTE)], STYLES[number % len(STYLES)]
            axes.plot(loads, ms, label=label, color=colour, linestyle=dash, marker="o", markersize=3.2)
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
