"""Prints what version 0.1.0 reads from the files of this folder: expected.json."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from moeplan.plan.store import load_plan

from moeplan.cli.app import run
from moeplan.trace import open_trace

HERE = Path(__file__).parent
REPLAYED = ("remote_share", "remote_nodes_per_token", "inter_node_bytes_per_token", "intra_node_bytes_per_token")


def sha(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def trace(name: str) -> dict[str, Any]:
    opened = open_trace(HERE / name)
    requests, shape = opened.requests, opened.shape
    facts: dict[str, Any] = {
        "model": shape.to_dict(),
        "checksum": opened.checksum,
        "complete": opened.complete,
        "synthetic": opened.synthetic,
        "aggregate": opened.aggregate,
        "dropped": opened.dropped,
        "left_over": opened.left_over,
        "source": opened.source,
        "rows": requests.rows.tolist(),
        "prefill": requests.prefill.tolist(),
        "domains": [requests.domains[i] for i in requests.domain],
        "arrival": [None if np.isnan(seconds) else seconds for seconds in requests.arrival.tolist()],
        "dp_rank": requests.dp_rank.tolist(),
    }
    if opened.aggregate > 1:
        return {**facts, "counts_sha256": sha(*(part.counts.astype("<u4") for part in opened.sums()))}
    parts = list(opened.parts(weights=opened.has_weights, positions=True))
    facts["experts_sha256"] = sha(*(part.experts.astype("<u2") for part in parts))
    facts["positions_sha256"] = sha(*(part.positions.astype("<u4") for part in parts))
    if opened.has_weights:
        facts["weights_sha256"] = sha(*(part.weights.astype("<f2") for part in parts))
    return facts


def answered(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert run([*arguments, "--json", "-"]) == 0, arguments
    return json.loads(out.getvalue())


def plan(name: str) -> dict[str, Any]:
    stored = load_plan(HERE / name)
    rows = answered("replay", "trace", "--plan", name, "--steps", "10")["strategies"]
    strategy = stored.result.strategy
    return {
        "strategy": strategy,
        "cluster": [stored.cluster.nodes, stored.cluster.gpus_per_node, stored.cluster.home.value],
        "redundant": stored.redundant,
        "replica_rule": stored.rule.value,
        "dispatch": stored.dispatch.value,
        "slots_sha256": sha(stored.result.placement.slots.astype("<i4")),
        "replay": {key: rows[strategy][key]["value"] for key in REPLAYED},
        "linear": {key: rows["linear"][key]["value"] for key in REPLAYED},
    }


os.chdir(HERE)
estimate = answered("estimate", "--hardware", "Mine", "--hardware-file", "hardware.json", "--model", "model.json")
balanced = ["export", "counts", "--engine", "sglang", "--nodes", "2", "--gpus-per-node", "4", "--redundant", "8"]
balanced = answered(*balanced, "--num-layers", "5", "--dense-layers", "0", "-o", "balanced.json")
(HERE / "balanced.json").unlink()
counts = np.load(HERE / "counts" / "counts.npy")
figures = {
    "traces": {path.name: trace(path.name) for path in sorted(HERE.glob("trace*"))},
    "plans": {path.name: plan(path.name) for path in sorted(HERE.glob("plan-*"))},
    "counts": {"sha256": sha(counts.astype("<u8")), "picks": int(counts.sum()), "layer_ids": balanced["layer_ids"]},
    "linear_load_ratio": balanced["load_ratio"]["linear"],
    "estimate": {
        "weights_gb": estimate["memory"]["weights_gb"],
        "usd_per_gpu_hour": estimate["usd_per_gpu_hour"],
        "gpus": estimate["parallel"]["gpus"],
    },
}
blocks = []
for key, value in figures.items():
    text = json.dumps(value)
    if key in ("traces", "plans"):  # one line each
        lines = (f"  {json.dumps(name)}: {json.dumps(of, ensure_ascii=False)}" for name, of in value.items())
        text = "{\n" + ",\n".join(lines) + "\n }"
    blocks.append(f" {json.dumps(key)}: {text}")
print("{\n" + ",\n".join(blocks) + "\n}")
