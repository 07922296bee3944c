"""Parsing untrusted placement files: bounded in size, strict, never executed.

A missing or unreadable file raises; a file that does not parse is an error of the report, with line and column.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moeplan.engines.report import Report, show
from moeplan.errors import FormatError
from moeplan.io.paths import check_input
from moeplan.io.torch import integers, load_pt
from moeplan.io.yaml import parse_yaml

__all__ = ["load_json", "load_npy", "load_tensors", "load_yaml"]

#: DeepSeek-V3 on 320 slots is 0.1 MB, and 1 MB in the largest of the formats; parsed text takes many times its size.
MAX_BYTES = 16 * 1024 * 1024
#: YAML is parsed slowly and needs much memory.
MAX_YAML_BYTES = 4 * 1024 * 1024
_TRUNCATED = "the file may be truncated: copy or export it again"


class _DuplicateKeyError(ValueError):
    """A duplicate key in one object."""


def _load_text(report: Report, max_bytes: int = MAX_BYTES) -> str | None:
    """The file's text; None with an error where it is too large or not text."""
    path = report.path
    try:
        size = check_input(path)
        data = b"" if size > max_bytes else path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None
    if size > max_bytes:
        report.add_error("", f"{size} bytes are more than any placement has (at most {max_bytes})", "check the file")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report.add_error(f"byte {error.start}", "is not UTF-8 text", "check that it is the right file")
        return None


def load_json(report: Report) -> Any:
    """The parsed file; None with an error where it is truncated or has duplicate keys, NaN or infinity."""
    text = _load_text(report)
    if text is None:
        return None
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        report.add_error(
            f"line {error.lineno}, column {error.colno}",
            f"is invalid or truncated JSON ({error.msg.removesuffix(' at')})",
            _TRUNCATED,
        )
    except _DuplicateKeyError as error:
        report.add_error(f"key {error}", "is duplicate: only the last one counts", "remove one of them")
    except RecursionError:
        report.add_error("", "is nested too deeply", "check the file")
    except ValueError as error:
        report.add_error("", str(error).split(";")[0][:100], "write whole numbers only")
    return None


def load_yaml(report: Report) -> Any:
    """The parsed file; None with an error."""
    text = _load_text(report, MAX_YAML_BYTES)
    try:
        return None if text is None else parse_yaml(text)
    except FormatError as error:
        report.add_error(error.where or "", error.what, error.hint or "")
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(show(next(key for key in keys if keys.count(key) > 1)))
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not an expert id")


def load_tensors(report: Report, key: str) -> tuple[list[Any], list[list[int]]] | None:
    """(keys, table) of a .pt that holds a dict, loaded with weights_only; None with an error."""
    if not report.path.exists():
        raise FormatError("does not exist", where=str(report.path), hint="check the path")
    check_input(report.path)
    try:
        data = load_pt(report.path)
        if key not in data:
            return list(data), []
        value = data[key]
        kind = str(getattr(value, "dtype", ""))
        table = integers(value, 2, key, str(report.path))
    except FormatError as error:
        report.add_error(key if key in error.what else "", error.what, error.hint or "save whole numbers, int64")
        return None
    if kind != "torch.int64":
        report.add_warning(key, f"is {kind.removeprefix('torch.')}, which the engine keeps", "save int64")
    return list(data), table.tolist()


def load_npy(report: Report) -> Any:
    """The rows of a .npy of whole numbers, as lists; None with an error."""
    path = report.path
    try:
        if check_input(path) > 8 * MAX_BYTES:
            report.add_error("", "is larger than any placement", "check the file")
            return None
        array = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: a header with a wrong size fails here
        if array.dtype.kind not in "iu" or array.ndim != 2:
            report.add_error("", f"holds {array.dtype} of {array.ndim} dimensions", "save int64 [MoE layers, slots]")
            return None
        return array.tolist()
    except FileNotFoundError:
        raise FormatError("does not exist", where=str(path), hint="check the path") from None
    except (OSError, ValueError, EOFError) as error:
        report.add_error("", f"is an invalid or truncated .npy array ({str(error)[:80]})", _TRUNCATED)
    return None
