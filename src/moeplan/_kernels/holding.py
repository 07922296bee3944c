"""Which node holds which expert: raise what requests find at home, against uneven load, by swapping and replacing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["improve"]

WORKERS = 2

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _unevenness(load: Float, mean: float) -> float:
    """The 8-norm of load / mean over the nodes: 1 where even, near the largest where one stands out."""
    total = 0.0
    for n in range(load.size):
        ratio = load[n] / mean
        square = ratio * ratio
        fourth = square * square
        total += fourth * fourth
    return float((total / load.size) ** 0.125)


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _account(use: Float, held: Bool, copies: Int, away: Float, load: Float) -> None:
    """Copies of each expert, picks of it that find none at home, and each node's load: own picks, and its share of
    those."""
    nodes, experts = use.shape
    for n in range(nodes):
        load[n] = 0.0
    for e in range(experts):
        copies[e] = 0
        away[e] = 0.0
        for n in range(nodes):
            if held[n, e]:
                copies[e] += 1
            else:
                away[e] += use[n, e]
        for n in range(nodes):
            if held[n, e]:
                load[n] += use[n, e] + away[e] / copies[e]


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _move(use: Float, held: Bool, copies: Int, away: Float, e: int, leaves: int, enters: int, load: Float) -> None:
    """Change `load` as if a copy of e left one node (-1: none) and entered another (-1: none)."""
    rest = away[e]
    count = copies[e]
    before = rest / count
    if leaves >= 0:
        rest += use[leaves, e]
        count -= 1
    if enters >= 0:
        rest -= use[enters, e]
        count += 1
    after = rest / count
    for n in range(load.size):
        if n == leaves:
            load[n] -= use[n, e] + before
        elif n == enters:
            load[n] += use[n, e] + after
        elif held[n, e]:
            load[n] += after - before


@nb.njit(cache=True, nogil=True, boundscheck=False)
def _layer(use: Float, held: Bool, weight: float, sweeps: int) -> None:
    nodes, experts = use.shape
    total = 0.0
    for n in range(nodes):
        for e in range(experts):
            total += use[n, e]
    if total <= 0.0:
        return
    mean = total / nodes
    price = weight * total
    copies = np.zeros(experts, np.int64)
    away = np.zeros(experts)
    load = np.zeros(nodes)
    trial = np.zeros(nodes)
    _account(use, held, copies, away, load)
    uneven = _unevenness(load, mean)
    for _ in range(sweeps):
        improved = False
        for here in range(nodes):
            for a in range(experts):
                if not held[here, a]:
                    continue
                best = 1e-7 * total
                other = partner = -1
                for b in range(experts):
                    if held[here, b]:
                        continue
                    # No move can win back more than all of today's unevenness.
                    hope = use[here, b] - use[here, a] + price * (uneven - 1.0)
                    for there in range(nodes):
                        gain = use[here, b] - use[here, a]
                        to = back = -1  # a's copy here makes room for one of b ..
                        if there == here:
                            if copies[a] == 1 or hope <= best:
                                continue
                        else:  # .. or a and b change places
                            if not held[there, b] or held[there, a] or hope + use[there, a] - use[there, b] <= best:
                                continue
                            to = back = there
                            gain += use[there, a] - use[there, b]
                        for n in range(nodes):
                            trial[n] = load[n]
                        _move(use, held, copies, away, a, here, to, trial)
                        _move(use, held, copies, away, b, back, here, trial)
                        gain += price * (uneven - _unevenness(trial, mean))
                        if gain > best:
                            best = gain
                            other = there
                            partner = b
                if partner >= 0:
                    held[here, a] = False
                    held[here, partner] = True
                    if other != here:
                        held[other, partner] = False
                        held[other, a] = True
                    _account(use, held, copies, away, load)
                    uneven = _unevenness(load, mean)
                    improved = True
        if not improved:
            break


def improve(use: Float, held: Bool, weight: float, sweeps: int) -> None:
    """Swap experts between nodes, and replace spare copies, while the value of the placement rises.

    The value of a layer is the picks that are served on the node they come from, less `weight` times all picks times
    (unevenness - 1), where unevenness is the 8-norm of the nodes' loads over their mean. A pick whose node holds no
    copy is shared evenly by all copies. The best move of each slot is taken at once. Every node keeps as many experts
    as it had, and every expert at least one copy and never two on a node.

    Args:
        use: float64 [L, N, E], picks of each expert by the requests at each node.
        held: bool [L, N, E], whether a node holds the expert; changed in place.
        weight: price of unevenness, in shares of all picks.
        sweeps: most sweeps over all slots of a layer.
    """
    with ThreadPoolExecutor(WORKERS) as pool:  # layers know nothing of each other
        list(pool.map(lambda layer: _layer(use[layer], held[layer], weight, sweeps), range(len(use))))
