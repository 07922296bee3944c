"""One word for one thing: words that the glossary replaces appear in no string, comment or page."""

from __future__ import annotations

import re

import pytest

from helpers import ROOT

#: A pattern, and what to write instead. Only words that have no other sense here.
REPLACED = {
    r"fore(tell|tells|told|telling|sight)": "predict, prediction",
    r"unseen requests?|requests? (that )?(the|a|its) plan never saw": "held-out requests",
    r"\bmend(s|ed|ing)?\b|_mend\b": "hint, correct",
    r"\breckon(s|ed|ing)?\b": "compute",
    r"fresh plans?\b|planning anew\b": "new plan",
    r"rows? that counts?\b|even experts would\b": "eligible row; noise floor",
    r"gives? away|given away": "leak",
    r"uneven(ness)?\b": "load imbalance",
    r"\bdearer\b": "load penalty",
    r"who serves\b|who decodes together": "expert load, GPU load; request group",
    r"(lives|live|lies|lie) where|what nodes hold": "placement",
    r"padded pairs": "message padding",
    r"everything that chance decides": "random seed",
    r"by chance alone|what chance alone": "noise floor",
    r"\b(the|these|those|all|no) bars?\b(?! chart)": "target",
    r"reprint": "reproduce",
    r"what is not there yet": "limitations",
    r"living plans?": "drift detection",
    r"trace of sums|sums of requests": "aggregated trace",
    r"not good: ": "invalid: ",
    r"fault of its own": "internal error",
    r"\bat home\b": "local",
    r"\bdrowns?\b": "is overloaded",
    r"the whole way\b": "the full pipeline",
    r"is not whole JSON": "invalid or truncated JSON",
    r"\bin vain\b": "does not help",
    r"by a hair\b": "narrowly",
    r"are not had\b|do not do\b": "are not supported",
    r"what (it|one) steps into": "hook points",
    r"broke off its answer": "closed the connection mid-response",
    r"(it )?looks better here than it is": "results are optimistic",
    r"nothing to gain by so few": "no improvement within --max-moves",
    r"how alike\b": "similarity",
}
FILES = sorted(
    path
    for pattern in ("src/moeplan/**/*.py", "src/moeplan/**/*.html", "docs/**/*.md", "*.md", "examples/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # history names old words
)


@pytest.mark.parametrize("pattern", REPLACED)
def test_a_word_that_another_replaces_is_used_nowhere(pattern: str) -> None:
    wrong = re.compile(pattern, re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if wrong.search(line)
    ]
    assert not found, f"write {REPLACED[pattern]!r}:\n" + "\n".join(found)
