"""Drawing k distinct experts per token and layer from given weights, by Walker's alias method with rejection.

Randomness is counted, not sequential: every (token, layer) has its own splitmix64 stream (Steele, Lea and Flood, OOPSLA
2014), so the picks of a token do not depend on which other tokens or layers are drawn, nor in what order.

Names: X tables (one per phase and topic), L layers, E experts in G expert groups of n = E / G consecutive experts.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan.arrays import CountArray, ExpertArray, FloatArray, Int64Array

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_U30, _U27, _U31 = np.uint64(30), np.uint64(27), np.uint64(31)
#: An alias table's entry: 24 bits of threshold above 8 bits of alias (hence n <= 256).
_COIN_BITS, _ALIAS_BITS = 24, 8
_COIN_MASK, _SLOT_MASK = np.uint64(0xFFFFFF), np.uint64(0xFFFF)
_U16, _U40 = np.uint64(16), np.uint64(40)
_UNIT = 1.0 / (1 << 24)
#: After so many rejected draws the next free expert is taken, so that weights that are almost all zero still end.
MAX_TRIES = 256


def mix64(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64, element by element: a bijection that turns counters into random bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _U30)) * _MIX_A
        values = (values ^ (values >> _U27)) * _MIX_B
        return values ^ (values >> _U31)


@nb.njit(inline="always")
def _mix(value: Any) -> Any:
    value = (value ^ (value >> _U30)) * _MIX_A
    value = (value ^ (value >> _U27)) * _MIX_B
    return value ^ (value >> _U31)


@compiled
def alias_tables(weights: FloatArray, groups: int, out: CountArray) -> None:
    """Walker's alias table of every routing group (Vose's construction).

    Args:
        weights: float64 [X, E], positive.
        groups: G.
        out: uint32 [X, E], set; entry s of a group holds the chance (24 bits) to stay at s, and the alias (8 bits).
    """
    n = weights.shape[1] // groups
    scaled = np.empty(n, np.float64)
    small, large = np.empty(n, np.int64), np.empty(n, np.int64)
    top = np.float64((1 << _COIN_BITS) - 1)
    for x in range(weights.shape[0]):
        for group in range(groups):
            first = group * n
            total = 0.0
            for s in range(n):
                total += weights[x, first + s]
            num_small, num_large = 0, 0
            for s in range(n):
                scaled[s] = weights[x, first + s] * n / total
                if scaled[s] < 1.0:
                    small[num_small] = s
                    num_small += 1
                else:
                    large[num_large] = s
                    num_large += 1
            while num_small > 0 and num_large > 0:
                num_small -= 1
                s, other = small[num_small], large[num_large - 1]
                out[x, first + s] = np.uint32(np.int64(scaled[s] * top) << _ALIAS_BITS | other)
                scaled[other] -= 1.0 - scaled[s]
                if scaled[other] < 1.0:
                    num_large -= 1
                    small[num_small] = other
                    num_small += 1
            while num_large > 0:
                num_large -= 1
                s = large[num_large]
                out[x, first + s] = np.uint32(np.int64(top) << _ALIAS_BITS | s)
            while num_small > 0:  # what rounding left over
                num_small -= 1
                s = small[num_small]
                out[x, first + s] = np.uint32(np.int64(top) << _ALIAS_BITS | s)


@compiled
def sample_picks(
    keys: UInt64Array,
    table: Int64Array,
    salts: UInt64Array,
    aliases: CountArray,
    masses: FloatArray,
    groups_per_token: int,
    out: ExpertArray,
) -> None:
    """Draw each token's picks at each layer: first its expert groups, then k distinct experts inside them.

    Args:
        keys: uint64 [T], one random key per token.
        table: int64 [T], which of the X tables a token draws from.
        salts: uint64 [L], one per layer.
        aliases: uint32 [X, L, E], from `alias_tables`.
        masses: float64 [X, L, G], the total weight of each routing group.
        groups_per_token: groups drawn (without replacement, in proportion to their mass); G draws from all of them.
        out: unsigned [T, L, k], set.
    """
    layers, experts = aliases.shape[1], aliases.shape[2]
    groups, k = masses.shape[2], out.shape[2]
    n = experts // groups
    chosen = np.empty(groups, np.int64)
    until = np.empty(groups, np.float64)  # running sum of the chosen groups' masses
    free = np.empty(groups, np.bool_)
    for t in range(keys.size):
        x = table[t]
        for layer in range(layers):
            state = _mix(keys[t] ^ salts[layer])
            num_chosen, mass = groups, 0.0
            if groups_per_token < groups:
                num_chosen, left = groups_per_token, 0.0
                for g in range(groups):
                    free[g] = True
                    left += masses[x, layer, g]
                for c in range(num_chosen):
                    state += _GOLDEN
                    target = np.float64(_mix(state) >> _U40) * _UNIT * left
                    last = -1
                    for g in range(groups):
                        if free[g]:
                            last = g
                            target -= masses[x, layer, g]
                            if target < 0.0:
                                break
                    free[last] = False
                    left -= masses[x, layer, last]
                    chosen[c] = last
            else:
                for g in range(groups):
                    chosen[g] = g
            for c in range(num_chosen):
                mass += masses[x, layer, chosen[c]]
                until[c] = mass
            j, tries = 0, 0
            while j < k:
                state += _GOLDEN
                bits = _mix(state)
                c = 0
                if num_chosen > 1:
                    target = np.float64(bits >> _U40) * _UNIT * mass
                    while c < num_chosen - 1 and target >= until[c]:
                        c += 1
                first = chosen[c] * n
                slot = np.int64((bits & _SLOT_MASK) * np.uint64(n) >> _U16)
                entry = np.int64(aliases[x, layer, first + slot])
                if np.int64((bits >> _U16) & _COIN_MASK) >= entry >> _ALIAS_BITS:
                    slot = np.int64(entry & 0xFF)
                tries += 1
                while True:
                    fresh = True
                    for i in range(j):
                        if out[t, layer, i] == first + slot:
                            fresh = False
                            break
                    if fresh or tries < MAX_TRIES:
                        break
                    slot += 1  # tries are used up: the next free expert, on into the next chosen group
                    if slot == n:
                        slot, c = np.int64(0), (c + 1) % num_chosen
                        first = chosen[c] * n
                if fresh:
                    out[t, layer, j] = first + slot
                    j += 1


def sample_picks_reference(
    keys: UInt64Array,
    table: Int64Array,
    salts: UInt64Array,
    aliases: CountArray,
    masses: FloatArray,
    groups_per_token: int,
    out: ExpertArray,
) -> None:
    """`sample_picks` in plain Python: the same draws, to the bit."""
    _, layers, experts = aliases.shape
    groups, k = masses.shape[2], out.shape[2]
    n = experts // groups
    for t, layer in np.ndindex(len(keys), layers):
        stream = _stream(int(keys[t]) ^ int(salts[layer]))
        mass = masses[table[t], layer]
        chosen = list(range(groups))
        if groups_per_token < groups:
            chosen = _draw_groups(stream, mass, groups_per_token)
        until = np.cumsum(mass[chosen])
        picks: list[int] = []
        tries = 0
        while len(picks) < k:
            bits = next(stream)
            c = 0
            if len(chosen) > 1:
                c = min(int(np.searchsorted(until, (bits >> 40) * _UNIT * until[-1], side="right")), len(chosen) - 1)
            slot = (bits & 0xFFFF) * n >> 16
            entry = int(aliases[table[t], layer, chosen[c] * n + slot])
            if (bits >> 16) & 0xFFFFFF >= entry >> _ALIAS_BITS:
                slot = entry & 0xFF
            tries += 1
            pick = chosen[c] * n + slot
            if tries >= MAX_TRIES:
                inside = [g * n + s for g in chosen for s in range(n)]
                at = inside.index(pick)
                pick = next(e for e in inside[at:] + inside[:at] if e not in picks)
            if pick not in picks:
                picks.append(pick)
        out[t, layer] = picks


def _stream(seed: int) -> Any:
    """splitmix64, started from a mixed seed."""
    state = int(mix64(np.array([seed], np.uint64))[0])
    while True:
        state = (state + int(_GOLDEN)) % (1 << 64)
        yield int(mix64(np.array([state], np.uint64))[0])


def _draw_groups(stream: Any, mass: FloatArray, count: int) -> list[int]:
    free, left, chosen = list(range(len(mass))), float(np.add.accumulate(mass)[-1]), []
    for _ in range(count):
        target = (next(stream) >> 40) * _UNIT * left
        for group in free:
            target -= mass[group]
            if target < 0.0:
                break
        free.remove(group)
        left -= mass[group]
        chosen.append(group)
    return chosen
