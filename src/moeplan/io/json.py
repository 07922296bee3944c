"""JSON that was read, checked against a type: every error names the file, the key and the value."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from moeplan.errors import FormatError

__all__ = ["convert"]

T = TypeVar("T")

#: msgspec's names of types, in words.
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


def convert(value: Any, kind: type[T], where: str, hint: str = "correct it") -> T:
    """A parsed JSON value as an instance of a type, such as a `msgspec.Struct` with bounds on its fields.

    Raises:
        FormatError: a key missing, unknown, or with a value of another type or out of bounds.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise FormatError(_in_words(str(error), value), where=where, hint=hint) from None


def _in_words(message: str, value: Any) -> str:
    """msgspec's message with the key's path first, such as `moe.top_k is 0, not a whole number >= 1`."""
    why, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if key := re.match(r"Object (contains|missing) .* field `(.*)`", why):
        name = f"{path}.{key[2]}".lstrip(".")
        return f"unknown key {name}" if key[1] == "contains" else f"{name} is missing"
    if wanted := re.match(r"Expected `(.*?)`(.*?)(, got .*)?$", why):
        if choices := re.search(r"regex '\^\((.*)\)\$'", why):
            return f"{path} is {_shown(value, path)}, not one of {choices[1].replace('|', ', ')}"
        kinds = [WORDS.get(kind, kind) for kind in wanted[1].split(" | ") if kind != "null"]
        return f"{path} is {_shown(value, path)}, not {' or '.join(kinds)}{wanted[2]}".lstrip()
    return f"{path}: {why}" if path else why[0].lower() + why[1:]


def _shown(value: Any, path: str) -> str:
    """The value at a path such as `moe.layers[3]`, short enough for a line."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):  # a name with a dot in it
            return "something"
    return "an object" if isinstance(value, dict) else str(value)[:40]
