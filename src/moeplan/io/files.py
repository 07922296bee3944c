"""Checksums of files, atomic writing, and checks of where results go."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moeplan.errors import FormatError, OutputError
from moeplan.io.paths import kind_of_special, open_input

__all__ = ["atomic_path", "cannot_write", "check_folder", "check_place", "is_taken", "make_folder", "sha256"]

_ELSEWHERE = "choose a place that you may write to"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path)) from None


def cannot_write(path: Path, error: OSError) -> OutputError:
    """What to say when a place cannot be written to."""
    return OutputError(f"cannot be written ({error.strerror})", where=str(path), hint=_ELSEWHERE)


def check_place(path: str | Path) -> None:
    """Refuse a place that a file cannot be written to, before the work is done rather than after it.

    Raises:
        OutputError: the folder is missing or not writable, or the path is a folder, a pipe, a socket or a device.
    """
    place = Path(path)
    why = None
    if place.is_dir():
        why = "it is a folder"
    elif kind := kind_of_special(place):  # writing ends with a rename, which would put a file in its place
        why = f"it is {kind}"
    elif not place.parent.is_dir():
        why = "its folder does not exist"
    elif not os.access(place.parent, os.W_OK):
        why = "no permission"
    if why:
        raise OutputError(f"cannot be written ({why})", where=str(place), hint=_ELSEWHERE)


def check_folder(path: str | Path) -> None:
    """The same for a folder that is made with all its parents.

    Raises:
        OutputError: on the way there is a file, or a folder that is not writable.
    """
    place = Path(path)
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "no permission" if there.is_dir() else f"{there} is no folder"
        raise OutputError(f"cannot be made ({why})", where=str(place), hint=_ELSEWHERE)


def is_taken(path: Path) -> bool:
    """Whether there is something at a path, an empty folder apart."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def make_folder(path: Path) -> bool:
    """Make a folder for a result, with its parents; False where it is there already, and empty.

    Raises:
        OutputError: the place is taken or cannot be made.
    """
    try:
        if is_taken(path):
            raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", where=str(path), hint=_ELSEWHERE) from None
    return made


@contextlib.contextmanager
def atomic_path(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """A temporary name beside `path`, renamed onto it when the block ends well and removed when it does not.

    Args:
        mode: permissions of the file, before the umask.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(mode & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
