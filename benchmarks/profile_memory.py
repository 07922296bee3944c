"""Peak memory of `moeplan profile` on traces of one and of eight times as many parts.

Each profile runs in a process of its own, whose peak resident memory the kernel reports (ru_maxrss).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from moeplan.synthetic.generator import WorkloadSettings, draw_workload
from moeplan.trace import TraceWriter

#: More requests at 1x than `profile` keeps counts of, so that sample and reservoir are full there already; small parts,
#: so that there are many.
PRESET, LAYERS, REQUESTS, PREFILL, DECODE = "deepseek-v3", 12, 2_100, 64, 112
FACTOR, PART_PICKS = 8, 1 << 22

MEASURE = """
import resource, sys
from moeplan.profile import profile_trace
from moeplan.trace import open_trace
profile_trace(open_trace(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def bench() -> list[tuple[str, str]]:
    """(label, result): peak memory at 1x and 8x parts, and their ratio."""
    found, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, FACTOR):
            path = Path(folder) / f"x{factor}"
            tokens = make(path, REQUESTS * factor)
            parts = sum(1 for _ in path.glob("part-*.parquet"))
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
            )
            peaks.append(int(done.stdout) / 1024)
            found.append(
                (
                    f"profile memory, {factor}x (synthetic)",
                    f"{peaks[-1]:,.0f} MiB peak, {parts} parts, {tokens:,} tokens",
                )
            )
    found.append((f"profile memory, {FACTOR}x against 1x", f"{peaks[1] / peaks[0]:.2f} x"))
    return found


def make(path: Path, requests: int) -> int:
    """Write a synthetic trace in small parts and return its tokens."""
    workload = draw_workload(
        PRESET, WorkloadSettings(requests=requests, prefill=PREFILL, decode=DECODE, layers=LAYERS, exact=True)
    )
    table, length = workload.requests, PREFILL + DECODE
    with TraceWriter(path, workload.shape, source={}, synthetic=True, part_picks=PART_PICKS) as writer:
        for first, last in workload.chunks():
            picks = workload.picks(first, last).reshape(last - first, length, LAYERS, -1)
            for rows, domain in zip(picks, table.domain[first:last], strict=True):
                writer.add(rows, prefill=PREFILL, domain=table.domains[domain])
    return requests * length


if __name__ == "__main__":
    for label, result in bench():
        print(f"{label}: {result}")
