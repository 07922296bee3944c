"""Files with the prompt features of the requests of a part: `prompts-NNNNN.parquet`, one row per request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError
from moeplan.io.files import atomic_path
from moeplan.trace.columns import read_columns
from moeplan.trace.prompts import PRIVATE, PromptFeatures, PromptKind, Uint32Array

__all__ = ["read_prompts", "write_prompts"]

#: Far above any context window, far below what would exhaust memory.
MAX_PROMPT_TOKENS = 2**26


def write_prompts(path: Path, parts: Sequence[PromptFeatures]) -> None:
    """Write the features of the requests of a part, of one kind, to a file that only its owner can read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = [0]
    for part in parts:
        offsets += (part.offsets[1:] + offsets[-1]).tolist()
    columns = {"tokens": _list(offsets, [part.tokens for part in parts])}
    if parts[0].kind == "hashed":
        columns["counts"] = _list(offsets, [part.counts for part in parts])
    with atomic_path(path, mode=PRIVATE) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _list(offsets: list[int], values: Sequence[Any]) -> Any:
    """An Arrow column of lists."""
    import pyarrow as pa

    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(values)))


def read_prompts(paths: Sequence[tuple[Path, int]], kind: PromptKind, key: str) -> PromptFeatures:
    """The features in the files of a trace, (file, requests) each.

    Raises:
        FormatError: a file that is not parquet, or does not hold what it must.
    """
    tokens, counts, ends = [], [], [np.zeros(1, np.int64)]
    for path, requests in paths:
        names = ["tokens"] + ["counts"] * (kind == "hashed")
        columns = read_columns(path, names, at_most=requests)
        length, values = _values(columns["tokens"], np.dtype(np.uint32), path)
        if len(length) != requests:
            raise FormatError(f"{len(length)} prompts for {requests} requests", where=str(path))
        tokens.append(values)
        if kind == "hashed":
            same, number = _values(columns["counts"], np.dtype(np.uint16), path)
            if not np.array_equal(same, length):
                raise FormatError("counts do not match the hashes", where=str(path))
            if len(number) and int(number.min()) < 1:
                raise FormatError("a count is 0", where=str(path))
            counts.append(number)
            _check_ascending(values, length, path)
        ends.append(np.cumsum(length) + ends[-1][-1])
    joined = np.concatenate(counts) if kind == "hashed" else None
    return PromptFeatures(kind, np.concatenate(ends), np.concatenate(tokens), joined, key)


def _values(column: Any, dtype: np.dtype[Any], path: Path) -> tuple[Int64Array, npt.NDArray[Any]]:
    """(length of each row, values) of a column of lists without nulls."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise FormatError(f"a list column was expected, not {column.type}", where=str(path))
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise FormatError("holds empty (null) prompts or tokens", where=str(path))
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "ui" or (values.size and (values.min() < 0 or values.max() > np.iinfo(dtype).max)):
        raise FormatError(f"column holds {values.dtype}, not {dtype}", where=str(path))
    length = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    if len(length) and int(length.max()) > MAX_PROMPT_TOKENS:
        raise FormatError(f"a prompt of {length.max()} tokens", where=str(path))
    return length, values.astype(dtype)


def _check_ascending(hashes: Uint32Array, length: Int64Array, path: Path) -> None:
    """Raise FormatError where the hashes of a prompt do not rise."""
    row = np.repeat(np.arange(len(length)), length)
    wrong = (np.diff(hashes.astype(np.int64)) <= 0) & (row[1:] == row[:-1])
    if wrong.any():
        raise FormatError(f"row {row[int(np.argmax(wrong))]}: hashes must rise", where=str(path))
