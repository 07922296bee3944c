"""What the command line says to wrong use."""

from __future__ import annotations

from typing import Any

import pytest

from moeplan.cli.app import run

__all__ = ["refused"]


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error with status 2."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("moeplan: "), lines
    return lines[0]
