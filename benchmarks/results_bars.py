"""The bars that `moeplan` is held to on unseen requests, and what was measured of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from results_settings import KEY, Results, Setting, gpus_per_node

#: Marks a figure that does not count.
OVER = "°"
GPU_TOTAL, GPU_STEP = 1.05, 1.15  # most that a plan's GPU load may be, in multiples of eplb's


@dataclass(frozen=True)
class Bar:
    """The mode's own figure must change by at least `asked` (-0.17: 17 % less) against `linear`, guarded."""

    setting: Setting
    asked: float

    @property
    def name(self) -> str:
        return f"{name_of(self.setting)}, {self.setting.gpus} GPU{'s' * (self.setting.gpus > 1)} a node"

    @property
    def target(self) -> str:
        return percent(self.asked, 0)


@dataclass(frozen=True)
class LoadBar:
    """One plan near eplb's GPU load, with `remote_share` at most `asked` of eplb's."""

    setting: Setting
    asked: float

    @property
    def name(self) -> str:
        return f"{name_of(self.setting)}, {self.setting.gpus} GPUs a node"


_BARS = (
    ("maverick-mmlu", 8, 0, "pick", -0.17),
    ("maverick-mmlu", 8, 8, "pick", -0.36),
    ("maverick-mmlu", 8, 16, "pick", -0.45),
    ("gpt-oss-20b", 8, 0, "pick", -0.09),
    ("gpt-oss-20b", 8, 8, "pick", -0.21),
    ("gpt-oss-20b", 8, 16, "pick", -0.31),
    ("gpt-oss-20b", 4, 0, "pick", -0.17),
    ("gpt-oss-20b", 8, 0, "node", -0.23),
    ("gpt-oss-20b", 8, 8, "node", -0.33),
    ("deepseek-v2-lite-chat", 8, 0, "node", -0.26),
)
_LOAD_BARS = (("maverick-mmlu", 6, 16, 0.70), ("gpt-oss-20b", 5, 8, 0.87), ("gpt-oss-20b", 3, 16, 0.82))


def bars_of(sources: Collection[str], folds: int, steps: int) -> list[Bar]:
    """The bars of those sets, on one GPU a node (locality and the guard alone) and on several, whose load costs too.

    With copies on those that the load bars name, so that one plan answers both.
    """
    named = {(source, redundant): gpus for source, gpus, redundant, _ in _LOAD_BARS}
    return [
        Bar(Setting(source, nodes, gpus, redundant, mode, folds=folds, steps=steps), asked)
        for source, nodes, redundant, mode, asked in _BARS
        if source in sources
        for gpus in dict.fromkeys((1, named.get((source, redundant)) or gpus_per_node(source, nodes, redundant)))
    ]


def load_bars_of(sources: Collection[str], folds: int, steps: int) -> list[LoadBar]:
    """The bars on load of those sets."""
    return [
        LoadBar(Setting(source, 8, gpus, redundant, "pick", folds=folds, steps=steps), asked)
        for source, gpus, redundant, asked in _LOAD_BARS
        if source in sources
    ]


def settings_of(bars: Collection[Bar | LoadBar]) -> Iterator[Setting]:
    """What must be run for them: guarded, and without a look at load."""
    for bar in bars:
        yield bar.setting
        if isinstance(bar, Bar):
            yield dataclasses.replace(bar.setting, guarded=False)


def bar_row(bar: Bar, results: Results) -> list[str]:
    """Cells: what, asked, measured, against linear without copies, verdict, oracle, unguarded."""
    found, key = results[bar.setting], KEY[bar.setting.mode]
    row, oracle = found["strategies"]["moeplan"], found["strategies"]["moeplan/oracle"]
    loose = results[dataclasses.replace(bar.setting, guarded=False)]["strategies"]["moeplan"]
    versus = row[key]["vs_linear"]
    bare = _without_copies(bar.setting, results)
    other = "" if bare is None else percent(row[key]["value"] / bare - 1.0)
    low, value = versus["ci95"][0], versus["value"]
    if not row["guarded"]:
        verdict = f"no: node load {over_guard(found, 'moeplan'):.2f} x linear's"
    elif value <= bar.asked:
        verdict = "**yes**"
    else:
        verdict = f"no, by {100 * (value - bar.asked):.1f} points" + (
            " (within the interval)" if low <= bar.asked else ""
        )
        if bare is not None and row[key]["value"] / bare - 1.0 <= bar.asked:
            verdict += "; yes against linear without copies"
    return [
        bar.name, f"`{key}`", bar.target, f"**{change_of(row[key])}**", other, verdict,
        percent(oracle[key]["vs_linear"]["value"]), percent(loose[key]["vs_linear"]["value"]),
    ]  # fmt: skip


def load_row(bar: LoadBar, results: Results) -> list[str]:
    """Cells: what, remote share, total GPU load and per step in multiples of eplb's, verdict."""
    row = results[bar.setting]["strategies"]["moeplan"]
    parts = (("remote_share", bar.asked), ("gpu_load_total", GPU_TOTAL), ("gpu_load_ratio", GPU_STEP))
    cells, missed = [], []
    for key, most in parts:
        versus = row[key]["vs_eplb"]
        low, high = (1.0 + v for v in versus["ci95"])
        cells.append(f"{1.0 + versus['value']:.2f} [{low:.2f}, {high:.2f}] of {most:.2f}")
        if 1.0 + versus["value"] > most:
            missed.append(f"`{key}`")
    if not row["guarded"]:
        missed.append("the guard")
    return [bar.name, *cells, f"no: {', '.join(missed)}" if missed else "**yes**"]


def _without_copies(setting: Setting, results: Results) -> float | None:
    """Linear's own figure at R = 0 on the same nodes, where there are copies."""
    key = KEY[setting.mode]
    if setting.redundant == 0:
        return None
    for other, found in results.items():
        same = (other.source, other.nodes, other.mode) == (setting.source, setting.nodes, setting.mode)
        if same and other.redundant == 0:
            return float(found["strategies"]["linear"][key]["value"])
    return None


def over_guard(found: dict[str, Any], row: str) -> float:
    """Node load in a step, in multiples of linear's."""
    rows = found["strategies"]
    return float(rows[row]["node_load_ratio"]["value"] / rows["linear"]["node_load_ratio"]["value"])


def name_of(setting: Setting) -> str:
    """A setting in words, without its GPUs."""
    copies = f", R = {setting.redundant}"
    return f"{setting.source}, {setting.nodes} nodes{copies}, `{setting.mode}`"


def percent(share: float, digits: int = 1) -> str:
    """-0.163 -> '-16.3 %'."""
    return f"{100 * share:+.{digits}f} %"


def change_of(figure: dict[str, Any]) -> str:
    """The change against linear with its interval: '-16.3 % [-18.1, -14.4]'."""
    versus = figure["vs_linear"]
    low, high = (100 * v for v in versus["ci95"])
    return f"{percent(versus['value'])} [{low:+.1f}, {high:+.1f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
