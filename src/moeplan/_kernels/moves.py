"""What single changes of a placement's copies would save in messages, looked up as far as it is asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import NONE, Layer, cost

__all__ = ["Moves", "look_at", "look_from", "look_to"]

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


class Moves(NamedTuple):
    """What each single change would save, as far as it is looked up: messages [S, places] for moving a slot's copy,
    [S] for losing it, and [E, places] for a new one. A place is a node, or a GPU where messages are counted by GPU."""

    place: Int  # [P]
    move: Float
    lose: Float
    gain: Float


@compiled
def _moved(layer: Layer, moves: Moves, s: int, p: int, now: float) -> float:
    """What moving slot s's copy to place p saves; `now` is what its expert costs as it is."""
    own = layer.gpu[s]
    if moves.place[own] == p:
        return 0.0
    first = p * (layer.node.size // moves.move.shape[1])  # any GPU of the place: only where it is counts
    return float(now - cost(layer, layer.slots[s], own, first))


@compiled
def look_from(layer: Layer, moves: Moves, s: int) -> None:
    """Look up what a slot's copy would save at each place, and lost."""
    none, e = np.int64(NONE), layer.slots[s]
    now = cost(layer, e, none, none)
    for p in range(moves.move.shape[1]):
        moves.move[s, p] = _moved(layer, moves, s, np.int64(p), now)
    if layer.copies[e] > 1:
        moves.lose[s] = now - cost(layer, e, layer.gpu[s], none)


@compiled
def _look_new(layer: Layer, moves: Moves, e: int, p: int, now: float) -> None:
    """Look up what a new copy of an expert would save at a place."""
    step = layer.node.size // moves.move.shape[1]
    moves.gain[e, p] = now - cost(layer, e, np.int64(NONE), p * step)


@compiled
def look_to(layer: Layer, moves: Moves, p: int, spare: bool) -> None:
    """Look up what every slot's copy, and a new one of every expert, would save at a place."""
    none = np.int64(NONE)
    now = np.empty(layer.copies.size)
    for e in range(now.size):
        now[e] = cost(layer, np.int64(e), none, none)
        if spare:
            _look_new(layer, moves, np.int64(e), p, now[e])
    for s in range(layer.slots.size):
        moves.move[s, p] = _moved(layer, moves, s, p, now[layer.slots[s]])


@compiled
def look_at(layer: Layer, moves: Moves, e: int, spare: bool) -> None:
    """Look up all that one expert's copies would save."""
    none = np.int64(NONE)
    for s in range(layer.slots.size):
        if layer.slots[s] == e:
            look_from(layer, moves, np.int64(s))
    if spare:
        now = cost(layer, e, none, none)
        for p in range(moves.move.shape[1]):
            _look_new(layer, moves, e, np.int64(p), now)
