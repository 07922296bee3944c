"""Reading and writing files that may be wrong, cut off, huge or hostile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError, OutputError
from moeplan.io.paths import check_input, kind_of_special, open_input

__all__ = ["atomic_path", "cannot_write", "check_folder", "check_place", "read_json", "sha256", "write_json"]

#: No JSON file that moeplan reads whole is larger: a bigger one is refused before it is opened.
MAX_JSON_BYTES = 256 * 1024 * 1024


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file; a bomb (huge, or nested without end), a cut-off or a binary file is one clear line."""
    try:
        size = check_input(path)
        if size > max_bytes:
            raise FormatError(f"{size} bytes of JSON are more than the {max_bytes} that moeplan reads", where=str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", where=str(path)) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"is not whole JSON ({error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno})",
            where=str(path),
            hint="the file may be cut off: copy or record it again",
        ) from None
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise FormatError(f"is JSON that moeplan does not accept: {why}", where=str(path)) from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path)) from None


def cannot_write(path: Path, error: OSError) -> OutputError:
    """What to say when a place cannot be written to."""
    return OutputError(
        f"cannot be written ({error.strerror})", where=str(path), hint="choose a place that you may write to"
    )


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
        raise OutputError(f"cannot be written ({why})", where=str(place), hint="choose a place that you may write to")


def check_folder(path: str | Path) -> None:
    """The same for a folder that is made with all its parents.

    Raises:
        OutputError: on the way there is a file, or a folder that is not writable.
    """
    place = Path(path)
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "no permission" if there.is_dir() else f"{there} is no folder"
        raise OutputError(f"cannot be made ({why})", where=str(place), hint="choose a place that you may write to")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed onto it when the block ends well and removed when it does not."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
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


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename; NaN and infinity are refused rather than written."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
