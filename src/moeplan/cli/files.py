"""The files of a command: every output is checked against every input before any work."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moeplan.embedded import TRACE, WORD
from moeplan.errors import OutputError, UsageError

__all__ = ["File", "check_files"]

EMBEDDED = TRACE.parent
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

    found = list(_files(typing.get_type_hints(command, include_extras=True), arguments))
    outputs = [(kind, path) for kind, path in found if kind != "input"]
    _check_outputs([path for _, path in outputs], [path for kind, path in found if kind == "input"])
    for kind, path in outputs:
        if kind in ("new file", "new folder") and path.exists():
            raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
        if kind.endswith("file"):
            check_place(path)
        elif kind == "new folder":
            check_folder(path)


def _check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Refuse an output that is an input, or lies in one, or is another output."""
    for place, output in enumerate(outputs):
        target = output.resolve()
        for other in (*inputs, *outputs[:place]):
            source = EMBEDDED if str(other) == WORD and not other.exists() else other.resolve()
            same = target == source or (target.exists() and source.exists() and target.samefile(source))
            if same or (source.is_dir() and source in target.parents):
                raise UsageError(f"{output} would be written over {other}", hint="give every output a place of its own")


def _files(hints: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[Kind, Path]]:
    """Kind and path of each file, through groups of flags."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = typing.get_type_hints(type(value), include_extras=True)
            yield from _files(inner, {field: getattr(value, field) for field in inner})
        elif value is not None and (kind := _kind(hints[name])):
            for path in value if isinstance(value, list | tuple) else [value]:
                if str(path) != "-":
                    yield kind, Path(path)


def _kind(hint: Any) -> Kind | None:
    """The mark in a type: in its own metadata, or in that of a member of a union."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, File):
            return mark.kind
    return next(filter(None, map(_kind, typing.get_args(hint))), None)
