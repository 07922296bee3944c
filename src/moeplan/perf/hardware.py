"""Accelerators and their links, from the catalogue `data/hardware.json`, or a user's file of the same form.

Also `Fields`, by which this room reads any JSON object that may be wrong: each fault names the file, the key, the mend.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError, UsageError

__all__ = ["Fields", "Hardware", "Link", "find_name", "hardware", "hardware_names", "read_object"]

DATA = Path(__file__).parent / "data"
MAX_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Link:
    """A network of one level.

    Attributes:
        bytes_per_s: of one GPU, one way, by datasheet.
        latency_s: of one message between two neighbours, by datasheet or measurement.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """One accelerator and the networks it sits in.

    Attributes:
        name: as in the catalogue.
        flops: dense peak operations per second (2 per multiply-add) by dtype: bf16, fp8, int8, fp4, where it has them.
        memory_bytes, memory_bytes_per_s: capacity and peak bandwidth of one accelerator.
        scale_up: the fast network inside a node or rack; scale_up_size: how many accelerators it joins.
        scale_out: the network between those.
        watts: board power; usd_per_hour: a stated price of one accelerator; both the user may override.
        sources: where each figure is from, by field.
    """

    name: str
    flops: dict[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    scale_up: Link
    scale_up_size: int
    scale_out: Link
    watts: float
    usd_per_hour: float
    sources: dict[str, str]


#: The fields that an entry must give: all of Hardware's but its name (the entry's key) and the sources (a user's own).
REQUIRED = tuple(field.name for field in fields(Hardware) if field.name not in ("name", "sources"))
DTYPES = ("bf16", "fp8", "int8", "fp4")


def hardware(name: str, extra: Path | None = None) -> Hardware:
    """The accelerator of that name, in any case and with any of `-`, `_`, space between its parts.

    Args:
        name: a name or alias of the catalogue, or of `extra`.
        extra: a JSON file in the form of `data/hardware.json` (docs/catalogue.md). An entry whose name the catalogue
            knows overrides the fields it gives; a new one must give all but `sources` and `aliases`.

    Raises:
        UsageError: an unknown name.
        FormatError: a field of `extra` that is missing, unknown, of a wrong type or out of range.
    """
    entries, where = _entries(extra)
    key = find_name(name, {key: entry.get("aliases", []) for key, entry in entries.items()}, "hardware")
    return _hardware(key, entries[key], where.get(key, str(DATA / "hardware.json")))


def hardware_names(extra: Path | None = None) -> tuple[str, ...]:
    """All names, as the catalogue and `extra` spell them."""
    return tuple(_entries(extra)[0])


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return read_object(DATA / "hardware.json")


def _entries(extra: Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Raw entries by name, and the file of those that `extra` touched."""
    entries, where = dict(_catalogue()), {}
    for given, entry in ({} if extra is None else read_object(extra)).items():
        if not isinstance(entry, dict):
            raise FormatError(f"{given[:60]} is not an object", where=str(extra), mend="see docs/catalogue.md")
        spelt = ((known, (known, *old.get("aliases", []))) for known, old in entries.items())
        name = next((known for known, names in spelt if _plain(given) in map(_plain, names)), given)
        data = Fields(entry, f"{extra}, {given[:60]}")
        if any(type(alias) is not str for alias in (data.items("aliases", 100) if data.has("aliases") else ())):
            raise FormatError("aliases is not a list of names", where=data.where)
        own = dict.fromkeys((key for key in entry if key in REQUIRED), f"given in {extra}")
        sources = entries.get(name, {}).get("sources", {}) | own
        if data.has("sources"):
            sources |= data.inner("sources").data
        entries[name] = entries.get(name, {}) | {k: v for k, v in entry.items() if v is not None} | {"sources": sources}
        where[name] = str(extra)
    return entries, where


def _hardware(name: str, entry: dict[str, Any], where: str) -> Hardware:
    data = Fields(entry, f"{where}, {name}")
    data.only((*REQUIRED, "sources", "aliases"))
    flops = data.inner("flops")
    flops.only(DTYPES)
    if not flops.data:
        raise FormatError("flops is empty", where=data.where, mend='give e.g. {"bf16": 9.89e14}')
    return Hardware(
        name=name,
        flops={dtype: flops.number(dtype, 1e9, 1e21) for dtype in DTYPES if dtype in flops.data},
        memory_bytes=data.number("memory_bytes", 1e6, 1e16),
        memory_bytes_per_s=data.number("memory_bytes_per_s", 1e6, 1e18),
        scale_up=_link(data.inner("scale_up")),
        scale_up_size=data.whole("scale_up_size", 1, 1 << 24),
        scale_out=_link(data.inner("scale_out")),
        watts=data.number("watts", 1e-3, 1e7),
        usd_per_hour=data.number("usd_per_hour", 0.0, 1e6),
        sources={key: str(text) for key, text in data.inner("sources").data.items()},
    )


def _link(data: Fields) -> Link:
    data.only(("bytes_per_s", "latency_s"))
    return Link(data.number("bytes_per_s", 1e3, 1e18), data.number("latency_s", 0.0, 1.0))


def find_name(name: str, known: Mapping[str, Iterable[str]], what: str, mend: str = "") -> str:
    """The key of `known` (key: its aliases) that `name` means; an unknown one is an error that names the near ones."""
    spelt = {_plain(word): key for key, aliases in known.items() for word in (key, *aliases)}
    if _plain(name) in spelt:
        return spelt[_plain(name)]
    holding = [word for word in spelt if _plain(name) and _plain(name) in word]
    close = difflib.get_close_matches(_plain(name)[:80], spelt, n=5, cutoff=0.5)
    near = list(dict.fromkeys(spelt[word] for word in (*holding, *close)))[:5]
    some = f"near it: {', '.join(near)}" if near else f"the catalogue has {', '.join(known)}"
    raise UsageError(f'unknown {what} "{name[:80]}"', mend=some + mend)


@functools.lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def read_object(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """A JSON file that holds one object, read whole only if it is small; never evaluated."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise FormatError(f"is larger than the {max_bytes} bytes that moeplan reads", where=str(path))
        data = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), mend="check the path") from None
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}: {error.msg.removesuffix(' at')}"
        raise FormatError(f"is not whole JSON ({why})", where=str(path)) from None
    except (ValueError, RecursionError):
        raise FormatError("is not JSON in UTF-8", where=str(path)) from None
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object", where=str(path), mend="see docs/catalogue.md")
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
                raise FormatError(f"unknown key {str(key)[:60]}", where=self.where, mend=f"use {', '.join(allowed)}")

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
            raise FormatError(f"{key} is missing", where=self.where, mend="add it; docs/catalogue.md says what it is")
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> FormatError:
        return FormatError(f"{key} is {str(value)[:40]}, not {wanted}", where=self.where, mend="correct it")
