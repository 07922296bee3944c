"""The picture of a comparison: bars of one figure with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplan.replay.table import TableRow

__all__ = ["bar_height", "draw_bars"]


def bar_height(rows: int) -> float:
    """Inches that so many bars take."""
    return 0.9 + 0.3 * rows


def draw_bars(
    axes: Any,
    rows: Sequence[TableRow],
    key: str,
    label: str,
    baseline: float,
    scale: float = 1.0,
    colours: Sequence[str] = ("C0", "C1"),
) -> None:
    """Horizontal bars of one key (times `scale`) with 95 % intervals, one per row, on matplotlib axes.

    Rows that are not eligible are hatched; the baseline is a dashed line.
    """
    for i, row in enumerate(reversed(rows)):
        found = row.figures[key]
        eligible = {"color": colours[0]}
        hatched = {"facecolor": "#ffffff", "edgecolor": colours[1], "hatch": "////", "linewidth": 1.0}
        axes.barh(i, (found.value or 0.0) * scale, height=0.66, **(eligible if row.guarded else hatched))
        if interval := found.interval():
            axes.plot([end * scale for end in interval], [i, i], color="#1b1f24", linewidth=1.4)
    axes.axvline(baseline * scale, color="#7a838c", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
