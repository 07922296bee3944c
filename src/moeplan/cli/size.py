"""`moeplan size`: the smallest cluster that a use needs, per hardware, and what would have to improve."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import perf_options as o
from moeplan.cli.common import JsonOption, Progress, check_places, claim_stdout, echo, emit_json, progress
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.model.spec import ModelSpec
    from moeplan.perf.sizing import SizingResult, UseCase


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
        from moeplan.model.spec import model as find_model
        from moeplan.perf.sizing import size as run
        from moeplan.perf.sweep import precision_of

        spec, found = find_model(model), o.machines(hardware, hardware_file, usd_per_hour, watts, gpus_per_node)
        cases = [
            replace(case, drafts=mtp, accepted=o.accepted_of(mtp, accepted))
            for case in _cases(use_case, prompt, output_tokens, beams, ttft, tpot)
        ]
        if requests < 1 or max_gpus < 1:
            raise UsageError("--requests and --max-gpus must be at least 1")
        if mtp and not spec.mtp_layers:
            raise UsageError(f"{spec.name} has no module for multi-token prediction", hint="leave --mtp out")
        precision = precision_of(spec, weights, experts, kv)
        for case in cases:
            _ = case.load  # refuses what cannot be, before any work
        asked = [(case, machine) for case in cases for machine in found]
        answers: list[SizingResult] = []
        with progress("size") as report:
            for done, (case, machine) in enumerate(asked):
                at = partial(_at, report, done, len(asked), f"{case.name}, {machine.name}")
                answers.append(
                    run(
                        spec, machine, case, precision, requests=requests, most=max_gpus, gpus_per_node=gpus_per_node,
                        usd_per_hour=usd_per_hour, watts=watts, report=at,
                    )
                )  # fmt: skip
        dtypes = o.dtypes(spec, precision)
        facts: dict[str, Any] = {"model": spec.name, "requests": requests, "max_gpus": max_gpus, "use_cases": {}}
        for case in cases:
            mine = [answer for answer in answers if answer.case is case]
            facts["use_cases"][case.name] = _show(spec, case, mine, requests, dtypes, sensitivity)
        if any(answer.meets for answer in answers):
            echo("bound by: prefill, decode. full at: most requests at a time, and what limits them")
            echo("tokens, USD, kWh: with that many requests; per million output tokens")
        emit_json(json, facts)
        if output is not None:
            from moeplan.report.perf_page import write_size_page

            write_size_page(Path(output), spec, answers, dtypes, requests, sensitivity)
            echo(f"wrote {output}")
        if any(not any(a.meets for a in answers if a.case is case) for case in cases):
            raise typer.Exit(1)


def _at(report: Progress, done: int, total: int, what: str, gpus: int) -> None:
    report(done, total, f"{what} x {gpus}")


def _cases(
    name: UseCaseChoice | None, prompt: int | None, output: int | None, beams: int | None, ttft: float | None,
    tpot: float | None,
) -> list[UseCase]:  # fmt: skip
    """The use cases asked for, each with what the flags change of it."""
    from moeplan.perf.sizing import USE_CASES, UseCase

    for flag, value in (
        ("--prompt", prompt),
        ("--output", output),
        ("--beams", beams),
        ("--ttft", ttft),
        ("--tpot", tpot),
    ):
        if value is not None and not value > 0:
            raise UsageError(f"{flag} {value:g} is not above 0")
    if name is None:
        if prompt is None or output is None or ttft is None or tpot is None:
            raise UsageError(
                "the use is not known", hint="give --use-case, or --prompt, --output, --ttft and --tpot (milliseconds)"
            )
        return [UseCase("own", prompt, output, beams or 1, ttft / 1e3, tpot / 1e3, "limits as given")]
    listed = list(USE_CASES.values()) if name is UseCaseChoice.all else [USE_CASES[name.value]]
    return [
        replace(
            case,
            prompt=prompt or case.prompt,
            output=output or case.output,
            beams=beams or case.beams,
            ttft_s=ttft / 1e3 if ttft else case.ttft_s,
            tpot_s=tpot / 1e3 if tpot else case.tpot_s,
            source="limits as given" if ttft and tpot else case.source + (", or as given" if ttft or tpot else ""),
        )
        for case in listed
    ]


def _show(
    spec: ModelSpec, case: UseCase, answers: list[SizingResult], requests: int, dtypes: str, sensitivity: bool
) -> dict[str, Any]:
    """One use case for people; returns its JSON."""
    from moeplan.perf.sensitivity import KNOBS, elasticities, improvements

    echo(
        f"{spec.name}, {case.name}: {case.prompt:,} tokens in, {case.output:,} out, {case.beams} beam"
        f"{'s' * (case.beams > 1)}; {requests} request{'s' * (requests > 1)} at a time; {dtypes}"
    )
    echo(f"TTFT within {1e3 * case.ttft_s:g} ms, TPOT within {1e3 * case.tpot_s:g} ms ({case.source})")
    echo()
    for line in _table(answers):
        echo(line)
    out: dict[str, Any] = {"case": _case_facts(case), "hardware": {}}
    missed = [a for a in answers if not a.meets]
    helps = {id(a): improvements(a.layout, case.load, a.each, lambda s: case.miss(s) <= 1) for a in missed if a.layout}
    if missed:
        echo()
    for answer in missed:
        echo(_missed(answer, helps.get(id(answer), {})))
    close = [f"{a.hardware.name}" for a in answers if a.close]
    if close:
        echo()
        echo(f"a size more or less, being within 15 % of a limit, about the model's error: {', '.join(close)}")
    changes = {id(a): elasticities(a.layout, case.load, a.each) for a in answers if a.layout and sensitivity}
    if changes:
        echo()
        for line in _sensitivity([(a, changes[id(a)]) for a in answers if id(a) in changes], KNOBS):
            echo(line)
    for answer in answers:
        facts = _facts(answer)
        if id(answer) in helps:
            facts["would_need"] = helps[id(answer)]
        if id(answer) in changes:
            facts["elasticities"] = changes[id(answer)]
        out["hardware"][answer.hardware.name] = facts
    echo()
    return out


def _table(answers: list[SizingResult]) -> list[str]:
    """One line per hardware, of the smallest cluster that keeps the limits."""
    from moeplan.perf.sweep import ways

    rows = []
    for a in answers:
        if not a.meets or a.layout is None or a.serving is None or a.full is None:
            rows.append([a.hardware.name, "-", f"none up to {a.tried:,}", *[""] * 8])
            continue
        rows.append(
            [
                a.hardware.name, f"{a.layout.parallel.gpus:,}", ways(a.layout), f"{1e3 * a.serving.ttft_s:,.0f}",
                f"{1e3 * a.serving.tpot_s:.1f}", f"{_first(a.bounds[1])}, {_first(a.bounds[0])}",
                f"{a.most * a.layout.parallel.dp:,} {a.limited}", _digits(a.full.output_per_s), f"{a.usd:,.2f}",
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


def _missed(a: SizingResult, helps: dict[str, float | None]) -> str:
    """One line on hardware that does not do."""
    from moeplan.perf.sensitivity import needs
    from moeplan.perf.sweep import ways

    if a.layout is None or a.serving is None:
        return f"{a.hardware.name}: does not fit {a.tried:,} GPUs ({a.why}): {a.short:.2f} x the memory would be needed"
    alone, machine, everything = needs(helps)
    return (
        f"{a.hardware.name}: nearest {a.layout.parallel.gpus:,} ({ways(a.layout)}), TTFT {1e3 * a.serving.ttft_s:,.0f} "
        f"ms, TPOT {1e3 * a.serving.tpot_s:.1f} ms; enough: {alone}; all of the hardware {machine}; hardware and "
        f"overhead {everything}"
    )


def _sensitivity(answers: list[tuple[SizingResult, dict[str, dict[str, float]]]], knobs: dict[str, str]) -> list[str]:
    """Elasticities as a table."""
    head = ["hardware", "GPUs", "of", "FLOPs", "mem rate", "capacity", "up rate", "out rate", "up lat", "out lat"]
    rows = []
    for a, table in answers:
        assert a.layout is not None
        first = [a.hardware.name, f"{a.layout.parallel.gpus:,}"]
        second = ["" if a.meets else "  (misses)", ""]
        for name, start in (("ttft", first), ("tpot", second)):
            rows.append([*start, name.upper(), *(_plain(table[knob][name]) for knob in knobs)])
    held = ", ".join(f"{a.hardware.name} {_plain(table['capacity']['requests'])}" for a, table in answers)
    return [
        "sensitivity: per cent of change for one per cent more of",
        *o.aligned([*head, "overhead"], rows, left=(0, 2)),
        "up, out: links inside and between nodes. overhead: launches, small kernels, the engine between steps",
        f"capacity changes how many requests fit instead: {held}",
    ]


def _plain(value: float) -> str:
    """A figure, or nothing where nothing changes."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "."


def _case_facts(case: UseCase) -> dict[str, Any]:
    return {
        "prompt": case.prompt,
        "output": case.output,
        "beams": case.beams,
        "ttft_limit_ms": 1e3 * case.ttft_s,
        "tpot_limit_ms": 1e3 * case.tpot_s,
        "limits_from": case.source,
        "drafts": case.drafts,
        "accepted": case.accepted,
    }


def _facts(a: SizingResult) -> dict[str, Any]:
    """One answer, as JSON."""
    out: dict[str, Any] = {"meets": a.meets, "within_model_error": a.close, "largest_tried": a.tried}
    if a.layout is None or a.serving is None:
        return out | {"nearest": None, "why": a.why, "memory_needed_over_usable": a.short}
    p = a.layout.parallel
    out |= {
        "cluster" if a.meets else "nearest": o.layout_facts(a.layout),
        "ttft_ms": 1e3 * a.serving.ttft_s,
        "tpot_ms": 1e3 * a.serving.tpot_s,
        "requests": a.each * p.dp,
        "bound_ttft": a.bounds[1],
        "bound_tpot": a.bounds[0],
    }
    if not a.meets or a.full is None:
        return out
    return out | {
        "most_requests": a.most * p.dp,
        "most_requests_limited_by": a.limited,
        "tokens_per_s_per_gpu": a.full.output_per_s,
        "usd_per_million_tokens": a.usd,
        "kwh_per_million_tokens": a.kwh,
        "smaller": {"gpus": a.smaller, "why": a.why} if a.smaller else None,
    }
