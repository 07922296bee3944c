"""Which slot holds which expert: fewer messages between nodes, at a price on uneven load, by swaps and replacements.

One search for every dispatch mode. What a copy of expert e costs is what the requests at home h, none of whose GPUs
holds e, must send for it: one message a pick (`pick`), or one only where no other pick of the token goes to the same
node or GPU anyway (`node`, `gpu`), which the token rows tell.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["BY_GPU", "BY_NODE", "BY_PICK", "improve", "messages", "value_reference"]

WORKERS = 2
#: No copy, slot or expert; written np.int64(NONE), or the compiler makes a copy of each function for the literal.
NONE = -1
#: A move must gain this share of a layer's picks.
LEAST = 1e-6
#: What a message is counted by.
BY_PICK, BY_NODE, BY_GPU = 0, 1, 2

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


class _Layer(NamedTuple):
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
    shared: Float  # [E, N, U], of `away`, messages that other picks of the same tokens send to a unit anyway


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _power(ratio: float) -> float:
    square = ratio * ratio
    fourth = square * square
    eighth = fourth * fourth
    return eighth * eighth


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _slope(load: Float, price: float, out: Float) -> float:
    """What one more pick on each unit costs, at the tangent, is put into `out`.

    The price is on unevenness: the 16-norm of load / mean, 1 where even and near the largest where one stands out. It
    is convex: the true cost is no less than the tangent's. Returns the sum of the powers; it is their mean's root.
    """
    mean = load.sum() / load.size
    total = 0.0
    for i in range(load.size):
        total += _power(load[i] / mean)
    scale = price / ((total / load.size) ** 0.9375 * load.size * mean)
    for i in range(load.size):
        ratio = load[i] / mean
        cube = ratio * ratio * ratio
        out[i] = scale * cube * cube * cube * cube * cube
    return total


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _cost(layer: _Layer, e: int, leaves: int, enters: int) -> float:
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
                free += layer.shared[e, n, layer.unit[gpu]]
        total += (layer.away[n, e] * far - free) / count
    return total


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _trace(
    layer: _Layer, row: npt.NDArray[np.unsignedinteger], home: int, seen: Int, units: Int, zero: Int, rest: Float,
    share: Float,
) -> int:  # fmt: skip
    """Units that a token reaches, each with the chance that each pick goes there.

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


class _Scratch(NamedTuple):
    """What `_trace` writes."""

    seen: Int
    units: Int
    zero: Int
    rest: Float
    share: Float


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _rows_of(layer: _Layer, rows: Rows, s: _Scratch, a: int, b: int, weight: float) -> float:
    """Messages of the rows that hold expert a or b (-1: of all rows).

    With a weight other than 0, what picks share is also added to `layer.shared` that many times.
    """
    total = 0.0
    for part in range(2):
        e, other = (a, -1) if part == 0 else (b, a)
        first, last = (0, rows.home.size) if a < 0 else (rows.starts[e], rows.starts[e + 1])
        for i in range(first, last):
            r = i if a < 0 else rows.holding[i]
            row = rows.experts[r]
            if other >= 0:
                twice = False
                for j in range(row.size):
                    twice = twice or row[j] == other
                if twice:
                    continue
            home = rows.home[r]
            found = _trace(layer, row, home, s.seen, s.units, s.zero, s.rest, s.share)
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
        if a < 0 or b < 0:
            break
    return total


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _put(layer: _Layer, e: int, leaves: int, enters: int) -> None:
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


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _fill(layer: _Layer) -> None:
    """Copies, as the slots have them."""
    none = np.int64(NONE)
    for x in range(layer.slots.size):
        _put(layer, layer.slots[x], none, layer.gpu[x])


class _Moves(NamedTuple):
    """What each single change would save: messages [S, places] for moving a slot's copy, [S] for losing it, and
    [E, places] for a new one. A place is a node, or a GPU where messages are counted by GPU."""

    place: Int  # [P]
    move: Float
    lose: Float
    gain: Float


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _look(layer: _Layer, moves: _Moves, only: int, spare: bool) -> None:
    """Fill `moves`, for one expert or (-1) for all."""
    none = np.int64(NONE)
    gpus, places = layer.node.size, moves.move.shape[1]
    step = gpus // places
    for s in range(layer.slots.size):
        e = layer.slots[s]
        if only >= 0 and e != only:
            continue
        now = _cost(layer, e, none, none)
        own = layer.gpu[s]
        for p in range(places):
            first = p * step  # any GPU of the place, and not its own: only where it is counts
            inside = moves.place[own] == p
            moves.move[s, p] = 0.0 if inside else now - _cost(layer, e, own, first)
        if layer.copies[e] > 1:
            moves.lose[s] = now - _cost(layer, e, own, none)
    if spare:
        for e in range(layer.copies.size):
            if only < 0 or e == only:
                now = _cost(layer, e, none, none)
                for p in range(places):
                    moves.gain[e, p] = now - _cost(layer, e, none, p * step)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _dear(
    own: float, slopes: float, rest: float, count: int, change: int, use_out: float, slope_out: float, use_in: float,
    slope_in: float,
) -> float:  # fmt: skip
    """What a change of an expert's copies does to the price of load, at its tangent.

    Numbers alone, for the compiler to put it where it is called.

    Args:
        own, slopes, rest: over the copies, sum of slope x the own node's picks, and of slopes; picks that all share.
        count, change: copies, and how many more.
        use_out, slope_out, use_in, slope_in: of the node that a copy leaves and of the one that it enters (0: none).
    """
    before = own + slopes * rest / count
    own += slope_in * use_in - slope_out * use_out
    slopes += slope_in - slope_out
    rest += use_out - use_in
    return float(own + slopes * rest / (count + change) - before)


class _Weights(NamedTuple):
    """Loads of the state as it is, and their price."""

    price: Float  # [2], of uneven nodes and uneven GPUs
    power: Float  # [3], sums of the powers of loads over their mean, and what is paid for them
    node: Float  # [N], loads
    gpu: Float  # [P]
    slope: Float  # [P], what one more pick on a GPU, and so on its node, costs at the tangent
    tally: Float  # [3, E], see `_dear`
    trial: Float  # [P], loads as a move would make them; else as `gpu`
    touched: Int  # [..], GPUs that it would change
    by_node: Float  # [N], and by how much nodes; else 0


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _weigh(layer: _Layer, w: _Weights) -> None:
    """Fill the weights for the state as it is."""
    w.gpu[:] = 0.0
    w.node[:] = 0.0
    for e in range(layer.copies.size):
        rest = 0.0
        for n in range(w.node.size):
            if not layer.nearest or layer.at[n, e] == 0:
                rest += layer.use[n, e]
        w.tally[2, e] = rest
        for i in range(layer.copies[e]):
            gpu = layer.where[e, i]
            w.gpu[gpu] += rest / layer.copies[e]
            if layer.nearest:
                w.gpu[gpu] += layer.use[layer.node[gpu], e]
    for g in range(w.gpu.size):
        w.node[layer.node[g]] += w.gpu[g]
        w.trial[g] = w.gpu[g]
    w.power[0] = _slope(w.node, w.price[0], w.by_node)
    w.power[1] = _slope(w.gpu, w.price[1], w.slope)
    for g in range(w.gpu.size):
        w.slope[g] += w.by_node[layer.node[g]]
    w.by_node[:] = 0.0
    for e in range(layer.copies.size):
        own, slopes = 0.0, 0.0
        for i in range(layer.copies[e]):
            gpu = layer.where[e, i]
            slopes += w.slope[gpu]
            if layer.nearest:
                own += w.slope[gpu] * layer.use[layer.node[gpu], e]
        w.tally[0, e] = own
        w.tally[1, e] = slopes
    w.power[2] = _paid(w, 0.0, 0.0)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _paid(w: _Weights, node: float, gpu: float) -> float:
    """The price of load, `node` and `gpu` being added to the sums of powers."""
    uneven_node = ((w.power[0] + node) / w.node.size) ** 0.0625
    uneven_gpu = ((w.power[1] + gpu) / w.gpu.size) ** 0.0625
    return float(w.price[0] * uneven_node + w.price[1] * uneven_gpu)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _shift(layer: _Layer, w: _Weights, e: int, leaves: int, enters: int, found: int) -> int:
    """Put the loads that a change of expert e's copies makes into `trial`, and their GPUs into `touched`."""
    rest, count = w.tally[2, e], layer.copies[e]
    before = rest / count
    if leaves >= 0:
        count -= 1
        if layer.nearest:
            rest += layer.use[layer.node[leaves], e]
    if enters >= 0:
        count += 1
        if layer.nearest:
            rest -= layer.use[layer.node[enters], e]
    after = rest / count
    for i in range(layer.copies[e]):
        gpu = layer.where[e, i]
        w.touched[found] = gpu
        found += 1
        if gpu != leaves:
            w.trial[gpu] += after - before
        else:
            w.trial[gpu] -= before + (layer.use[layer.node[gpu], e] if layer.nearest else 0.0)
    if enters >= 0:
        w.touched[found] = enters
        found += 1
        w.trial[enters] += after + (layer.use[layer.node[enters], e] if layer.nearest else 0.0)
    return found


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _dearer(layer: _Layer, w: _Weights, a: int, b: int, here: int, there: int) -> float:
    """What the price of load rises by when a copy of expert a goes from GPU `here` to `there`, and one of b back (-1:
    a is dropped, b is new). Only the GPUs that serve the two are looked at: the mean stays what it is."""
    found = _shift(layer, w, b, there, here, _shift(layer, w, a, here, there, np.int64(0)))
    mean_node = w.node.sum() / w.node.size
    mean_gpu = mean_node * w.node.size / w.gpu.size
    node, gpu = 0.0, 0.0
    for i in range(found):
        g = w.touched[i]
        if w.trial[g] != w.gpu[g]:
            w.by_node[layer.node[g]] += w.trial[g] - w.gpu[g]
            gpu += _power(w.trial[g] / mean_gpu) - _power(w.gpu[g] / mean_gpu)
            w.trial[g] = w.gpu[g]
    for i in range(found):
        n = layer.node[w.touched[i]]
        if w.by_node[n] != 0.0:
            node += _power((w.node[n] + w.by_node[n]) / mean_node) - _power(w.node[n] / mean_node)
            w.by_node[n] = 0.0
    return float(_paid(w, node, gpu) - w.power[2])


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _dear_move(layer: _Layer, w: _Weights, e: int, leaves: int, enters: int) -> float:
    """The same of a copy of expert e that leaves a GPU, enters another, or both (-1: none)."""
    tally, use_out, use_in, slope_out, slope_in = w.tally, 0.0, 0.0, 0.0, 0.0
    if leaves >= 0:
        slope_out = w.slope[leaves]
        use_out = layer.use[layer.node[leaves], e] if layer.nearest else 0.0
    if enters >= 0:
        slope_in = w.slope[enters]
        use_in = layer.use[layer.node[enters], e] if layer.nearest else 0.0
    change = (enters >= 0) - (leaves >= 0)
    count = layer.copies[e]
    return float(_dear(tally[0, e], tally[1, e], tally[2, e], count, change, use_out, slope_out, use_in, slope_in))


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _leave(layer: _Layer, moves: _Moves, w: _Weights, scale: float, x: int, out: Float) -> float:
    """Gain, at the tangent, of moving slot x's copy to each GPU (`out` [P]); returns that of losing it."""
    none = np.int64(NONE)
    a, here, node, use, slope, near = layer.slots[x], layer.gpu[x], layer.node, layer.use, w.slope, layer.near
    own, slopes, rest, count = w.tally[0, a], w.tally[1, a], w.tally[2, a], layer.copies[a]
    local, zero = 1.0 if layer.nearest else 0.0, np.int64(0)
    use_out, slope_out, move, place = local * use[node[here], a], slope[here], moves.move, moves.place
    for g in range(out.size):
        dear = _dear(own, slopes, rest, count, zero, use_out, slope_out, local * use[node[g], a], slope[g])
        out[g] = scale * move[x, place[g]] - dear
        if near.size:
            out[g] += near[g, a] - near[here, a]
    if count == 1:
        return 0.0
    return float(scale * moves.lose[x] - _dear_move(layer, w, a, here, none) - (near[here, a] if near.size else 0.0))


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _enter(layer: _Layer, moves: _Moves, w: _Weights, scale: float, here: int, spare: bool, others: Float) -> None:
    """Gain, at the tangent, of each slot's copy coming to GPU `here`, and of a new copy of each expert: [S + E]."""
    use, node, slope, tally, copies, near = layer.use, layer.node, w.slope, w.tally, layer.copies, layer.near
    slots, gpu, move, place, home = layer.slots, layer.gpu, moves.move, moves.place[here], layer.node[here]
    local, slope_in, zero, one = 1.0 if layer.nearest else 0.0, w.slope[here], np.int64(0), np.int64(1)
    for y in range(slots.size):
        b, there = slots[y], gpu[y]
        others[y] = scale * move[y, place] - _dear(
            tally[0, b], tally[1, b], tally[2, b], copies[b], zero, local * use[node[there], b], slope[there],
            local * use[home, b], slope_in,
        )  # fmt: skip
        if near.size:
            others[y] += near[here, b] - near[there, b]
    if spare:
        gain = moves.gain
        for b in range(copies.size):
            others[slots.size + b] = scale * gain[b, place] - _dear(
                tally[0, b], tally[1, b], tally[2, b], copies[b], one, 0.0, 0.0, local * use[home, b], slope_in
            )
            if near.size:
                others[slots.size + b] += near[here, b]


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _allowed(layer: _Layer, a: int, b: int, here: int, there: int) -> bool:
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


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _exactly(
    layer: _Layer, rows: Rows, s: _Scratch, moves: _Moves, w: _Weights, scale: float, x: int, y: int, b: int,
    gain: float, best: float,
) -> float:  # fmt: skip
    """The gain itself: load instead of its tangent, and, if that is still the best, tokens that hold both experts."""
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    gain += _dear_move(layer, w, a, here, there) + _dear_move(layer, w, b, there, here)
    gain -= _dearer(layer, w, a, b, here, there)
    if gain <= best or layer.shared.size == 0 or (y >= 0 and moves.place[here] == moves.place[there]):
        return gain
    if y >= 0:
        guess = moves.move[x, moves.place[there]] + moves.move[y, moves.place[here]]
    else:
        guess = moves.lose[x] + moves.gain[b, moves.place[here]]
    truth = _rows_of(layer, rows, s, a, b, 0.0)
    _put(layer, a, here, there)
    _put(layer, b, there, here)
    truth -= _rows_of(layer, rows, s, a, b, 0.0)
    _put(layer, b, here, there)
    _put(layer, a, there, here)
    return float(gain + scale * (truth - guess))


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _apply(layer: _Layer, rows: Rows, s: _Scratch, moves: _Moves, w: _Weights, x: int, y: int, b: int) -> None:
    """Slots x and y change places; without a y, slot x's copy gives way to one of expert b."""
    none = np.int64(NONE)
    a, here = layer.slots[x], layer.gpu[x]
    there = layer.gpu[y] if y >= 0 else np.int64(NONE)
    by_rows, spare = layer.shared.size > 0, layer.slots.size > layer.copies.size
    if by_rows:
        _rows_of(layer, rows, s, a, b, -1.0)
    _put(layer, a, here, there)
    _put(layer, b, there, here)
    layer.slots[x] = b
    if y >= 0:
        layer.slots[y] = a
    if by_rows:
        _rows_of(layer, rows, s, a, b, 1.0)
        _look(layer, moves, none, spare)
    else:
        _look(layer, moves, a, spare)
        _look(layer, moves, b, spare)
    _weigh(layer, w)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _search(
    layer: _Layer, rows: Rows, s: _Scratch, moves: _Moves, w: _Weights, scale: float, sweeps: int, budget: int
) -> float:
    none = np.int64(NONE)
    slots, gpu = layer.slots, layer.gpu
    experts, spare = layer.copies.size, slots.size > layer.copies.size
    out, others = np.empty(layer.node.size), np.empty(slots.size + experts)
    old = layer.on.copy() if budget >= 0 else layer.on
    moved = 0
    if layer.shared.size:
        _rows_of(layer, rows, s, none, none, 1.0)
    _look(layer, moves, none, spare)
    _weigh(layer, w)
    for _ in range(sweeps):
        improved = False
        best, slot, partner, entering, spent = LEAST, none, none, none, np.int64(0)
        ready = -1  # the GPU that `others` holds for
        for x in range(slots.size):
            a, here = slots[x], gpu[x]
            if budget < 0:
                best = LEAST
                slot = none
            if ready != here:
                _enter(layer, moves, w, scale, here, spare, others)
                ready = here
            leave = _leave(layer, moves, w, scale, x, out)
            for y in range(slots.size):
                gain = others[y] + out[gpu[y]]
                if gain > best and gpu[y] != here and _allowed(layer, a, slots[y], here, gpu[y]):
                    b, there, cost = slots[y], gpu[y], 0
                    if budget >= 0:
                        cost = old[here, a] - old[here, b] + (old[there, b] - old[there, a])
                    if moved + cost <= budget or budget < 0:
                        gain = _exactly(layer, rows, s, moves, w, scale, x, y, b, gain, best) / max(cost, 1)
                        if gain > best:
                            best, slot, partner, entering, spent = gain, np.int64(x), np.int64(y), b, np.int64(cost)
            for b in range(experts if layer.copies[a] > 1 else 0):
                gain = others[slots.size + b] + leave
                if gain > best and _allowed(layer, a, b, here, none):
                    cost = old[here, a] - old[here, b] if budget >= 0 else 0
                    if moved + cost <= budget or budget < 0:
                        gain = _exactly(layer, rows, s, moves, w, scale, x, none, b, gain, best) / max(cost, 1)
                        if gain > best:
                            best, slot, partner, entering, spent = gain, x, -1, b, cost
            if slot >= 0 and (budget < 0 or x == slots.size - 1):
                _apply(layer, rows, s, moves, w, slot, partner, entering)
                ready = -1
                moved += spent
                improved = True
        if not improved:
            break
    return float(_worth(layer, rows, s, scale) - w.power[2])


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _worth(layer: _Layer, rows: Rows, s: _Scratch, scale: float) -> float:
    """Value of the layer but for its load."""
    none = np.int64(NONE)
    worth, sent = 0.0, 0.0
    if layer.near.size:
        for x in range(layer.slots.size):
            worth += layer.near[layer.gpu[x], layer.slots[x]]
    if layer.shared.size:
        sent = _rows_of(layer, rows, s, none, none, 0.0)
    else:
        for e in range(layer.copies.size):
            sent += _cost(layer, e, none, none)
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
        budget: most copies of a layer that may be elsewhere than they were (-1: any number), the best moves first.

    Returns:
        float64 [L], the value of each layer.
    """
    with ThreadPoolExecutor(WORKERS) as pool:  # layers know nothing of each other
        values = pool.map(
                lambda i: _improve_layer(
                    use[i], slots[i], gpus_per_node, price_node, price_gpu, sweeps, nearest,
                    None if near is None else near[i], None if rows is None else rows[i], by, budget,
                ),
                range(len(use)),
            )  # fmt: skip
        return np.array(list(values))


def _improve_layer(
    use: Float, slots: Int, per_node: int, price_node: float, price_gpu: float, sweeps: int, nearest: bool,
    near: Float | None, tokens: tuple[npt.NDArray[np.unsignedinteger], Int] | None, by: int, budget: int,
) -> float:  # fmt: skip
    if use.sum() <= 0.0:
        return 0.0
    layer, rows, scratch = _state(use, slots, per_node, nearest, near, tokens, by)
    place = np.arange(layer.node.size) if by == BY_GPU else layer.node
    places = int(place[-1]) + 1
    gpus, nodes = layer.node.size, len(use)
    weights = _Weights(
        np.array([price_node, price_gpu]), np.zeros(3), np.zeros(nodes), np.zeros(gpus), np.zeros(gpus),
        np.zeros((3, use.shape[1])), np.zeros(gpus), np.zeros(2 * gpus + 2, np.int64), np.zeros(nodes),
    )  # fmt: skip
    moves = _Moves(
        place, np.zeros((slots.size, places)), np.zeros(slots.size), np.zeros((use.shape[1], places))
    )  # fmt: skip
    return float(_search(layer, rows, scratch, moves, weights, 1.0 / float(layer.away.sum()), sweeps, budget))


def _state(
    use: Float, slots: Int, per_node: int, nearest: bool, near: Float | None,
    tokens: tuple[npt.NDArray[np.unsignedinteger], Int] | None, by: int,
) -> tuple[_Layer, Rows, _Scratch]:  # fmt: skip
    nodes, experts = use.shape
    gpus = nodes * per_node
    node = np.arange(gpus) // per_node
    away, picked, home = use, np.zeros((0, 1), np.uint16), np.zeros(0, np.int64)
    if by != BY_PICK and tokens is not None:
        picked, home = tokens[0].astype(np.uint16), tokens[1].astype(np.int64)
        away = np.zeros(use.shape)
        np.add.at(away, (np.repeat(home, picked.shape[1]), picked.ravel()), 1.0)
    units = (0, nodes, gpus)[by]
    layer = _Layer(
        use, away, np.zeros((0, 0)) if near is None else near, slots,
        np.arange(slots.size) // (slots.size // gpus), node,
        (np.zeros(gpus, np.int64), node, np.arange(gpus))[by], nearest,
        np.zeros(experts, np.int64), np.full((experts, gpus), -1), np.zeros((gpus, experts), np.bool_),
        np.zeros((nodes, experts), np.int64), np.zeros((experts, nodes, units) if units else (0, 0, 0)),
    )  # fmt: skip
    _fill(layer)
    units = max(units, 1)
    none = np.zeros(units, np.int64)
    scratch = _Scratch(none - 1, none.copy(), none, np.zeros(units), np.zeros((picked.shape[1], units)))
    return layer, Rows(picked, home, *_index(picked, experts)), scratch


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
        layer, tokens, scratch = _state(none, slots[i], gpus_per_node, nearest, None, (rows[i], home), by)
        out = np.zeros((requests, nodes))
        _sent(layer, tokens, scratch, request, out)
        return out

    with ThreadPoolExecutor(WORKERS) as pool:
        return np.asarray(sum(pool.map(work, range(len(slots)))))


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _sent(layer: _Layer, rows: Rows, s: _Scratch, request: Int, out: Float) -> None:
    for r in range(rows.home.size):
        for home in range(layer.at.shape[0]):
            found = _trace(layer, rows.experts[r], home, s.seen, s.units, s.zero, s.rest, s.share)
            for u in range(found):
                out[request[r], home] += 1.0 if s.zero[u] else 1.0 - s.rest[u]


def _index(picked: npt.NDArray[np.unsignedinteger], experts: int) -> tuple[Int, Int]:
    """Rows by the experts that they hold."""
    k = max(picked.shape[1], 1)
    order = np.argsort(picked.ravel(), kind="stable") // k
    return np.searchsorted(np.sort(picked.ravel()), np.arange(experts + 1)), order


def value_reference(
    use: Float, slots: Int, gpus_per_node: int, price_node: float, price_gpu: float, *, nearest: bool = True,
    near: Float | None = None, rows: tuple[npt.NDArray[np.unsignedinteger], Int] | None = None, by: int = BY_PICK,
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
            messages += float((1.0 - np.prod(1.0 - each, axis=1)).sum()) / rows[0].size

    def uneven(of: Float) -> float:
        return float(((of / of.mean()) ** 16).mean() ** 0.0625)

    worth = 0.0 if near is None else float((near * on).sum())
    by_node = load.reshape(nodes, -1).sum(axis=1)
    return float(worth - messages - price_node * uneven(by_node) - price_gpu * uneven(load))
