"""`moeplan profile`: characterise a trace."""

from __future__ import annotations

from pathlib import Path

from moeplan.cli.options import Json, PageOut, Seed, TraceFlags, TraceIn
from moeplan.cli.terminal import echo, emit_json, progress
from moeplan.cli.text.profile import profile_lines

__all__ = ["profile"]


def profile(
    trace: TraceIn, /, *, output: PageOut = None, requests: TraceFlags = TraceFlags(), seed: Seed = 0, json: Json = None
) -> None:
    """Characterise a trace: load imbalance, phases, domains, similarity of requests, leakage.

    Writes a page with figures (default: TRACE-profile.html) and prints the findings.
    """
    from moeplan import profile_trace
    from moeplan.io.files import check_place
    from moeplan.report.page import write_page
    from moeplan.report.profile_page import profile_html

    opened = requests.open(trace)
    page = output or Path(f"{trace.resolve().name}-profile.html")
    check_place(page)
    with progress("profile") as report:
        found = profile_trace(opened, seed=seed, signature_tokens=requests.signature_tokens, progress=report)
    write_page(page, profile_html(found))
    emit_json(json, found.to_dict())
    for line in profile_lines(found):
        echo(line)
    echo()
    echo(f"wrote {page}")
