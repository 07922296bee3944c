"""The form of a trace that holds no token rows: counts of picks, summed over N requests of one domain.

A part has one row for each sum and phase; `docs/trace-format.md` says what MUST and MAY be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError
from moeplan.trace.columns import list_column, list_values, phase_column, phase_names, read_columns
from moeplan.trace.format import PHASES, Requests
from moeplan.types import ModelShape

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SUMS_VERSION", "Sums", "one_phase", "read_sums", "sums_table"]

#: Version 1 knows token rows only, so its readers must refuse this form.
SUMS_VERSION = 2

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Sums:
    """Consecutive sums: one part of a trace.

    Attributes:
        first: number of the first sum.
        counts: uint32 [3, n, L, E], picks by phase, in the order of `PHASES`.
    """

    first: int
    counts: Counts

    def __len__(self) -> int:
        return len(self.counts[0])


def sums_schema(shape: ModelShape) -> pa.Schema:
    """The Arrow schema of a part: one row for each sum and phase."""
    import pyarrow as pa

    cells = pa.list_(pa.field("item", pa.uint32(), nullable=False), shape.num_layers * shape.num_experts)
    return pa.schema(
        [
            pa.field("request", pa.uint32(), nullable=False),
            pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("counts", cells, nullable=False),
        ]
    )


def sums_table(shape: ModelShape, items: Sequence[Counts], first: int) -> pa.Table:
    """Sums as a part.

    Args:
        items: uint32 [3, L, E] each, picks by phase; a phase without picks gets no row.
        first: the number of the first sum.
    """
    import pyarrow as pa

    schema = sums_schema(shape)
    number, phase = np.nonzero([counts.any(axis=(1, 2)) for counts in items])
    columns = [
        pa.array((first + number).astype(np.uint32)),
        phase_column(phase.astype(np.int8)),
        list_column(schema, "counts", [items[i][p] for i, p in zip(number.tolist(), phase.tolist(), strict=True)]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def read_sums(path: Path, first: int, requests: Requests, shape: ModelShape) -> Sums:
    """Read a part and hold it to the table of sums.

    Args:
        first: the number of its first sum.
        requests: those sums, and no others.
        shape: the model as stored.

    Raises:
        FormatError: rows that are not those sums and phases, or counts that are not k picks a token and layer.
    """
    layers, experts = shape.num_layers, shape.num_experts
    tokens = np.stack((requests.prefill_known, requests.decode, np.where(requests.prefill < 0, requests.rows, 0)), 1)
    number, phase = np.nonzero(tokens)  # what the part must hold, row by row
    columns = read_columns(path, ["request", "phase", "counts"], at_most=len(number))
    found = columns["request"].to_numpy(zero_copy_only=False)
    if len(found) != len(number):
        raise FormatError(f"{len(found)} rows, but requests.parquet counts {len(number)}", where=str(path))
    wrong = (found != first + number) | (phase_names(columns["phase"]) != np.array(PHASES)[phase])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FormatError(
            f"row {row}: request {found[row]} where {PHASES[phase[row]]} of {first + number[row]} belongs",
            where=str(path),
        )
    values = list_values(columns["counts"], layers * experts, path, "counts")
    if values.dtype.kind not in "ui":
        raise FormatError(f"column counts holds {values.dtype}, not whole numbers", where=str(path))
    values = values.reshape(-1, layers, experts)
    wrong = (values.sum(axis=2, dtype=np.int64) != tokens[number, phase, None] * shape.top_k).any(axis=1)
    if wrong.any() or (values.size and int(values.min()) < 0):
        row = int(np.argmax(wrong))
        raise FormatError(
            f"row {row}: its counts are not {shape.top_k} picks a layer for each of {tokens[number[row], phase[row]]}"
            " tokens",
            where=str(path),
        )
    counts = np.zeros((len(PHASES), len(requests), layers, experts), np.uint32)
    counts[phase, number] = values
    return Sums(first, counts)


def one_phase(counts: Counts) -> Counts:
    """uint32 [3, L, E] with all under `unknown` where any is: a sum cannot say which of its tokens were prefill."""
    prefill, decode, unknown = counts
    if not unknown.any():
        return counts
    return np.stack((np.zeros_like(prefill), np.zeros_like(prefill), prefill + decode + unknown))
