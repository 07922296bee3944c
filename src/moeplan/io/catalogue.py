"""Catalogues in JSON that users may extend: names in any spelling, and objects read key by key, each fault named."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError, UsageError
from moeplan.io.paths import open_input

__all__ = ["Fields", "find_name", "plain_name", "read_object"]

MAX_FILE_BYTES = 4 * 1024 * 1024


def find_name(name: str, known: Mapping[str, Iterable[str]], what: str, hint: str = "") -> str:
    """The key of `known` (key: its aliases) that `name` means; an unknown one is an error that names the near ones."""
    spelt = {plain_name(word): key for key, aliases in known.items() for word in (key, *aliases)}
    if plain_name(name) in spelt:
        return spelt[plain_name(name)]
    holding = [word for word in spelt if plain_name(name) and plain_name(name) in word]
    close = difflib.get_close_matches(plain_name(name)[:80], spelt, n=5, cutoff=0.5)
    near = list(dict.fromkeys(spelt[word] for word in (*holding, *close)))[:5]
    some = f"near it: {', '.join(near)}" if near else f"the catalogue has {', '.join(known)}"
    raise UsageError(f'unknown {what} "{name[:80]}"', hint=some + hint)


@functools.lru_cache(maxsize=1024)
def plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def read_object(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """A JSON file that holds one object, read whole only if it is small; never evaluated."""
    try:
        with open_input(path) as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise FormatError(f"is larger than the {max_bytes} bytes that moeplan reads", where=str(path))
        data = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}: {error.msg.removesuffix(' at')}"
        raise FormatError(f"is not whole JSON ({why})", where=str(path)) from None
    except (ValueError, RecursionError):
        raise FormatError("is not JSON in UTF-8", where=str(path)) from None
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object", where=str(path), hint="see docs/catalogue.md")
    return data


class Fields:
    """One JSON object, read key by key. null counts as absent, as in Transformers' configurations."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def only(self, keys: Iterable[str]) -> None:
        """Refuse a key that is none of these: most likely a typing error."""
        allowed = tuple(keys)
        for key in self.data:
            if key not in allowed:
                raise FormatError(f"unknown key {str(key)[:60]}", where=self.where, hint=f"use {', '.join(allowed)}")

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def whole(self, key: str, low: int, top: int, default: int | None = None) -> int:
        """A whole number in low..top; absent: the default, or an error where there is none."""
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= top:
            raise self._wrong(key, value, f"a whole number in {low}..{top}")
        return value

    def number(self, key: str, low: float, top: float) -> float:
        """A number in low..top (NaN is in no range)."""
        value = self._get(key, None)
        if type(value) not in (int, float) or not low <= value <= top:
            raise self._wrong(key, value, f"a number in {low:g}..{top:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        value, known = self._get(key, default), tuple(choices)
        if type(value) is not str or value not in known:
            raise self._wrong(key, value, f"one of {', '.join(known)}")
        return value

    def inner(self, key: str) -> Fields:
        """The object under a key."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.where}, {key}")

    def items(self, key: str, length: int) -> list[Any]:
        """A list of at most `length` values, unchecked."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) > length:
            raise self._wrong(key, value, f"a list of at most {length}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            raise FormatError(f"{key} is missing", where=self.where, hint="add it; docs/catalogue.md says what it is")
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> FormatError:
        return FormatError(f"{key} is {str(value)[:40]}, not {wanted}", where=self.where, hint="correct it")
