"""`moeplan profile`: characterise a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    check_places,
    claim_stdout,
    echo,
    emit_json,
    parse_layers,
    progress,
)

if TYPE_CHECKING:
    from moeplan.profile import Profile


def profile(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace directory, as 'moeplan import' makes it.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="HTML", help="The report.", show_default="TRACE-profile.html"),
    ] = None,
    without_layers: WithoutLayers = "",
    signature_tokens: Annotated[
        int | None,
        typer.Option(
            "--signature-tokens", metavar="N", help="Let a request's first N rows stand in for its prefill.", min=1
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")] = 0,
    json_target: JsonOption = None,
) -> None:
    """Characterise a trace; an HTML report and JSON."""
    claim_stdout(json_target)
    from moeplan.profile import profile as characterise
    from moeplan.report.page import write_page
    from moeplan.report.profile_page import profile_html
    from moeplan.trace import open_trace

    opened = open_trace(trace, without_layers=parse_layers(without_layers))
    page = output or Path(f"{trace.resolve().name}-profile.html")
    check_places(page)
    with progress("profile") as report:
        found = characterise(opened, seed=seed, signature_tokens=signature_tokens, progress=report)
    write_page(page, profile_html(found))
    emit_json(json_target, found.to_dict())
    _summary(found)
    echo()
    echo(f"wrote {page}")


def _summary(found: Profile) -> None:
    """The findings in some 25 lines, the same sentences as in the report."""
    import textwrap

    from moeplan.report.profile_page import sentences

    shape, requests, stages = found.trace.shape, found.trace.requests, found.counts.stages
    echo(f"{found.trace.label}: {shape.num_layers} MoE layers x {shape.num_experts} experts, top-{shape.top_k}")
    rows = [f"{int(stages.lengths(s).sum()):,} {name}" for s, name in enumerate(found.stage_labels.values())]
    named = ", ".join(text for text in rows if not text.startswith("0 "))
    domains = len(found.counts.domains)
    echo(f"{len(requests):,} {found.trace.request_noun} of {domains} domain{'s' * (domains != 1)}; rows: {named}")
    for notice in found.notices:
        echo(textwrap.fill(f"note: {notice}", 110, subsequent_indent="      "))
    for topic, sentence in sentences(found).items():
        echo()
        echo(topic)
        echo(textwrap.fill(sentence, 110, initial_indent="  ", subsequent_indent="  "))


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(profile)
