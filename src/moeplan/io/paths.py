"""Which paths may be read and which may be written: no pipe or device as input, no result over an input."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path

from moeplan.errors import FormatError, UsageError

__all__ = ["check_input", "check_outputs", "kind_of_special", "open_input", "readable"]

#: What marks a directory that moeplan wrote: nothing else is written into it.
OWN_DIRECTORY = ("trace.json", "plan.json", "counts.json")
#: What a path may be besides a file and a folder.
_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_input(path: Path) -> int:
    """Size of a file that is going to be read; every reader calls this, or `open_input`, before it opens the file.

    Raises:
        FormatError: it is a pipe, a socket or a device: reading from those may never end.
        OSError: it does not exist, or its folder may not be searched.
    """
    found = path.stat()
    kind = _kind(found)
    if kind:
        raise FormatError(f"cannot be read (it is {kind})", where=str(path), hint="give a regular file")
    return found.st_size


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong with a file or folder in the block, as an error that names it."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None


def open_input(path: Path) -> BufferedReader:
    """Open a file for reading, in bytes, after `check_input`."""
    check_input(path)
    return path.open("rb")


def kind_of_special(path: Path) -> str:
    """What a path is, if it is neither a file nor a folder; /dev/stdout is a device whatever it stands for."""
    if path.parent == Path("/dev"):
        return "a device"
    with contextlib.suppress(OSError):
        return _kind(path.stat())
    return ""


def _kind(found: os.stat_result) -> str:
    return next((name for is_kind, name in _SPECIAL if is_kind(found.st_mode)), "")


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Refuse a command whose results would be written over what it reads, or over each other.

    Paths are compared as the file system sees them: links of both kinds are followed.

    Args:
        outputs: what is written, by flag: `{"--json": json, "-o": output}`; None and "-" (standard output) are ignored.
        inputs: every file and directory that is read; None, and names that are no path (a model, a kind of GPU), are
            ignored.

    Raises:
        UsageError: an output is an input, lies in a trace, plan or counts profile that is read, is an existing file in
            any other directory that is read, or holds an input; or two outputs are the same.
    """
    places = {flag: _real(path) for flag, path in outputs.items() if path is not None and str(path) != "-"}
    sources = [(path, _real(path)) for path in inputs if path is not None]
    for number, (flag, place) in enumerate(places.items()):
        for other in list(places)[:number]:
            if place == places[other] or _identity(place) & _identity(places[other]):
                raise UsageError(
                    f"{other} and {flag} are the same file, {outputs[flag]}", hint="give each a path of its own"
                )
        for source, real in sources:
            if real.exists() and (place == real or place in real.parents or _is_read(place, real)):
                raise UsageError(
                    f"{flag} {outputs[flag]} would be written over {source}, which is read",
                    hint="give it a path of its own",
                )


def _real(path: str | Path) -> Path:
    """The path without links; unlike `Path.resolve`, a loop of links is no error."""
    return Path(os.path.realpath(path))


def _is_read(place: Path, source: Path) -> bool:
    """Whether an output is a file of an input, or would be put into a directory that moeplan wrote."""
    own = any((source / name).is_file() for name in OWN_DIRECTORY)
    if source in place.parents and (own or place.exists()):
        return True
    identity = _identity(place)
    files = [source, *source.glob("*"), *source.glob("*/*")] if source.is_dir() else [source]
    return bool(identity) and any(identity & _identity(path) for path in files)


def _identity(path: Path) -> set[tuple[int, int]]:
    """Device and inode of a path, empty where there is nothing: names of one file have the same."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return {(found.st_dev, found.st_ino)}
    return set()
