"""Which slot holds which expert: fewer messages between nodes, at a price on uneven load, by swaps and replacements.

One search for every dispatch mode. What a copy of expert e costs is what the requests at home h, none of whose GPUs
holds e, must send for it: one message a pick (`pick`), or one only where no other pick of the token goes to the same
node or GPU anyway (`node`, `gpu`), which the token rows tell.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import (
    BY_GPU,
    BY_NODE,
    BY_PICK,
    NONE,
    Layer,
    Rows,
    Scratch,
    cost,
    mark,
    put,
    rows_of,
    rows_of_both,
    sent_by_home,
    state_of,
)
from moeplan._kernels.loads import Weights, dear_move, dearer, load_penalty, weigh
from moeplan._kernels.moves import Moves, look_at, look_from, look_to

__all__ = ["BY_GPU", "BY_NODE", "BY_PICK", "improve", "messages", "value_reference"]

WORKERS = 2
#: A move must gain this share of a layer's picks.
LEAST = 1e-6

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


@compiled
def leave(layer: Layer, moves: Moves, w: Weights, scale: float, x: int, out: Float) -> float:
    """Gain, at the tangent, of moving slot x's copy to each GPU (`out` [P]); returns that of losing it."""
    none = np.int64(NONE)
    a, here, node, use, slope, near = layer.slots[x], layer.gpu[x], layer.node, layer.use, w.slope, layer.near
    own, slopes, rest, count = w.tally[0, a], w.tally[1, a], w.tally[2, a], layer.copies[a]
    local, zero = 1.0 if layer.nearest else 0.0, np.int64(0)
    use_out, slope_out, move, place = local * use[node[here], a], slope[here], moves.move, moves.place
    for g in range(out.size):
        use_in = local * use[node[g], a]
        out[g] = scale * move[x, place[g]] - load_penalty(
            own, slopes, rest, count, zero, use_out, slope_out, use_in, slope[g]
        )
        if near.size:
            out[g] += near[g, a] - near[here, a]
    if count == 1:
        return 0.0
    return float(scale * moves.lose[x] - dear_move(layer, w, a, here, none) - (near[here, a] if near.size else 0.0))


@compiled
def enter(layer: Layer, moves: Moves, w: Weights, scale: float, here: int, spare: bool, others: Float) -> None:
    """Gain, at the tangent, of each slot's copy coming to GPU `here`, and of a new copy of each expert: [S + E]."""
    use, node, slope, tally, copies, near = layer.use, layer.node, w.slope, w.tally, layer.copies, layer.near
    slots, gpu, move, place, home = layer.slots, layer.gpu, moves.move, moves.place[here], layer.node[here]
    local, slope_in, zero, one = 1.0 if layer.nearest else 0.0, w.slope[here], np.int64(0), np.int64(1)
    for y in range(slots.size):
        b, there = slots[y], gpu[y]
        others[y] = scale * move[y, place] - load_penalty(
            tally[0, b], tally[1, b], tally[2, b], copies[b], zero, local * use[node[there], b], slope[there],
            local * use[home, b], slope_in,
        )  # fmt: skip
        if near.size:
            others[y] += near[here, b] - near[there, b]
    if spare:
        gain = moves.gain
        for b in range(copies.size):
            others[slots.size + b] = scale * gain[b, place] - load_penalty(
                tally[0, b], tally[1, b], tally[2, b], copies[b], one, 0.0, 0.0, local * use[home, b], slope_in
            )
            if near.size:
                others[slots.size + b] += near[here, b]


@compiled
def _allowed(layer: Layer, a: int, b: int, here: int, there: int) -> bool:
    """Whether a copy of a may go from GPU `here` to `there`, and one of b the other way (-1: dropped, new)."""
    if a == b or layer.on[here, b]:
        return False
    home = layer.node[here]
    if there < 0:
        return not (layer.nearest and layer.at[home, b])
    if layer.on[there, a]:
        return False
    away = layer.node[there]
    return not (layer.nearest and home != away and (layer.at[away, a] or layer.at[home, b]))


@compiled
def _exactly(
    layer: Layer, rows: Rows | None, s: Scratch | None, moves: Moves, w: Weights, scale: float, x: int, y: int, b: int,
    gain: float, best: float,
) -> float:  # fmt: skip
    """The gain itself: load instead of its tangent, and, if that is still the best, tokens that hold both experts."""
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    gain += dear_move(layer, w, a, here, there) + dear_move(layer, w, b, there, here)
    gain -= dearer(layer, w, a, b, here, there)
    if rows is None:
        return gain
    if gain <= best or (y >= 0 and moves.place[here] == moves.place[there]):
        return gain
    # Each change by itself was looked up exactly; together they differ where a token holds both experts.
    mark(layer, s, a, b, here, there)
    more = -rows_of_both(layer, rows, s, a, b)
    put(layer, a, here, there)
    more += rows_of_both(layer, rows, s, a, b)
    put(layer, b, there, here)
    more -= rows_of_both(layer, rows, s, a, b)
    put(layer, a, there, here)
    more += rows_of_both(layer, rows, s, a, b)
    put(layer, b, here, there)
    return float(gain + scale * layer.credit * more)


@compiled
def _apply(
    layer: Layer, rows: Rows | None, s: Scratch | None, moves: Moves, w: Weights, x: int, y: int, b: int
) -> None:
    """Slots x and y change places; without a y, slot x's copy gives way to one of expert b."""
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    spare = layer.slots.size > layer.copies.size
    if rows is not None:
        mark(layer, s, a, b, here, there)
        rows_of(layer, rows, s, a, b, -1.0)
    put(layer, a, here, there)
    put(layer, b, there, here)
    layer.slots[x] = b
    if y >= 0:
        layer.slots[y] = a
    if rows is not None:
        rows_of(layer, rows, s, a, b, 1.0)
    else:
        look_at(layer, moves, a, spare)
        look_at(layer, moves, b, spare)
    weigh(layer, w)


@compiled
def _search(
    layer: Layer,
    rows: Rows | None,
    s: Scratch | None,
    moves: Moves,
    w: Weights,
    scale: float,
    sweeps: int,
    budget: int,
) -> float:
    none = np.int64(NONE)
    slots, gpu = layer.slots, layer.gpu
    experts, spare = layer.copies.size, slots.size > layer.copies.size
    out, others = np.empty(layer.node.size), np.empty(slots.size + experts)
    old = layer.on.copy() if budget >= 0 else layer.on
    moved = 0
    # With rows, any change may change what any copy would save, so that is looked up where it is asked for.
    known = np.zeros(moves.move.shape[1], np.bool_)
    if rows is not None:
        mark(layer, s, none, none, none, none)
        rows_of(layer, rows, s, none, none, 1.0)
    else:
        for e in range(experts):
            look_at(layer, moves, np.int64(e), spare)
        known[:] = True
    weigh(layer, w)
    for _ in range(sweeps):
        improved = False
        best, slot, partner, entering, spent = LEAST, none, none, none, np.int64(0)
        ready = -1  # the GPU that `others` holds for
        for x in range(slots.size):
            a, here = slots[x], gpu[x]
            if budget < 0:
                best = LEAST
                slot = none
            if not known[moves.place[here]]:
                look_to(layer, moves, moves.place[here], spare)
                known[moves.place[here]] = True
            if rows is not None:
                look_from(layer, moves, np.int64(x))
            if ready != here:
                enter(layer, moves, w, scale, here, spare, others)
                ready = here
            lost = leave(layer, moves, w, scale, x, out)
            for y in range(slots.size + (experts if layer.copies[a] > 1 else 0)):
                swap = y < slots.size  # else slot x's copy gives way to a new one
                gain = others[y] + (out[gpu[y]] if swap else lost)
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
                gain = _exactly(layer, rows, s, moves, w, scale, x, other, b, gain, best) / max(spend, 1)
                if gain > best:
                    best, slot, partner, entering, spent = gain, np.int64(x), other, b, np.int64(spend)
            if slot >= 0 and (budget < 0 or x == slots.size - 1):
                _apply(layer, rows, s, moves, w, slot, partner, entering)
                ready = -1
                known[:] = rows is None
                moved += int(spent)
                improved = True
        if not improved:
            break
    return float(_worth(layer, rows, s, scale) - w.power[2])


@compiled
def _worth(layer: Layer, rows: Rows | None, s: Scratch | None, scale: float) -> float:
    """Value of the layer but for its load."""
    none = np.int64(NONE)
    worth, sent = 0.0, 0.0
    if layer.near.size:
        for x in range(layer.slots.size):
            worth += layer.near[layer.gpu[x], layer.slots[x]]
    rest = 1.0
    if rows is not None:
        mark(layer, s, none, none, none, none)
        sent = layer.credit * rows_of(layer, rows, s, none, none, 0.0)
        rest -= layer.credit
        layer.shared[:] = 0.0  # the rest as if nothing were shared
    if rest > 0.0:
        for e in range(layer.copies.size):
            sent += rest * cost(layer, e, none, none)
    return float(worth - scale * sent)


def improve(
    use: Float,
    slots: npt.NDArray[np.int64],
    gpus_per_node: int,
    price_node: float,
    price_gpu: float,
    sweeps: int,
    *,
    nearest: bool = True,
    near: Float | None = None,
    rows: list[tuple[npt.NDArray[np.unsignedinteger], Int]] | None = None,
    by: int = BY_PICK,
    credit: float = 1.0,
    budget: int = -1,
) -> Float:
    """Swap copies between GPUs, and replace spare ones, while the value of the placement rises.

    The value of a layer is minus the messages between nodes, in shares of its picks, less `price_node` x the unevenness
    of nodes and `price_gpu` x that of GPUs, where unevenness is the 16-norm of the loads over their mean. The best move
    of each slot is taken at once. No GPU gets two copies of an expert, and with `nearest` no node does; every expert
    keeps at least one.

    Args:
        use: float64 [L, N, E], picks of each expert by the requests at each node.
        slots: int64 [L, S], the expert of each slot, S / (N x G) to a GPU; changed in place.
        gpus_per_node: G.
        price_node, price_gpu: of unevenness, in shares of all picks.
        sweeps: most sweeps over all slots of a layer.
        nearest: a copy on its node serves a pick; else all copies share all picks (`hash`).
        near: float64 [L, P, E], what a copy on this very GPU is worth besides, in shares of all picks.
        rows: for each layer, sampled tokens' experts [T, k] and home nodes [T], for `by` nodes or GPUs.
        by: what a message is counted by.
        credit: for messages that picks of a token share: 1 counts them as they are, 0 as if each pick sent its own.
        budget: most copies of a layer that may be elsewhere than they were (-1: any number), the best moves first.

    Returns:
        float64 [L], the value of each layer.
    """
    with ThreadPoolExecutor(WORKERS) as pool:  # layers know nothing of each other
        values = pool.map(
                lambda i: _improve_layer(
                    use[i], slots[i], gpus_per_node, price_node, price_gpu, sweeps, nearest,
                    None if near is None else near[i], None if rows is None else rows[i], by, credit, budget,
                ),
                range(len(use)),
            )  # fmt: skip
        return np.array(list(values))


def _improve_layer(
    use: Float, slots: Int, per_node: int, price_node: float, price_gpu: float, sweeps: int, nearest: bool,
    near: Float | None, tokens: tuple[npt.NDArray[np.unsignedinteger], Int] | None, by: int, credit: float, budget: int,
) -> float:  # fmt: skip
    if use.sum() <= 0.0:
        return 0.0
    layer, rows, scratch = state_of(use, slots, per_node, nearest, near, tokens, by, credit)
    place = np.arange(layer.node.size) if by == BY_GPU else layer.node
    places = int(place[-1]) + 1
    gpus, nodes = layer.node.size, len(use)
    weights = Weights(
        np.array([price_node, price_gpu]), np.zeros(3), np.zeros(nodes), np.zeros(gpus), np.zeros(gpus),
        np.zeros((3, use.shape[1])), np.zeros(gpus), np.zeros(2 * gpus + 2, np.int64), np.zeros(nodes),
    )  # fmt: skip
    moves = Moves(
        place, np.zeros((slots.size, places)), np.zeros(slots.size), np.zeros((use.shape[1], places))
    )  # fmt: skip
    return float(_search(layer, rows, scratch, moves, weights, 1.0 / float(layer.away.sum()), sweeps, budget))


def messages(
    slots: npt.NDArray[np.int64], nodes: int, gpus_per_node: int, experts: int, *, nearest: bool,
    rows: list[npt.NDArray[np.unsignedinteger]], request: Int, requests: int, by: int,
) -> Float:  # fmt: skip
    """Messages between nodes that each request's sampled rows would send from each home: float64 [n, N].

    Args:
        slots: int64 [L, S]; rows: for each layer, unsigned [T, k]; request: int64 [T], whose row it is; requests: n.
    """
    none = np.zeros((nodes, experts))
    home = np.zeros(len(request), np.int64)

    def work(i: int) -> Float:
        layer, tokens, scratch = state_of(none, slots[i], gpus_per_node, nearest, None, (rows[i], home), by, 1.0)
        out = np.zeros((requests, nodes))
        sent_by_home(layer, tokens, scratch, request, out)
        return out

    with ThreadPoolExecutor(WORKERS) as pool:
        return np.asarray(sum(pool.map(work, range(len(slots)))))


def value_reference(
    use: Float, slots: Int, gpus_per_node: int, price_node: float, price_gpu: float, *, nearest: bool = True,
    near: Float | None = None, rows: tuple[npt.NDArray[np.unsignedinteger], Int] | None = None, by: int = BY_PICK,
    credit: float = 1.0,
) -> float:  # fmt: skip
    """What `improve` raises, of one layer, written plainly: token by token, unit by unit."""
    nodes, experts = use.shape
    gpus = nodes * gpus_per_node
    on = np.zeros((gpus, experts))
    on[np.repeat(np.arange(gpus), slots.size // gpus), slots] = 1.0
    at = on.reshape(nodes, gpus_per_node, experts).sum(axis=1)
    copies = on.sum(axis=0)
    #: chance[n, g, e]: a pick of e by a request at node n is served by GPU g.
    chance = np.repeat((on / copies)[None], nodes, axis=0)
    if nearest:
        for n in range(nodes):
            own = on.copy()
            own[np.arange(gpus) // gpus_per_node != n] = 0.0
            chance[n][:, at[n] > 0] = own[:, at[n] > 0]
    load = np.einsum("nge,ne->g", chance, use)
    far = np.repeat(np.arange(nodes), gpus_per_node)[None] != np.arange(nodes)[:, None]
    if by == BY_PICK or rows is None:
        messages = float(np.einsum("nge,ne,ng->", chance, use, far)) / use.sum()
    else:
        messages = 0.0
        for row, n in zip(*rows, strict=True):
            each = chance[n][:, row] * far[n][:, None]
            if by == BY_NODE:
                each = each.reshape(nodes, gpus_per_node, -1).sum(axis=1)
            messages += (1.0 - credit) * float(each.sum()) / rows[0].size
            messages += credit * float((1.0 - np.prod(1.0 - each, axis=1)).sum()) / rows[0].size

    def uneven(of: Float) -> float:
        return float(((of / of.mean()) ** 16).mean() ** 0.0625)

    worth = 0.0 if near is None else float((near * on).sum())
    by_node = load.reshape(nodes, -1).sum(axis=1)
    return float(worth - messages - price_node * uneven(by_node) - price_gpu * uneven(load))
