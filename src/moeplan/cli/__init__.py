"""The command line: one module per verb, and the only place that prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `moeplan` command."""
    from moeplan.cli.app import run

    sys.exit(run(sys.argv[1:]))
