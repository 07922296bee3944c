"""Rules for the maps of all engines, which the engines do not check themselves.

Names: a map has one row per layer and S slots per row; E experts; P ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import Report, show
from moeplan.types import MAX_EXPERTS, MAX_LAYERS, Int32Array

__all__ = ["Row", "check_rows", "finish", "plural"]

#: Slots of one layer; far above any deployment.
MAX_SLOTS = 1 << 20


def _slot(slot: int) -> str:
    return f"slot {slot}"


@dataclass(frozen=True)
class Row:
    """One layer's part of a file.

    Attributes:
        place: where it is in the file. layer: the model's own index; None where not known.
        values: unchecked content.
        slot: the name of a slot, for messages.
    """

    place: str
    layer: int | None
    values: Any
    slot: Callable[[int], str] = _slot

    def at(self, slot: int) -> str:
        return f"{self.place}, {self.slot(slot)}"


def check_rows(
    report: Report,
    rows: list[Row],
    *,
    slots: int | None = None,
    unique: bool = False,
    wraps: bool = False,
) -> Int32Array | None:
    """Check every row; int32 [rows, S] if all are valid.

    Args:
        report: gets the findings.
        rows: in the file's order. unique: an expert twice on one rank is an error, not a warning.
        slots: S, if the file gives it separately.
        wraps: the engine accepts negative ids: -1 becomes the last expert.

    If the number of experts is not known, that of most rows is used (largest id + 1), and the report says so.
    """
    if not 1 <= len(rows) <= MAX_LAYERS:
        report.add_error("", f"{len(rows)} rows are outside 1..{MAX_LAYERS}", "one row per layer")
        return None
    whole = [row for row in rows if _is_list(report, row)]
    typed = [row for row in whole if _are_integers(report, row)]
    experts = _num_experts(report, typed)
    slots = _num_slots(report, whole, experts, slots)
    sound = [row for row in typed if _in_range(report, row, experts, wraps)]
    complete = [row for row in sound if len(row.values) == slots and _all_present(report, row, experts)]
    report.rows, report.slots = len(rows), slots
    if len(complete) < len(rows) or not report.ok:
        return None
    table = np.array([row.values for row in rows], np.int32)
    _check_duplicates(report, rows, table, unique)
    return table if report.ok else None


def _is_list(report: Report, row: Row) -> bool:
    if isinstance(row.values, list) and row.values and len(row.values) <= MAX_SLOTS:
        return True
    what = "is empty" if row.values == [] else f"is {show(row.values)[:40]}, not a list of experts"
    report.add_error(row.place, what, "give the expert of every slot")
    return False


def _are_integers(report: Report, row: Row) -> bool:
    bad = [slot for slot, value in enumerate(row.values) if type(value) is not int]
    if bad:
        value = row.values[bad[0]]
        kind = " (a float)" if isinstance(value, float) else ""
        report.add_error(
            row.at(bad[0]), f"{show(value)} is not a whole number{kind}{_more(bad)}", "give the expert's id"
        )
    return not bad


def _num_experts(report: Report, rows: list[Row]) -> int:
    if report.model.num_experts is not None:
        return report.model.num_experts
    tops = Counter(max(row.values) + 1 for row in rows)
    common = [top for top, _ in sorted(tops.items(), key=lambda item: (-item[1], item[0])) if 1 <= top <= MAX_EXPERTS]
    if not common:
        return MAX_EXPERTS
    report.unchecked.append(
        f"that there are {common[0]} experts, the number in the file itself: give --config, or --num-experts"
    )
    return int(common[0])


def _num_slots(report: Report, rows: list[Row], experts: int, given: int | None) -> int | None:
    """S; an error for each row with another number of slots."""
    model, layout = report.model, report.layout
    if not rows:
        return None
    lengths = Counter(len(row.values) for row in rows)
    usual = max(lengths, key=lambda length: (lengths[length], -length))
    slots, why = (usual, "as most rows have") if given is None else (given, "as num_slots says")
    if layout.redundant is None:
        report.unchecked.append("that the engine starts with as many redundant slots: give --redundant")
    elif model.num_experts is not None and slots != experts + layout.redundant:
        slots, why = experts + layout.redundant, f"{experts} experts + {layout.redundant} redundant"
        if given is not None:
            report.add_error("num_slots", f"is {given}, not {slots} ({why})", "correct one of them")
    for row in rows:
        if len(row.values) != slots:
            report.add_error(
                row.place, f"has {len(row.values)} slots, not {slots} ({why})", "give the expert of every slot, once"
            )
    if layout.ep_size is None:
        report.unchecked.append("that slots divide by the EP size, and no rank holds an expert twice: give --ep-size")
    elif slots % layout.ep_size:
        near = slots - slots % layout.ep_size
        report.add_error(
            "",
            f"{slots} slots do not divide over an EP size of {layout.ep_size}",
            f"use {f'{near} or ' if near else ''}{near + layout.ep_size} slots, or another EP size",
        )
    if model.num_experts is not None and slots == usual < experts:
        report.add_error("", f"{slots} slots do not hold {experts} experts", "use more slots, or the model's config")
    return slots


def _in_range(report: Report, row: Row, experts: int, wraps: bool) -> bool:
    bad = [slot for slot, value in enumerate(row.values) if not 0 <= value < experts]
    if bad:
        value = row.values[bad[0]]
        means = f": the engine takes it for expert {experts + value}" if wraps and -experts <= value < 0 else ""
        report.add_error(
            row.at(bad[0]), f"expert {value} is outside 0..{experts - 1}{means}{_more(bad)}", "give the expert's id"
        )
    return not bad


def _all_present(report: Report, row: Row, experts: int) -> bool:
    missing = np.flatnonzero(np.bincount(row.values, minlength=experts) == 0)
    if len(missing):
        named = ", ".join(str(expert) for expert in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        what = f"experts {named}{more} have no slot" if len(missing) > 1 else f"expert {named} has no slot"
        report.add_error(row.place, what + _again(row, experts), "every expert needs a slot")
    return not len(missing)


def _again(row: Row, experts: int) -> str:
    """The slot that is likely wrong if there are no redundant slots: the second one with the same expert."""
    seen: set[int] = set()
    if len(row.values) > experts:
        return ""
    for slot, value in enumerate(row.values):
        if value in seen:
            return f"; expert {value} is duplicate in {row.slot(slot)}"
        seen.add(value)
    return ""


def _check_duplicates(report: Report, rows: list[Row], table: Int32Array, unique: bool) -> None:
    if report.layout.ep_size is None:
        return
    by_rank = table.reshape(len(table), report.layout.ep_size, -1)
    ordered = np.sort(by_rank, axis=2)
    found = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if not len(found):
        return
    row, rank, place = (int(i) for i in found[0])
    expert = int(ordered[row, rank, place])
    slots = [int(slot) + rank * by_rank.shape[2] for slot in np.flatnonzero(by_rank[row, rank] == expert)]
    count = len(np.unique(found[:, 0]))
    more = f"; {plural(count, 'row has', 'rows have')} such ({count} of {len(rows)})"
    where = f"{rows[row].place}, {' and '.join(rows[row].slot(slot) for slot in slots[:2])}"
    what = f"rank {rank} holds expert {expert} {len(slots)} times{more}"
    if unique:
        report.add_error(where, what, "give each rank an expert once")
    else:
        report.add_warning(where, what, "legal, but does not balance load: give the slot to another expert")


def finish(
    report: Report, table: Int32Array | None, layers: tuple[int, ...] | None, keep: npt.NDArray[np.intp] | None = None
) -> Report:
    """Set the placement, if there is no error and everything is known.

    Args:
        table: int32 [rows, S] of `check_rows`. layers: the model's index of the rows to keep.
        keep: those rows; None: all.
    """
    layout, experts = report.layout, report.model.num_experts
    if table is None or not report.ok or layers is None or layout.ep_size is None or layout.nodes is None:
        return report
    if experts is None or layout.ep_size % layout.nodes:
        return report
    kept = table if keep is None else table[keep]
    report.model = report.model.override(moe_layers=layers)
    report.layout = replace(layout, redundant=table.shape[1] - experts)
    report.placement = EnginePlacement(kept, layers, experts, layout.ep_size, layout.nodes)
    return report


def _more(bad: list[int]) -> str:
    return f" (and {len(bad) - 1} more in this row)" if len(bad) > 1 else ""


def plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
