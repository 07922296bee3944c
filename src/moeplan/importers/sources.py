"""What the name of a source file says."""

from __future__ import annotations

from pathlib import Path

__all__ = ["domain_of"]


def domain_of(path: Path) -> str:
    """A file's label: its name up to the trailing number, so `anatomy-100.json` is `anatomy`."""
    stem = path.stem.removesuffix("_data")
    return stem.rstrip("0123456789").rstrip("-_") or stem
