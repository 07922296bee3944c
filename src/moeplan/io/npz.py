"""Reading files that somebody else made: cut off, hostile, or larger than they look.

An .npz is read member by member: its header is checked against bounds before anything else is decompressed, pickled
objects are refused, and the one large array is streamed, so that a zip bomb cannot take more memory than one request.
"""

from __future__ import annotations

import contextlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.io.paths import check_input

__all__ = ["ArrayStream", "Npz", "open_npz", "read_npy_header"]

#: Largest array that is read whole (offsets, lengths, labels), and largest block of a streamed one, in bytes.
MAX_SMALL_BYTES = 256 * 1024 * 1024
MAX_BLOCK_BYTES = 2 * 1024 * 1024 * 1024
#: A streamed array declares at most this much; more is a bomb or a set to be split before import.
MAX_STREAM_BYTES = 256 * 1024 * 1024 * 1024
#: A .npy header is a line or two of text.
MAX_HEADER_BYTES = 64 * 1024

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
_CUT_OFF = "it may be cut off: copy it again"


class ArrayStream:
    """One array of an .npz, read front to back along its first axis.

    Attributes:
        shape, dtype: as its header declares them.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
        self._file, self.shape, self.dtype, self._where = file, shape, dtype, where

    def take(self, rows: int) -> npt.NDArray[Any]:
        """The next `rows` items of the first axis."""
        size = rows * int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize
        if size > MAX_BLOCK_BYTES:
            raise FormatError(f"{rows} rows at once are more than moeplan reads", where=self._where)
        with _reading(self._where):
            data = self._file.read(size)
        if len(data) != size:
            raise FormatError("ends before its declared shape is full", where=self._where, hint=_CUT_OFF)
        return np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])

    def finish(self) -> None:
        """Read to the end, which is where the zip's own checksum is compared."""
        with _reading(self._where):
            if self._file.read(1):
                raise FormatError("holds more than its declared shape", where=self._where)


class Npz:
    """An open .npz whose arrays are checked before they are read; use `open_npz`."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self.path = archive, path

    @property
    def names(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def small(self, name: str, *, kinds: str, ndim: int) -> npt.NDArray[Any]:
        """A whole array of at most 256 MiB; `kinds` are NumPy dtype kinds, e.g. 'iu' for integers."""
        with self.stream(name, kinds=kinds, ndim=ndim, max_bytes=MAX_SMALL_BYTES) as array:
            if ndim == 0:
                array.shape = (1,)
                values = array.take(1).reshape(())
            else:
                values = array.take(array.shape[0])
            array.finish()
        return values

    @contextlib.contextmanager
    def stream(self, name: str, *, kinds: str, ndim: int, max_bytes: int = MAX_STREAM_BYTES) -> Iterator[ArrayStream]:
        """An array to be taken piece by piece.

        Raises:
            FormatError: no such array, a wrong type or number of dimensions, more than `max_bytes`, a broken zip.
        """
        where = f"{self.path}, array {name}"
        if name not in self.names:
            raise FormatError(
                f"has no array {name!r}", where=str(self.path), hint=f"it holds {', '.join(self.names[:12]) or 'none'}"
            )
        with _reading(where):
            file = self._archive.open(f"{name}.npy")
        with file:
            shape, dtype = read_npy_header(file, where)
            if dtype.kind not in kinds or len(shape) != ndim:
                raise FormatError(
                    f"is {dtype} of {len(shape)} dimensions, expected {_kind_names(kinds)} of {ndim}", where=where
                )
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size > max_bytes:
                raise FormatError(f"declares {size} bytes, more than the {max_bytes} that moeplan reads", where=where)
            yield ArrayStream(file, shape, dtype, where)


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open an .npz; a file that is no whole zip is one clear line."""
    with _reading(str(path)):
        check_input(path)
        archive = zipfile.ZipFile(path)
    with archive:
        yield Npz(archive, path)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FormatError("does not exist", where=where, hint="check the path") from None
    except (IsADirectoryError, PermissionError) as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=where, hint="check the path") from None
    except _BROKEN as error:
        raise FormatError(f"is not a whole .npz ({str(error)[:100]})", where=where, hint=_CUT_OFF) from None


def read_npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the .npy that a file is at; NumPy's parser evaluates literals only, and its length is bounded.

    Raises:
        FormatError: no header, one that is truncated, or an array of objects or in column order.
    """
    with _reading(where):
        try:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(file, max_header_size=MAX_HEADER_BYTES)
        except (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
            reason = str(error).splitlines()[0][:100] if str(error) else "no header"
            raise FormatError(f"is not a whole .npy array ({reason})", where=where, hint=_CUT_OFF) from None
    if dtype.hasobject:
        raise FormatError("holds Python objects, which are never loaded", where=where, hint="save plain numbers")
    if fortran and len(shape) > 1:
        raise FormatError("is stored column by column", where=where, hint="save np.ascontiguousarray of it")
    if any(size < 0 for size in shape):
        raise FormatError(f"declares the shape {shape}", where=where)
    return tuple(int(size) for size in shape), dtype


def _kind_names(kinds: str) -> str:
    return {"iu": "whole numbers", "U": "text"}.get(kinds, kinds)
