"""Finding source files, and what their names say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moeplan.errors import FormatError

__all__ = ["domain_of", "natural_order", "response_files", "source_files"]


def domain_of(path: Path) -> str:
    """A file's label: its name up to the trailing number, so `anatomy-100.json` is `anatomy`."""
    stem = path.stem.removesuffix("_data")
    return stem.rstrip("0123456789").rstrip("-_") or stem


def natural_order(path: Path) -> str:
    """Sort key under which 9.txt comes before 10.txt."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(12), path.name)


def source_files(sources: Sequence[Path], suffix: str) -> list[Path]:
    """The files named, and those with `suffix` in the folders named, in natural order.

    Raises:
        FormatError: a path that does not exist, or a folder without such a file.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = [path for path in source.iterdir() if path.suffix.lower() == suffix and path.is_file()]
            if not inside:
                raise FormatError(f"holds no {suffix} file", where=str(source), hint="check the folder")
            found += sorted(inside, key=natural_order)
        elif source.exists():
            found.append(source)
        else:
            raise FormatError("does not exist", where=str(source), hint="check the path")
    return found


def response_files(sources: Sequence[Path]) -> list[Path]:
    """The files named, and the .json or, where there are some, .jsonl files of the folders named."""
    found: list[Path] = []
    for source in sources:
        lines = source.is_dir() and any(path.suffix.lower() == ".jsonl" for path in source.iterdir())
        found += source_files([source], ".jsonl" if lines else ".json")
    return found
