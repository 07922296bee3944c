"""The public surface, and that importing it costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moeplan


def test_public_names() -> None:
    assert len(moeplan.__all__) < 70 and set(moeplan.__all__) <= set(dir(moeplan))
    for name in moeplan.__all__:
        value = getattr(moeplan, name)
        assert value.__doc__ and value.__module__.startswith("moeplan."), name
    with pytest.raises(AttributeError):
        moeplan.no_such_name  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["numba", "numpy", "matplotlib", "sklearn", "pyarrow", "scipy", "torch", "rich"]
    code = f"import sys, moeplan; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = code.replace("import sys, moeplan", "import sys, moeplan.cli.app")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("[]", "['rich']")
