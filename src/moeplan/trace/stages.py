"""Which rows of a request are known before it is assigned to a group, and which follow: one definition for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeplan.arrays import BoolArray, Int64Array
from moeplan.errors import UsageError
from moeplan.trace.format import UNKNOWN, Requests

__all__ = ["MIN_DECODE", "MIN_PREFILL", "Stages"]


#: What a request needs to be usable for anything that compares its phases.
MIN_PREFILL, MIN_DECODE = 1, 8


@dataclass(frozen=True)
class Stages:
    """Which rows of each request are prefill and which decode.

    Request r's rows are, in order: other [0, first[r]), prefill [first[r], middle[r]), decode [middle[r], rows[r]).

    Attributes:
        rows, first, middle: int64 [R].
        usable: bool [R], requests with enough of both stages for what needs both.
        signature_tokens: N when the first N rows stand in for a prefill; then a request needs 2N rows.
        source: what the first stage is made of: the prefill, or the first N rows of the prompt, the decode or all rows.
        prefill, decode: what the stages are called in output.
    """

    rows: Int64Array
    first: Int64Array
    middle: Int64Array
    usable: BoolArray
    signature_tokens: int | None
    source: Literal["prefill", "prompt", "decode", "rows"]
    prefill: str
    decode: str

    @classmethod
    def from_requests(cls, requests: Requests, signature_tokens: int | None = None) -> Stages:
        """Stages as recorded, or with the first N rows of the decode standing in for the prefill and the rest for the
        decode; of the prompt where the trace has no decode; of all rows where no phase is known.

        Raises:
            UsageError: N is below 1, or no request has 2N rows.
        """
        source: Literal["prompt", "decode", "rows"]
        rows, known = requests.rows, requests.prefill != UNKNOWN
        if signature_tokens is None:
            first = np.where(known, 0, rows)
            middle = np.where(known, requests.prefill_known, rows)
            usable = known & (middle >= MIN_PREFILL) & (rows - middle >= MIN_DECODE)
            return cls(rows, first, middle, usable, None, "prefill", "prefill", "decode")
        if signature_tokens < 1:
            raise UsageError(f"--signature-tokens {signature_tokens} is not positive")
        if (requests.decode > 0).any():
            source, start, usable = "decode", requests.prefill_known, known
        elif (requests.prefill > 0).any():
            source, start, usable = "prompt", np.zeros_like(rows), known
        else:
            source, start, usable = "rows", np.zeros_like(rows), ~known
        what = "recorded" if source == "rows" else source
        usable = usable & (rows - start >= 2 * signature_tokens)
        if not usable.any():
            longest = int((rows - start).max())
            raise UsageError(
                f"--signature-tokens {signature_tokens} needs requests of {2 * signature_tokens} {what} tokens, the "
                f"longest has {longest}",
                hint=f"use a smaller --signature-tokens, {max(1, longest // 4)} say",
            )
        return cls(
            rows,
            np.where(usable, start, rows),
            np.where(usable, start + signature_tokens, rows),
            usable,
            signature_tokens,
            source,
            f"first {signature_tokens} {what} tokens",
            f"rest of {source}",
        )

    def label(self, stage: int) -> str:
        """The name of a stage: 0 prefill, 1 decode, 2 the rows that are neither."""
        return (self.prefill, self.decode, "unknown phase" if self.signature_tokens is None else "not used")[stage]

    def phrase(self, stage: int) -> str:
        """The label as it reads in a sentence."""
        return self.label(stage) if self.signature_tokens is None else f"the {self.label(stage)}"

    def lengths(self, stage: int) -> Int64Array:
        """int64 [R], rows of one stage."""
        ends = (np.zeros_like(self.rows), self.first, self.middle, self.rows)
        low, high = ((1, 2), (2, 3), (0, 1))[stage]
        return ends[high] - ends[low]

    def starts(self, stage: int) -> Int64Array:
        """int64 [R], where a stage begins inside its request."""
        return (self.first, self.middle, np.zeros_like(self.rows))[stage]
