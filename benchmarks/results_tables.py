"""Cells and tables of the results pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from results_settings import Setting

#: Marks a figure that is not eligible.
OVER = "°"


def over_guard(found: dict[str, Any], row: str) -> float:
    """Node load in a step, in multiples of linear's."""
    rows = found["strategies"]
    return float(rows[row]["node_load_ratio"]["value"] / rows["linear"]["node_load_ratio"]["value"])


def name_of(setting: Setting) -> str:
    """A setting in words, without its GPUs."""
    return f"{setting.source}, {setting.nodes} nodes, R = {setting.redundant}, `{setting.mode}`"


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
