"""How long work reports its progress to its caller."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

#: progress(done, total, note): called after each part of the work, such as a request or a file.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """The default: reports nothing."""
