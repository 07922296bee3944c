"""Prompts to record a model with: from JSONL, CSV and text files, or a folder with one sub-folder or file per domain.

A row of JSONL is recognised by its keys: `prompt` or chat `messages` (with optional `domain` and `max_new_tokens`), the
`body` of a request in an OpenAI batch file, or the keys of a public set: HumanEval, MBPP, GSM8K, MT-bench and Vicuna
questions, token ids with lengths and arrival times. A CSV is MMLU's: question, four choices, answer. A text file is one
prompt.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moeplan.errors import FormatError, UsageError
from moeplan.importers.sources import domain_of, natural_order
from moeplan.io.paths import open_input, readable

__all__ = ["Prompt", "parse_row", "prompts_digest", "read_prompts"]

#: Bounds against hostile input: one row, one file once unpacked, prompts in all, and new tokens of one request.
MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_FILE_BYTES = 1024 * 1024 * 1024
MAX_PROMPTS = 1_000_000
MAX_NEW_TOKENS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1

TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
SUFFIXES = (*JSONL_SUFFIXES, ".csv", *TEXT_SUFFIXES)

#: (where, fields of a Prompt, the row's own domain, the domain of the public set it comes from)
Row = tuple[str, dict[str, Any], str | None, str | None]


@dataclass(frozen=True)
class Prompt:
    """One request to be.

    Attributes:
        domain: its label, possibly empty.
        where: file and row, for messages.
        text: the prompt, or
        messages: a chat, as (role, content) pairs, or
        token_ids: the prompt already tokenised. Exactly one of the three is given.
        max_new_tokens: tokens to sample, at most; None for the recorder's own setting.
        arrival: seconds since a fixed moment; None when unknown.
    """

    domain: str
    where: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    arrival: float | None = None

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates and servers take them."""
        return [{"role": role, "content": content} for role, content in self.messages or ()]


def read_prompts(source: Path, *, domain: str | None = None, limit: int | None = None) -> list[Prompt]:
    """All prompts of a file or folder, in the order of files and rows.

    Args:
        domain: the label of every prompt; by default the row's own, its folder's, its public set's, or the file's name.
        limit: at most so many, from the domains round robin, so that each gets its share, the earliest rows first.

    Raises:
        FormatError: a file or a row that is no prompt; it names both.
        UsageError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not positive")
    prompts: list[Prompt] = []
    for path, label in _files(source):
        for prompt in _read_file(path, domain if domain is not None else label, forced=domain is not None):
            if len(prompts) == MAX_PROMPTS:
                raise FormatError(f"holds more than {MAX_PROMPTS} prompts", where=str(source), hint="split it")
            prompts.append(prompt)
    if not prompts:
        raise FormatError("holds no prompt", where=str(source), hint="check the file")
    return prompts if limit is None else _share(prompts, limit)


def prompts_digest(prompts: list[Prompt]) -> str:
    """Hex sha256 over the prompts: tells whether a recording goes on with those it began with."""
    digest = hashlib.sha256()
    for p in prompts:
        row = [p.text, p.messages, p.token_ids, p.domain, p.max_new_tokens, p.arrival]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _share(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts in their order; the n-th of a domain goes before the (n + 1)-th of any other."""
    seen, turns = Counter[str](), []
    for index, prompt in enumerate(prompts):
        seen[prompt.domain] += 1
        turns.append((seen[prompt.domain], index))
    return [prompts[index] for index in sorted(index for _, index in sorted(turns)[:limit])]


def _files(source: Path) -> list[tuple[Path, str | None]]:
    """(file, label of its folder or None): the file itself, or what a folder and its sub-folders hold."""
    if not source.is_dir():
        if not source.exists():
            raise FormatError("does not exist", where=str(source), hint="check the path")
        return [(source, None)]
    found: list[tuple[Path, str | None]] = []
    for entry in _inside(source):
        if entry.is_dir():
            found += [(path, entry.name) for path in _inside(entry) if path.is_file()]
        else:
            found.append((entry, source.name if entry.suffix.lower() in TEXT_SUFFIXES else None))
    if not found:
        raise FormatError(f"holds no prompt file ({', '.join(SUFFIXES)})", where=str(source), hint="check the folder")
    return found


def _inside(folder: Path) -> list[Path]:
    """Sub-folders and prompt files of a folder, by the numbers in their names; nothing hidden."""
    with readable(folder):
        names = [p for p in folder.iterdir() if not p.name.startswith(".")]
    files = [p for p in names if p.is_file() and p.name.lower().endswith(SUFFIXES)]
    return sorted(p for p in names if p.is_dir()) + sorted(files, key=natural_order)


def _read_file(path: Path, label: str | None, *, forced: bool) -> Iterator[Prompt]:
    """The prompts of one file; `label` names those that have no domain of their own, or all of them when `forced`."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise FormatError(f"is not a prompt file ({', '.join(SUFFIXES)})", where=str(path), hint="rename or convert it")
    if name.endswith(TEXT_SUFFIXES):
        text = _decoded(b"".join(line for _, line in _lines(path, whole=True)), str(path))
        if not text.strip():
            raise FormatError("holds no text", where=str(path), hint="leave the file out")
        yield Prompt(label or domain_of(path), str(path), text=text)
        return
    read = _read_csv if name.endswith(".csv") else _read_jsonl
    for where, fields, own, default in read(path):
        chosen = label if forced else own or label or default
        stem = Path(path.name.removesuffix(".gz"))
        yield Prompt(domain_of(stem) if chosen is None else chosen, where, **fields)


def _read_jsonl(path: Path) -> Iterator[Row]:
    """Each line that is not blank."""
    for number, line in _lines(path):
        row = parse_row(line, f"{path}, row {number}")
        if row is not None:
            yield row


def parse_row(line: bytes, where: str) -> Row | None:
    """A line of JSONL; None where it is blank.

    Args:
        where: file and row, for messages.

    Raises:
        FormatError: it is not a prompt.
    """
    text = _decoded(line, where)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or out of range"
        raise FormatError(f"is not JSON ({why})", where=where, hint="one JSON object a line is expected") from None
    if not isinstance(row, dict):
        raise FormatError("is not a JSON object", where=where, hint='write {"prompt": ".."}')
    if isinstance(row.get("body"), dict):  # OpenAI's batch files
        body = row["body"]
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        row = {"domain": row.get("domain"), "max_new_tokens": most, **body}
    fields, default = _fields(row, where)
    own = None if row.get("domain") is None else _text(row["domain"], "domain", where)
    return where, fields, own, default


def _fields(row: dict[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """What a row asks for and the domain of the set that it comes from, by the keys it has."""
    fields: dict[str, Any] = {}
    default: str | None = None
    if "messages" in row:
        fields["messages"] = _chat(row["messages"], where)
    elif "prompt" in row:
        fields["text"] = _text(row["prompt"], "prompt", where)
        default = "code" if "entry_point" in row and "task_id" in row else None  # HumanEval
    elif "input_tok_ids" in row:
        fields["token_ids"], default = _ids(row["input_tok_ids"], where), "chat"
        fields["max_new_tokens"] = _count(row.get("output_toks"), "output_toks", where)
        fields["arrival"] = _seconds(row.get("arrival_time_ns"), where)
    elif "turns" in row:  # MT-bench and Vicuna: the first turn, since later ones need an answer
        turns = row["turns"]
        first = turns[0] if isinstance(turns, list) and turns else None
        fields["messages"], default = (("user", _text(first, "turns[0]", where)),), "chat"
    elif "question" in row:  # GSM8K
        fields["text"] = _text(row["question"], "question", where)
        default = "math" if "answer" in row else None
    elif "text" in row:  # MBPP
        fields["text"] = _text(row["text"], "text", where)
        default = "code" if "code" in row else None
    else:
        keys = ", ".join(repr(str(key)[:20]) for key in list(row)[:6]) or "none"
        raise FormatError(f"has no prompt (keys: {keys})", where=where, hint="give 'prompt' or 'messages'")
    if row.get("max_new_tokens") is not None:
        fields["max_new_tokens"] = _count(row["max_new_tokens"], "max_new_tokens", where)
    return fields, default


def _read_csv(path: Path) -> Iterator[Row]:
    """MMLU: question, choices A to D, answer; the subject is the file's name."""
    text = _decoded(b"".join(line for _, line in _lines(path, whole=True)), str(path))
    subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
    rows, number = csv.reader(io.StringIO(text, newline=""), strict=True), -1
    try:
        for number, row in enumerate(rows):
            where = f"{path}, row {number}"
            if row and (len(row) != 6 or not row[0].strip()):
                raise FormatError(f"has {len(row)} columns, not question, four choices and answer", where=where)
            if row:
                choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5], strict=True))
                yield where, {"text": f"{row[0]}\n{choices}\nAnswer:"}, subject, None
    except csv.Error as error:
        where = f"{path}, row {number + 1}"
        raise FormatError(f"is not CSV ({error})", where=where, hint="it may be cut off") from None


def _lines(path: Path, *, whole: bool = False) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file, gzip or plain; `whole` gives blocks instead. Never more than the bounds above."""
    read, most = 0, MAX_ROW_BYTES * (4 if whole else 1)
    try:
        with open_input(path) as plain:
            file: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=plain) if path.suffix.lower() == ".gz" else plain
            number = 0
            while line := file.read(1 << 20) if whole else file.readline(most + 1):
                read += len(line)
                if len(line) > most or read > (most if whole else MAX_FILE_BYTES):
                    raise FormatError(
                        f"is longer than the {most if whole or len(line) > most else MAX_FILE_BYTES} bytes that"
                        " moeplan reads",
                        where=str(path) if whole else f"{path}, row {number}",
                        hint="split it",
                    )
                yield number, line
                number += 1
    except (zlib.error, EOFError, gzip.BadGzipFile):
        raise FormatError("is not a whole gzip file", where=str(path), hint="it may be cut off") from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", where=where) from None


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{key} is not text, or is empty", where=where)
    return value


def _count(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_NEW_TOKENS:
        raise FormatError(f"{key} is {str(value)[:20]!r}, not a whole number from 1 to {MAX_NEW_TOKENS}", where=where)
    return value


def _seconds(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise FormatError("arrival_time_ns is not a time in nanoseconds", where=where)
    return value / 1e9


def _ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(i) is not int or not 0 <= i <= MAX_TOKEN_ID for i in value):
        raise FormatError("input_tok_ids is not a list of token ids", where=where)
    return tuple(value)


def _chat(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Messages as (role, content) pairs; content parts of type text are joined."""
    if not isinstance(value, list) or not value:
        raise FormatError("messages is not a list of messages", where=where)
    pairs = []
    for number, message in enumerate(value):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise FormatError(f"messages[{number}] has no text role and content", where=where)
        pairs.append((role, content))
    return tuple(pairs)
