"""Write the README's figures anew from the commands that it names: `python benchmarks/readme.py` (about three minutes).

Each block lies between `<!-- name -->` and `<!-- /name -->`. The real trace's blocks stay where it is absent.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "traces" / "maverick-mmlu.npz"


def moeplan(*arguments: str, folder: Path) -> str:
    """What one command prints."""
    command = [sys.executable, "-m", "moeplan", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def table(text: str) -> str:
    """The strategy table of a command's output."""
    return "\n".join(re.findall(r"^strategy .*?noise floor\)[^\n]*$", text, re.S | re.M))


def blocks() -> dict[str, str]:
    """Name -> new text of each block."""
    sys.path.insert(0, str(Path(__file__).parent))
    out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out["demo"] = f"```\n{moeplan('demo', folder=folder).strip()}\n```"
        if REAL.is_file():
            moeplan(
                "import",
                "arrays",
                str(REAL),
                "-o",
                "maverick",
                "--without-layers",
                "45",
                "--hidden",
                "5120",
                folder=folder,
            )
            text = moeplan("compare", "maverick", "--nodes", "8", "--gpus-per-node", "8", folder=folder)
            command = (
                "$ moeplan import arrays maverick-mmlu.npz -o maverick --without-layers 45 --hidden 5120\n"
                "$ moeplan compare maverick --nodes 8 --gpus-per-node 8"
            )
            out["maverick"] = f"```console\n{command}\n{table(text)}\n```"
            for block, strategy in (("real", "paper"), ("ours", "moeplan")):
                row = rf"^{strategy} +signature +[\d.]+ +-([\d.]+) % \[([-+\d.]+), ([-+\d.]+)\]"
                gain = re.search(row, text, re.M)
                assert gain is not None
                out[block] = f"{gain[1]} % (interval {gain[3].lstrip('-')} to {gain[2].lstrip('-')})"
            import paper

            kept = [line for line in paper.bench() if "padded" not in line[0] or "unpadded" in line[0]]
            lines = [f"{label:44s} {result}" for label, result in kept if "busiest" not in label]
            out["paper"] = "```\n" + "\n".join(lines) + "\n```"
    return out


if __name__ == "__main__":
    readme = ROOT / "README.md"
    page = readme.read_text(encoding="utf-8")
    for name, text in blocks().items():
        space = "" if name in ("real", "ours") else "\n"
        pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        page = re.sub(pattern, lambda m, s=space, t=text: f"{m[1]}{s}{t}{s}{m[2]}", page, flags=re.S)
    readme.write_text(page, encoding="utf-8")
