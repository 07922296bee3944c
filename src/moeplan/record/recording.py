"""What recordings share, be it a model in this process or a server: limits of a request, parts, resuming, progress."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError, OutputError, UsageError
from moeplan.io.files import check_folder
from moeplan.progress import Progress
from moeplan.record.prompts import MAX_NEW_TOKENS, Prompt
from moeplan.trace.format import REQUESTS_NAME
from moeplan.trace.reader import open_trace
from moeplan.trace.resume import check_same
from moeplan.types import ModelShape

__all__ = ["Meter", "SamplingOptions", "check_out", "finished", "new_tokens", "part_picks", "seed_of", "sweep"]

#: A part ends at so many picks, but not before so many tokens: a kill loses less than a minute of a small model's work,
#: and a large model's recording does not fall into thousands of files.
PART_PICKS, PART_TOKENS = 256 * 1024, 1024
#: Sampled per request where neither the prompt nor an option says.
NEW_TOKENS = 128


@dataclass(frozen=True)
class SamplingOptions:
    """How much of each prompt is run, and how tokens are chosen.

    Attributes:
        max_new_tokens: sampled per request, at most; None takes each prompt's own limit, or `NEW_TOKENS` or what the
            model's positions leave.
        max_prompt_tokens: longer prompts are cut to their first tokens; None refuses what the model cannot hold.
        temperature: 0 takes the likeliest token; above it, tokens are drawn with `seed`.
        seed: of the draws.
    """

    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-new-tokens", self.max_new_tokens),
            ("--max-prompt-tokens", self.max_prompt_tokens),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value} is not positive")
        if not 0 <= self.temperature < 100:
            raise UsageError(f"--temperature {self.temperature} is outside 0 to 100")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed} is outside 0 to {2**31 - 1}")


def new_tokens(prompt: Prompt, length: int, room: int | None, options: SamplingOptions) -> int:
    """How many tokens a prompt of `length` tokens may sample in a model of `room` positions (None: nobody knows).

    Raises:
        FormatError: prompt and new tokens that the model cannot hold.
    """
    asked = prompt.max_new_tokens or options.max_new_tokens
    new = min(asked or NEW_TOKENS, options.max_new_tokens or MAX_NEW_TOKENS)
    if room is None:
        return new
    if asked is None:
        new = max(1, min(new, room - length))  # nobody asked for more
    if length + new > room:
        raise FormatError(
            f"{length} prompt tokens and {new} new ones are more than the model's {room} positions",
            where=prompt.where,
            hint=f"use --max-prompt-tokens {room - new}" if new < room else "use a smaller --max-new-tokens",
        )
    return new


def part_picks(shape: ModelShape) -> int:
    """Picks in a part of a recording."""
    return max(PART_PICKS, PART_TOKENS * shape.num_layers * shape.top_k)


def seed_of(seed: int, start: int) -> int:
    """A seed of its own, 32 bits, for the batch or request that begins at `start`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4], "big")


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse a place that is taken, or cannot be, before a model is loaded or a server asked for it."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError("already exists", where=str(out), hint="choose another place, remove it, or add --resume")
    check_folder(out)


def finished(out: Path, source: dict[str, Any], shape: ModelShape, *, weights: bool = False) -> bool:
    """Whether the recording at `out` is complete.

    Raises:
        UsageError: it was begun with another model, or with other settings.
    """
    trace = open_trace(out)
    check_same(trace, shape, source, weights=weights)
    return trace.complete


def sweep(out: Path, *, begun: bool) -> None:
    """Remove what a kill left half-written, and the files of a first part that no `trace.json` names yet."""
    if not out.is_dir():
        return
    temporary = [p for p in out.iterdir() if re.fullmatch(r"\.(part-\d+|prompts-\d+|requests|trace)\..*\.tmp", p.name)]
    for path in temporary:
        path.unlink(missing_ok=True)
    rest = list(out.iterdir())
    if not begun and {path.name for path in rest} <= {"part-00000.parquet", "prompts-00000.parquet", REQUESTS_NAME}:
        for path in rest:
            path.unlink()


class Meter:
    """Tells progress with tokens a second; `rows` counts tokens."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._start, self.rows = progress, total, time.monotonic(), 0

    def tell(self, done: int) -> None:
        """So many requests are done."""
        rate = self.rows / max(time.monotonic() - self._start, 1e-9)
        self._progress(done, self._total, f"{done}/{self._total} requests, {rate:,.0f} tokens/s")
