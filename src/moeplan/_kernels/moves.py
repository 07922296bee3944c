"""Messages that single changes of a placement's replicas would save, computed as far as they are asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan._kernels.layer_state import NONE, Layer, expert_messages
from moeplan.arrays import FloatArray, Int64Array


class Savings(NamedTuple):
    """Messages that each single change would save, as far as they are computed.

    A place is a node, or a GPU where messages are counted by GPU.
    """

    place: Int64Array  # [P], the place of each GPU
    move: FloatArray  # [S, places], for moving a slot's replica
    drop: FloatArray  # [S], for dropping it
    add: FloatArray  # [E, places], for a new replica


@compiled
def _moving(layer: Layer, savings: Savings, s: int, p: int, now: float) -> float:
    """What moving slot s's replica to place p saves; `now` is what its expert costs as it is."""
    own = layer.gpu[s]
    if savings.place[own] == p:
        return 0.0
    first = p * (layer.node.size // savings.move.shape[1])  # any GPU of the place
    return float(now - expert_messages(layer, layer.slots[s], own, first))


@compiled
def update_slot(layer: Layer, savings: Savings, s: int) -> None:
    """Compute what a slot's replica would save at each place, and dropped."""
    none, e = np.int64(NONE), layer.slots[s]
    now = expert_messages(layer, e, none, none)
    for p in range(savings.move.shape[1]):
        savings.move[s, p] = _moving(layer, savings, s, np.int64(p), now)
    if layer.replicas[e] > 1:
        savings.drop[s] = now - expert_messages(layer, e, layer.gpu[s], none)


@compiled
def _update_new(layer: Layer, savings: Savings, e: int, p: int, now: float) -> None:
    """Compute what a new replica of an expert would save at a place."""
    step = layer.node.size // savings.move.shape[1]
    savings.add[e, p] = now - expert_messages(layer, e, np.int64(NONE), p * step)


@compiled
def update_place(layer: Layer, savings: Savings, p: int) -> None:
    """Compute what every slot's replica, and a new one of every expert, would save at a place."""
    none = np.int64(NONE)
    now = np.empty(layer.replicas.size)
    for e in range(now.size):
        now[e] = expert_messages(layer, np.int64(e), none, none)
        if layer.slots.size > layer.replicas.size:
            _update_new(layer, savings, np.int64(e), p, now[e])
    for s in range(layer.slots.size):
        savings.move[s, p] = _moving(layer, savings, s, p, now[layer.slots[s]])


@compiled
def update_expert(layer: Layer, savings: Savings, e: int) -> None:
    """Compute all that one expert's replicas would save."""
    none = np.int64(NONE)
    for s in range(layer.slots.size):
        if layer.slots[s] == e:
            update_slot(layer, savings, np.int64(s))
    if layer.slots.size > layer.replicas.size:
        now = expert_messages(layer, e, none, none)
        for p in range(savings.move.shape[1]):
            _update_new(layer, savings, e, np.int64(p), now)
