"""Hardware by name, as they are, or from a file: what functions of the library accept."""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.perf.hardware import Hardware, hardware, hardware_list

__all__ = ["find_hardware", "list_hardware"]


def find_hardware(given: str | Hardware) -> Hardware:
    """A description as it is, or the hardware of a name (see `moeplan.perf.hardware.hardware`)."""
    return given if isinstance(given, Hardware) else hardware(given)


def list_hardware(given: str | Hardware | Sequence[str | Hardware]) -> list[Hardware]:
    """Several, also from "A,B" or "all" (see `moeplan.perf.hardware.hardware_list`)."""
    if isinstance(given, str):
        return hardware_list(given)
    return [find_hardware(each) for each in ([given] if isinstance(given, Hardware) else given)]
