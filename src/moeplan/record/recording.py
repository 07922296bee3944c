"""What recordings share, be it a model in this process or a server: options, limits of a request, parts, resuming."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from moeplan.errors import FormatError, OutputError, UsageError
from moeplan.io.files import check_folder, is_taken
from moeplan.progress import Progress
from moeplan.record.prompts import MAX_NEW_TOKENS, Prompt, prompts_digest, read_prompts
from moeplan.trace.format import JSON_NAME, REQUESTS_NAME, Request
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.resume import check_same
from moeplan.trace.retention import RetentionPolicy
from moeplan.trace.writer import TraceWriter
from moeplan.types import ModelShape

__all__ = ["Prompts", "RecordOptions", "Recording", "new_tokens", "seed_of"]

#: A file or folder of prompts, or the prompts themselves.
Prompts: TypeAlias = str | Path | Sequence[Prompt]
#: A part ends at so many picks, but not before so many tokens: a kill loses less than a minute of a small model's work,
#: and a large model's recording does not fall into thousands of files.
PART_PICKS, PART_TOKENS = 256 * 1024, 1024
#: Sampled per request where neither the prompt nor an option says.
NEW_TOKENS = 128


@dataclass(frozen=True)
class RecordOptions:
    """Which prompts are run, how tokens are sampled, and what is stored.

    Attributes:
        domain, limit: see `read_prompts`; they apply where prompts are read from files.
        max_new_tokens: sampled per request, at most; None takes each prompt's own limit, or 128 or what the model's
            positions leave.
        max_prompt_tokens: longer prompts are cut to their first tokens; None refuses what the model cannot hold.
        temperature: 0 takes the likeliest token; above it, tokens are drawn with `seed`.
        seed: of the draws.
        resume: continue the recording at the path, if there is one, that was begun with the same options.
        retention: which requests are stored, and in what form; all of them, row by row, by default.
    """

    domain: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    resume: bool = False
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)

    def __post_init__(self) -> None:
        lengths = {"--max-new-tokens": self.max_new_tokens, "--max-prompt-tokens": self.max_prompt_tokens}
        for flag, value in lengths.items():
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value} is not positive")
        if not 0 <= self.temperature < 100:
            raise UsageError(f"--temperature {self.temperature} is outside 0 to 100")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed} is outside 0 to {2**31 - 1}")


def new_tokens(prompt: Prompt, length: int, room: int | None, options: RecordOptions) -> int:
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


def seed_of(seed: int, start: int) -> int:
    """A seed of its own, 32 bits, for the batch or request that begins at `start`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4], "big")


class Recording:
    """A trace that prompts are recorded into; what can be refused is, before a model is loaded or a server asked.

    Args:
        weights: gate weights are recorded as well.

    Attributes:
        prompts: those to run, in their order.

    Raises:
        OutputError: `out` exists (without `resume`) or cannot be written.
        FormatError, UsageError: prompts that cannot be read, or of which nothing would be stored.
    """

    def __init__(self, prompts: Prompts, out: str | Path, options: RecordOptions, *, weights: bool = False) -> None:
        self._out, self._options, self._weights = Path(out), options, weights
        self._check_out()
        if isinstance(prompts, str | Path):
            prompts = read_prompts(Path(prompts), domain=options.domain, limit=options.limit)
        self.prompts = list(prompts)
        self._domains = [prompt.domain for prompt in self.prompts]
        options.retention.check(self._domains, weights=weights)

    def _check_out(self) -> None:
        out = self._out
        if not self._options.resume and is_taken(out):
            raise OutputError("already exists", where=str(out), hint="choose another place, remove it, or add --resume")
        check_folder(out)

    def source(self) -> dict[str, Any]:
        """What a trace says of its prompts and how they were sampled. No prompt text."""
        sampling = ("max_new_tokens", "max_prompt_tokens", "temperature", "seed")
        return {
            "prompts_sha256": prompts_digest(self.prompts),
            "requests": len(self.prompts),
            **{name: getattr(self._options, name) for name in sampling},
        }

    def write(
        self,
        shape: ModelShape,
        source: dict[str, Any],
        record: Callable[[list[int]], Generator[Request, None, None]],
        progress: Progress,
    ) -> Trace:
        """Record what the trace at the path lacks.

        Args:
            source: how the trace comes about; the same for a recording to be resumed.
            record: gives the requests of these prompts, numbered from 0, in their order.
            progress: called after each request that was written.

        Raises:
            UsageError: the recording at the path was begun with another model, or with other settings.
        """
        retention, weights = self._options.retention, self._weights
        source = {**source, **retention.source()}
        begun = self._options.resume and (self._out / JSON_NAME).exists()
        if begun:
            trace = open_trace(self._out)
            check_same(trace, shape, source, weights=weights)
            if trace.complete:
                return trace
        if self._options.resume:
            _sweep(self._out, begun=begun)
        how: Any = {"weights": weights, "retention": retention, "mode": "resume" if begun else "record"}
        start, tokens = time.monotonic(), 0
        with TraceWriter(self._out, shape, source=source, part_picks=_part_picks(shape), **how) as writer:
            numbers = np.flatnonzero(writer.pending(self._domains)).tolist()
            with closing(record(numbers)) as requests:
                for number, request in zip(numbers, requests, strict=True):
                    writer.add_request(request)
                    tokens += len(request.experts)
                    rate = tokens / max(time.monotonic() - start, 1e-9)
                    done, total = number + 1, len(self.prompts)
                    progress(done, total, f"{done}/{total} requests, {rate:,.0f} tokens/s")
        return open_trace(self._out)


def _part_picks(shape: ModelShape) -> int:
    return max(PART_PICKS, PART_TOKENS * shape.num_layers * shape.top_k)


def _sweep(out: Path, *, begun: bool) -> None:
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
