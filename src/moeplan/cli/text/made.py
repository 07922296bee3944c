"""A trace or a counts profile that a verb has made, as text and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.cli.terminal import echo, emit_json, plural

if TYPE_CHECKING:
    from moeplan.trace.counts import CountsProfile
    from moeplan.trace.reader import Trace

__all__ = ["show_counts", "show_made", "show_trace"]

_PROMPTS = {
    "ids": "the trace holds the prompts' token ids, which can be read as text",
    "hashed": "the trace holds hashed prompt tokens, which the secret makes searchable",
}
_INCOMPLETE = (
    ("requests_with_unknown_phases", "have unknown phases"),
    (
        "requests_without_prefill",
        "have no prefill rows: --signature-tokens N uses their first decode tokens in its place",
    ),
    ("requests_without_decode", "have no decode rows"),
)


def show_made(made: Trace | CountsProfile, json: Path | None) -> None:
    """A trace, or counts where the source has no requests."""
    from moeplan.trace.reader import Trace

    if isinstance(made, Trace):
        show_trace(made, json)
    else:
        show_counts(made, json)


def show_trace(trace: Trace, json: Path | None, **more: Any) -> None:
    """What was imported, recorded or generated; `more` goes into the JSON."""
    from moeplan.profile.summary import trace_summary

    kept = trace.prompts_info.kind if trace.prompts_info else None
    facts = {**trace_summary(trace), "prompt_tokens": kept, "notes": list(trace.source.get("notes", ())), **more}
    layers = plural(facts["layers"], "layer")
    echo(
        f"{facts['model'] or 'unnamed model'}{' (synthetic)' * facts['synthetic']}: {layers} x {facts['experts']} "
        f"experts, top-{facts['top_k']}"
    )
    what = "requests"
    if facts["aggregate"] > 1:
        what = f"sum{'s' * (facts['requests'] != 1)} of {facts['aggregate']} requests"
    echo(f"{facts['requests']} {what}, {facts['tokens']} tokens, {_phases(facts)}")
    echo(_domains(facts["domains"]))
    if facts["dropped"]:
        echo(f"not stored: {facts['dropped']} requests of fewer than {facts['min_tokens']} tokens")
    if facts["left_over"]:
        echo(
            f"not stored: {facts['left_over']} requests that do not fill a sum of {facts['aggregate']} of their domain"
        )
    for key, why in _INCOMPLETE:
        if facts[key]:
            echo(f"note: {facts[key]} of {facts['requests']} requests {why}")
    if facts["hidden"] is None:
        echo("note: the hidden size is unknown, so byte figures will be null: --hidden sets it")
    if kept:
        echo(f"warning: {_PROMPTS[kept]}; the files are readable by you only, and copies should be")
    for note in facts["notes"]:
        echo(f"note: {note}")
    took = f" in {facts['seconds']:.1f} s" if "seconds" in facts else ""
    echo(f"wrote {trace.path}{took}; next: moeplan profile {trace.path}")
    emit_json(json, facts)


def _phases(facts: dict[str, Any]) -> str:
    parts = [f"{facts[f'{phase}_tokens']} {phase}" for phase in ("prefill", "decode", "unknown")]
    return ", ".join(part for part in parts if not part.startswith("0 "))


def _domains(domains: dict[str, int]) -> str:
    """The largest domains and their requests, on one line."""
    largest = sorted(domains.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{label or '(none)'} {count}" for label, count in largest[:8])
    more = f", and {len(largest) - 8} more" if len(largest) > 8 else ""
    return f"{plural(len(domains), 'domain')}: {shown}{more}"


def show_counts(profile: CountsProfile, json: Path | None) -> None:
    """A counts profile."""
    from moeplan.profile.summary import counts_summary
    from moeplan.trace.counts import WITHOUT_REQUESTS

    facts = counts_summary(profile)
    echo(f"{facts['model'] or 'unnamed model'}: {plural(facts['layers'], 'layer')} x {facts['experts']} experts")
    echo(f"{facts['picks']} picks counted, phase: {facts['phase']}")
    echo(f"imbalance (largest over mean), mean {facts['mean_imbalance']:.2f}; by layer:")
    cells = [f"{layer:>5} {factor:6.2f}" for layer, factor in zip(facts["layer_ids"], facts["imbalance"], strict=True)]
    for first in range(0, len(cells), 6):
        echo("".join(cells[first : first + 6]))
    for note in (*facts["notes"], WITHOUT_REQUESTS):
        echo(f"note: {note}")
    echo(f"wrote {profile.path}, a counts profile, not a trace")
    emit_json(json, facts)
