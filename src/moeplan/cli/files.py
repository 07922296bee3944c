"""The files of a command: every output is checked against every input before any work."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moeplan.embedded import TRACE, WORD
from moeplan.errors import OutputError

__all__ = ["File", "check_files"]

Kind = Literal["input", "file", "new file", "folder", "new folder"]


@dataclasses.dataclass(frozen=True)
class File:
    """Marks a parameter as the path of an input (or as a name in whose place a path may stand), or of an output.

    Attributes:
        kind: "file": may be overwritten; "new file", "new folder": must not exist; "folder": the library decides.
    """

    kind: Kind


def check_files(command: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse outputs that would destroy an input or another output, that exist, or that cannot be written.

    Args:
        command: its parameters are marked with `File`. arguments: their values by name.

    Raises:
        OutputError, UsageError: naming the output.
    """
    from moeplan.io.files import check_folder, check_place
    from moeplan.io.paths import check_outputs

    found = list(_files(typing.get_type_hints(command, include_extras=True), arguments))
    outputs = [(flag, kind, path) for flag, kind, path in found if kind != "input"]
    check_outputs({flag: path for flag, _, path in outputs}, [path for _, kind, path in found if kind == "input"])
    for _, kind, path in outputs:
        if kind in ("new file", "new folder") and path.exists():
            raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
        if kind.endswith("file"):
            check_place(path)
        elif kind == "new folder":
            check_folder(path)


def _files(hints: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, Kind, Path]]:
    """Flag, kind and path of each file, through groups of flags."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = typing.get_type_hints(type(value), include_extras=True)
            yield from _files(inner, {field: getattr(value, field) for field in inner})
        elif value is not None and (kind := _kind(hints[name])):
            for path in value if isinstance(value, list | tuple) else [value]:
                if str(path) != "-":
                    word = str(path) == WORD and not Path(path).exists()
                    yield f"--{name.replace('_', '-')}", kind, TRACE if word else Path(path)


def _kind(hint: Any) -> Kind | None:
    """The mark in a type: in its own metadata, or in that of a member of a union."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, File):
            return mark.kind
    return next(filter(None, map(_kind, typing.get_args(hint))), None)
