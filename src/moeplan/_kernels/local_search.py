"""Which slot holds which expert: local search by swaps and replacements, for few messages between nodes and even load.

One search for every dispatch mode. A replica of expert e costs what the requests of node h, none of whose GPUs holds e,
must send for it: one message a pick (`pick`), or one only where no other pick of the token goes to the same node or GPU
anyway (`node`, `gpu`), which token rows tell.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import (
    BY_GPU,
    BY_NODE,
    BY_PICK,
    NONE,
    Layer,
    Objective,
    Rows,
    Scratch,
    build_state,
    expert_messages,
    mark_units,
    messages_by_home,
    move_replica,
    row_messages,
    row_messages_of_both,
)
from moeplan._kernels.loads import (
    LoadState,
    load_norm,
    load_penalty_delta,
    load_penalty_linear,
    move_penalty_linear,
    update_loads,
)
from moeplan._kernels.moves import Savings, update_expert, update_place, update_slot
from moeplan.arrays import ExpertArray, FloatArray, Int64Array

WORKERS = 2
#: A move must gain this share of a layer's picks.
MIN_GAIN = 1e-6


class Search(NamedTuple):
    """What the search of one layer works on, but for rows and scratch: the compiler drops the code of those that are
    None only where they are arguments."""

    layer: Layer
    savings: Savings
    loads: LoadState
    scale: float  # from messages to shares of a layer's picks


@compiled
def _gains_of_leaving(search: Search, x: int, out: FloatArray) -> float:
    """Gain, at the tangent, of moving slot x's replica to each GPU (`out` [P]); returns that of dropping it."""
    layer, savings, loads, scale = search.layer, search.savings, search.loads, search.scale
    none, near = np.int64(NONE), layer.same_gpu_value
    a, here, node, use, slope = layer.slots[x], layer.gpu[x], layer.node, layer.use, loads.slope
    own, slopes, rest, count = loads.tally[0, a], loads.tally[1, a], loads.tally[2, a], layer.replicas[a]
    local, zero = 1.0 if layer.nearest else 0.0, np.int64(0)
    use_out, slope_out, move, place = local * use[node[here], a], slope[here], savings.move, savings.place
    for g in range(out.size):
        use_in = local * use[node[g], a]
        out[g] = scale * move[x, place[g]] - load_penalty_linear(
            own, slopes, rest, count, zero, use_out, slope_out, use_in, slope[g]
        )
        if near.size:
            out[g] += near[g, a] - near[here, a]
    if count == 1:
        return 0.0
    penalty = move_penalty_linear(layer, loads, a, here, none)
    return float(scale * savings.drop[x] - penalty - (near[here, a] if near.size else 0.0))


@compiled
def _gains_of_entering(search: Search, here: int, others: FloatArray) -> None:
    """Gain, at the tangent, of each slot's replica coming to GPU `here`, and of a new one of each expert: [S + E]."""
    layer, savings, loads, scale = search.layer, search.savings, search.loads, search.scale
    use, node, slope, tally, replicas = layer.use, layer.node, loads.slope, loads.tally, layer.replicas
    slots, gpu, move, place, home = layer.slots, layer.gpu, savings.move, savings.place[here], layer.node[here]
    local, slope_in, zero, one = 1.0 if layer.nearest else 0.0, loads.slope[here], np.int64(0), np.int64(1)
    near = layer.same_gpu_value
    for y in range(slots.size):
        b, there = slots[y], gpu[y]
        use_out, slope_out, use_in = local * use[node[there], b], slope[there], local * use[home, b]
        others[y] = scale * move[y, place] - load_penalty_linear(
            tally[0, b], tally[1, b], tally[2, b], replicas[b], zero, use_out, slope_out, use_in, slope_in
        )
        if near.size:
            others[y] += near[here, b] - near[there, b]
    if slots.size > replicas.size:
        add = savings.add
        for b in range(replicas.size):
            others[slots.size + b] = scale * add[b, place] - load_penalty_linear(
                tally[0, b], tally[1, b], tally[2, b], replicas[b], one, 0.0, 0.0, local * use[home, b], slope_in
            )
            if near.size:
                others[slots.size + b] += near[here, b]


@compiled
def _allowed(layer: Layer, a: int, b: int, here: int, there: int) -> bool:
    """Whether a replica of a may go from GPU `here` to `there`, and one of b the other way (-1: dropped, new)."""
    if a == b or layer.on_gpu[here, b]:
        return False
    home = layer.node[here]
    if there < 0:
        return not (layer.nearest and layer.on_node[home, b])
    if layer.on_gpu[there, a]:
        return False
    away = layer.node[there]
    return not (layer.nearest and home != away and (layer.on_node[away, a] or layer.on_node[home, b]))


@compiled
def _exact_gain(
    search: Search, rows: Rows | None, s: Scratch | None, x: int, y: int, b: int, gain: float, best: float
) -> float:
    """The gain itself: load instead of its tangent, and, if that is still the best, tokens that hold both experts."""
    layer, savings, loads = search.layer, search.savings, search.loads
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    gain += move_penalty_linear(layer, loads, a, here, there) + move_penalty_linear(layer, loads, b, there, here)
    gain -= load_penalty_delta(layer, loads, a, b, here, there)
    if rows is None:
        return gain
    if gain <= best or (y >= 0 and savings.place[here] == savings.place[there]):
        return gain
    # Each change by itself was computed exactly; together they differ where a token holds both experts.
    mark_units(layer, s, a, b, here, there)
    more = -row_messages_of_both(layer, rows, s, a, b)
    move_replica(layer, a, here, there)
    more += row_messages_of_both(layer, rows, s, a, b)
    move_replica(layer, b, there, here)
    more -= row_messages_of_both(layer, rows, s, a, b)
    move_replica(layer, a, there, here)
    more += row_messages_of_both(layer, rows, s, a, b)
    move_replica(layer, b, here, there)
    return float(gain + search.scale * layer.sharing_credit * more)


@compiled
def _apply(search: Search, rows: Rows | None, s: Scratch | None, x: int, y: int, b: int) -> None:
    """Slots x and y change places; without a y, slot x's replica gives way to one of expert b."""
    layer, savings = search.layer, search.savings
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    if rows is not None:
        mark_units(layer, s, a, b, here, there)
        row_messages(layer, rows, s, a, b, -1.0)
    move_replica(layer, a, here, there)
    move_replica(layer, b, there, here)
    layer.slots[x] = b
    if y >= 0:
        layer.slots[y] = a
    if rows is not None:
        row_messages(layer, rows, s, a, b, 1.0)
    else:
        update_expert(layer, savings, a)
        update_expert(layer, savings, b)
    update_loads(layer, search.loads)


@compiled
def _search(search: Search, rows: Rows | None, s: Scratch | None, sweeps: int, budget: int) -> float:
    """Move replicas while that raises the layer's value, which is returned."""
    layer, savings, loads = search.layer, search.savings, search.loads
    none = np.int64(NONE)
    slots, gpu, experts = layer.slots, layer.gpu, layer.replicas.size
    out, others = np.empty(layer.node.size), np.empty(slots.size + experts)
    old = layer.on_gpu.copy() if budget >= 0 else layer.on_gpu
    moved = 0
    # With rows, any change may change what any replica would save, so that is computed where it is asked for.
    known = np.zeros(savings.move.shape[1], np.bool_)
    if rows is not None:
        mark_units(layer, s, none, none, none, none)
        row_messages(layer, rows, s, none, none, 1.0)
    else:
        for e in range(experts):
            update_expert(layer, savings, np.int64(e))
        known[:] = True
    update_loads(layer, loads)
    for _ in range(sweeps):
        improved = False
        best, slot, partner, entering, spent = MIN_GAIN, none, none, none, np.int64(0)
        ready = -1  # the GPU that `others` holds for
        for x in range(slots.size):
            a, here = slots[x], gpu[x]
            if budget < 0:
                best = MIN_GAIN
                slot = none
            if not known[savings.place[here]]:
                update_place(layer, savings, savings.place[here])
                known[savings.place[here]] = True
            if rows is not None:
                update_slot(layer, savings, np.int64(x))
            if ready != here:
                _gains_of_entering(search, here, others)
                ready = here
            dropped = _gains_of_leaving(search, x, out)
            for y in range(slots.size + (experts if layer.replicas[a] > 1 else 0)):
                swap = y < slots.size  # else slot x's replica gives way to a new one
                gain = others[y] + (out[gpu[y]] if swap else dropped)
                if gain <= best:
                    continue
                b, there = (slots[y], gpu[y]) if swap else (np.int64(y - slots.size), none)
                if here == there or not _allowed(layer, a, b, here, there):
                    continue
                spend = 0
                if budget >= 0:
                    spend = old[here, a] - old[here, b]
                    if swap:
                        spend += old[there, b] - old[there, a]
                    if moved + spend > budget:
                        continue
                other = np.int64(y) if swap else none
                gain = _exact_gain(search, rows, s, x, other, b, gain, best) / max(spend, 1)
                if gain > best:
                    best, slot, partner, entering, spent = gain, np.int64(x), other, b, np.int64(spend)
            if slot >= 0 and (budget < 0 or x == slots.size - 1):
                _apply(search, rows, s, slot, partner, entering)
                ready = -1
                known[:] = rows is None
                moved += int(spent)
                improved = True
        if not improved:
            break
    return float(_value_without_load(layer, rows, s, search.scale) - loads.power[2])


@compiled
def _value_without_load(layer: Layer, rows: Rows | None, s: Scratch | None, scale: float) -> float:
    none, value, sent = np.int64(NONE), 0.0, 0.0
    if layer.same_gpu_value.size:
        for x in range(layer.slots.size):
            value += layer.same_gpu_value[layer.gpu[x], layer.slots[x]]
    rest = 1.0
    if rows is not None:
        mark_units(layer, s, none, none, none, none)
        sent = layer.sharing_credit * row_messages(layer, rows, s, none, none, 0.0)
        rest -= layer.sharing_credit
        layer.shared[:] = 0.0  # the rest as if nothing were shared
    if rest > 0.0:
        for e in range(layer.replicas.size):
            sent += rest * expert_messages(layer, e, none, none)
    return float(value - scale * sent)


def improve(
    use: FloatArray,
    slots: Int64Array,
    gpus_per_node: int,
    objective: Objective,
    sweeps: int,
    *,
    same_gpu: FloatArray | None = None,
    rows: list[tuple[ExpertArray, Int64Array]] | None = None,
    budget: int = -1,
) -> FloatArray:
    """Swap replicas between GPUs, and replace redundant ones, while the value of the placement rises.

    The value of a layer is minus the messages between nodes, in shares of its picks, less the penalties for the load
    imbalance (`load_norm`) of nodes and GPUs. The best move of each slot is taken at once. No GPU gets two replicas of
    an expert, and with the nearest rule no node does; every expert keeps at least one.

    Args:
        use: float64 [L, N, E], picks of each expert by the requests at each node.
        slots: int64 [L, S], the expert of each slot, S / (N x G) to a GPU; changed in place.
        gpus_per_node: G.
        sweeps: over all slots of a layer, at most.
        same_gpu: float64 [L, P, E], what a replica on this very GPU is worth besides, in shares of all picks.
        rows: for each layer, sampled tokens' experts [T, k] and home nodes [T], where messages are not counted by pick;
            E stands for a pick that a token lacks.
        budget: the most replicas of a layer that may be elsewhere than they were (-1: any number), best moves first.

    Returns:
        float64 [L], the value of each layer.
    """

    def work(i: int) -> float:
        if use[i].sum() <= 0.0:
            return 0.0
        near, tokens = None if same_gpu is None else same_gpu[i], None if rows is None else rows[i]
        layer, held, scratch = build_state(use[i], slots[i], gpus_per_node, objective, near, tokens)
        scale = 1.0 / max(float(layer.unshared.sum()), 1e-12)  # all sampled tokens may lack all picks
        search = Search(layer, _savings(layer, objective), _load_state(layer, objective), scale)
        return float(_search(search, held, scratch, sweeps, budget))

    with ThreadPoolExecutor(WORKERS) as pool:  # layers are independent
        return np.array(list(pool.map(work, range(len(use)))))


def _load_state(layer: Layer, objective: Objective) -> LoadState:
    (nodes, experts), gpus = layer.use.shape, layer.node.size
    return LoadState(
        penalty=np.array([objective.node_penalty, objective.gpu_penalty]),
        power=np.zeros(3),
        node=np.zeros(nodes),
        gpu=np.zeros(gpus),
        slope=np.zeros(gpus),
        tally=np.zeros((3, experts)),
        trial=np.zeros(gpus),
        touched=np.zeros(2 * gpus + 2, np.int64),
        by_node=np.zeros(nodes),
    )


def _savings(layer: Layer, objective: Objective) -> Savings:
    place = np.arange(layer.node.size) if objective.counted_by == BY_GPU else layer.node
    places, slots = int(place[-1]) + 1, layer.slots.size
    return Savings(place, np.zeros((slots, places)), np.zeros(slots), np.zeros((layer.replicas.size, places)))


def sampled_messages(
    slots: Int64Array,
    gpus_per_node: int,
    objective: Objective,
    rows: list[ExpertArray],
    request: Int64Array,
    shape: tuple[int, int, int],
) -> FloatArray:
    """Messages between nodes that each request's sampled rows would send if it decoded on each node: float64 [n, N].

    Args:
        slots: int64 [L, S]. rows: for each layer, unsigned [T, k]. request: int64 [T], whose row it is.
        shape: n requests, N nodes, E experts.
    """
    requests, nodes, experts = shape
    none, home = np.zeros((nodes, experts)), np.zeros(len(request), np.int64)

    def work(i: int) -> FloatArray:
        layer, tokens, scratch = build_state(none, slots[i], gpus_per_node, objective, None, (rows[i], home))
        out = np.zeros((requests, nodes))
        messages_by_home(layer, tokens, scratch, request, out)
        return out

    with ThreadPoolExecutor(WORKERS) as pool:
        return np.asarray(sum(pool.map(work, range(len(slots)))))


def value_reference(
    use: FloatArray,
    slots: Int64Array,
    gpus_per_node: int,
    objective: Objective,
    *,
    same_gpu: FloatArray | None = None,
    rows: tuple[ExpertArray, Int64Array] | None = None,
) -> float:
    """What `improve` raises, of one layer, written plainly: token by token, unit by unit."""
    nodes, experts = use.shape
    gpus, credit = nodes * gpus_per_node, objective.sharing_credit
    on_gpu = np.zeros((gpus, experts))
    on_gpu[np.repeat(np.arange(gpus), slots.size // gpus), slots] = 1.0
    on_node = on_gpu.reshape(nodes, gpus_per_node, experts).sum(axis=1)
    #: chance[n, g, e]: a pick of e by a request at node n is served by GPU g.
    chance = np.repeat((on_gpu / on_gpu.sum(axis=0))[None], nodes, axis=0)
    if objective.nearest:
        for n in range(nodes):
            own = on_gpu.copy()
            own[np.arange(gpus) // gpus_per_node != n] = 0.0
            chance[n][:, on_node[n] > 0] = own[:, on_node[n] > 0]
    load = np.einsum("nge,ne->g", chance, use)
    far = np.repeat(np.arange(nodes), gpus_per_node)[None] != np.arange(nodes)[:, None]
    if objective.counted_by == BY_PICK or rows is None:
        messages = float(np.einsum("nge,ne,ng->", chance, use, far)) / use.sum()
    else:
        messages, picks = 0.0, max(int((rows[0] < experts).sum()), 1)
        for row, n in zip(*rows, strict=True):
            each = chance[n][:, row[row < experts]] * far[n][:, None]
            if objective.counted_by == BY_NODE:
                each = each.reshape(nodes, gpus_per_node, -1).sum(axis=1)
            messages += (1.0 - credit) * float(each.sum()) / picks
            messages += credit * float((1.0 - np.prod(1.0 - each, axis=1)).sum()) / picks
    value = 0.0 if same_gpu is None else float((same_gpu * on_gpu).sum())
    penalty = objective.node_penalty * load_norm(load.reshape(nodes, -1).sum(axis=1))
    return float(value - messages - penalty - objective.gpu_penalty * load_norm(load))
