"""The page of a simulation: what each policy changes, in one sentence a figure."""

from __future__ import annotations

from pathlib import Path

from moeplan.report.figures import GREY, PALETTE, Image, canvas, to_image
from moeplan.report.page import Section, Table, render, write_page
from moeplan.simulation.result import Simulation
from moeplan.simulation.settings import BASELINE

__all__ = ["simulation_html", "write_simulation_page"]

#: key, heading, axis, what it is.
_FIGURES = (
    (
        "experts_per_step",
        "Experts read per step",
        "distinct experts of a layer in a token's step",
        "Distinct experts of a layer that a decoded token's step reads on its instance: mean over tokens and layers.",
    ),
    (
        "remote_share",
        "Remote share",
        "share of picks that another node serves",
        "Each request decodes in the group that it was sent to.",
    ),
    ("tpot_p99_ms", "Time per output token, p99", "ms", "From the first token to the last, over the tokens after it."),
    ("ttft_p99_ms", "Time to the first token, p99", "ms", "From arrival: waiting at the gateway and prefill."),
    ("e2e_p99_ms", "End to end, p99", "ms", "From arrival to the last token."),
    (
        "live_ratio",
        "Balance",
        "fullest group's live requests / mean, over 10 s",
        "The 99th percentile over windows of 10 s.",
    ),
)


def write_simulation_page(path: Path, found: Simulation) -> None:
    """Write the page, whole or not at all."""
    write_page(path, simulation_html(found))


def simulation_html(found: Simulation) -> str:
    """The whole page as HTML."""
    head = found.head
    unit = str(head["deployment"]).removesuffix("s")
    units = {"rate": "requests/s", "load": "of what full slots can serve", "live": f"live requests per {unit}"}
    load = next((f"{head[name]:g} {units[name]}" for name in units if head[name] is not None), "as recorded")
    subtitle = (
        f"{head['groups']} {head['deployment']}, {head['arrivals']} arrivals, {load}, mix {head['mix']}; "
        f"{head['requests']} requests in each of {head['seeds']} runs; seed {head['seed']}"
    )
    notices = [note[0].upper() + note[1:] for note in found.notes]
    names, rows = found.table()
    summary = Section("Policies", found.verdict(), table=Table(names, rows, strong=_strong(found)))
    sections = [summary, *(_figure(found, *entry) for entry in _FIGURES if entry[0] in found.keys)]
    return render(f"Serving {head['trace']} as requests arrive", subtitle, notices, sections)


def _strong(found: Simulation) -> list[int]:
    return [i for i, row in enumerate(found.rows) if row.name == "experts"]


def _figure(found: Simulation, key: str, heading: str, label: str, note: str) -> Section:
    base = found.row(BASELINE)
    best = min((row for row in found.rows if row.name != "oracle"), key=lambda row: row.mean(key) or 0.0)
    change = best.change(base, key)
    sentence = f"Lowest with {best.name}: {best.mean(key):.4g}{' ms' if key.endswith('_ms') else ''}"
    if best is not base and change is not None:
        sentence += f", {100 * change['value']:+.1f} % against {BASELINE}"
        if change["ci95"] is not None:
            sentence += f" (95 % interval {100 * change['ci95'][0]:+.1f} to {100 * change['ci95'][1]:+.1f} %)"
    if any(row.interval(key) is not None for row in found.rows):
        note += " Bars are 95 % intervals over runs."
    note += f" The dotted line is {BASELINE}."
    return Section(heading, sentence + ".", figures=[_bars(found, key, label)], note=note)


def _bars(found: Simulation, key: str, label: str) -> Image:
    """Dots with intervals, one for each policy; the baseline's value as a line."""
    with canvas(height=0.9 + 0.3 * len(found.rows)) as (figure, axes):
        for i, row in enumerate(reversed(found.rows)):
            mean, interval = row.mean(key), row.interval(key)
            colour = GREY if row.name == BASELINE else PALETTE[0]
            if interval is not None:
                axes.plot(interval, [i, i], color=colour, linewidth=2.2)
            axes.plot(mean, i, "o", color=colour, markersize=6)
        axes.axvline(found.row(BASELINE).mean(key), color=GREY, linewidth=1.2, linestyle=":")
        axes.set_yticks(range(len(found.rows)), [row.name for row in reversed(found.rows)])
        axes.set_ylim(-0.6, len(found.rows) - 0.4)
        axes.set_xlabel(label)
        return to_image(figure, f"{label} by policy")
