"""Reading small .safetensors files of whole numbers, without the library: a header in JSON, then plain bytes.

Format as in the safetensors README: 8 bytes with the header's length, the header {name: {dtype, shape, data_offsets}},
then the data, which the tensors cover without a gap or an overlap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.io.paths import check_input

__all__ = ["read_integer_vectors"]

MAX_FILE_BYTES = 1024 * 1024 * 1024
MAX_HEADER_BYTES = 128 * 1024 * 1024
DTYPES = {"I64": "<i8", "I32": "<i4"}
_CUT_OFF = "it may be cut off: copy or record it again"


def read_integer_vectors(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    """{name: int64 [n]} of every tensor; a file with anything but vectors of int32 or int64 is refused."""
    where = str(path)
    try:
        if check_input(path) > MAX_FILE_BYTES:
            raise FormatError(f"more than the {MAX_FILE_BYTES} bytes that moeplan reads", where=where)
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=where, hint="check the path") from None
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise FormatError("is not a whole .safetensors file", where=where, hint=_CUT_OFF)
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise FormatError("has a header that is not JSON", where=where, hint=_CUT_OFF) from None
    if not isinstance(header, dict):
        raise FormatError("has a header that is no object", where=where)
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + length :]
    spans = sorted((*_span(name, item, where), name) for name, item in header.items())
    covered = 0
    for begin, end, _, name in spans:
        if begin != covered:
            raise FormatError(f"tensor {name[:40]!r} overlaps another or leaves a gap", where=where)
        covered = end
    if covered != len(body):
        raise FormatError(f"has {len(body)} bytes of data, its tensors {covered}", where=where, hint=_CUT_OFF)
    return {name: np.frombuffer(body[begin:end], dtype).astype(np.int64) for begin, end, dtype, name in spans}


def _span(name: str, item: Any, where: str) -> tuple[int, int, str]:
    """(first byte, byte after the last, NumPy's name of the type) of one tensor."""
    item = item if isinstance(item, dict) else {}
    dtype, shape, offsets = DTYPES.get(str(item.get("dtype"))), item.get("shape"), item.get("data_offsets")
    good = (
        dtype is not None
        and isinstance(shape, list)
        and len(shape) == 1
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(number) is int and number >= 0 for number in [*shape, *offsets])
        and offsets[1] - offsets[0] == shape[0] * np.dtype(dtype).itemsize
    )
    if not good or dtype is None or not isinstance(offsets, list):
        raise FormatError(f"tensor {name[:40]!r} is no vector of int32 or int64", where=where)
    return offsets[0], offsets[1], dtype
