"""Prints the lowest version of every dependency that pyproject.toml allows, as pip constraints.

    python .ci/lowest.py > /tmp/lowest.txt && pip install -e . -c /tmp/lowest.txt

The workflow file runs the tests with exactly these, so that a floor is never only a guess.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

FLOOR = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:\[.*\])?\s*(?:>=|==|~=)\s*([0-9][^,;\s]*)")


def floors(requirements: list[str]) -> list[str]:
    """`name==version` of each requirement.

    Raises:
        SystemExit: a requirement without a lower bound.
    """
    matches = [(text, FLOOR.match(text)) for text in requirements]
    unbounded = [text for text, match in matches if match is None]
    if unbounded:
        sys.exit(f"no lower bound in pyproject.toml: {', '.join(unbounded)}")
    return [f"{match[1]}=={match[2]}" for _, match in matches if match]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(floors(project["dependencies"])))
