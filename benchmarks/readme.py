"""Write the README's figures anew from the commands and tables that it names: `python benchmarks/readme.py`.

Each block lies between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACES = ("gpt-oss-20b", "maverick-mmlu", "deepseek-v2-lite-chat")
SHOWN = ("eplb", "paper", "moeplan", "moeplan/oracle")


def demo() -> str:
    """What `moeplan demo` prints, up to the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moeplan", "demo"]
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    shown = re.search(r"^[^\n]*\n^strategy .*?^Among [^\n]*$", text, re.DOTALL | re.MULTILINE)
    assert shown is not None
    lines = [line for line in shown[0].splitlines() if not re.match(r"\S+/(prefill|domain|oracle)|paper/", line)]
    return "\n".join(["```", "$ moeplan demo", "...", *lines, "```"])


def results() -> str:
    """Change of remote picks by strategy, dispatch per pick, on 8 nodes: from docs/results/strategies.csv."""
    with (ROOT / "docs" / "results" / "strategies.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["nodes"] == "8" and _picks(row)]
    lines = [
        "| trace | redundant | " + " | ".join(f"`{name}`" for name in SHOWN) + " |",
        "|---" * (2 + len(SHOWN)) + "|",
    ]
    for trace in TRACES:
        for redundant in ("0", "16"):
            own = {
                row["row"]: row
                for row in rows
                if (row["trace"], row["redundant"]) == (trace, redundant) and _picks(row)
            }
            lines.append(f"| {trace} | {redundant} | " + " | ".join(_cell(own[name]) for name in SHOWN) + " |")
    return "\n".join(
        [*lines, "", "° over the load guard. `moeplan/oracle`: the same placement if the decode were known."]
    )


def _picks(row: dict[str, str]) -> bool:
    """Whether a row was planned for dispatch per pick, within the load guard."""
    return row["planned_for"] in ("", "pick") and row["load_guard"] != "off"


def _cell(row: dict[str, str]) -> str:
    mark = "" if row["eligible"] == "yes" else "°"
    if row["row"] != "moeplan":
        return f"{row['remote_share_change_pct']} %{mark}"
    return f"**{row['remote_share_change_pct']} %**{mark} [{row['remote_share_low']}, {row['remote_share_high']}]"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    page = readme.read_text(encoding="utf-8")
    for name, block in (("demo", demo()), ("results", results())):
        pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        page = re.sub(pattern, lambda match, text=block: f"{match[1]}\n{text}\n{match[2]}", page, flags=re.DOTALL)
    readme.write_text(page, encoding="utf-8")
