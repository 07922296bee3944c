"""One layer of a placement: which GPUs hold which expert, and the messages that it sends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import BoolArray, ExpertArray, FloatArray, Int64Array

#: What a message is counted by.
BY_PICK, BY_NODE, BY_GPU = 0, 1, 2
#: No replica, slot or expert; written np.int64(NONE), or each function is compiled once more for the literal.
NONE = -1


class Objective(NamedTuple):
    """What a placement is valued by.

    Attributes:
        node_penalty, gpu_penalty: for each unit of load imbalance of nodes and of GPUs, in shares of all picks.
        nearest: a replica on its own node serves a pick; if not, all replicas share all picks (`hash`).
        counted_by: what a message is counted by.
        sharing_credit: for messages that picks of a token share: 1 counts them as they are, 0 as if each pick sent its
            own.
    """

    node_penalty: float
    gpu_penalty: float
    nearest: bool = True
    counted_by: int = BY_PICK
    sharing_credit: float = 1.0


class Rows(NamedTuple):
    """Sampled token rows of one layer, and which of them hold an expert.

    Attributes:
        experts: unsigned [T, k], E and above for picks that a token lacks; home: int64 [T], the node where each row's
            request decodes.
        starts: int64 [E + 1], holding: int64 [T * k]; rows that hold expert e: holding[starts[e]:starts[e + 1]].
    """

    experts: ExpertArray
    home: Int64Array
    starts: Int64Array
    holding: Int64Array


class Layer(NamedTuple):
    """The state of one layer: E experts, N nodes, P GPUs, S slots, U units that messages are counted by."""

    use: FloatArray  # [N, E], picks of each expert by the requests of each node, for loads
    unshared: FloatArray  # [N, E], messages that these picks send where no other pick of a token shares them
    same_gpu_value: FloatArray  # [P, E], what a replica on the very GPU that asks is worth besides; empty: nothing
    slots: Int64Array  # [S], the expert of each slot
    gpu: Int64Array  # [S], of each slot
    node: Int64Array  # [P], of each GPU
    unit: Int64Array  # [P], what a message is counted by: node, GPU, or 0 for picks
    nearest: bool  # a replica on a node serves all picks from there; if not, all replicas share all picks
    replicas: Int64Array  # [E], how many
    replica_gpu: Int64Array  # [E, P], the GPUs of an expert's replicas
    on_gpu: BoolArray  # [P, E]
    on_node: Int64Array  # [N, E], replicas on a node
    sharing_credit: float  # for what picks of a token share: 1 as it is, 0 as if each sent its own message
    shared: FloatArray  # [E, N, U], of `unshared`, messages that other picks of the same tokens send to a unit anyway


class Scratch(NamedTuple):
    """What `_reached_units` writes: per unit that a token reaches, `sure` picks that certainly go there, `missed` the
    chance that none of the others does; chance[j, i]: that pick j goes to unit i."""

    seen: Int64Array  # [U], the position of a unit among those reached, or -1
    units: Int64Array
    sure: Int64Array
    missed: FloatArray
    chance: FloatArray
    marked: BoolArray  # [U], units that are looked at


@compiled
def expert_messages(layer: Layer, e: int, leaves: int, enters: int) -> float:
    """Messages that expert e costs with a replica less or more, the other picks of each token staying where they are.

    Args:
        leaves, enters: the GPU that a replica leaves, and the one that it enters (-1: none).
    """
    count = layer.replicas[e] - (leaves >= 0) + (enters >= 0)
    node_in = layer.node[enters] if enters >= 0 else -1
    node_out = layer.node[leaves] if leaves >= 0 else -1
    total = 0.0
    for n in range(layer.use.shape[0]):
        if layer.nearest and layer.on_node[n, e] - (n == node_out) + (n == node_in) > 0:
            continue
        far, free = 0, 0.0
        for i in range(layer.replicas[e] + 1):
            gpu = layer.replica_gpu[e, i] if i < layer.replicas[e] else enters
            if gpu < 0 or (gpu == leaves and i < layer.replicas[e]) or layer.node[gpu] == n:
                continue
            far += 1
            if layer.shared.size:
                free += layer.sharing_credit * layer.shared[e, n, layer.unit[gpu]]
        total += (layer.unshared[n, e] * far - free) / count
    return total


@compiled
def _reached_units(layer: Layer, row: ExpertArray, home: int, s: Scratch) -> int:
    """Of the marked units those that a token reaches, with the chance that each pick goes there; returns how many."""
    seen, units, chance = s.seen, s.units, s.chance
    found = 0
    for j in range(row.size):
        e = row[j]
        if e >= layer.replicas.size or (layer.nearest and layer.on_node[home, e] > 0):
            continue
        each = 1.0 / layer.replicas[e]
        for i in range(layer.replicas[e]):
            gpu = layer.replica_gpu[e, i]
            if layer.node[gpu] == home:
                continue
            unit = layer.unit[gpu]
            if not s.marked[unit]:
                continue
            if seen[unit] < 0:
                seen[unit] = found
                units[found] = unit
                for other in range(row.size):
                    chance[other, found] = 0.0
                found += 1
            chance[j, seen[unit]] += each
    for i in range(found):
        seen[units[i]] = -1
        s.sure[i] = 0
        s.missed[i] = 1.0
        for j in range(row.size):
            if chance[j, i] > 0.999999:
                s.sure[i] += 1
            else:
                s.missed[i] *= 1.0 - chance[j, i]
    return found


@compiled
def mark_units(layer: Layer, s: Scratch, a: int, b: int, here: int, there: int) -> None:
    """Mark the units that replicas of a and b are on, or move to: what tokens send to others stays (a -1: mark all)."""
    s.marked[:] = a < 0
    if a >= 0:
        s.marked[layer.unit[here]] = True
        if there >= 0:
            s.marked[layer.unit[there]] = True
        for i in range(layer.replicas[a]):
            s.marked[layer.unit[layer.replica_gpu[a, i]]] = True
        for i in range(layer.replicas[b]):
            s.marked[layer.unit[layer.replica_gpu[b, i]]] = True


@compiled
def _holds(row: ExpertArray, e: int) -> bool:
    found = False
    for j in range(row.size):
        found = found or row[j] == e
    return found


@compiled
def _messages(layer: Layer, rows: Rows, s: Scratch, r: int, weight: float) -> float:
    """Messages of one row to marked units; with a weight, what its picks share goes into `layer.shared` as often."""
    row, home, total = rows.experts[r], rows.home[r], 0.0
    found = _reached_units(layer, row, home, s)
    for u in range(found):
        total += 1.0 if s.sure[u] else 1.0 - s.missed[u]
        if weight != 0.0:
            for j in range(row.size):
                if row[j] >= layer.replicas.size:
                    continue
                chance = s.chance[j, u]
                sure = chance > 0.999999
                reached = 1.0
                if s.sure[u] - sure == 0:
                    reached = 1.0 - (s.missed[u] if sure else s.missed[u] / (1.0 - chance))
                layer.shared[row[j], home, s.units[u]] += weight * reached
    return total


@compiled
def row_messages(layer: Layer, rows: Rows, s: Scratch, a: int, b: int, weight: float) -> float:
    """Messages to marked units of the rows that hold expert a or b (-1: of all rows).

    With a weight other than 0, what picks share is also added to `layer.shared` that many times.
    """
    total = 0.0
    if a < 0:
        for r in range(rows.home.size):
            total += _messages(layer, rows, s, np.int64(r), weight)
        return total
    for i in range(rows.starts[a], rows.starts[a + 1]):
        total += _messages(layer, rows, s, rows.holding[i], weight)
    for i in range(rows.starts[b], rows.starts[b + 1]):
        if not _holds(rows.experts[rows.holding[i]], a):
            total += _messages(layer, rows, s, rows.holding[i], weight)
    return total


@compiled
def row_messages_of_both(layer: Layer, rows: Rows, s: Scratch, a: int, b: int) -> float:
    """Messages to marked units of the rows that hold both experts."""
    if rows.starts[a + 1] - rows.starts[a] > rows.starts[b + 1] - rows.starts[b]:
        a, b = b, a
    total = 0.0
    for i in range(rows.starts[a], rows.starts[a + 1]):
        if _holds(rows.experts[rows.holding[i]], b):
            total += _messages(layer, rows, s, rows.holding[i], 0.0)
    return total


@compiled
def move_replica(layer: Layer, e: int, leaves: int, enters: int) -> None:
    """Move, add (leaves -1) or take away (enters -1) a replica."""
    if leaves >= 0:
        last = layer.replicas[e] - 1
        for i in range(last):
            if layer.replica_gpu[e, i] == leaves:
                layer.replica_gpu[e, i] = layer.replica_gpu[e, last]
                break
        layer.replicas[e] = last
        layer.on_gpu[leaves, e] = False
        layer.on_node[layer.node[leaves], e] -= 1
    if enters >= 0:
        layer.replica_gpu[e, layer.replicas[e]] = enters
        layer.replicas[e] += 1
        layer.on_gpu[enters, e] = True
        layer.on_node[layer.node[enters], e] += 1


@compiled
def _fill(layer: Layer) -> None:
    """Replicas, as the slots have them."""
    none = np.int64(NONE)
    for x in range(layer.slots.size):
        move_replica(layer, layer.slots[x], none, layer.gpu[x])


@compiled
def messages_by_home(layer: Layer, rows: Rows, s: Scratch, request: Int64Array, out: FloatArray) -> None:
    """Add to `out` [n, N] what each request's rows would send if it decoded on each node."""
    for r in range(rows.home.size):
        row, replicated, of = rows.experts[r], False, request[r]
        for j in range(row.size):
            replicated = replicated or (row[j] < layer.replicas.size and layer.replicas[row[j]] > 1)
        if replicated:
            for home in range(layer.on_node.shape[0]):
                found = _reached_units(layer, row, home, s)
                for u in range(found):
                    out[of, home] += 1.0 if s.sure[u] else 1.0 - s.missed[u]
            continue
        # Without replicas a token reaches the same units from every node, but for those on its own.
        found = 0
        for j in range(row.size):
            if row[j] >= layer.replicas.size:
                continue
            gpu = layer.replica_gpu[row[j], 0]
            if s.seen[layer.unit[gpu]] < 0:
                s.seen[layer.unit[gpu]] = 0
                s.units[found] = layer.unit[gpu]
                found += 1
                out[of, layer.node[gpu]] -= 1.0
        for u in range(found):
            s.seen[s.units[u]] = -1
        for home in range(layer.on_node.shape[0]):
            out[of, home] += found


def build_state(
    use: FloatArray,
    slots: Int64Array,
    gpus_per_node: int,
    objective: Objective,
    same_gpu: FloatArray | None = None,
    tokens: tuple[ExpertArray, Int64Array] | None = None,
) -> tuple[Layer, Rows | None, Scratch | None]:
    """The state of a layer for use [N, E] and slots [S]; rows and scratch where messages are counted on tokens.

    Args:
        same_gpu: [P, E], see `Layer`. tokens: sampled rows' experts [T, k] and home nodes [T].
    """
    (nodes, experts), by = use.shape, objective.counted_by
    gpus = nodes * gpus_per_node
    node = np.arange(gpus) // gpus_per_node
    unshared, picked, home = use, np.zeros((0, 1), np.uint16), np.zeros(0, np.int64)
    if by != BY_PICK and tokens is not None:
        picked, home = tokens[0].astype(np.uint16), tokens[1].astype(np.int64)
        unshared = np.zeros(use.shape)
        there = picked < experts
        np.add.at(unshared, (np.broadcast_to(home[:, None], picked.shape)[there], picked[there]), 1.0)
    units = (0, nodes, gpus)[by]
    layer = Layer(
        use=use,
        unshared=unshared,
        same_gpu_value=np.zeros((0, 0)) if same_gpu is None else same_gpu,
        slots=slots,
        gpu=np.arange(slots.size) // (slots.size // gpus),
        node=node,
        unit=(np.zeros(gpus, np.int64), node, np.arange(gpus))[by],
        nearest=objective.nearest,
        replicas=np.zeros(experts, np.int64),
        replica_gpu=np.full((experts, gpus), -1),
        on_gpu=np.zeros((gpus, experts), np.bool_),
        on_node=np.zeros((nodes, experts), np.int64),
        sharing_credit=objective.sharing_credit,
        shared=np.zeros((experts, nodes, units) if units else (0, 0, 0)),
    )
    _fill(layer)
    if not units:
        return layer, None, None  # the compiler then leaves out what only rows need
    none, chance = np.zeros(units, np.int64), np.zeros((picked.shape[1], units))
    scratch = Scratch(none - 1, none.copy(), none, np.zeros(units), chance, np.ones(units, np.bool_))
    return layer, Rows(picked, home, *_rows_by_expert(picked, experts)), scratch


def _rows_by_expert(picked: ExpertArray, experts: int) -> tuple[Int64Array, Int64Array]:
    """Rows by the experts that they hold: `Rows.starts` and `Rows.holding`."""
    k = max(picked.shape[1], 1)
    order = np.argsort(picked.ravel(), kind="stable") // k
    return np.searchsorted(np.sort(picked.ravel()), np.arange(experts + 1)), order
