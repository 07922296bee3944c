"""`moeplan size`: the smallest cluster that a use needs, per hardware, and what would have to improve."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import JsonOption, check_places, claim_stdout, echo, emit_json, progress

if TYPE_CHECKING:
    from moeplan.perf.sizing import Sizing, SizingResult
    from moeplan.perf.use_cases import UseCase


class UseCaseChoice(StrEnum):
    """The four use cases of GenZ's paper, or all of them."""

    qa = "qa"
    summarise = "summarise"
    chat = "chat"
    code = "code"
    all = "all"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(help="The smallest cluster of each hardware for a use case and its limits, and what bounds it.")
    def size(
        model: o.Model,
        hardware: o.HardwareList = "all",
        use_case: Annotated[
            UseCaseChoice | None, typer.Option("--use-case", help="Lengths, beams and limits of a use case.")
        ] = None,
        prompt: Annotated[int | None, typer.Option("--prompt", metavar="N", help="Tokens of a prompt.")] = None,
        output_tokens: Annotated[int | None, typer.Option("--output", metavar="N", help="Tokens of an answer.")] = None,
        beams: Annotated[int | None, typer.Option("--beams", metavar="N", help="Beams of a request.")] = None,
        ttft: Annotated[float | None, typer.Option("--ttft", metavar="MS", help="Limit: time to first token.")] = None,
        tpot: Annotated[
            float | None, typer.Option("--tpot", metavar="MS", help="Limit: time per output token.")
        ] = None,
        requests: Annotated[
            int, typer.Option("--requests", metavar="N", help="Requests at a time that it must serve.")
        ] = 1,
        max_gpus: Annotated[int, typer.Option("--max-gpus", metavar="N", help="Largest cluster tried.")] = 8192,
        gpus_per_node: o.GpusPerNode = None,
        sensitivity: Annotated[
            bool, typer.Option("--sensitivity", help="Also how TTFT and TPOT answer to each part of the hardware.")
        ] = False,
        mtp: o.Drafts = 0,
        accepted: o.Accepted = None,
        weights: o.Weights = None,
        experts: o.Experts = None,
        kv: o.Kv = "bf16",
        usd_per_hour: o.UsdPerHour = None,
        watts: o.Watts = None,
        hardware_file: o.HardwareFile = None,
        json: JsonOption = None,
        output: Annotated[
            str | None, typer.Option("-o", "--html", metavar="HTML", help="Also write a page with figures.")
        ] = None,
    ) -> None:
        claim_stdout(json)
        check_places(output)
        from moeplan.perf.hardware import hardware_list
        from moeplan.perf.sizing import SizingSettings
        from moeplan.perf.sizing import size as run
        from moeplan.perf.use_cases import find_use_cases

        found = hardware_list(hardware, hardware_file, usd_per_hour, watts)
        cases = [
            replace(case, drafts=mtp, accepted=1 + 0.8 * mtp if accepted is None else accepted)
            for case in find_use_cases(
                use_case.value if use_case else None, prompt=prompt, output=output_tokens, beams=beams, ttft_ms=ttft,
                tpot_ms=tpot,
            )
        ]  # fmt: skip
        settings = SizingSettings(requests, max_gpus, gpus_per_node, weights, experts, kv, sensitivity)
        with progress("size") as report:
            sized = run(model, found, cases, settings, report)
        for case in cases:
            _show(sized, case)
        if any(answer.meets for answer in sized.results):
            echo("bound by: prefill, decode. full at: most requests at a time, and what limits them")
            echo("tokens, USD, kWh: with that many requests; per million output tokens")
        emit_json(json, sized.to_dict())
        if output is not None:
            from moeplan.report.perf_page import write_size_page

            write_size_page(Path(output), sized)
            echo(f"wrote {output}")
        if not sized.met:
            raise typer.Exit(1)


def _show(sized: Sizing, case: UseCase) -> None:
    """One use case for people."""
    from moeplan.perf.sensitivity import KNOBS

    answers, requests, dtypes = sized.of(case), sized.settings.requests, sized.precision.describe(sized.spec)
    echo(
        f"{sized.spec.name}, {case.name}: {case.prompt:,} tokens in, {case.output:,} out, {case.beams} beam"
        f"{'s' * (case.beams > 1)}; {requests} request{'s' * (requests > 1)} at a time; {dtypes}"
    )
    echo(f"TTFT within {1e3 * case.ttft_s:g} ms, TPOT within {1e3 * case.tpot_s:g} ms ({case.source})")
    echo()
    for line in _table(answers):
        echo(line)
    missed = [a for a in answers if not a.meets]
    if missed:
        echo()
    for answer in missed:
        echo(_missed(answer))
    close = [f"{a.hardware.name}" for a in answers if a.close]
    if close:
        echo()
        echo(f"a size more or less, being within 15 % of a limit, about the model's error: {', '.join(close)}")
    shown = [a for a in answers if a.step_model and sized.settings.sensitivity]
    if shown:
        echo()
        for line in _sensitivity(shown, KNOBS):
            echo(line)
    echo()


def _table(answers: list[SizingResult]) -> list[str]:
    """One line per hardware, of the smallest cluster that keeps the limits."""
    rows = []
    for a in answers:
        if not a.meets or a.step_model is None or a.serving is None or a.full is None:
            rows.append([a.hardware.name, "-", f"none up to {a.tried:,}", *[""] * 8])
            continue
        rows.append(
            [
                a.hardware.name, f"{a.gpus:,}", a.layout, f"{1e3 * a.serving.ttft_s:,.0f}",
                f"{1e3 * a.serving.tpot_s:.1f}", f"{_first(a.bounds[1])}, {_first(a.bounds[0])}",
                f"{a.max_requests:,} {a.limited_by}", _digits(a.full.output_per_s), f"{a.usd:,.2f}",
                f"{a.kwh:,.2f}", f"{a.smaller:,}: {a.why}" if a.smaller else "there is none",
            ]
        )  # fmt: skip
    head = ["hardware", "GPUs", "layout", "TTFT ms", "TPOT ms", "bound by", "full at", "tokens/s/GPU", "USD/M", "kWh/M"]
    return o.aligned([*head, "smaller: why not"], rows, left=(0, 2, 5, 10))


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _first(shares: dict[str, float]) -> str:
    return next(iter(shares))


def _missed(a: SizingResult) -> str:
    """One line on hardware that does not do."""
    from moeplan.perf.sensitivity import needs

    if a.step_model is None or a.serving is None:
        return f"{a.hardware.name}: does not fit {a.tried:,} GPUs ({a.why}): {a.memory_ratio:.2f} x memory needed"
    alone, machine, everything = needs(a.would_need)
    return (
        f"{a.hardware.name}: nearest {a.gpus:,} ({a.layout}), TTFT {1e3 * a.serving.ttft_s:,.0f} "
        f"ms, TPOT {1e3 * a.serving.tpot_s:.1f} ms; enough: {alone}; all of the hardware {machine}; hardware and "
        f"overhead {everything}"
    )


def _sensitivity(answers: list[SizingResult], knobs: dict[str, str]) -> list[str]:
    """Elasticities as a table."""
    head = ["hardware", "GPUs", "of", "FLOPs", "mem rate", "capacity", "up rate", "out rate", "up lat", "out lat"]
    rows = []
    for a in answers:
        assert a.step_model is not None
        first = [a.hardware.name, f"{a.gpus:,}"]
        second = ["" if a.meets else "  (misses)", ""]
        for name, start in (("ttft", first), ("tpot", second)):
            rows.append([*start, name.upper(), *(_plain(a.elasticities[knob][name]) for knob in knobs)])
    held = ", ".join(f"{a.hardware.name} {_plain(a.elasticities['capacity']['requests'])}" for a in answers)
    return [
        "sensitivity: per cent of change for one per cent more of",
        *o.aligned([*head, "overhead"], rows, left=(0, 2)),
        "up, out: links inside and between nodes. overhead: launches, small kernels, the engine between steps",
        f"capacity changes how many requests fit instead: {held}",
    ]


def _plain(value: float) -> str:
    """A figure, or nothing where nothing changes."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "."
