"""The command line: one module per verb, and the only place that prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `moeplan` command."""
    try:
        from moeplan.cli.app import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # so early that nothing had begun
        print("moeplan: stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
