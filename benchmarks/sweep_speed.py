"""Time to sweep 1,000 set-ups, and to size a cluster for each of the four use cases, in one process.

The target: 1,000 set-ups in 5 s on two cores. The sweep uses one. Set-ups are of the model whose steps take long
to estimate: DeepSeek-V3, on several nodes, with and without two-batch overlap.
"""

from __future__ import annotations

import sys
import time

from moeplan.model.catalogue import load_model
from moeplan.perf.cluster_search import smallest_cluster
from moeplan.perf.hardware import hardware_names, load_hardware
from moeplan.perf.memory import Precision
from moeplan.perf.sweep import SweepSettings, sweep
from moeplan.perf.use_cases import USE_CASES

SETUPS, TARGET_S = 1000, 5.0
MODELS = ("Llama-3.1-70B", "DeepSeek-V3", "MoE-100T")


def bench() -> list[tuple[str, str]]:
    """(label, result): seconds per 1,000 set-ups and per use case on all hardware of the catalogue."""
    found = []
    spec = load_model("DeepSeek-V3")
    settings = SweepSettings(gpus=(16, 32, 72), batches=(1, 4, 16, 32, 64, 128, 256), overlap=True)
    start = time.perf_counter()
    swept = sweep(spec, "H100,H200", settings)
    each = (time.perf_counter() - start) / len(swept.points)
    verdict = "met" if each * SETUPS <= TARGET_S else "MISSED"
    found.append(
        (
            f"sweep, {len(swept.points):,} set-ups of DeepSeek-V3, first in its process",
            f"{each * SETUPS:.2f} s per {SETUPS:,} (target {TARGET_S:g} s: {verdict})",
        )
    )
    for name in MODELS:
        spec = load_model(name)
        precision = Precision.of_checkpoint(spec, "fp8" if name == "MoE-100T" else None)
        start = time.perf_counter()
        for case in USE_CASES.values():
            for machine in hardware_names():
                smallest_cluster(spec, load_hardware(machine), case, precision)
        seconds = (time.perf_counter() - start) / len(USE_CASES)
        found.append((f"size, {name}, a use case on {len(hardware_names())} kinds of hardware", f"{seconds:.1f} s"))
    return found


if __name__ == "__main__":
    from run import machine as this_machine

    print(f"machine: {this_machine()}")
    for label, text in bench():
        print(f"  {label:72s} {text}", flush=True)
    sys.exit(0)
