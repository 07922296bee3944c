"""One file per strategy; adding a strategy is adding a file.

A strategy file has `STRATEGIES`, a dict from each name it offers to a `Strategy`. Names come from the files in this
folder, so nothing else has to be told.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from moeplan.errors import UsageError
from moeplan.planning.problem import Strategy

__all__ = ["available", "find"]


@cache
def available() -> dict[str, Strategy]:
    """Every strategy by name."""
    found: dict[str, Strategy] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(importlib.import_module(f"{__name__}.{module.name}").STRATEGIES)
    return found


def find(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UsageError: there is none; the error lists those there are.
    """
    strategies = available()
    if name not in strategies:
        raise UsageError(f"no strategy {name!r}", hint=f"choose among {', '.join(sorted(strategies))}")
    return strategies[name]
