"""Accelerators and their links, from the catalogue `data/hardware.json`, or a user's file of the same form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import asdict

from moeplan.errors import FormatError, UsageError
from moeplan.io.catalogue import find_name, plain_name, read_object
from moeplan.io.json import convert

__all__ = ["Hardware", "Link", "hardware_list", "hardware_names", "load_hardware"]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Link:
    """A network of one level.

    Attributes:
        bytes_per_s: of one GPU, one way, by datasheet.
        latency_s: of one message between two neighbours, by datasheet or measurement.
    """

    bytes_per_s: Annotated[float, Meta(ge=1e3, le=1e18)]
    latency_s: Annotated[float, Meta(ge=0.0, le=1.0)]


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

    def priced(self, usd_per_hour: float | None = None, watts: float | None = None) -> Hardware:
        """The same at another price or board power; None: as it is.

        Raises:
            UsageError: a negative one.
        """
        price = self.usd_per_hour if usd_per_hour is None else usd_per_hour
        power = self.watts if watts is None else watts
        for name, value in (("price", price), ("power", power)):
            if not value >= 0:
                raise UsageError(f"a {name} of {value:g} is negative")
        return replace(self, usd_per_hour=price, watts=power)


#: The fields that an entry must give: all of Hardware's but its name (the entry's key) and the sources (a user's own).
REQUIRED = tuple(field.name for field in fields(Hardware) if field.name not in ("name", "sources"))
Flops = Annotated[float, Meta(ge=1e9, le=1e21)]


class FlopsEntry(Struct, forbid_unknown_fields=True):
    """Operations per second by dtype."""

    bf16: Flops | None = None
    fp8: Flops | None = None
    int8: Flops | None = None
    fp4: Flops | None = None


class Notes(Struct, kw_only=True):
    """What an entry says beside the figures."""

    sources: dict[str, str] = {}
    aliases: list[str] = []


class Entry(Notes, forbid_unknown_fields=True, kw_only=True):
    """One accelerator in the catalogue's form."""

    flops: FlopsEntry
    memory_bytes: Annotated[float, Meta(ge=1e6, le=1e16)]
    memory_bytes_per_s: Annotated[float, Meta(ge=1e6, le=1e18)]
    scale_up: Link
    scale_up_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    scale_out: Link
    watts: Annotated[float, Meta(ge=1e-3, le=1e7)]
    usd_per_hour: Annotated[float, Meta(ge=0.0, le=1e6)]

    def hardware(self, name: str, where: str) -> Hardware:
        """The accelerator under its name."""
        given = {key: getattr(self, key) for key in (*REQUIRED, "sources")}
        flops = {dtype: rate for dtype, rate in asdict(self.flops).items() if rate is not None}
        if not flops:
            raise FormatError("flops is empty", where=where, hint='give e.g. {"bf16": 9.89e14}')
        return Hardware(name=name, **given | {"flops": flops})


def load_hardware(name: str | Hardware, file: str | Path | None = None) -> Hardware:
    """The accelerator of that name, in any case and with any of `-`, `_`, space between its parts.

    Args:
        name: a name or alias of the catalogue, or of `file`; a description is returned as it is.
        file: a JSON file in the form of `data/hardware.json` (docs/reference/catalogue.md). An entry whose name the
            catalogue knows overrides the fields it gives; a new one must give all but `sources` and `aliases`.

    Raises:
        UsageError: an unknown name.
        FormatError: a field of `file` that is missing, unknown, of a wrong type or out of range.
    """
    if isinstance(name, Hardware):
        return name
    entries, where = _entries(None if file is None else Path(file))
    key = find_name(name, {key: entry.get("aliases", []) for key, entry in entries.items()}, "hardware")
    place = f"{where.get(key, str(DATA / 'hardware.json'))}, {key}"
    return convert(entries[key], Entry, place, "docs/reference/catalogue.md lists the keys").hardware(key, place)


def hardware_list(
    names: str | Hardware | Sequence[str | Hardware],
    file: Path | None = None,
    usd_per_hour: float | None = None,
    watts: float | None = None,
) -> list[Hardware]:
    """Several accelerators: names or descriptions, or "A,B", or "all"; each once.

    Args:
        usd_per_hour, watts: another price and board power, where there is one accelerator.

    Raises:
        UsageError: an unknown name; a price or power where there are several. FormatError: as in `load_hardware`.
    """
    if isinstance(names, str):
        names = hardware_names(file) if names.strip().lower() == "all" else names.split(",")
    listed = [names] if isinstance(names, Hardware) else names
    found = [load_hardware(name.strip() if isinstance(name, str) else name, file) for name in listed]
    if len(unique := {each.name: each for each in found}) > 1 and (usd_per_hour, watts) != (None, None):
        what = "a power" if usd_per_hour is None else "a price"
        raise UsageError(f"{what} is of one kind of hardware, but {len(unique)} are given", hint="use a hardware file")
    return [each.priced(usd_per_hour, watts) for each in unique.values()]


def hardware_names(file: Path | None = None) -> tuple[str, ...]:
    """All names, as the catalogue and `file` spell them."""
    return tuple(_entries(file)[0])


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return read_object(DATA / "hardware.json")


def _entries(file: Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Raw entries by name, and which of them are from the user's file."""
    entries, where = dict(_catalogue()), {}
    for given, entry in ({} if file is None else read_object(file)).items():
        at = f"{file}, {given[:60]}"
        data = {key: value for key, value in convert(entry, dict[str, Any], at).items() if value is not None}
        notes = convert(data, Notes, at)
        spelt = ((known, (known, *old.get("aliases", []))) for known, old in entries.items())
        name = next((known for known, names in spelt if plain_name(given) in map(plain_name, names)), given)
        own = dict.fromkeys((key for key in data if key in REQUIRED), f"given in {file}")
        sources = entries.get(name, {}).get("sources", {}) | own | notes.sources
        entries[name] = entries.get(name, {}) | data | {"sources": sources}
        where[name] = str(file)
    return entries, where
