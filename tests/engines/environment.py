"""What the tests of engines run in: `python tests/engines/environment.py` makes it.

- `.venv-vllm`: the real vLLM on the CPU, and moeplan beside it, with its plug-ins, as a user installs them.
- `.venv-vllm-wheels`: the Python files of released wheels that need a GPU to run. Their own loaders run without one.

Both are made once, and again when their pins, moeplan's metadata or the interpreter change: vLLM and moeplan's own
tests want different versions of the same libraries.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-vllm"
PINS = Path(__file__).with_name("requirements-vllm.txt")
PYTHON = FOLDER / "bin" / "python"
#: Written last: holds the digest that the environment was made for.
MARK = FOLDER / "moeplan-pins"
#: The same for moeplan in it.
OWN_MARK = FOLDER / "moeplan-installed"
#: What moeplan needs there and vLLM does not bring.
OWN = ("scipy==1.17.1", "lazy-loader==0.6")
WHEELS = ROOT / ".venv-vllm-wheels"
#: Where the CPU build of vLLM is installed.
SITE = next(iter((FOLDER / "lib").glob("python3*/site-packages")), FOLDER)


@dataclass(frozen=True)
class Wheel:
    """A released wheel, of which only the Python files are kept.

    Attributes:
        name, version, sha256: of the file. megabytes: to download.
    """

    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def folder(self) -> Path:
        """Where it is unpacked: what goes on the path."""
        return WHEELS / f"{self.name}-{self.version}-{self.sha256[:8]}"


SGLANG = Wheel("sglang", "0.5.23", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937", 39)
VLLM = Wheel("vllm", "0.33.0", "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa", 336)


def digest(*of: bytes) -> str:
    """Of what an environment is made from."""
    return hashlib.sha256(b"".join(of) + sys.version.encode()).hexdigest()


def _is(mark: Path, text: str) -> bool:
    return mark.is_file() and mark.read_text() == text


def is_ready() -> bool:
    """Whether the environment is there, whole, and of these pins; and moeplan in it."""
    return _is(MARK, digest(PINS.read_bytes())) and _is(OWN_MARK, _own_digest())


def _own_digest() -> str:
    return digest((ROOT / "pyproject.toml").read_bytes(), *(pin.encode() for pin in OWN))


def has_wheels() -> bool:
    """Whether the unpacked wheels are there."""
    return SGLANG.folder.is_dir() and VLLM.folder.is_dir()


def pip(*arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]


def make() -> None:
    """Make what is not ready."""
    if not _is(MARK, digest(PINS.read_bytes())):
        shutil.rmtree(FOLDER, ignore_errors=True)
        venv.create(FOLDER, with_pip=True)
        subprocess.run(pip("install", "--no-deps", "--no-compile", "-r", str(PINS)), check=True)
        MARK.write_text(digest(PINS.read_bytes()))
    if not _is(OWN_MARK, _own_digest()):
        subprocess.run(pip("install", "--no-deps", "--no-compile", *OWN, "-e", str(ROOT)), check=True)
        OWN_MARK.write_text(_own_digest())
    for wheel in (SGLANG, VLLM):
        unpack(wheel)


def unpack(wheel: Wheel) -> None:
    """Download a wheel with pip, which checks its digest, and keep its Python files and metadata."""
    if wheel.folder.is_dir():
        return
    WHEELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WHEELS) as name:
        temporary = Path(name)
        pins = temporary / "pins.txt"
        pins.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        # The platform is named, so that the same file comes wherever the tests run: only its Python is executed.
        platform = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3"]
        platform += ["--platform=manylinux_2_34_x86_64", "--platform=manylinux_2_28_x86_64"]
        done = subprocess.run(
            pip("download", "--no-deps", "--require-hashes", *platform, "-r", str(pins), "-d", name),
            capture_output=True,
            text=True,
        )
        found = [path for path in temporary.iterdir() if path.suffix == ".whl"]
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise SystemExit(
                f"cannot download {wheel.name} {wheel.version} ({wheel.megabytes} MB), whose own loaders the tests in "
                f"tests/engines run: {last}. Check that the package index has it, then `make test-engines` again."
            )
        part = temporary / "unpacked"
        with zipfile.ZipFile(found[0]) as archive:
            kept = [member for member in archive.namelist() if member.endswith(".py") or ".dist-info/" in member]
            archive.extractall(part, kept)
        part.rename(wheel.folder)


if __name__ == "__main__":
    make()
