"""`make bench`: every benchmark's figures, ratios within one run where a time is involved."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

#: Modules with a `bench() -> list[(label, result)]`.
MODULES = (
    "counting", "replay", "planning", "profile_memory", "paper", "record_overhead", "sweep_speed", "time_accuracy",
    "prediction",
)  # fmt: skip


def machine() -> str:
    """What the timings ran on."""
    import os

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    print(f"machine: {machine()}")
    for name in sys.argv[1:] or MODULES:
        print(f"\n{name}", flush=True)
        for label, text in importlib.import_module(name).bench():
            print(f"  {label:58s} {text}", flush=True)
