"""The result of a simulation: figures of each policy over several runs, and what they changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.frames import data_frame
from moeplan.simulation.clock import NOT_VALIDATED
from moeplan.simulation.figures import KEYS
from moeplan.simulation.settings import BASELINE

if TYPE_CHECKING:
    import pandas

__all__ = ["PolicyFigures", "Simulation"]

FloatArray = npt.NDArray[np.float64]


#: What `Simulation.verdict` says, in this order, after what got slower beyond chance.
_SAID = {
    "tpot_p99_ms": "p99 TPOT",
    "ttft_p99_ms": "p99 TTFT",
    "remote_share": "remote share",
    "experts_per_step": "experts read per step",
    "tpot_p50_ms": "median TPOT",
}


@dataclass(frozen=True)
class PolicyFigures:
    """One policy's figures, a value for each run.

    Attributes:
        name: of the row. values: {key: float64 [seeds]}, NaN where a run has none.
    """

    name: str
    values: dict[str, FloatArray]

    def mean(self, key: str) -> float | None:
        """The mean over runs; None where there is no value."""
        values = self.values[key]
        return None if np.isnan(values).any() else float(values.mean())

    def interval(self, key: str) -> list[float] | None:
        """The 95 % interval of the mean, by Student's t over runs; None where there are fewer than two."""
        return _interval(self.values[key])

    def change(self, baseline: PolicyFigures, key: str) -> dict[str, Any] | None:
        """The relative change against another row, paired by run: value and 95 % interval."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(self.values[key] / baseline.values[key])
        if not np.isfinite(ratio).all():
            return None
        found = _interval(ratio)
        interval = None if found is None else [float(np.expm1(end)) for end in found]
        return {"value": float(np.expm1(ratio.mean())), "ci95": interval}


def _interval(values: FloatArray) -> list[float] | None:
    from scipy.stats import t

    n = len(values)
    if n < 2 or np.isnan(values).any():
        return None
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return [float(values.mean() - half), float(values.mean() + half)]


@dataclass(frozen=True, repr=False)
class Simulation:
    """Policies on the same simulated traffic.

    Attributes:
        rows: the policies, `least-loaded` first. head: what was simulated. notes: what a reader must know.

    Examples:
        >>> import moeplan
        >>> settings = moeplan.SimulationSettings(("experts",), instances=2, live=4, requests=100, seeds=2)
        >>> result = moeplan.simulate(moeplan.open_trace("embedded"), settings)
        >>> sorted(result.row("experts").change(result.row("least-loaded"), "experts_per_step"))
        ['ci95', 'value']
    """

    rows: tuple[PolicyFigures, ...]
    head: dict[str, Any]
    notes: tuple[str, ...]

    def row(self, name: str) -> PolicyFigures:
        """A policy by its name.

        Raises:
            UsageError: it was not simulated.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(f'"{name[:40]}" was not simulated', hint=f"there are {', '.join(r.name for r in self.rows)}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Figures that every row has."""
        return tuple(key for key in KEYS if all(row.mean(key) is not None for row in self.rows))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, cells): the figures that a reader compares first."""
        shown = [(key, label, form) for key, label, form in _COLUMNS if key in self.keys]
        head = ["policy", *(label for _, label, _ in shown)]
        base, rows = self.row(BASELINE), []
        if "experts_per_step" in self.keys:
            head.insert(2, "vs least loaded [95 %]")
        for row in self.rows:
            cells = [row.name, *(form.format(row.mean(key)) for key, _, form in shown)]
            if "experts_per_step" in self.keys:
                cells.insert(2, "" if row is base else _signed(row.change(base, "experts_per_step")))
            rows.append(cells)
        return head, rows

    def __repr__(self) -> str:
        head, rows = self.table()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            for cells in (head, *rows)
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def verdict(self) -> str:
        """In one sentence: what choosing by experts changes against least loaded, the slower step first."""
        name = next((n for n in ("experts", "prompt-tokens", "domain") if any(r.name == n for r in self.rows)), None)
        if name is None:
            return "No policy that goes by experts was simulated."
        row, base = self.row(name), self.row(BASELINE)
        changes = {label: row.change(base, key) for key, label in _SAID.items()}
        known = {label: change for label, change in changes.items() if change is not None}
        slower = [label for label, change in known.items() if change["ci95"] is not None and change["ci95"][0] > 0]
        said = ", ".join(
            f"{label} {_signed(known[label])}" for label in [*slower, *(k for k in known if k not in slower)]
        )
        times = f" (times: {NOT_VALIDATED})" if "tpot_p99_ms" in self.keys else ""
        bounds = [change["ci95"] for change in known.values()]
        if any(ci95 is None for ci95 in bounds):
            times += "; one run has no interval: use more --seeds"
        elif all(low <= 0 <= high for low, high in bounds):
            times += "; no difference is shown: use more --requests or --seeds"
        return f"{name} against {BASELINE}: {said}{times}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        base = self.row(BASELINE)
        rows = []
        for row in self.rows:
            figures = {
                key: {"value": row.mean(key), "ci95": row.interval(key), "change": row.change(base, key)}
                for key in self.keys
            }
            rows.append({"policy": row.name, "figures": figures})
        return {**self.head, "notes": list(self.notes), "verdict": self.verdict(), "rows": rows}

    def to_pandas(self) -> pandas.DataFrame:
        """One line per policy, one column per figure: means over runs.

        Raises:
            MoeplanError: pandas is not installed.
        """
        table = {key: [row.mean(key) for row in self.rows] for key in self.keys}
        return data_frame(table, [row.name for row in self.rows], "policy")

    def plot(self, key: str = "experts_per_step") -> Any:
        """Bars of one figure with intervals, as a `matplotlib.figure.Figure`.

        Raises:
            UsageError: no such figure here.
        """
        from matplotlib.figure import Figure

        if key not in self.keys:
            raise UsageError(f'"{key[:40]}" is not a figure here', hint=f"use {', '.join(self.keys)}")
        figure = Figure(figsize=(5.2, 0.9 + 0.32 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(reversed(self.rows)):
            mean, interval = row.mean(key), row.interval(key)
            assert mean is not None
            axes.barh(i, mean, color="#0072B2" if row.name != BASELINE else "#7a838c")
            if interval is not None:
                axes.plot(interval, [i, i], color="black", linewidth=1.5)
        axes.set_yticks(range(len(self.rows)), [row.name for row in reversed(self.rows)])
        axes.set_xlabel(key)
        return figure


#: key, column, format.
_COLUMNS = (
    ("experts_per_step", "experts/step", "{:.2f}"),
    ("remote_share", "remote", "{:.3f}"),
    ("live", "live", "{:.1f}"),
    ("tpot_p50_ms", "TPOT p50", "{:.2f}"),
    ("tpot_p99_ms", "p99, ms", "{:.2f}"),
    ("ttft_p50_ms", "TTFT p50", "{:.0f}"),
    ("ttft_p99_ms", "p99, ms ", "{:.0f}"),
    ("e2e_p99_ms", "end p99, ms", "{:.0f}"),
    ("goodput_per_s", "goodput/s", "{:.1f}"),
    ("live_ratio", "live, worst", "{:.2f}"),
)


def _signed(change: dict[str, Any] | None) -> str:
    if change is None:
        return "-"
    text = f"{100 * change['value']:+.1f} %"
    if change["ci95"] is not None:
        low, high = change["ci95"]
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text
