"""The environment that the real vLLM runs in: `python tests/engines/environment.py` makes it, in .venv-vllm.

It is made once, and again when its pins or the interpreter change: vLLM and moeplan's own tests want different versions
of the same libraries.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-vllm"
PINS = Path(__file__).with_name("requirements-vllm.txt")
PYTHON = FOLDER / "bin" / "python"
#: Written last: holds the digest that the environment was made for.
MARK = FOLDER / "moeplan-pins"


def digest() -> str:
    """Of what the environment is made from."""
    return hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()


def is_ready() -> bool:
    """Whether it is there, whole, and of these pins."""
    return MARK.is_file() and MARK.read_text() == digest()


def make() -> None:
    """Make it, unless it is ready."""
    if is_ready():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "-r", str(PINS)], check=True)
    MARK.write_text(digest())


if __name__ == "__main__":
    make()
