"""Reading small .safetensors files of whole numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from moeplan.errors import FormatError
from moeplan.io.paths import check_input, readable

__all__ = ["read_integer_vectors"]

MAX_FILE_BYTES = 1024 * 1024 * 1024


def read_integer_vectors(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    """{name: int64 [n]} of every tensor; a file with anything but vectors of int32 or int64 is refused."""
    where, found = str(path), {}
    with readable(path):
        if check_input(path) > MAX_FILE_BYTES:
            raise FormatError(f"more than the {MAX_FILE_BYTES} bytes that moeplan reads", where=where)
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in ("I32", "I64") or len(tensor.get_shape()) != 1:
                        raise FormatError(f"tensor {name[:40]!r} is not a vector of int32 or int64", where=where)
                    found[name] = file.get_tensor(name).astype(np.int64)
        except SafetensorError as error:
            why = str(error).removeprefix("Error while deserializing header: ")[:100]
            hint = "it may be truncated: copy or record it again"
            raise FormatError(f"is not a valid .safetensors file ({why})", where=where, hint=hint) from None
    return found
