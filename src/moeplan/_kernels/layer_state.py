"""One layer of a placement: which GPUs hold which expert, and the messages that it costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled

__all__ = [
    "BY_GPU",
    "BY_NODE",
    "BY_PICK",
    "NONE",
    "Layer",
    "Rows",
    "Scratch",
    "cost",
    "mark",
    "put",
    "rows_of",
    "rows_of_both",
    "sent_by_home",
    "state_of",
]

#: What a message is counted by.
BY_PICK, BY_NODE, BY_GPU = 0, 1, 2
#: No copy, slot or expert; written np.int64(NONE), or the compiler makes a copy of each function for the literal.
NONE = -1

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """Sampled token rows of one layer, and which of them hold an expert.

    Attributes:
        experts: unsigned [T, k]; home: int64 [T], the node where each row's request decodes.
        starts: int64 [E + 1], holding: int64 [T * k]; rows that hold expert e: holding[starts[e]:starts[e + 1]].
    """

    experts: npt.NDArray[np.unsignedinteger]
    home: Int
    starts: Int
    holding: Int


class Layer(NamedTuple):
    """The state of one layer: E experts, N nodes, P GPUs, S slots."""

    use: Float  # [N, E], picks of each expert by the requests of each node, for loads
    away: Float  # [N, E], messages that these cost where no other pick of a token shares them
    near: Float  # [P, E], what a copy on the very GPU that asks is worth besides
    slots: Int  # [S], the expert of each slot
    gpu: Int  # [S], of each slot
    node: Int  # [P], of each GPU
    unit: Int  # [P], what a message is counted by: node, GPU, or 0 for picks
    nearest: bool  # a copy at home serves all picks from there; else all copies share all picks
    copies: Int  # [E]
    where: Int  # [E, P], the GPUs of an expert's copies
    on: Bool  # [P, E]
    at: Int  # [N, E], copies on a node
    credit: float  # for what picks of a token share: 1 as it is, 0 as if each sent its own message
    shared: Float  # [E, N, U], of `away`, messages that other picks of the same tokens send to a unit anyway


class Scratch(NamedTuple):
    """What `trace` writes."""

    seen: Int
    units: Int
    zero: Int
    rest: Float
    share: Float
    marked: Bool  # [U], units that are looked at


@compiled
def cost(layer: Layer, e: int, leaves: int, enters: int) -> float:
    """Messages that expert e costs, the other picks of each token staying where they are."""
    count = layer.copies[e] - (leaves >= 0) + (enters >= 0)
    home = layer.node[enters] if enters >= 0 else -1
    gone = layer.node[leaves] if leaves >= 0 else -1
    total = 0.0
    for n in range(layer.use.shape[0]):
        if layer.nearest and layer.at[n, e] - (n == gone) + (n == home) > 0:
            continue
        far, free = 0, 0.0
        for i in range(layer.copies[e] + 1):
            gpu = layer.where[e, i] if i < layer.copies[e] else enters
            if gpu < 0 or (gpu == leaves and i < layer.copies[e]) or layer.node[gpu] == n:
                continue
            far += 1
            if layer.shared.size:
                free += layer.credit * layer.shared[e, n, layer.unit[gpu]]
        total += (layer.away[n, e] * far - free) / count
    return total


@compiled
def trace(
    layer: Layer, row: npt.NDArray[np.unsignedinteger], home: int, seen: Int, units: Int, zero: Int, rest: Float,
    share: Float, marked: Bool,
) -> int:  # fmt: skip
    """Of the marked units those that a token reaches, each with the chance that each pick goes there.

    Returns the number of units; per unit: `zero` picks that surely go there, `rest` the product of 1 - chance over the
    others; share[j, i]: the chance that pick j goes to unit i.
    """
    found = 0
    for j in range(row.size):
        e = row[j]
        if layer.nearest and layer.at[home, e] > 0:
            continue
        each = 1.0 / layer.copies[e]
        for i in range(layer.copies[e]):
            gpu = layer.where[e, i]
            if layer.node[gpu] == home:
                continue
            unit = layer.unit[gpu]
            if not marked[unit]:
                continue
            if seen[unit] < 0:
                seen[unit] = found
                units[found] = unit
                for other in range(row.size):
                    share[other, found] = 0.0
                found += 1
            share[j, seen[unit]] += each
    for i in range(found):
        seen[units[i]] = -1
        zero[i] = 0
        rest[i] = 1.0
        for j in range(row.size):
            if share[j, i] > 0.999999:
                zero[i] += 1
            else:
                rest[i] *= 1.0 - share[j, i]
    return found


@compiled
def mark(layer: Layer, s: Scratch, a: int, b: int, here: int, there: int) -> None:
    """Mark the units that copies of a and b are on, or move to: what tokens send to others stays (a -1: mark all)."""
    s.marked[:] = a < 0
    if a >= 0:
        s.marked[layer.unit[here]] = True
        if there >= 0:
            s.marked[layer.unit[there]] = True
        for i in range(layer.copies[a]):
            s.marked[layer.unit[layer.where[a, i]]] = True
        for i in range(layer.copies[b]):
            s.marked[layer.unit[layer.where[b, i]]] = True


@compiled
def _holds(row: npt.NDArray[np.unsignedinteger], e: int) -> bool:
    found = False
    for j in range(row.size):
        found = found or row[j] == e
    return found


@compiled
def _sent(layer: Layer, rows: Rows, s: Scratch, r: int, weight: float) -> float:
    """Messages of one row to marked units; with a weight, what its picks share goes into `layer.shared` as often."""
    row, home, total = rows.experts[r], rows.home[r], 0.0
    found = trace(layer, row, home, s.seen, s.units, s.zero, s.rest, s.share, s.marked)
    for u in range(found):
        total += 1.0 if s.zero[u] else 1.0 - s.rest[u]
        if weight != 0.0:
            for j in range(row.size):
                chance = s.share[j, u]
                sure = chance > 0.999999
                reached = 1.0
                if s.zero[u] - sure == 0:
                    reached = 1.0 - (s.rest[u] if sure else s.rest[u] / (1.0 - chance))
                layer.shared[row[j], home, s.units[u]] += weight * reached
    return total


@compiled
def rows_of(layer: Layer, rows: Rows, s: Scratch, a: int, b: int, weight: float) -> float:
    """Messages to marked units of the rows that hold expert a or b (-1: of all rows).

    With a weight other than 0, what picks share is also added to `layer.shared` that many times.
    """
    total = 0.0
    if a < 0:
        for r in range(rows.home.size):
            total += _sent(layer, rows, s, np.int64(r), weight)
        return total
    for i in range(rows.starts[a], rows.starts[a + 1]):
        total += _sent(layer, rows, s, rows.holding[i], weight)
    for i in range(rows.starts[b], rows.starts[b + 1]):
        if not _holds(rows.experts[rows.holding[i]], a):
            total += _sent(layer, rows, s, rows.holding[i], weight)
    return total


@compiled
def rows_of_both(layer: Layer, rows: Rows, s: Scratch, a: int, b: int) -> float:
    """Messages to marked units of the rows that hold both experts."""
    if rows.starts[a + 1] - rows.starts[a] > rows.starts[b + 1] - rows.starts[b]:
        a, b = b, a
    total = 0.0
    for i in range(rows.starts[a], rows.starts[a + 1]):
        if _holds(rows.experts[rows.holding[i]], b):
            total += _sent(layer, rows, s, rows.holding[i], 0.0)
    return total


@compiled
def put(layer: Layer, e: int, leaves: int, enters: int) -> None:
    """Move, add (leaves -1) or take away (enters -1) a copy."""
    if leaves >= 0:
        last = layer.copies[e] - 1
        for i in range(last):
            if layer.where[e, i] == leaves:
                layer.where[e, i] = layer.where[e, last]
                break
        layer.copies[e] = last
        layer.on[leaves, e] = False
        layer.at[layer.node[leaves], e] -= 1
    if enters >= 0:
        layer.where[e, layer.copies[e]] = enters
        layer.copies[e] += 1
        layer.on[enters, e] = True
        layer.at[layer.node[enters], e] += 1


@compiled
def fill(layer: Layer) -> None:
    """Copies, as the slots have them."""
    none = np.int64(NONE)
    for x in range(layer.slots.size):
        put(layer, layer.slots[x], none, layer.gpu[x])


@compiled
def sent_by_home(layer: Layer, rows: Rows, s: Scratch, request: Int, out: Float) -> None:
    """Add to `out` [n, N] what each request's rows would send from each home."""
    for r in range(rows.home.size):
        row, copied, of = rows.experts[r], False, request[r]
        for j in range(row.size):
            copied = copied or layer.copies[row[j]] > 1
        if copied:
            for home in range(layer.at.shape[0]):
                found = trace(layer, row, home, s.seen, s.units, s.zero, s.rest, s.share, s.marked)
                for u in range(found):
                    out[of, home] += 1.0 if s.zero[u] else 1.0 - s.rest[u]
            continue
        # Without copies a token reaches the same units from everywhere, but for those at home.
        found = 0
        for j in range(row.size):
            gpu = layer.where[row[j], 0]
            if s.seen[layer.unit[gpu]] < 0:
                s.seen[layer.unit[gpu]] = 0
                s.units[found] = layer.unit[gpu]
                found += 1
                out[of, layer.node[gpu]] -= 1.0
        for u in range(found):
            s.seen[s.units[u]] = -1
        for home in range(layer.at.shape[0]):
            out[of, home] += found


def state_of(
    use: Float, slots: Int, per_node: int, nearest: bool, near: Float | None,
    tokens: tuple[npt.NDArray[np.unsignedinteger], Int] | None, by: int, credit: float,
) -> tuple[Layer, Rows | None, Scratch | None]:  # fmt: skip
    nodes, experts = use.shape
    gpus = nodes * per_node
    node = np.arange(gpus) // per_node
    away, picked, home = use, np.zeros((0, 1), np.uint16), np.zeros(0, np.int64)
    if by != BY_PICK and tokens is not None:
        picked, home = tokens[0].astype(np.uint16), tokens[1].astype(np.int64)
        away = np.zeros(use.shape)
        np.add.at(away, (np.repeat(home, picked.shape[1]), picked.ravel()), 1.0)
    units = (0, nodes, gpus)[by]
    layer = Layer(
        use, away, np.zeros((0, 0)) if near is None else near, slots,
        np.arange(slots.size) // (slots.size // gpus), node,
        (np.zeros(gpus, np.int64), node, np.arange(gpus))[by], nearest,
        np.zeros(experts, np.int64), np.full((experts, gpus), -1), np.zeros((gpus, experts), np.bool_),
        np.zeros((nodes, experts), np.int64), credit, np.zeros((experts, nodes, units) if units else (0, 0, 0)),
    )  # fmt: skip
    fill(layer)
    if not units:
        return layer, None, None  # the compiler then leaves out what only rows need
    none = np.zeros(units, np.int64)
    scratch = Scratch(
        none - 1, none.copy(), none, np.zeros(units), np.zeros((picked.shape[1], units)), np.ones(units, np.bool_)
    )
    return layer, Rows(picked, home, *index(picked, experts)), scratch


def index(picked: npt.NDArray[np.unsignedinteger], experts: int) -> tuple[Int, Int]:
    """Rows by the experts that they hold."""
    k = max(picked.shape[1], 1)
    order = np.argsort(picked.ravel(), kind="stable") // k
    return np.searchsorted(np.sort(picked.ravel()), np.arange(experts + 1)), order
