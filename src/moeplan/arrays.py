"""Names for the array types of the package; the dimensions stand with each value, as in `float64 [L, E]`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "BoolArray", "CountArray", "ExpertArray", "Float32Array", "FloatArray", "Int16Array", "Int32Array", "Int64Array",
    "NumberArray",
]  # fmt: skip

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
#: Picks of experts, counted.
CountArray = npt.NDArray[np.uint32]
#: Ids of experts, of the narrowest type that holds them.
ExpertArray = npt.NDArray[np.unsignedinteger]
NumberArray = npt.NDArray[np.number]
