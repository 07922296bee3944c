"""Keyed hashes of the 1- and 2-grams of token sequences, counted per sequence.

The hash is SipHash-2-4 (Aumasson and Bernstein 2012) of a gram's token ids as little-endian 32-bit words, 4 bytes for a
1-gram and 8 for a 2-gram, cut to its low 32 bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Int64Array

__all__ = ["count_ngrams", "count_ngrams_reference", "hash_grams", "siphash_reference"]

Uint32Array = npt.NDArray[np.uint32]
Uint16Array = npt.NDArray[np.uint16]

#: Largest count; more occurrences are counted as so many.
MOST = 2**16 - 1
#: Tokens that are hashed and sorted at a time (longer sequences whole).
BLOCK = 2**20
_MASK = 2**64 - 1


@compiled
def _round(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64) -> tuple[np.uint64, ...]:
    """One SipRound."""
    v0 += v1
    v2 += v3
    v1 = (v1 << np.uint64(13)) | (v1 >> np.uint64(51))
    v3 = (v3 << np.uint64(16)) | (v3 >> np.uint64(48))
    v1 ^= v0
    v3 ^= v2
    v0 = (v0 << np.uint64(32)) | (v0 >> np.uint64(32))
    v2 += v1
    v0 += v3
    v1 = (v1 << np.uint64(17)) | (v1 >> np.uint64(47))
    v3 = (v3 << np.uint64(21)) | (v3 >> np.uint64(43))
    v1 ^= v2
    v3 ^= v0
    v2 = (v2 << np.uint64(32)) | (v2 >> np.uint64(32))
    return v0, v1, v2, v3


@compiled
def _absorb(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64, word: np.uint64) -> tuple[np.uint64, ...]:
    """Take in one 64-bit word of the message."""
    v3 ^= word
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ word, v1, v2, v3


@compiled
def _finish(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64) -> np.uint64:
    """The low 32 bits of the hash."""
    v2 ^= np.uint64(0xFF)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return (v0 ^ v1 ^ v2 ^ v3) & np.uint64(0xFFFFFFFF)


def count_ngrams(
    tokens: Uint32Array, offsets: Int64Array, key: npt.NDArray[np.uint64]
) -> tuple[Int64Array, Uint32Array, Uint16Array]:
    """The distinct hashes of each sequence, ascending, and how often each occurs (at most 65,535).

    Args:
        tokens: uint32 [T]; sequence i is tokens[offsets[i]:offsets[i + 1]].
        offsets: int64 [n + 1].
        key: uint64 [2], the key of the hash.

    Returns:
        (ends, hashes, counts): int64 [n + 1], uint32 [H], uint16 [H]; sequence i has hashes[ends[i]:ends[i + 1]].
    """
    ends = np.zeros(len(offsets), np.int64)
    hashes, counts = [np.empty(0, np.uint32)], [np.empty(0, np.uint16)]
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = max(last, first + 1)
        block = offsets[first : last + 1]
        grams = np.empty(int(np.maximum(2 * np.diff(block) - 1, 0).sum()), np.uint64)
        hash_grams(tokens, block, key, grams)
        grams.sort()  # by sequence, then by hash
        own_hashes, own_counts = np.empty(len(grams), np.uint32), np.empty(len(grams), np.uint16)
        found = _count_runs(grams, own_hashes, own_counts, ends[first + 1 : last + 1])
        hashes.append(own_hashes[:found].copy())
        counts.append(own_counts[:found].copy())
        first = last
    return np.cumsum(ends), np.concatenate(hashes), np.concatenate(counts)


@compiled
def hash_grams(
    tokens: Uint32Array, offsets: Int64Array, key: npt.NDArray[np.uint64], grams: npt.NDArray[np.uint64]
) -> None:
    """Every gram as (number of its sequence, hash) in one integer of 64 bits."""
    k0, k1 = key[0], key[1]
    v0, v1 = k0 ^ np.uint64(0x736F6D6570736575), k1 ^ np.uint64(0x646F72616E646F6D)
    v2, v3 = k0 ^ np.uint64(0x6C7967656E657261), k1 ^ np.uint64(0x7465646279746573)
    of_one, of_two = np.uint64(4) << np.uint64(56), np.uint64(8) << np.uint64(56)  # lengths of the messages
    at = 0
    for i in range(offsets.size - 1):
        number = np.uint64(i) << np.uint64(32)
        for t in range(offsets[i], offsets[i + 1]):
            token = np.uint64(tokens[t])
            a0, a1, a2, a3 = _absorb(v0, v1, v2, v3, of_one | token)
            grams[at] = number | _finish(a0, a1, a2, a3)
            at += 1
            if t + 1 < offsets[i + 1]:
                a0, a1, a2, a3 = _absorb(v0, v1, v2, v3, token | (np.uint64(tokens[t + 1]) << np.uint64(32)))
                a0, a1, a2, a3 = _absorb(a0, a1, a2, a3, of_two)
                grams[at] = number | _finish(a0, a1, a2, a3)
                at += 1


@compiled
def _count_runs(grams: npt.NDArray[np.uint64], hashes: Uint32Array, counts: Uint16Array, found: Int64Array) -> int:
    """Equal neighbours become one hash with a count; `found` [n] gets the number of distinct hashes per sequence."""
    at = 0
    for i in range(grams.size):
        if i > 0 and grams[i] == grams[i - 1]:
            if counts[at - 1] < MOST:
                counts[at - 1] += np.uint16(1)
            continue
        hashes[at], counts[at] = np.uint32(grams[i] & np.uint64(0xFFFFFFFF)), np.uint16(1)
        found[np.int64(grams[i] >> np.uint64(32))] += 1
        at += 1
    return at


def siphash_reference(message: bytes, key: npt.NDArray[np.uint64]) -> int:
    """SipHash-2-4 of any bytes, 64 bits, in plain Python."""
    k0, k1 = int(key[0]), int(key[1])
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & _MASK

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0], v[2] = (v[0] + v[1]) & _MASK, (v[2] + v[3]) & _MASK
            v[1], v[3] = turn(v[1], 13) ^ v[0], turn(v[3], 16) ^ v[2]
            v[0] = turn(v[0], 32)
            v[2], v[0] = (v[2] + v[1]) & _MASK, (v[0] + v[3]) & _MASK
            v[1], v[3] = turn(v[1], 17) ^ v[2], turn(v[3], 21) ^ v[0]
            v[2] = turn(v[2], 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def count_ngrams_reference(tokens: Uint32Array, key: npt.NDArray[np.uint64]) -> tuple[Uint32Array, Uint16Array]:
    """`count_ngrams` of one sequence in plain NumPy: its hashes and counts."""
    grams = [tokens[i : i + n].astype("<u4").tobytes() for n in (1, 2) for i in range(len(tokens) - n + 1)]
    values = np.array([siphash_reference(gram, key) & 0xFFFFFFFF for gram in grams], np.uint32)
    hashes, counts = np.unique(values, return_counts=True)
    return hashes, np.minimum(counts, MOST).astype(np.uint16)
