"""Pictures of the time model, on matplotlib axes: operators of a step, and throughput against time per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moeplan.perf.step import Step

if TYPE_CHECKING:
    from moeplan.perf.sweep import Point

__all__ = ["Bar", "breakdown_bars", "breakdown_height", "draw_breakdown", "draw_pareto"]

PALETTE = tuple(f"C{i}" for i in range(8))
GREY, BLACK = "#7a838c", "#1b1f24"
#: Which colour of the palette is what bounds an operator; launches and other overhead are grey.
_COLOURS = {
    "memory": 0, "compute": 1, "scale_out": 2, "latency": 3, "scale_up": 4, "slowest stage": 5, "copying": 7,
}  # fmt: skip
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
#: Operators below this share of a step are drawn as one.
_SMALL = 0.004


class Bar(NamedTuple):
    """One operator: milliseconds that the step waits for it, those hidden elsewhere, and what bounds it."""

    name: str
    exposed: float
    hidden: float
    bound: str


def breakdown_bars(step: Step) -> list[Bar]:
    """The operators of a step, small ones as one."""
    total = float(step.seconds)
    shown = [o for o in step.operators if float(o.seconds) >= _SMALL * total]
    rest = sum(float(o.exposed) for o in step.operators) - sum(float(o.exposed) for o in shown)
    bars = [Bar(o.name, 1e3 * float(o.exposed), 1e3 * float(o.hidden), o.bound) for o in shown]
    return [*bars, *([Bar("the rest", 1e3 * rest, 0.0, "overhead")] if rest > _SMALL * total else [])]


def breakdown_height(bars: Sequence[Bar]) -> float:
    """Inches that so many bars take."""
    return 1.1 + 0.27 * len(bars)


def draw_breakdown(axes: Any, step: Step, palette: Sequence[str] = PALETTE) -> None:
    """One bar per operator, its colour by what bounds it; hatched: hidden behind other work."""
    bars = breakdown_bars(step)
    colours = {bar.bound: GREY if bar.bound == "overhead" else palette[_COLOURS.get(bar.bound, 6)] for bar in bars}
    for row, bar in enumerate(reversed(bars)):
        colour = colours[bar.bound]
        axes.barh(row, bar.exposed, height=0.68, color=colour)
        if bar.hidden > 0:
            axes.barh(
                row, bar.hidden, left=bar.exposed, height=0.68, facecolor="#ffffff", edgecolor=colour, hatch="////"
            )
    axes.set_yticks(range(len(bars)), [bar.name for bar in reversed(bars)])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"ms of a step of {1e3 * float(step.seconds):.1f} ms")
    for bound, colour in colours.items():
        axes.barh(0, 0, color=colour, label=bound.replace("_", "-"))


def draw_pareto(
    axes: Any,
    fronts: dict[str, tuple[list[Point], list[Point]]],
    chosen: Point | None,
    limit_ms: float,
    palette: Sequence[str] = PALETTE,
) -> None:
    """Tokens per second and accelerator against TPOT: all set-ups as faint dots, fronts as lines, the limit, the best.

    Args:
        fronts: {hardware: (its set-ups, those that no other one beats)}.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    for number, (name, (points, front)) in enumerate(fronts.items()):
        colour = palette[number % len(palette)]
        style = {"linestyle": _LINES[number % len(_LINES)], "marker": "o", "markersize": 3.2}
        axes.scatter(*_places(points), s=4, color=colour, alpha=0.25, linewidths=0, rasterized=len(points) > 3000)
        axes.plot(*_places(front), label=name, color=colour, **style)
    axes.axvline(limit_ms, color=GREY, linewidth=1.2, linestyle=":")
    if chosen:
        axes.plot(*_places([chosen]), "*", color=BLACK, markersize=13, linestyle="none", label="chosen")
    axes.set(xscale="log", yscale="log", xlabel="TPOT, ms", ylabel="tokens/s per GPU")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # the default labels overlap within one decade
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [1e3 * p.tpot_s for p in points], [p.per_gpu_s for p in points]
