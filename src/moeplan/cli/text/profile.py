"""The findings of a profile as text: the same sentences as in its page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeplan.cli.terminal import plural

if TYPE_CHECKING:
    from moeplan.profile import Profile

__all__ = ["profile_lines"]


def profile_lines(found: Profile) -> Iterator[str]:
    """Some 25 lines."""
    from moeplan.report.profile_page import sentences

    shape, requests, stages = found.trace.shape, found.trace.requests, found.counts.stages
    yield f"{found.trace.label}: {shape.num_layers} MoE layers x {shape.num_experts} experts, top-{shape.top_k}"
    rows = [f"{int(stages.lengths(s).sum()):,} {name}" for s, name in enumerate(found.stage_labels.values())]
    named = ", ".join(text for text in rows if not text.startswith("0 "))
    domains = plural(len(found.counts.domains), "domain")
    yield f"{len(requests):,} {found.trace.request_noun} of {domains}; rows: {named}"
    for notice in found.notices:
        yield from textwrap.wrap(f"note: {notice}", 110, subsequent_indent="      ")
    for topic, sentence in sentences(found).items():
        yield ""
        yield topic
        yield from textwrap.wrap(sentence, 110, initial_indent="  ", subsequent_indent="  ")
