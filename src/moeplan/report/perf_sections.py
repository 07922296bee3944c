"""Sections that the pages of `estimate` and `sweep` share: where a step's time goes, and what skew costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel, Workload
from moeplan.report.page import Section
from moeplan.report.perf_figures import breakdown_figure, roofline_figure, skew_figure

__all__ = ["ERROR", "UNIFORM", "can_skew", "skew_section", "skewed", "time_section"]

#: Loads of the busiest GPU over the mean at which a time is drawn.
SKEWS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
UNIFORM = "Routing is uniform (no trace was given). Real routing has more load imbalance."
ERROR = (
    "Error of the time model (docs/results/accuracy.md): median error of the TPOT of servers 3 to 25 %, by hardware "
    "and layout, from H100 to GB300. TTFT excludes queueing: on busy servers it is several times as long. Beams and "
    "other hardware were not checked."
)
Curve = tuple[Sequence[float], Sequence[float]]


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
