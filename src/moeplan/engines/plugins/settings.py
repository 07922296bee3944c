"""What the environment asks a plug-in to do, and the plan that it names.

Everything that is wrong comes out as one line in the engine's log; a plug-in never raises into the server.
"""

from __future__ import annotations

import multiprocessing
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from moeplan.errors import MoeplanError, UsageError

if TYPE_CHECKING:
    from moeplan.engines.placement import EnginePlacement

__all__ = ["MODES", "PluginSettings", "asked", "is_first_process", "kind", "not_tested"]

#: `plan`: the plan as it is, always. `online`: from the plan, by the load that the engine counts.
MODES = ("plan", "online")


@dataclass(frozen=True)
class PluginSettings:
    """One request of the environment.

    Attributes:
        path: a plan's directory, or a file of `moeplan export --engine vllm`.
        mode: one of `MODES`, or something else, which `problem` then names.
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
        except Exception as error:  # a defect of ours, or a library that is missing, must not end the server
            return f"{self.path}: cannot be read ({kind(error)})"

    @property
    def placement(self) -> EnginePlacement | None:
        """Where the plan puts every expert; None where there is a `problem`."""
        return None if isinstance(self._read, str) else self._read

    @property
    def problem(self) -> str:
        """Why there is no placement, in one line; empty when there is one."""
        return self._read if isinstance(self._read, str) else ""

    @property
    def name(self) -> str:
        """Mode and plan, by which all ranks must agree: a placement's checksum, layers, slots and mode."""
        if self.placement is None:
            return "none"
        rows = self.placement.physical_to_logical
        return f"{zlib.crc32(rows.tobytes()):08x}-{rows.shape[0]}x{rows.shape[1]}-{self.mode}"

    @property
    def words(self) -> str:
        """The plan in a few words, for the log."""
        of = self.placement
        if of is None:
            return f"plan {self.path}"
        return (
            f"plan {self.path} ({len(of.layer_ids)} layers, {of.num_experts} experts + {of.redundant} redundant, "
            f"{of.nodes} nodes x {of.ep_size // of.nodes} GPUs, {self.name})"
        )


def _placement(path: Path) -> EnginePlacement:
    if path.is_file():
        from moeplan.engines.vllm import read

        return read(path)
    from moeplan.engines.placement import EnginePlacement
    from moeplan.planning.store import load_plan

    return EnginePlacement.of_plan(load_plan(path))


def asked(prefix: str) -> PluginSettings | None:
    """What `PREFIX_PLAN` and `PREFIX_MODE` ask for; None when no plan is named."""
    path = os.environ.get(f"{prefix}_PLAN", "").strip()
    if not path:
        return None
    return PluginSettings(path, os.environ.get(f"{prefix}_MODE", "").strip().lower() or MODES[0], prefix)


def not_tested(engine: str, names: tuple[str, ...], tested: tuple[str, ...]) -> str:
    """Why the plug-in stays out of an engine of this version; empty if it was tested with it. `+cu129` does not count.

    Args:
        engine: as the log calls it. names: under which it may be installed. tested: versions.
    """
    version = _version(names)
    if version.split("+")[0] in tested:
        return ""
    return f"{engine} {version} is not one that the plug-in was tested with ({', '.join(tested)}): it stays out"


def is_first_process() -> bool:
    """Whether this is the server's first process on its node, which speaks for those that it starts."""
    return multiprocessing.parent_process() is None


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "of unknown version"


def kind(error: Exception) -> str:
    """An error that nobody foresaw, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
