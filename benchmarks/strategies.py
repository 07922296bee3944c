"""Reproduce the results of every strategy on held-out requests: docs/results/.

    python benchmarks/strategies.py --write            # strategies.md, strategies.csv, the summary in index.md
    python benchmarks/strategies.py --sets embedded    # a part, printed

Real sets are read from ../shared/traces and left out where it is absent. The figures of every setting are kept as JSON
in the --cache folder, named by the code that made them, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from results_page import CSV_HEAD, csv_rows, page, summary
from results_settings import ABLATED, KEY, PARTS, REAL, ROOT, SOURCES, TIMES, ablations, present, run, table
from results_tables import change_of

PAGES = ROOT / "docs" / "results"
CACHE = Path(tempfile.gettempdir()) / "moeplan-strategies"
NODES, FOLDS, STEPS = (8, 4), 4, 200


def one_of(label: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of 'a,b' that names the first word which is not known."""

    def parse(text: str) -> list[str]:
        names = [word.strip() for word in text.split(",") if word.strip()]
        for name in names or [text]:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{label} {name!r} is not one of {', '.join(known)}")
        return names

    return parse


def counts(text: str) -> list[int]:
    """'8,4' as numbers."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, e.g. 8,4") from None


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    out.add_argument("--sets", type=one_of("set", tuple(SOURCES)), help="sets, separated by commas")
    out.add_argument("--nodes", type=counts, help="numbers of nodes: 8,4")
    out.add_argument("--redundant", type=counts, help="redundant slots, in multiples of the nodes: 0,1,2,4")
    out.add_argument("--modes", type=one_of("mode", tuple(KEY)), help="dispatch modes: pick,node")
    out.add_argument("--folds", type=int, default=FOLDS, help="splits of each set")
    out.add_argument("--steps", type=int, default=STEPS, help="replayed steps a split")
    out.add_argument("--write", action="store_true", help="write the page; needs every set, node, replica and mode")
    out.add_argument("--cache", type=Path, default=CACHE, help="folder of the figures of finished settings")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print it, or write the page."""
    flags = parser()
    given = flags.parse_args(arguments)
    part = any(value is not None for value in (given.sets, given.nodes, given.redundant, given.modes))
    if given.write and part:
        flags.error("--write is for all pages: leave out --sets, --nodes, --redundant and --modes")
    wanted = given.sets or list(SOURCES)
    there = present(wanted)
    if given.write and len(there) < len(wanted):
        flags.error(f"--write needs all of {REAL}: {', '.join(sorted(set(wanted) - set(there)))} is not there")
    if not there:
        flags.error(f"none of {', '.join(wanted)} is in {REAL}")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    settings = table(
        there, given.nodes or NODES, given.redundant or TIMES, given.modes or KEY, given.folds, given.steps
    )
    results = run(settings, given.cache, say)
    ablated = {}
    if not part:
        ablated = run(ablations([name for name in there if name in ABLATED], given.steps), given.cache, say)
    text = page(results, ablated, PARTS)
    if not given.write:
        print(text)
        return
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    filled = f"<!-- summary -->\n{summary(results)}\n<!-- /summary -->"
    index = re.sub(r"<!-- summary -->.*<!-- /summary -->", lambda match: filled, index, flags=re.DOTALL)
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([CSV_HEAD, *csv_rows(results)])
    for name, content in (("strategies.md", text), ("strategies.csv", rows.getvalue()), ("index.md", index)):
        unfinished = PAGES / f"{name}.part"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(PAGES / name)


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs: `moeplan` against `linear` on 8 nodes, on the traces that are there."""
    results = run(table(present(SOURCES), (8,), (0, 2), tuple(KEY), FOLDS, STEPS), CACHE, lambda text: None)
    return [
        (
            f"{setting.source}, R = {setting.redundant}, {setting.mode}",
            change_of(found["strategies"]["moeplan"][KEY[setting.mode]]),
        )
        for setting, found in results.items()
        if setting.guarded
    ]


if __name__ == "__main__":
    main()
