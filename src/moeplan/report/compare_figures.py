"""The figures of a comparison: volume, load by GPU, and the effect of each signature."""

from __future__ import annotations

import numpy as np

from moeplan.replay.table import Comparison, TableRow, bar_height, draw_bars
from moeplan.report.figures import GREY, PALETTE, STYLES, Image, canvas, legend_below, to_image

__all__ = ["bars_figure", "gpu_load_figure", "load_figure"]


def bars_figure(
    rows: list[TableRow], table: Comparison, key: str, label: str, alt: str, scale: float = 1.0
) -> Image | None:
    """Horizontal bars of one key (times `scale`); None where no row has a value."""
    shown = [row for row in rows if row.figures[key].value is not None]
    baseline = table.row("linear").figures[key].value
    if not shown or baseline is None:
        return None
    with canvas(height=bar_height(len(shown))) as (figure, axes):
        draw_bars(axes, shown, key, label, baseline, scale, PALETTE)
        return to_image(figure, alt)


def load_figure(rows: list[TableRow], key: str, label: str, alt: str) -> Image | None:
    """Dots with intervals of a load ratio, and the noise floor."""
    shown = [row for row in rows if row.figures[key].value is not None]
    if not shown:
        return None
    floor = dict(shown[0].figures[key].extra).get("noise_floor")
    with canvas(height=0.9 + 0.3 * len(shown)) as (figure, axes):
        for i, row in enumerate(reversed(shown)):
            found = row.figures[key]
            colour = PALETTE[0] if row.guarded else PALETTE[1]
            if interval := found.interval():
                axes.plot(interval, [i, i], color=colour, linewidth=2.2)
            axes.plot(found.value, i, "o" if row.guarded else "D", color=colour, markersize=6)
        if floor is not None:
            axes.axvline(floor, color=GREY, linewidth=1.2, linestyle=":")
        axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)])
        axes.set_xlabel(label)
        axes.set_xlim(left=1.0)
        return to_image(figure, alt)


def gpu_load_figure(rows: list[TableRow], alt: str) -> Image:
    """GPU loads over the held-out requests, busiest first, relative to the mean."""
    with canvas() as (figure, axes):
        for number, row in enumerate(rows):
            rank = np.arange(1, len(row.gpu_load) + 1)
            axes.plot(
                rank, row.gpu_load, label=row.name, color=PALETTE[number % len(PALETTE)],
                linestyle=STYLES[number % len(STYLES)],
            )  # fmt: skip
        axes.axhline(1.0, color=GREY, linewidth=1.0)
        axes.set_xlabel("GPU, busiest first")
        axes.set_ylabel("picks served / mean")
        axes.set_ylim(bottom=0)
        axes.set_xlim(1 - 0.02 * len(rows[0].gpu_load), len(rows[0].gpu_load))
        legend_below(figure, axes, columns=3)
        return to_image(figure, alt)
