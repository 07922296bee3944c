"""Importer of SGLang's `logical_count` JSON: counts without requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions
from moeplan.io.json import read_json
from moeplan.trace.counts import MAX_CELLS, CountsProfile, make_counts, write_counts

__all__ = ["import_logical_count", "read_logical_count"]

#: A thousand passes of DeepSeek-V3; parsed JSON takes many times its size in memory.
MAX_JSON_BYTES = 64 * 1024 * 1024


class _LogicalCount(msgspec.Struct):
    logical_count: list[Any]


def import_logical_count(
    path: Path, out: Path, options: ImportOptions = ImportOptions(), *, phase: str = "unknown"
) -> CountsProfile:
    """`read_logical_count`, written as a counts profile."""
    return write_counts(read_logical_count(path, options, phase=phase), out)


def read_logical_count(
    path: Path, options: ImportOptions = ImportOptions(), *, phase: str = "unknown"
) -> CountsProfile:
    """SGLang's JSON {"logical_count": [L, E] or [steps, L, E]}, all hidden layers, as counts.

    The same object that `--init-expert-location` takes (SGLang 0.5.23 `srt/eplb/expert_location.py`); dense layers are
    rows of zeros. The file does not say which phase was counted.

    Raises:
        FormatError: truncated, ragged, negative or fractional counts, or nothing counted.
    """
    data: _LogicalCount = read_json(path, _LogicalCount, max_bytes=MAX_JSON_BYTES)
    try:
        totals = np.array(data.logical_count)
    except (ValueError, OverflowError):
        totals = np.array("")
    if totals.dtype.kind not in "iuf" or totals.ndim not in (2, 3) or totals.size > MAX_CELLS:
        raise FormatError(
            "logical_count is not a table of counts, [layers, experts] or [steps, layers, experts]", where=str(path)
        )
    source: dict[str, Any] = {"import": "logical-count", "file": path.name}
    if totals.ndim == 3:
        source["steps"] = len(totals)
        if (totals < 0).any():
            raise FormatError("holds a negative count", where=str(path))
        totals = totals.astype(np.float64).sum(axis=0)  # exact below 2**53, and more is refused
    source["hidden_layers"] = len(totals)
    name, top_k = options.model.name or "", options.model.top_k
    return make_counts(totals, where=str(path), source=source, name=name, top_k=top_k, phase=phase)
