"""Writes what the command line of 0.1.0 alone does not: every optional column of a trace, arrays, counts, .npy maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moeplan.trace import TraceWriter
from moeplan.types import ModelShape

HERE = Path(__file__).parent
rng = np.random.default_rng(7)


def picks(rows: int, layers: int, experts: int, k: int) -> np.ndarray:
    """Distinct ids, [rows, layers, k]."""
    return np.argsort(rng.random((rows, layers, experts)), axis=2)[:, :, :k]


# More than 256 experts (uint16), gate weights, gaps in the positions, labels that are not ASCII, ranks, arrival times.
shape = ModelShape("wide", 3, 300, 2, layer_ids=(1, 2, 5), routing_groups=4)
with TraceWriter(HERE / "trace-columns", shape, weights=True, source={"made_by": "columns.py"}) as writer:
    for number in range(10):
        rows = 4 + number
        writer.add(
            picks(rows, 3, 300, 2),
            prefill=-1 if number == 9 else min(number, rows),
            domain=("code", "prose", "größe")[number % 3],
            arrival=None if number == 4 else number / 4,
            positions=np.arange(rows, dtype=np.uint32) * (1 + number % 2),
            weights=rng.random((rows, 3, 2)).astype(np.float16),
            dp_rank=None if number == 5 else number % 4,
            where=f"request {number}",
        )

np.savez_compressed(
    HERE / "arrays.npz",
    experts=picks(60, 2, 8, 2).astype(np.uint8),
    request_offsets=np.arange(0, 61, 12),
    prefill_lengths=np.array([4, 0, -1, 12, 6]),
    num_experts=np.array(8),
    domain=np.array(["x", "y", "x", "y", "z"]),
    layer_ids=np.array([3, 4]),
    model=np.array("small"),
)

counts = rng.integers(1, 1000, (5, 32))
counts[0] = 0  # a dense layer
(HERE / "logical-count.json").write_text(json.dumps({"logical_count": counts.tolist()}) + "\n", encoding="utf-8")
