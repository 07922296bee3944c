"""The look of every figure, and how it gets into the page.

Figures are drawn small (460 px) and shown at 300 to 540 px, so that their letters stay readable on a phone.
Colours: Okabe and Ito's palette, safe for the colour-blind; line styles tell the lines apart as well.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PALETTE", "Image", "canvas", "heat_map", "legend_below", "lines", "shorten", "to_image"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D1F")
GREY = "#7a838c"
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
WIDTH, HEIGHT = 4.8, 3.3  # inches, at 96 px

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#57606a",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "text.color": "#1b1f24",
    "axes.labelcolor": "#1b1f24",
    "svg.fonttype": "path",
    "svg.hashsalt": "moeplan",
}


@dataclass(frozen=True)
class Image:
    """A figure ready for the page: a data URI, its size in px, and what it shows for those who cannot see it."""

    source: str
    width: int
    height: int
    alt: str


@contextlib.contextmanager
def canvas(*, width: float = WIDTH, height: float = HEIGHT) -> Iterator[tuple[Any, Any]]:
    """(figure, axes) in moeplan's style, without pyplot and its global state; sizes in inches at 96 px."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def to_image(figure: Any, alt: str) -> Image:
    """The figure as SVG in a data URI (its ids cannot meet those of another figure); the same input, the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(float(inches) * 96) for inches in figure.get_size_inches())
    return Image("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), width, height, alt)


def lines(axes: Any, x: Any, series: Sequence[tuple[str, Any]], labels: tuple[str, str], *quiet: str) -> None:
    """Lines in the palette, each with its own dash; those named in `quiet` (baselines) are thin and grey.

    Args:
        labels: of x and y.
    """
    colours, greys = iter(PALETTE * 4), iter((":", "--", "-.", (0, (1, 2))) * 4)
    for number, (label, y) in enumerate(series):
        if label in quiet:
            axes.plot(x, y, label=label, color=GREY, linestyle=next(greys), linewidth=1.4)
        else:
            dash = STYLES[number % len(STYLES)]
            dots = {"marker": "o", "markersize": 3.2} if len(x) <= 32 else {}  # a layer between two gaps is a dot
            axes.plot(x, y, label=label, color=next(colours), linestyle=dash, **dots)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.margins(x=0.02)


def legend_below(figure: Any, axes: Any, *, columns: int = 2) -> None:
    """The legend under the axes, where it never covers a line."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 22 else min(columns, len(labels))
        shape = {"handlelength": 2.4, "markerscale": 1.6, "columnspacing": 1.5}
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **shape)


def shorten(name: str, most: int = 16) -> str:
    """A label cut in its middle: labels of one family differ at their ends."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"


def heat_map(figure: Any, axes: Any, values: Any, names: Sequence[str], *, low: float, high: float, label: str) -> None:
    """A square matrix with its names; figures in the cells while there are few, names left out when there are many."""
    import numpy as np

    shown = axes.imshow(values, vmin=low, vmax=high, cmap="cividis")
    axes.grid(False)
    figure.colorbar(shown, ax=axes, shrink=0.85, label=label)
    count = len(names)
    if count <= 16:
        short = [shorten(name) for name in names]
        axes.set_xticks(range(count), short, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), short)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{count} domains")
    for side in axes.spines.values():
        side.set_visible(False)
    if count <= 7:
        for i, j in np.ndindex(count, count):
            if np.isfinite(values[i, j]):
                colour = "white" if (values[i, j] - low) / max(high - low, 1e-9) < 0.55 else "#1b1f24"
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=9.5, color=colour)
