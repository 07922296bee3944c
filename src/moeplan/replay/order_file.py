"""The order of a file of prompts: JSONL in, the same lines in another order out.

Lines are read in windows, each ordered by itself, so that a stream may be larger than memory.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, UsageError
from moeplan.io.files import atomic_path
from moeplan.io.paths import check_outputs, open_input
from moeplan.planning.order import split_order
from moeplan.planning.plan import Plan
from moeplan.planning.prompt_points import PromptPoints, word_ids
from moeplan.progress import Progress, silent
from moeplan.record.prompts import MAX_ROW_BYTES, parse_row
from moeplan.replay.order import Order, arrange, measured_saving, points_from
from moeplan.trace import Trace
from moeplan.trace.prompts import PromptFeatures, PromptKind

__all__ = ["DEFAULT_WINDOW", "Encode", "OrderSettings", "encode_words", "instance_path", "load_tokenizer", "order_file"]

#: Lines that are ordered at a time.
DEFAULT_WINDOW = 200_000

#: From a prompt's text to its token ids.
Encode = Callable[[str], npt.NDArray[np.uint32]]

encode_words: Encode = word_ids


@dataclass(frozen=True)
class OrderSettings:
    """How a file is ordered.

    Attributes:
        instances: independent servers that the queue is split over. batch: requests that decode together on each.
        window: lines that are ordered at a time.
        recorded: the trace is a recording of this very file, in its order.
        seed: random seed.

    Raises:
        UsageError: a value out of range.
    """

    instances: int = 1
    batch: int = 8
    window: int = DEFAULT_WINDOW
    recorded: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("--instances", self.instances, 1, 4096),
            ("--batch", self.batch, 2, 4096),
            ("--window", self.window, 16, 10_000_000),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value} is outside {least}..{most}")


def order_file(
    source: Path,
    out: Path,
    *,
    trace: Trace | None = None,
    plan: Plan | None = None,
    encode: Encode = encode_words,
    secret: bytes | None = None,
    settings: OrderSettings = OrderSettings(),
    progress: Progress = silent,
) -> Order:
    """Write the lines of a file of prompts in an order in which neighbours use the same experts.

    Every line that is not blank comes out once, byte for byte. With several instances, each gets a file of its own
    (`instance_path`).

    Args:
        source: JSONL as `record` reads it: prompts, chat messages, OpenAI batch requests; may be gzipped.
        out: the file to write.
        trace, plan: see `moeplan.order`.
        encode: tokenizes texts as the trace's prompts were.
        secret: of a trace or plan whose prompts are hashed.

    Raises:
        FormatError: a line that is no prompt; no line. UsageError: see `moeplan.order`. OutputError: cannot be
            written, or an output is the source.
    """
    paths = [instance_path(out, number, settings.instances) for number in range(settings.instances)]
    check_outputs({str(path): path for path in paths}, [source, None if trace is None else trace.path])
    points = points_from(trace, plan, settings.recorded, settings.seed)
    if settings.recorded:
        settings = replace(settings, window=max(settings.window, 10_000_000))
    placed: list[list[Int64Array]] = [[] for _ in paths]
    saving, first = None, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(stack.enter_context(atomic_path(path)).open("wb")) for path in paths]
        for window in _windows(source, settings.window, encode):
            prompts = window.features(secret, "hashed" if secret is not None else "ids")
            sequence = arrange(prompts, points, settings.batch, seed=settings.seed, progress=progress)
            for number, part in enumerate(_split(sequence, window, points, settings.instances)):
                files[number].writelines(window.lines[line] for line in part)
                placed[number].append(part + first)
            if trace is not None and saving is None:
                saving = measured_saving(trace, settings.batch, sequence if settings.recorded else None, settings.seed)
            first += len(sequence)
        if not first:
            raise FormatError("holds no prompt", where=str(source), hint="check the file")
    parts = tuple(np.concatenate(part) for part in placed)
    return Order(parts, points.basis, settings.batch, *(saving or (None, 0)))


def instance_path(out: Path, number: int, instances: int) -> Path:
    """Where the lines of an instance go: OUT itself, or OUT with -1, -2, .. before its ending."""
    return out if instances == 1 else out.with_name(f"{out.stem}-{number + 1}{out.suffix}")


def load_tokenizer(path: Path) -> Encode:
    """A tokenizer from its `tokenizer.json`, or the folder that holds it.

    Raises:
        UsageError: the package tokenizers is not installed. FormatError: the file cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError("--tokenizer needs the package tokenizers", hint="pip install tokenizers") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    with open_input(file):  # refuses what is no regular file
        pass
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:
        raise FormatError("is not a tokenizer", where=str(file), hint="give the model's tokenizer.json") from None
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


@dataclass(frozen=True)
class _Window:
    """Some lines of the file.

    Attributes:
        lines: each ends with a line break. ids: token ids of each prompt. new_tokens: its limit, or 0.
    """

    lines: list[bytes]
    ids: list[npt.NDArray[np.uint32]]
    new_tokens: list[int]

    def features(self, secret: bytes | None, kind: PromptKind) -> PromptFeatures:
        """As a predictor takes them."""
        prompts = PromptFeatures.of_ids(self.ids)
        return prompts.hashed(secret) if kind == "hashed" and secret is not None else prompts


def _windows(source: Path, size: int, encode: Encode) -> Iterator[_Window]:
    """The lines of a file that are not blank, so many at a time."""
    window = _Window([], [], [])
    with _opened(source) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            where = f"{source}, row {number}"
            if len(line) > MAX_ROW_BYTES:
                raise FormatError(f"is longer than {MAX_ROW_BYTES} bytes", where=where, hint="split the file")
            row = parse_row(line, where)
            number += 1
            if row is None:
                continue
            fields = row[1]
            window.lines.append(line if line.endswith(b"\n") else line + b"\n")
            window.ids.append(_ids(fields, encode))
            window.new_tokens.append(fields.get("max_new_tokens") or 0)
            if len(window.lines) == size:
                yield window
                window = _Window([], [], [])
    if window.lines:
        yield window


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[IO[bytes]]:
    try:
        with open_input(source) as file:
            if source.suffix.lower() == ".gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=file))
            else:
                yield file
    except (zlib.error, EOFError, gzip.BadGzipFile):
        raise FormatError("is not a whole gzip file", where=str(source), hint="it may be cut off") from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(source), hint="check the path") from None


def _ids(fields: dict[str, Any], encode: Encode) -> npt.NDArray[np.uint32]:
    if "token_ids" in fields:
        return np.array(fields["token_ids"], np.uint32)
    if "messages" in fields:
        return encode("\n".join(content for _, content in fields["messages"]))
    return encode(fields["text"])


def _split(sequence: Int64Array, window: _Window, points: PromptPoints, instances: int) -> list[Int64Array]:
    """The part of each instance, of equal expected tokens."""
    answer = float(points.tokens.mean()) if len(points.tokens) else 256.0
    limit = np.array(window.new_tokens, np.float64)
    answers = np.where(limit > 0, np.minimum(limit, answer), answer)
    return split_order(sequence, np.array([len(ids) for ids in window.ids]) + answers, instances)
