"""How the loops are compiled: once on a machine whose cache can be written, else again in each process."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as nb


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a loop: no bounds checks, the lock released while it runs, the machine code cached on disk.

    In a locked-down container (installation and home read-only) numba has no folder to cache in. Then the loop is
    compiled in each process that uses it, and one line on standard error says so.
    """
    try:
        loop = nb.njit(nogil=True, boundscheck=False, cache=True)(function)
    except RuntimeError:  # cannot cache function: no locator available
        _warn_once()
        return nb.njit(nogil=True, boundscheck=False)(function)
    _drop_stale(Path(loop.stats.cache_path), function)
    return loop


@functools.cache
def _warn_once() -> None:
    print(
        "moeplan: no folder to cache compiled loops in, so this run compiles them again (about a minute); set "
        "NUMBA_CACHE_DIR to a folder that can be written to",
        file=sys.stderr,
    )


def _drop_stale(folder: Path, function: Callable[..., Any]) -> None:
    """Remove a loop's cache index that is older than any source file of this folder.

    numba compares the loop's own file only: it would keep the old code of a loop that is called from another file. And
    after an upgrade that renamed a class it cannot even load the index, which names the classes of the arguments.
    """
    stem, line = Path(inspect.getfile(function)).stem, function.__code__.co_firstlineno
    with contextlib.suppress(OSError):
        for index in folder.glob(f"{stem}.{function.__name__}-{line}.*.nbi"):
            if index.stat().st_mtime < _newest_source():
                index.unlink(missing_ok=True)


@functools.cache
def _newest_source() -> float:
    return max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
