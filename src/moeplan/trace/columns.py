"""Columns of parquet files: made from arrays, and read back with checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.io.paths import check_input
from moeplan.trace.format import PHASES

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["list_column", "list_values", "phase_column", "phase_names", "read_columns"]


def phase_column(codes: npt.NDArray[np.int8]) -> pa.Array:
    """Dictionary column from indices into `PHASES`."""
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(PHASES))


def phase_names(column: pa.Array) -> npt.NDArray[np.str_]:
    """The phases of a column as text, however it is encoded."""
    names = np.asarray(column.dictionary.to_pylist() if hasattr(column, "dictionary") else [], dtype=str)
    codes = column.indices.to_numpy(zero_copy_only=False) if len(names) and not column.null_count else None
    return names[codes] if codes is not None else np.asarray(column.to_pylist(), dtype=str)


def list_column(schema: pa.Schema, name: str, blocks: Sequence[npt.NDArray[Any]]) -> pa.Array:
    """A fixed-size list column of the schema from the values of its rows, block after block."""
    import pyarrow as pa

    values = np.concatenate([block.reshape(-1) for block in blocks])
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=schema.field(name).type)


def read_columns(path: Path, names: list[str], *, at_most: int, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Whole columns of a file whose footer declares no more rows than `at_most`; `optional` ones where present."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_input(path)
        footer = pq.read_metadata(path)
        if footer.num_rows > at_most:
            raise FormatError(f"declares {footer.num_rows} rows, expected at most {at_most}", where=str(path))
        present = [name for name in optional if name in footer.schema.names]
        table = pq.read_table(path, columns=[*names, *present], memory_map=False)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise FormatError(
            f"is not a valid parquet file with columns {', '.join(names)} ({str(error).splitlines()[0][:120]})",
            where=str(path),
            hint="it may be truncated: record or import again",
        ) from None
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise FormatError(f"has no column {missing[0]!r}", where=str(path))
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def list_values(column: Any, width: int, path: Path, what: str = "picks") -> np.ndarray[Any, np.dtype[Any]]:
    """The values of a list column whose every row must hold `width` of them."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_fixed_size_list(column.type):
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise FormatError(f"a list column was expected, not {column.type}", where=str(path))
        lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            row = int(np.argmax(lengths != width))
            raise FormatError(f"row {row}: {lengths[row]} {what}, expected {width}", where=str(path))
    elif column.type.list_size != width:
        raise FormatError(f"row 0: {column.type.list_size} {what}, expected {width}", where=str(path))
    values = column.flatten()
    if values.null_count or column.null_count:
        raise FormatError(f"holds empty (null) {what}", where=str(path))
    array = np.asarray(values.to_numpy(zero_copy_only=False))
    return array if array.flags.writeable else array.copy()  # one kind of array, one compiled loop
