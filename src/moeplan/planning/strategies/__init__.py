"""One file per strategy; adding a strategy is adding a file.

A strategy file has a `Strategy` class, whose fields are its parameters, and a tuple `STRATEGIES`: an instance for each
name that it offers, with the default parameters. Strategies are found by the files in this folder; nothing else lists
them.
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
    """Every strategy by name, with its default parameters."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {strategy.name: strategy for module in modules for strategy in module.STRATEGIES}


def find(strategy: str | Strategy) -> Strategy:
    """The strategy of that name with its default parameters; a strategy itself is returned as it is.

    Raises:
        UsageError: no such name; the error lists the available ones.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in available():
        raise UsageError(f"no strategy {strategy!r}", hint=f"choose among {', '.join(sorted(available()))}")
    return available()[strategy]
