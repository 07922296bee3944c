"""The public surface, and that importing it costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import moeplan


def test_public_names() -> None:
    assert sorted(moeplan.__all__) == [
        "Cluster", "Dispatch", "Home", "ModelShape", "MoeplanError", "Options", "Placement", "Problem", "ReplicaRule",
        "Setup", "Trace", "TraceWriter", "compare", "load_plan", "open_trace", "profile_trace", "read_requests",
        "replay_plan", "save_plan", "solve",
    ]  # fmt: skip
    for name in moeplan.__all__:
        assert getattr(moeplan, name) is not None
    assert set(moeplan.__all__) <= set(dir(moeplan))


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["numba", "numpy", "matplotlib", "sklearn", "pyarrow", "scipy", "torch", "rich"]
    code = f"import sys, moeplan; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = code.replace("import sys, moeplan", "import sys, moeplan.cli.app")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("[]", "['rich']")
