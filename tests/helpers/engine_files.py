"""Files as engines leave them behind, made small, for the tests of the importers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.errors import FormatError
from moeplan.trace.reader import Trace


def picks(rows: int, layers: int = 3, k: int = 2, *, dense: int = 1, seed: int = 0) -> np.ndarray:
    """Distinct ids below 8, [rows, layers, k]; the first `dense` layers are zeros."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(8), (rows, layers, 1)), axis=2)[:, :, :k]
    ids[:, :dense] = 0
    return ids


def changed(row: int, layer: int, values: Any) -> np.ndarray:
    ids = picks(5)
    ids[row, layer] = values
    return ids


def raw64(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def save(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def same(trace: Trace, expected: np.ndarray, layer_ids: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(trace.load().experts, expected)
    assert trace.shape.layer_ids == layer_ids and trace.complete


def refused_when_cut(whole: bytes, path: Path, out: Path, load: Callable[[], Any], *, step: int = 1) -> None:
    """Every proper beginning of a file is refused and leaves nothing."""
    for cut in range(0, len(whole), step):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError) as error:
            load()
        assert "\n" not in str(error.value) and path.name in str(error.value)
        assert not out.exists()
