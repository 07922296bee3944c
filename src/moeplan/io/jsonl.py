"""Reading JSON that an engine or a script left behind: one value, a list, or one value per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError
from moeplan.io.files import MAX_JSON_BYTES, read_json
from moeplan.io.paths import open_input

__all__ = ["json_lines", "json_objects", "whole"]

_CUT_OFF = "the file may be cut off: copy or record it again"


def json_lines(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line that is not blank; a line of at most `max_bytes`.

    Raises:
        FormatError: a line that is not whole JSON, too long, or not UTF-8; a file that cannot be read.
    """
    try:
        with open_input(path) as file:
            number = 0
            while line := file.readline(max_bytes + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > max_bytes:
                    raise FormatError(f"is longer than the {max_bytes} bytes that moeplan reads", where=where)
                if line.strip():
                    yield where, _parse(line, where)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each object in a file: one object, a list of them, or JSON lines of either."""
    for where, value in _values(path):
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            place = f"{where}, item {index}" if isinstance(value, list) else where
            if not isinstance(item, dict):
                raise FormatError(f"is no object (but {type(item).__name__})", where=place)
            yield place, item


def whole(value: Any, label: str, where: str) -> int | None:
    """A count that may be absent: None, or a whole number >= 0."""
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise FormatError(f"{label} is {str(value)[:40]!r}, not a whole number", where=where)
    return value


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file; JSON lines if its first line is JSON by itself, else the whole file as one value."""
    lines = json_lines(path)
    try:
        first = next(lines, None)
    except FormatError:
        yield str(path), read_json(path)
        return
    if first is None:
        raise FormatError("is empty", where=str(path), hint="leave the file out")
    yield first
    yield from lines


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"is not whole JSON ({error.msg})", where=where, hint=_CUT_OFF) from None
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", where=where, hint=_CUT_OFF) from None
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise FormatError(f"is JSON that moeplan does not accept: {why}", where=where) from None
