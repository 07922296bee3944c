"""Every `moeplan VERB --flag` that a page, a message or a comment names exists, and no renamed flag is left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.cli.old_names import FLAGS as OLD_FLAGS
from moeplan.cli.old_names import VERBS as OLD_VERBS

#: Verb and sub-verb: its flags.
FLAGS: dict[str, set[str]] = {}
for line in (ROOT / "tests/data/flags.tsv").read_text().splitlines():
    flag, _, verbs = line.split("\t")
    for command in verbs.split(", "):
        FLAGS.setdefault(command, {"--help", "--version"}).add(flag)
ALL = set().union(*FLAGS.values())
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src/moeplan").rglob("*.py")])
PAGES += sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "old_names.py")]  # they name what is gone


def named(text: str) -> Iterator[tuple[str, list[str]]]:
    """Words after `moeplan`, and the flags up to the end of the command; continued lines are one."""
    text = re.sub(r"\\\n\s*", " ", text)
    for found in re.finditer(
        r"(?:^|[`$\"'(:;,] ?)moeplan ((?:[a-z][a-z-]*)(?: [a-z-]+)?)([^`\n|;#\"']*)", text, re.MULTILINE
    ):
        yield found[1], re.findall(r"(?<!\S)--[a-z][a-z-]*", found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_named_exist(page: Path) -> None:
    text, wrong = page.read_text(encoding="utf-8"), []
    for words, flags in named(text):
        verb = words.split()[0]
        of_verb = set().union(*(own for name, own in FLAGS.items() if name.split()[0] == verb))
        known = FLAGS.get(words, of_verb)
        wrong += [f"moeplan {words} has no {flag}" for flag in flags if flag not in known]
        wrong += [f"moeplan {verb} is gone"] * (verb in OLD_VERBS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_no_page_names_a_flag_that_is_gone(page: Path) -> None:
    gone = {old for old, _, _ in OLD_FLAGS} - ALL - {"--nnodes"}  # which is SGLang's and vLLM's
    text = page.read_text(encoding="utf-8")
    found = [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) if flag in gone]
    assert not found
