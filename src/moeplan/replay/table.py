"""The results of a comparison: rows of figures, as values, as text, for pandas, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeplan.arrays import FloatArray
from moeplan.errors import UsageError
from moeplan.frames import data_frame
from moeplan.replay.statistics import MeasuredValue

if TYPE_CHECKING:
    import pandas

__all__ = ["SIGNATURES", "Comparison", "TableRow", "bar_height", "draw_bars"]

#: What a kind of signature is called in tables.
SIGNATURES = {"none": "random"}
#: Columns of the text: heading of two lines, key, format.
_COLUMNS = (
    ("remote\nshare", "remote_share", "{:.3f}"),
    ("remote\nnodes", "remote_nodes_per_token", "{:.2f}"),
    ("inter-node\nKB/token", "inter_node_bytes_per_token", "{:,.0f}"),
    ("busiest\nlink", "padded_ratio", "{:.2f}"),
    ("GPU\nload", "gpu_load_ratio", "{:.2f}"),
    ("node\nload", "node_load_ratio", "{:.2f}"),
)
_LEGEND = (
    "remote nodes: other nodes that a token reaches per layer; KB/token: all layers, dispatch and combine;",
    "busiest link: between two nodes, relative to linear; GPU, node load: largest / mean in a step",
)


@dataclass(frozen=True, repr=False)
class TableRow:
    """One row: figures by key, and whether they are eligible.

    Attributes:
        name: the strategy, with `/signature` where requests are not grouped in the strategy's own way.
        strategy, signature: what made the plan, and what held-out requests are grouped by.
        equal_groups: whether all groups are of one size.
        within_guard: equal groups, and node_load_ratio at most 1.05 x linear's.
        figures: by key; docs/reference/metrics.md defines each. versus_linear: paired relative changes, value and ci95.
        gpu_load: float64 [P], each layer's GPU loads over the held-out part relative to their mean, sorted falling,
            then averaged over layers and folds.
        beats: for each key, the rows that this one beats by a paired interval.
    """

    name: str
    strategy: str
    signature: str
    equal_groups: bool
    within_guard: bool
    figures: dict[str, MeasuredValue]
    versus_linear: dict[str, dict[str, Any] | None]
    gpu_load: FloatArray
    beats: dict[str, list[str]]

    def __repr__(self) -> str:
        lines = [f"{self.name}: load guard {self.guard}"]
        for key, figure in self.figures.items():
            if figure.value is not None:
                lines.append(f"  {key:30s} {figure.value:.4g}{self._change(key)}")
        return "\n".join(lines)

    @property
    def guard(self) -> str:
        """The load guard in words: ok, over, or unequal groups."""
        return "ok" if self.within_guard else ("over" if self.equal_groups else "unequal groups")

    def _change(self, key: str) -> str:
        """'  -6.6 % [-8.3, -4.9]' against linear."""
        versus = self.versus_linear.get(key)
        if versus is None or self.name == "linear":
            return ""
        low, high = versus["ci95"] or (versus["value"], versus["value"])
        return f"  {100 * versus['value']:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the figures by key, then what marks the row."""
        out: dict[str, Any] = {}
        for key, figure in self.figures.items():
            out[key] = figure.to_dict()
            if self.versus_linear.get(key):
                out[key]["vs_linear"] = self.versus_linear[key]
        marks = {"signature": self.signature, "equal_groups": self.equal_groups, "guarded": self.within_guard}
        return out | marks | {"beats": self.beats, "gpu_load_sorted": [round(float(v), 6) for v in self.gpu_load]}

    def to_pandas(self) -> pandas.DataFrame:
        """One line per figure: value, low and high of its interval, change against linear.

        Raises:
            MoeplanError: pandas is not installed.
        """
        table: dict[str, list[Any]] = {"value": [], "low": [], "high": [], "vs_linear": []}
        for key, figure in self.figures.items():
            low, high = figure.interval() or (None, None)
            versus = self.versus_linear.get(key)
            cells = figure.value, low, high, versus and versus["value"]
            for column, cell in zip(table.values(), cells, strict=True):
                column.append(cell)
        return data_frame(table, list(self.figures), "figure")

    def cells(self, times: bool) -> list[str]:
        """The row of the text; with the modelled step and the idle share, where there are `times`."""
        values = []
        for _, key, form in _COLUMNS:
            value = self.figures[key].value
            if value is not None and key == "inter_node_bytes_per_token":
                value /= 1000.0
            values.append("-" if value is None else form.format(value))
        by = SIGNATURES.get(self.signature, self.signature)
        modelled = self._times() if times else []
        return [self.name, by, values[0], self._change("remote_share").strip(), *values[1:], *modelled, self.guard]

    def _times(self) -> list[str]:
        """The modelled step with its change against linear, and the idle share."""
        ms, idle = self.figures["modelled_step_ms"].value, self.figures["modelled_idle_share"].value
        if ms is None or idle is None:
            return ["-", "-"]
        versus = self.versus_linear["modelled_step_ms"]
        change = f"{100 * versus['value']:+.1f} %" if versus and self.name != "linear" else ""
        return [f"{ms:.2f} {change:>8}", f"{100 * idle:.0f} %"]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Strategies on the same held-out requests, one row per strategy and kind of signature.

    Attributes:
        head: the set-up, as plain values.
        notes: what a reader must know before any figure; method: what the figures rest on. One line each.
        rows: `linear`, the baseline, first.
    """

    head: dict[str, Any]
    notes: tuple[str, ...]
    method: tuple[str, ...]
    rows: tuple[TableRow, ...]

    def __repr__(self) -> str:
        """The table as text: lines of about 110 characters, 130 with times; then what its columns are."""
        times = self.head["setup"]["timing"] is not None
        head = ["strategy", "groups by", _COLUMNS[0][0], "vs linear [95 %]", *(name for name, _, _ in _COLUMNS[1:])]
        head += [*["step ms, change", "idle"] * times, "guard"]
        above, below = zip(*(("", *name.split("\n"))[-2:] for name in head), strict=True)
        floors = ["  (noise floor)", "", "", "", *(self._floor(key) for _, key, _ in _COLUMNS[1:])]
        lines = [above, below, *(row.cells(times) for row in self.rows), floors + [""] * (1 + 2 * times)]
        width = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, width, strict=True))
            ]
            text.append("  ".join(cells).rstrip())
        return "\n".join([*text[:2], "-" * (sum(width) + 2 * (len(width) - 1)), *text[2:], *_LEGEND])

    def _floor(self, key: str) -> str:
        extra = dict(self.rows[0].figures[key].extra)
        return f"{extra['noise_floor']:.2f}" if "noise_floor" in extra else ""

    def row(self, name: str) -> TableRow:
        """The row of that name.

        Raises:
            UsageError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(f"no row {name!r}", hint=f"choose among {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: head, notes, strategies by name."""
        said = {"notes": list(self.notes), "method": list(self.method)}
        return self.head | said | {"strategies": {row.name: row.to_dict() for row in self.rows}}

    def to_pandas(self) -> pandas.DataFrame:
        """One line per row: signature, equal_groups, within_guard, then the value of every figure.

        Raises:
            MoeplanError: pandas is not installed.
        """
        table: dict[str, list[Any]] = {
            mark: [getattr(row, mark) for row in self.rows] for mark in ("signature", "equal_groups", "within_guard")
        }
        for key in self.rows[0].figures:
            table[key] = [row.figures[key].value for row in self.rows]
        return data_frame(table, [row.name for row in self.rows], "strategy")

    def plot(self, key: str = "remote_share") -> Any:
        """Bars of one figure with their intervals, as a `matplotlib.figure.Figure`; hatched rows are not eligible.

        Raises:
            UsageError: no such figure, or one that no row has.
        """
        from matplotlib.figure import Figure as Canvas

        shown = [row for row in self.rows if key in row.figures and row.figures[key].value is not None]
        baseline = shown[0].figures[key].value if shown else None
        if baseline is None or shown[0].name != "linear":
            known = [key for key, found in self.rows[0].figures.items() if found.value is not None]
            raise UsageError(f"no figure {key!r} to plot", hint=f"choose among {', '.join(known)}")
        canvas = Canvas(figsize=(6.4, bar_height(len(shown))), layout="constrained")
        draw_bars(canvas.subplots(), shown, key, key, baseline)
        return canvas


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
        axes.barh(i, (found.value or 0.0) * scale, height=0.66, **(eligible if row.within_guard else hatched))
        if interval := found.interval():
            axes.plot([end * scale for end in interval], [i, i], color="#1b1f24", linewidth=1.4)
    axes.axvline(baseline * scale, color="#7a838c", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
