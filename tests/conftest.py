"""What several test files need."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real traces beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not (folder / "traces").is_dir():
        pytest.skip("the real traces (../shared) are not on this machine")
    return folder


@pytest.fixture
def engines(shared: Path) -> Path:
    """What engines really left behind; tests that need it are skipped where it is absent."""
    folder = shared / "engines"
    if not folder.is_dir():
        pytest.skip("the engines' files (../shared/engines) are not on this machine")
    return folder
