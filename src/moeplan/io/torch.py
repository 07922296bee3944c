"""Reading .pt files that somebody else made: tensors and plain values only, never arbitrary pickled objects."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import FormatError, UsageError
from moeplan.io.paths import check_input

__all__ = ["integers", "load_pt"]

#: A million tokens of DeepSeek-V3 on one rank are below this; declared sizes above it are a bomb.
MAX_PT_BYTES = 2 * 1024 * 1024 * 1024
_CUT_OFF = "it may be cut off: copy or record it again"


def load_pt(path: Path) -> dict[str, Any]:
    """The dict in a .pt file, tensors on the CPU; `torch.load(weights_only=True)`, after the sizes were looked at.

    Raises:
        UsageError: torch is not installed.
        FormatError: not a whole .pt of tensors and plain values, or one that unpacks to too much.
    """
    try:
        import torch
    except ImportError:
        hint = "pip install 'moeplan[transformers]', or torch alone"
        raise UsageError("reading a .pt file needs torch", where=str(path), hint=hint) from None
    try:
        check_input(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
    except FileNotFoundError:
        raise FormatError("does not exist", where=str(path), hint="check the path") from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise FormatError(f"is not a whole .pt file ({str(error)[:100]})", where=str(path), hint=_CUT_OFF) from None
    if size > MAX_PT_BYTES:
        raise FormatError(f"unpacks to {size} bytes, more than the {MAX_PT_BYTES} that moeplan reads", where=str(path))
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the damage happens to hit: RuntimeError, UnpicklingError, KeyError ..
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        what = f"is not a whole .pt file of tensors and plain values ({reason})"
        raise FormatError(what, where=str(path), hint=_CUT_OFF) from None
    if not isinstance(data, dict):
        raise FormatError(f"holds a {type(data).__name__}, not the recorder's dict", where=str(path))
    return data


def integers(value: Any, ndim: int, label: str, where: str | None = None) -> npt.NDArray[np.int64]:
    """int64 array of a tensor or a flat list of whole numbers, as many dimensions as said."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.layout is not torch.strided:
            raise FormatError(f"{label} is not whole numbers", where=where)
        if value.dim() != ndim:
            raise FormatError(f"{label} has {value.dim()} dimensions, expected {ndim}", where=where)
        # A tensor may declare more cells than it stores (strides of zero): a few bytes that unfold to gigabytes.
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise FormatError(f"{label} declares more than it stores: {list(value.shape)}", where=where)
        try:
            return np.asarray(value.numpy(), np.int64)
        except (TypeError, RuntimeError, OverflowError) as error:
            raise FormatError(f"{label} is not plain whole numbers ({str(error)[:60]})", where=where) from None
    if not isinstance(value, list) or ndim != 1 or any(type(item) is not int for item in value):
        raise FormatError(f"{label} is not a tensor or list of whole numbers", where=where)
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise FormatError(f"{label} holds numbers that are too large", where=where) from None
