"""Settings of a plug-in from the environment, and the plan that they name.

Every error is one line in the engine's log; a plug-in never raises into the server.
"""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING

from moeplan.errors import MoeplanError, UsageError

if TYPE_CHECKING:
    from moeplan.engines.placement import EnginePlacement

__all__ = ["MODES", "PluginSettings", "check_version", "describe", "is_first_process", "read_settings", "start"]

#: `plan`: always the plan itself. `online`: the plan, improved for the load that the engine counts.
MODES = ("plan", "online")


@dataclass(frozen=True)
class PluginSettings:
    """Values of the environment variables.

    Attributes:
        path: a plan's directory, or a file of `moeplan export --engine vllm`.
        mode: one of `MODES`; any other value is an error in `problem`.
        prefix: of the variables, e.g. MOEPLAN_VLLM.
    """

    path: str
    mode: str
    prefix: str

    @cached_property
    def _read(self) -> EnginePlacement | str:
        try:
            if self.mode not in MODES:
                raise UsageError(f"{self.prefix}_MODE is {self.mode!r}", hint=f"set it to {' or '.join(MODES)}")
            return _placement(Path(self.path))
        except MoeplanError as error:
            return error.line()
        except Exception as error:  # a bug or a missing library must not stop the server
            return f"{self.path}: cannot be read ({describe(error)})"

    @property
    def placement(self) -> EnginePlacement | None:
        """The placement of the plan; None where there is a `problem`."""
        return None if isinstance(self._read, str) else self._read

    @property
    def problem(self) -> str:
        """Why there is no placement, in one line; empty when there is one."""
        return self._read if isinstance(self._read, str) else ""

    @property
    def fingerprint(self) -> str:
        """What all ranks must agree on: checksum, layers and slots of the placement, and the mode."""
        if self.placement is None:
            return "none"
        rows = self.placement.physical_to_logical
        return f"{zlib.crc32(rows.tobytes()):08x}-{rows.shape[0]}x{rows.shape[1]}-{self.mode}"

    @property
    def summary(self) -> str:
        """The plan in one line, for the log."""
        plan = self.placement
        if plan is None:
            return f"plan {self.path}"
        return (
            f"plan {self.path} ({len(plan.layer_ids)} layers, {plan.num_experts} experts + {plan.redundant} redundant, "
            f"{plan.nodes} nodes x {plan.ep_size // plan.nodes} GPUs, {self.fingerprint})"
        )


def _placement(path: Path) -> EnginePlacement:
    if path.is_file():
        from moeplan.engines.vllm import read

        return read(path)
    from moeplan.engines.placement import EnginePlacement
    from moeplan.planning.store import load_plan

    return EnginePlacement.of_plan(load_plan(path))


def read_settings(prefix: str) -> PluginSettings | None:
    """Settings from `PREFIX_PLAN` and `PREFIX_MODE`; None if no plan is named."""
    path = os.environ.get(f"{prefix}_PLAN", "").strip()
    if not path:
        return None
    return PluginSettings(path, os.environ.get(f"{prefix}_MODE", "").strip().lower() or MODES[0], prefix)


def start(
    engine: str,
    packages: tuple[str, ...],
    tested: tuple[str, ...],
    prefix: str,
    log: Logger,
    install: Callable[[PluginSettings], None],
) -> None:
    """What an engine's entry point does: install the plug-in if a plan is named; else, or where that fails, nothing.

    Args:
        engine: its name in the log. packages, tested: as for `check_version`. prefix: of the variables.
    """
    settings = read_settings(prefix)
    if settings is None:
        return
    try:
        reason = check_version(engine, packages, tested)
        if not reason:
            install(settings)
    except Exception as error:
        reason = f"the plug-in does not fit this {engine} ({describe(error)})"
    if reason and is_first_process():
        log.error("moeplan: plan %s is not applied: %s", settings.path, reason)


def check_version(engine: str, names: tuple[str, ...], tested: tuple[str, ...]) -> str:
    """Why the plug-in does not support the engine's version; empty if it was tested with it. `+cu129` is ignored.

    Args:
        engine: its name in the log. names: of its packages. tested: versions.
    """
    version = _version(names)
    if version.split("+")[0] in tested:
        return ""
    return f"{engine} {version} is not one that the plug-in was tested with ({', '.join(tested)})"


def is_first_process() -> bool:
    """Whether this is the server's first process on its node, which logs for those that it starts."""
    return multiprocessing.parent_process() is None


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "of unknown version"


def describe(error: Exception) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
