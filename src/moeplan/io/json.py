"""Reading and writing JSON: bounded in size, checked against types, and every error names the file, the key, the value.

What a file must hold is said by a type: `msgspec.Struct` classes with bounds (`msgspec.Meta`), dataclasses, or plain
lists and dicts. Keys that a type does not have are ignored, unless a `Struct` forbids them, then also inside it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from moeplan.errors import FormatError, located
from moeplan.io.files import atomic_path
from moeplan.io.paths import check_input, open_input, readable

__all__ = ["convert", "decode_json", "read_json", "read_json_lines", "read_json_objects", "write_json"]

T = TypeVar("T")

#: No JSON file that moeplan reads whole is larger: a bigger one is refused before it is opened.
MAX_JSON_BYTES = 256 * 1024 * 1024

_TRUNCATED = "the file may be truncated: copy or record it again"
#: msgspec's names of types, in words.
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


def read_json(path: Path, kind: Any = Any, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file, as `kind`.

    Raises:
        FormatError: a file that cannot be read, is too large or nested too deeply, is no JSON, or holds another type.
    """
    with readable(path):
        size = check_input(path)
        if size > max_bytes:
            raise FormatError(f"{size} bytes of JSON are more than the {max_bytes} that moeplan reads", where=str(path))
        data = path.read_bytes()
    return convert(decode_json(data, where=str(path)), kind, str(path))


def decode_json(data: bytes, *, where: str) -> Any:
    """The value of JSON text; the same errors, which name `where`."""
    try:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(data)
        # Python's json module, and so Transformers, writes numbers that JSON does not have, such as Infinity.
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        why = f"{error.msg.removesuffix(' at')} at line {error.lineno}"
        raise FormatError(f"is invalid or truncated JSON ({why})", where=where, hint=_TRUNCATED) from None
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", where=where, hint=_TRUNCATED) from None
    except RecursionError:
        raise FormatError("is JSON that moeplan does not accept: nested too deeply", where=where) from None
    except ValueError as error:
        raise FormatError(f"is JSON that moeplan does not accept: {str(error).split(';')[0]}", where=where) from None


@overload
def convert(value: Any, kind: type[T], where: str, hint: str | None = None) -> T: ...
@overload
def convert(value: Any, kind: Any, where: str, hint: str | None = None) -> Any: ...
def convert(value: Any, kind: Any, where: str, hint: str | None = None) -> Any:
    """A parsed JSON value as an instance of a type, such as a `msgspec.Struct` with bounds on its fields.

    Raises:
        FormatError: a key missing, unknown, or with a value of another type or out of bounds.
    """
    try:
        with located(where):  # a dataclass may check itself
            made = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise FormatError(_in_words(str(error), value), where=where, hint=hint) from None
    if unknown := _unknown(value, made):
        raise FormatError(f"unknown key {unknown}", where=where, hint=hint)
    return made


def _unknown(value: Any, made: Any, strict: bool = False, path: str = "") -> str:
    """The path of a key that a dataclass inside a strict `Struct` does not have; empty if there is none."""
    if not isinstance(value, dict) or isinstance(made, dict):
        return ""
    if isinstance(made, msgspec.Struct):
        strict = made.__struct_config__.forbid_unknown_fields
    elif strict and (strange := value.keys() - vars(made)):
        return f"{path}{min(strange)}"
    found = (_unknown(each, getattr(made, key, None), strict, f"{path}{key}.") for key, each in value.items())
    return next(filter(None, found), "")


def _in_words(message: str, value: Any) -> str:
    """msgspec's message with the key's path first, such as `moe.top_k is 0, not a whole number >= 1`."""
    why, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if key := re.match(r"Object (contains|missing) .* field `(.*)`", why):
        name = f"{path}.{key[2]}".lstrip(".")
        return f"unknown key {name}" if key[1] == "contains" else f"{name} is missing"
    if why.endswith("of length >= 1"):
        return f"{path} is empty"
    if why.startswith("Invalid enum value"):
        return f"{path} is {_shown(value, path)}, which is not supported"
    if wanted := re.match(r"Expected `(.*?)`(.*?)(, got .*)?$", why):
        shown = f"{path} is {_shown(value, path)}".lstrip()
        if choices := re.search(r"regex '\^\((.*)\)\$'", why):
            return f"{shown}, not one of {choices[1].replace('|', ', ')}"
        kinds = [WORDS.get(name, name) for name in wanted[1].split(" | ") if name != "null"]
        return f"{shown}, not {' or '.join(kinds)}{wanted[2]}"
    return f"{path}: {why}" if path else why[0].lower() + why[1:]


def _shown(value: Any, path: str) -> str:
    """The value at a path such as `moe.layers[3]`, short enough for a line."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):  # a name with a dot in it
            return "something"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return str(value)[:40]


def read_json_lines(path: Path, kind: Any = Any, *, max_bytes: int = MAX_JSON_BYTES) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line that is not blank; a line of at most `max_bytes`.

    Raises:
        FormatError: a line that is too long, no JSON, or of another type; a file that cannot be read.
    """
    with readable(path), open_input(path) as file:
        for number in itertools.count(1):
            line, where = file.readline(max_bytes + 1), f"{path}, line {number}"
            if not line:
                return
            if len(line) > max_bytes:
                raise FormatError(f"is longer than the {max_bytes} bytes that moeplan reads", where=where)
            if line.strip():
                yield where, convert(decode_json(line, where=where), kind, where)


def read_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each object in a file: one object, a list of them, or JSON lines of either."""
    for where, value in _values(path):
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            place = f"{where}, item {index}" if isinstance(value, list) else where
            yield place, convert(item, dict[str, Any], place)


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file; JSON lines if its first line is JSON by itself, else the whole file as one value."""
    lines = read_json_lines(path)
    try:
        first = next(lines, None)
    except FormatError:
        yield str(path), read_json(path)
        return
    if first is None:
        raise FormatError("is empty", where=str(path), hint="leave the file out")
    yield first
    yield from lines


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename; NaN and infinity are refused."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
