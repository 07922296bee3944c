"""The rules that every engine's map must keep and none of them checks, and what a broken one would do.

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
        values: what stands there, whatever it is.
        slot: names a slot of it.
    """

    place: str
    layer: int | None
    values: Any
    slot: Callable[[int], str] = _slot

    def at(self, slot: int) -> str:
        return f"{self.place}, {self.slot(slot)}"


def check_rows(
    report: Report, rows: list[Row], *, slots: int | None = None, twice: str = "warn", wraps: bool = False
) -> Int32Array | None:
    """Hold every row to the rules; int32 [rows, S] when none is broken.

    Args:
        report: gets the findings, and E and R where only the rows tell them.
        rows: in the file's order. twice: what two copies of an expert on one rank are: "warn" or "fault".
        slots: S, where the file says it beside the rows.
        wraps: the engine indexes with negative ids, so that -1 becomes its last expert.

    The number of experts that is not given is what most rows say (largest id + 1), and the report tells so.
    """
    if not 1 <= len(rows) <= MAX_LAYERS:
        report.fault("", f"{len(rows)} rows are outside 1..{MAX_LAYERS}", "one row per layer")
        return None
    whole = [row for row in rows if _is_list(report, row)]
    typed = [row for row in whole if _are_numbers(report, row)]
    experts = _num_experts(report, typed)
    slots = _num_slots(report, whole, experts, slots)
    sound = [row for row in typed if _in_range(report, row, experts, wraps)]
    complete = [row for row in sound if len(row.values) == slots and _all_there(report, row, experts)]
    report.rows, report.slots = len(rows), slots
    if len(complete) < len(rows) or not report.good:
        return None
    table = np.array([row.values for row in rows], np.int32)
    _two_on_one_rank(report, rows, table, twice)
    return table if report.good else None


def _is_list(report: Report, row: Row) -> bool:
    if isinstance(row.values, list) and row.values and len(row.values) <= MAX_SLOTS:
        return True
    what = "is empty" if row.values == [] else f"is {show(row.values)[:40]}, not a list of experts"
    report.fault(row.place, what, "give the expert of every slot")
    return False


def _are_numbers(report: Report, row: Row) -> bool:
    bad = [slot for slot, value in enumerate(row.values) if type(value) is not int]
    if bad:
        value = row.values[bad[0]]
        kind = " (a fraction or a float)" if isinstance(value, float) else ""
        report.fault(row.at(bad[0]), f"{show(value)} is not a whole number{kind}{_more(bad)}", "give the expert's id")
    return not bad


def _num_experts(report: Report, rows: list[Row]) -> int:
    if report.model.num_experts is not None:
        return report.model.num_experts
    tops = Counter(max(row.values) + 1 for row in rows)
    common = [top for top, _ in sorted(tops.items(), key=lambda item: (-item[1], item[0])) if 1 <= top <= MAX_EXPERTS]
    if not common:
        return MAX_EXPERTS
    report.unchecked.append(
        f"that there are {common[0]} experts, as the file itself has it: give --config, or --num-experts"
    )
    return int(common[0])


def _num_slots(report: Report, rows: list[Row], experts: int, said: int | None) -> int | None:
    """S, and a fault for each row that has another number of slots."""
    model, layout = report.model, report.layout
    if not rows:
        return None
    lengths = Counter(len(row.values) for row in rows)
    usual = max(lengths, key=lambda length: (lengths[length], -length))
    slots, why = (usual, "as most rows have") if said is None else (said, "as num_slots says")
    if layout.redundant is None:
        report.unchecked.append("that the engine is started with as many redundant slots: give --redundant")
    elif model.num_experts is not None and slots != experts + layout.redundant:
        slots, why = experts + layout.redundant, f"{experts} experts + {layout.redundant} redundant"
        if said is not None:
            report.fault("num_slots", f"is {said}, not {slots} ({why})", "correct one of them")
    for row in rows:
        if len(row.values) != slots:
            report.fault(
                row.place, f"has {len(row.values)} slots, not {slots} ({why})", "give the expert of every slot, once"
            )
    if layout.ep_size is None:
        report.unchecked.append("that slots divide by the EP size, and no rank holds an expert twice: give --ep-size")
    elif slots % layout.ep_size:
        near = slots - slots % layout.ep_size
        report.fault(
            "",
            f"{slots} slots do not divide over an EP size of {layout.ep_size}",
            f"use {f'{near} or ' if near else ''}{near + layout.ep_size} slots, or another EP size",
        )
    if model.num_experts is not None and slots == usual < experts:
        report.fault("", f"{slots} slots do not hold {experts} experts", "use more slots, or the model's own config")
    return slots


def _in_range(report: Report, row: Row, experts: int, wraps: bool) -> bool:
    bad = [slot for slot, value in enumerate(row.values) if not 0 <= value < experts]
    if bad:
        value = row.values[bad[0]]
        means = f": the engine takes it for expert {experts + value}" if wraps and -experts <= value < 0 else ""
        report.fault(
            row.at(bad[0]), f"expert {value} is outside 0..{experts - 1}{means}{_more(bad)}", "give the expert's id"
        )
    return not bad


def _all_there(report: Report, row: Row, experts: int) -> bool:
    missing = np.flatnonzero(np.bincount(row.values, minlength=experts) == 0)
    if len(missing):
        named = ", ".join(str(expert) for expert in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        what = f"experts {named}{more} have no slot" if len(missing) > 1 else f"expert {named} has no slot"
        report.fault(row.place, what + _again(row, experts), "every expert needs a slot")
    return not len(missing)


def _again(row: Row, experts: int) -> str:
    """The slot that is likely wrong, where no expert may have two: the later of two that hold the same."""
    seen: set[int] = set()
    if len(row.values) > experts:
        return ""
    for slot, value in enumerate(row.values):
        if value in seen:
            return f"; expert {value} is there again in {row.slot(slot)}"
        seen.add(value)
    return ""


def _two_on_one_rank(report: Report, rows: list[Row], table: Int32Array, twice: str) -> None:
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
    if twice == "fault":
        report.fault(where, what, "give each rank an expert once")
    else:
        report.warn(where, what, "legal, but the second copy balances nothing: give the slot to another expert")


def finish(
    report: Report, table: Int32Array | None, layers: tuple[int, ...] | None, keep: npt.NDArray[np.intp] | None = None
) -> Report:
    """Set the placement, if there is no fault and all is known.

    Args:
        table: int32 [rows, S] of `check_rows`. layers: the model's index of the rows to keep.
        keep: those rows; None: all.
    """
    layout, experts = report.layout, report.model.num_experts
    if table is None or not report.good or layers is None or layout.ep_size is None or layout.nodes is None:
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
