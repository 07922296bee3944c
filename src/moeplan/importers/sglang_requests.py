"""Requests rebuilt from forward passes that carry no request ids.

SGLang's `per_token` recorder stores, per forward pass on one rank, the position of every token and the lengths of the
prompts in it. Assumed of the engine: a prompt (extend) joins its list of running requests at the end; a decode pass has
one token of each running request, in the list's order, at the position after its last one; a request that is finished
leaves, and the others keep their order. So a decode pass must match the list in order, and does so in exactly one way
or it is refused: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, located

__all__ = ["Owners", "Pass", "rebuild"]


COUNTS_HINT = "its counts can still be imported: --counts"


@dataclass(frozen=True)
class Pass:
    """One forward pass on one rank.

    Attributes:
        positions: int64 [T], each token's index in its sequence.
        lengths: int64 [n], tokens of each prompt in an extend pass; None in a decode pass.
        where: file and record, for errors.
    """

    positions: Int64Array
    lengths: Int64Array | None
    where: str


@dataclass(frozen=True)
class Owners:
    """Whose token each row is.

    Attributes:
        request: int64 [rows of all passes], in the order of the passes.
        prefill: int64 [R], prefill rows of each request.
    """

    request: Int64Array
    prefill: Int64Array


def rebuild(passes: Sequence[Pass]) -> Owners:
    """Assign every token of one rank's passes to a request.

    Raises:
        FormatError: a decode token that continues no request seen, or may continue several; a prompt part that may
            continue another one (chunked prefill) or start behind a cached prefix.
    """
    owners: list[Int64Array] = []
    prefill: list[int] = []
    live = np.zeros((0, 2), np.int64)  # (request, its next position), in the engine's order
    for step in passes:
        with located(step.where):
            if step.lengths is None:
                live = live[_match(live[:, 1], step.positions)]
                owners.append(live[:, 0].copy())
                live[:, 1] += 1
            else:
                starts = _starts(step.positions, step.lengths)
                _refuse_chunks(live, starts)
                numbers = np.arange(len(prefill), len(prefill) + len(starts))
                owners.append(np.repeat(numbers, step.lengths))
                prefill += step.lengths.tolist()
                live = np.concatenate([live, np.stack([numbers, starts + step.lengths], axis=1)])
    request = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    return Owners(request, np.array(prefill, np.int64))


def _starts(positions: Int64Array, lengths: Int64Array) -> Int64Array:
    """int64 [n], the first position of each prompt; each prompt's positions must be consecutive."""
    if (lengths < 1).any() or int(lengths.sum()) != len(positions):
        raise FormatError(f"extend_seq_lens add up to {int(lengths.sum())}, but there are {len(positions)} tokens")
    first = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    starts = positions[first]
    if (positions != np.repeat(starts - first, lengths) + np.arange(len(positions))).any():
        raise FormatError("positions inside a prompt are not consecutive", hint=COUNTS_HINT)
    return starts


def _refuse_chunks(live: Int64Array, starts: Int64Array) -> None:
    """Prompt tokens from position p > 0 follow a cached prefix, unless a request stands at p: then nobody can tell."""
    unclear = starts[(starts > 0) & np.isin(starts, live[:, 1])]
    if len(unclear):
        raise FormatError(
            f"prompt tokens from position {unclear[0]} may continue a chunked prompt or follow a cached prefix:"
            " the record holds no request ids",
            hint=f"record with --chunked-prefill-size -1 and --disable-radix-cache; {COUNTS_HINT}",
        )


def _match(waiting: Int64Array, positions: Int64Array) -> Int64Array:
    """Indices into the live list, rising, whose next positions are the pass's; the only such choice there is.

    The leftmost and the rightmost choice in order are the same exactly when there is only one.
    """
    if np.array_equal(waiting, positions):
        return np.arange(len(waiting))
    left = _leftmost(waiting, positions)
    if left is None:
        missing = next((p for p in positions.tolist() if p not in set(waiting.tolist())), None)
        what = "in an order that no list of requests gives" if missing is None else f"at position {missing}"
        raise FormatError(
            f"decode tokens {what} continue no request of this recording: their prompt or an earlier step is missing",
            hint=f"start the recording before the first request and stop it after the last; {COUNTS_HINT}",
        )
    right = _leftmost(waiting[::-1], positions[::-1])
    assert right is not None  # a choice from the left exists
    unsure = left != len(waiting) - 1 - right[::-1]
    if unsure.any():
        raise FormatError(
            f"the decode token at position {positions[np.argmax(unsure)]} may belong to several requests of the same"
            " length: the record holds no request ids",
            hint=f"record per request with --enable-return-routed-experts; {COUNTS_HINT}",
        )
    return left


def _leftmost(waiting: Int64Array, positions: Int64Array) -> Int64Array | None:
    """The first choice in order of `waiting` entries equal to `positions`; None if there is none."""
    found, at, values = [], 0, waiting.tolist()
    for position in positions.tolist():
        while at < len(values) and values[at] != position:
            at += 1
        if at == len(values):
            return None
        found.append(at)
        at += 1
    return np.array(found, np.int64)
