"""A queue served first come first served with continuous batching: who decodes in each step, and at which token."""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Int64Array

__all__ = ["count_steps", "queue_reference", "queue_steps"]


@compiled
def count_steps(length: Int64Array, slots: int) -> int:
    """How many steps `queue_steps` takes."""
    left = np.zeros(slots, np.int64)
    place = 0
    steps = 0
    while True:
        live = False
        for slot in range(slots):
            if left[slot] == 0 and place < length.size:
                left[slot] = length[place]
                place += 1
            if left[slot] > 0:
                left[slot] -= 1
                live = True
        if not live:
            return steps
        steps += 1


@compiled
def queue_steps(length: Int64Array, slots: int, place: Int64Array, token: Int64Array) -> None:
    """Serve a queue; a slot that became free takes the next request before the next step.

    Args:
        length: int64 [n], tokens that each request of the queue decodes, at least 1.
        place, token: int64 [S, slots] with S from `count_steps`; are set to the place in the queue that each slot
            decodes in each step (-1: the slot is empty), and to the number of the token, from 0.
    """
    current = np.full(slots, -1, np.int64)
    done = np.zeros(slots, np.int64)
    following = 0
    for step in range(place.shape[0]):
        for slot in range(slots):
            if current[slot] < 0 and following < length.size:
                current[slot] = following
                done[slot] = 0
                following += 1
            place[step, slot] = current[slot]
            token[step, slot] = done[slot]
            if current[slot] >= 0:
                done[slot] += 1
                if done[slot] == length[current[slot]]:
                    current[slot] = -1


def queue_reference(length: Int64Array, slots: int) -> list[list[tuple[int, int]]]:
    """`queue_steps` in plain Python: for each step, (place, token) of the live ones in no order."""
    waiting = list(enumerate(length.tolist()))
    live: list[tuple[int, int, int]] = []
    steps = []
    while waiting or live:
        while waiting and len(live) < slots:
            place, tokens = waiting.pop(0)
            live.append((place, 0, tokens))
        steps.append([(place, token) for place, token, _ in live])
        live = [(place, token + 1, tokens) for place, token, tokens in live if token + 1 < tokens]
    return steps
