"""Reproduce the table of strategies on held-out requests, docs/results/strategies.md, with the targets of `moeplan`.

    python benchmarks/strategies.py --write            # everything, into docs/results/strategies.md
    python benchmarks/strategies.py --only-bars        # the bars alone, printed
    python benchmarks/strategies.py --sets embedded    # a part, printed

Real sets are read from ../shared/traces and left out where it is absent. The figures of every setting are kept as JSON
in the --cache folder, named by the code that made them, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from results_bars import Bar, bar_row, bars_of, load_bars_of, load_row, settings_of
from results_page import bars_section, page
from results_settings import ABLATED, KEY, PARTS, REAL, ROOT, SOURCES, TIMES, ablations, present, run, table

PAGE = ROOT / "docs" / "results" / "strategies.md"
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
    out.add_argument("--only-bars", action="store_true", help="the bars alone")
    out.add_argument("--write", action="store_true", help="write the page; needs every set, node, replica and mode")
    out.add_argument("--cache", type=Path, default=CACHE, help="folder of the figures of finished settings")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print it, or write the page."""
    flags = parser()
    given = flags.parse_args(arguments)
    part = any(value is not None for value in (given.sets, given.nodes, given.redundant, given.modes))
    if given.write and (part or given.only_bars):
        flags.error("--write is for the whole page: leave out --sets, --nodes, --redundant, --modes and --only-bars")
    wanted = given.sets or list(SOURCES)
    there = present(wanted)
    if given.write and len(there) < len(wanted):
        flags.error(f"--write needs all of {REAL}: {', '.join(sorted(set(wanted) - set(there)))} is not there")
    if not there:
        flags.error(f"none of {', '.join(wanted)} is in {REAL}")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    whole = not part or given.only_bars
    bars = [*bars_of(there, given.folds, given.steps), *load_bars_of(there, given.folds, given.steps)] if whole else []
    results = run(list(settings_of(bars)), given.cache, say)
    if given.only_bars:
        print(bars_section(bars, results))
        return
    main_table = table(
        there, given.nodes or NODES, given.redundant or TIMES, given.modes or KEY, given.folds, given.steps
    )
    shown = run(main_table, given.cache, say)
    ablated = (
        run(ablations([name for name in there if name in ABLATED], given.steps), given.cache, say) if whole else {}
    )
    text = page(shown, bars, results, ablated, PARTS)
    if given.write:
        unfinished = PAGE.with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(PAGE)
    else:
        print(text)


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs: the bars."""
    there = present(SOURCES)
    bars = [*bars_of(there, FOLDS, STEPS), *load_bars_of(there, FOLDS, STEPS)]
    results = run(list(settings_of(bars)), CACHE, lambda text: None)
    lines = []
    for bar in bars:
        row = bar_row(bar, results) if isinstance(bar, Bar) else load_row(bar, results)
        text = f"{row[3]} (asked {row[2]}), met: {row[5]}" if isinstance(bar, Bar) else f"{row[1]}, met: {row[-1]}"
        lines.append((bar.name.replace("`", ""), text.replace("*", "").replace("`", "")))
    return lines


if __name__ == "__main__":
    main()
