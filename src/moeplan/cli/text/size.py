"""Sizes of clusters as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moeplan.cli.terminal import aligned, plural

if TYPE_CHECKING:
    from moeplan.perf.sizing import Sizing, SizingResult
    from moeplan.perf.use_cases import UseCase

__all__ = ["size_lines"]

_HEAD = ["hardware", "GPUs", "layout", "TTFT ms", "TPOT ms", "bound by", "maximum concurrency", "tokens/s/GPU"]
_HEAD += ["USD/M", "kWh/M", "why not smaller"]
_PARTS = ("hardware", "GPUs", "of", "FLOPs", "mem rate", "capacity", "up rate", "out rate", "up lat", "out lat")


def size_lines(sized: Sizing, cases: Sequence[UseCase]) -> Iterator[str]:
    """Every use case, then what the columns mean."""
    for case in cases:
        yield from _case(sized, case)
        yield ""
    if any(answer.meets for answer in sized.results):
        yield "bound by: prefill, decode. maximum concurrency: most requests in flight, and what limits them"
        yield "tokens, USD, kWh: with that many requests; per million output tokens"


def _case(sized: Sizing, case: UseCase) -> Iterator[str]:
    answers = sized.of(case)
    yield (
        f"{sized.spec.name}, {case.name}: {case.prompt:,} tokens in, {case.output:,} out, "
        f"{plural(case.beams, 'beam')}; {plural(sized.settings.requests, 'request')} at a time; "
        f"{sized.precision.describe(sized.spec)}"
    )
    yield f"TTFT within {1e3 * case.ttft_s:g} ms, TPOT within {1e3 * case.tpot_s:g} ms ({case.source})"
    yield ""
    yield from aligned(_HEAD, [_row(answer) for answer in answers], left=(0, 2, 5, 10))
    missed = [_missed(answer) for answer in answers if not answer.meets]
    if missed:
        yield ""
        yield from missed
    close = [answer.hardware.name for answer in answers if answer.close]
    if close:
        yield ""
        yield f"may be off by one size, being within 15 % of a limit, about the model's error: {', '.join(close)}"
    shown = [answer for answer in answers if answer.step_model and sized.settings.sensitivity]
    if shown:
        yield ""
        yield from _sensitivity(shown)


def _row(a: SizingResult) -> list[str]:
    """The smallest cluster that keeps the limits."""
    if not a.meets or a.step_model is None or a.serving is None or a.full is None:
        return [a.hardware.name, "-", f"none up to {a.tried:,}", *[""] * 8]
    each = a.full.output_per_s
    cells = [
        a.hardware.name,
        f"{a.gpus:,}",
        a.layout,
        f"{1e3 * a.serving.ttft_s:,.0f}",
        f"{1e3 * a.serving.tpot_s:.1f}",
    ]
    cells += [f"{next(iter(a.bounds[1]))}, {next(iter(a.bounds[0]))}", f"{a.max_requests:,} {a.limited_by}"]
    cells += [f"{each:,.0f}" if each >= 100 else f"{each:.3g}", f"{a.usd:,.2f}", f"{a.kwh:,.2f}"]
    return [*cells, f"{a.smaller:,}: {a.why}" if a.smaller else "the smallest size"]


def _missed(a: SizingResult) -> str:
    """One line on hardware that misses the limits."""
    from moeplan.perf.sensitivity import needs

    if a.step_model is None or a.serving is None:
        return f"{a.hardware.name}: does not fit {a.tried:,} GPUs ({a.why}): {a.memory_ratio:.2f} x memory needed"
    alone, machine, everything = needs(a.would_need)
    return (
        f"{a.hardware.name}: nearest {a.gpus:,} ({a.layout}), TTFT {1e3 * a.serving.ttft_s:,.0f} ms, TPOT "
        f"{1e3 * a.serving.tpot_s:.1f} ms; enough: {alone}; all of the hardware {machine}; hardware and overhead "
        f"{everything}"
    )


def _sensitivity(answers: Sequence[SizingResult]) -> Iterator[str]:
    """Elasticities as a table."""
    from moeplan.perf.sensitivity import KNOBS

    rows = []
    for a in answers:
        starts = ([a.hardware.name, f"{a.gpus:,}"], ["" if a.meets else "  (misses)", ""])
        for name, start in zip(("ttft", "tpot"), starts, strict=True):
            rows.append([*start, name.upper(), *(_plain(a.elasticities[knob][name]) for knob in KNOBS)])
    yield "sensitivity: per cent of change for one per cent more of"
    yield from aligned([*_PARTS, "overhead"], rows, left=(0, 2))
    yield "up, out: links inside and between nodes. overhead: launches, small kernels, the engine between steps"
    held = ", ".join(f"{a.hardware.name} {_plain(a.elasticities['capacity']['requests'])}" for a in answers)
    yield f"capacity changes how many requests fit instead: {held}"


def _plain(value: float) -> str:
    """A figure, or nothing where nothing changes."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "."
