"""Placements that the tests hand to the engines, and the call of an engine's side."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import environment
import numpy as np

from moeplan.engines.placement import EnginePlacement
from moeplan.planning.initial_placement import place_quickly


def planned(layers: tuple[int, ...], experts: int, redundant: int, nodes: int, per_node: int, seed: int = 0) -> Any:
    """A placement for use that differs from node to node, and that use [L, N, E]."""
    rng = np.random.default_rng(seed)
    use = rng.gamma(0.5, size=(len(layers), 1, experts)) * rng.gamma(0.5, size=(len(layers), nodes, experts)) * 1e4
    slots = place_quickly(use, (experts + redundant) // nodes, per_node, 0.2)
    return EnginePlacement(slots.astype(np.int32), layers, experts, nodes * per_node, nodes), use


def run(driver: str, code: Path, job: dict[str, Any], folder: Path) -> Any:
    """What tests/engines/`driver`.py makes of a job, in the engine's environment, with the engine's code in `code`."""
    asks, answers = folder / "job.json", folder / "answers.pickle"
    asks.write_text(json.dumps(job))
    path = Path(__file__).with_name(f"{driver}.py")
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MOEPLAN_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(environment.PYTHON), str(path), str(code), str(asks), str(answers)],
        capture_output=True,
        text=True,
        env={**ours, "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(environment.FOLDER / "numba")},
        cwd=folder,
        timeout=600,
    )
    assert done.returncode == 0, f"{driver} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return pickle.loads(answers.read_bytes())
