"""Steps, sweeps and sizes of clusters as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moeplan.cli.terminal import aligned, plural

if TYPE_CHECKING:
    from moeplan.perf.estimate import Estimate
    from moeplan.perf.sizing import Sizing, SizingResult
    from moeplan.perf.sweep import Sweep
    from moeplan.perf.use_cases import UseCase

__all__ = ["estimate_lines", "size_lines", "sweep_lines"]

#: Rows of a front that the text shows; `--json` has all.
SHOWN = 14
_FRONT_HEAD = ("TPOT ms", "tokens/s/GPU", "hardware", "GPUs", "layout", "batch", "USD/M", "kWh/M", "bound by")
_HEAD = ["hardware", "GPUs", "layout", "TTFT ms", "TPOT ms", "bound by", "max concurrency (limit)", "tokens/s/GPU"]
_HEAD += ["USD/M", "kWh/M", "why not smaller"]
_PARTS = ("hardware", "GPUs", "of", "FLOPs", "mem rate", "capacity", "up rate", "out rate", "up lat", "out lat")


def estimate_lines(found: Estimate) -> list[str]:
    """One step for people."""
    facts, layout = found.to_dict(), found.step_model
    p, per_node = facts["parallel"], layout.gpus_per_node
    spec = layout.spec
    ways = ", ".join(f"{name} {p[name]}" for name in ("tp", "dp", "ep", "pp") if p[name] > 1) or "one GPU"
    held = f"{facts['context']:,} tokens {'each to prefill' if facts['phase'] == 'prefill' else 'of context'}"
    nodes = -(-p["gpus"] // per_node)
    where = f"{p['gpus']} x {layout.hardware.name}" + (f" ({nodes} nodes of {per_node})" if nodes > 1 else "")
    lines = [
        f"{spec.name}, {facts['phase']} on {where}: {ways}; {layout.precision.describe(spec)}",
        f"{facts['batch']} requests"
        + (f" on each of {p['dp']} data-parallel ranks" if p["dp"] > 1 else "")
        + f", {held}",
    ]
    if spec.moe:
        slots = spec.moe.experts + p["redundant"]
        via = f"dispatch {facts['dispatch']}" if facts["dispatch"] else "no dispatch"
        lines.append(
            f"routing: {_source(facts)}, busiest GPU {facts['load_ratio']:.2f} x the mean; "
            f"{slots} expert slots a layer; {via}{', two-batch overlap' if facts['overlap'] else ''}"
        )
        lines += _real_lines(facts)
    return [*lines, "", *_breakdown(facts), "", *_costs(facts, layout.hardware.watts)]


def _costs(facts: dict[str, Any], watts: float) -> list[str]:
    """Waiting, memory, speed and price."""
    memory, each = facts["memory"], facts["tokens_per_s_per_gpu"]
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    time = f"TPOT {facts['tpot_ms']:.2f} ms" if facts["tpot_ms"] else f"TTFT {facts['ttft_ms']:.1f} ms without queueing"
    if facts["tpot_ms"] and facts["tokens_per_step"] != 1:
        time += f" at {facts['tokens_per_step']:g} tokens a step"
    return [
        f"a GPU waits {facts['idle_share']:.1%} of the step for the network or for the slowest rank",
        f"memory of a GPU: weights {memory['weights_gb']:.1f} GB, KV cache {memory['kv_gb']:.1f} GB, activations "
        f"{memory['activations_gb']:.1f} GB, of {memory['usable_gb']:.1f} GB usable: {fits}; at most "
        f"{memory['largest_batch']:,} requests a rank",
        f"{time}; {each:,.0f} tokens/s a GPU, {each * facts['parallel']['gpus']:,.0f} in all",
        f"{facts['usd_per_million_tokens']:.3f} USD and {facts['kwh_per_million_tokens']:.3f} kWh per million tokens "
        f"({facts['usd_per_gpu_hour']:.2f} USD an hour and {watts:.0f} W a GPU)",
    ]


def _source(facts: dict[str, Any]) -> str:
    if "real" not in facts:
        return f"{facts['routing']} (no trace was given)"
    real = facts["real"]
    return f"real, {real['steps']} steps of {real['trace']} under {real['plan']} ({real['strategy']})"


def _real_lines(facts: dict[str, Any]) -> list[str]:
    """What real routing did, beside what uniform routing would have done; how far the steps differ."""
    if "real" not in facts:
        return []
    real, flat = facts["real"], facts["real"]["uniform"]
    lines = [
        f"picks served on the token's own node: {real['local_share']:.1%} (uniform {flat['local_share']:.1%}); experts "
        f"that a GPU reads in a layer: {real['experts_per_gpu']:.2f} (uniform {flat['experts_per_gpu']:.2f})",
        f"with uniform routing, busiest GPU {flat['load_ratio']:.2f} x the mean, the step takes {flat['step_ms']:.3f} "
        f"ms; 9 in 10 real steps take {real['step_ms_p5']:.3f} to {real['step_ms_p95']:.3f} ms",
    ]
    return lines + [f"note: {note}" for note in real["notes"]]


def _breakdown(facts: dict[str, Any]) -> list[str]:
    """One line per operator; the exposed times add up to the step."""
    lines = [f"{'operator':<18}{'ms':>10}{'hidden':>10}{'exposed':>10}{'share':>8}  bound by"]
    lines.append("-" * len(lines[0]))
    for op in facts["operators"]:
        share = op["exposed_ms"] / facts["step_ms"]
        hidden = f"{op['hidden_ms']:.3f}" if op["hidden_ms"] else ""
        times = f"{op['ms']:>10.3f}{hidden:>10}{op['exposed_ms']:>10.3f}"
        lines.append(f"{op['name']:<18}{times}{share:>8.1%}  {op['bound']}")
    lines.append(f"{'step':<18}{'':>20}{facts['step_ms']:>10.3f}{1:>8.0%}")
    if any(op["bound"].startswith("scale_") for op in facts["operators"]):
        lines.append("scale_up: NVLink; scale_out: RDMA between nodes")
    return lines


def sweep_lines(swept: Sweep, seconds: float) -> Iterator[str]:
    """What was tried, and the front of each context."""
    spec = swept.spec
    yield (
        f"{spec.name}, decode: {len(swept.points):,} set-ups in {seconds:.1f} s, {swept.unfit:,} others do not fit in "
        f"memory; {swept.precision.describe(spec)}"
    )
    if spec.moe:
        yield "routing: uniform (no trace was given), so load imbalance is the noise floor only"
    for tokens in swept.settings.contexts:
        yield from _front(swept, tokens)


def _front(swept: Sweep, context: int) -> Iterator[str]:
    from moeplan.perf.sweep import pareto, thinned

    points, tpot = swept.at(context), swept.settings.tpot_ms
    front = pareto(points)
    shown = thinned(front, SHOWN)
    yield ""
    yield f"Pareto front at {context:,} tokens of context"
    rows = []
    for p in shown:
        speed = [f"{1e3 * p.tpot_s:.2f}", f"{p.per_gpu_s:,.0f}"]
        rows.append([*speed, p.hardware.name, f"{p.gpus:,}", p.layout, f"{p.batch:,}"])
        rows[-1] += [f"{p.usd:,.3f}", f"{p.kwh:,.3f}", p.bound]
    yield from aligned(_FRONT_HEAD, rows, left=(2, 4, 8))
    if len(shown) < len(front):
        yield f"({len(front)} in all; --json has every one)"
    best = swept.best(context)
    if best is None:
        yield f"no set-up has a TPOT within {tpot:g} ms"
        return
    yield f"within {tpot:g} ms: {best.per_gpu_s:,.0f} tokens/s a GPU on {best}, TPOT {1e3 * best.tpot_s:.2f} ms"
    cheap = min((p for p in points if p.tpot_s <= tpot / 1e3), key=lambda p: p.usd)
    if cheap.hardware.name != best.hardware.name:
        yield f"cheapest: {cheap.usd:.3f} USD per million tokens on {cheap}, TPOT {1e3 * cheap.tpot_s:.2f} ms"


def size_lines(sized: Sizing, cases: Sequence[UseCase]) -> Iterator[str]:
    """Every use case, then what the columns mean."""
    for case in cases:
        yield from _case(sized, case)
        yield ""
    if any(answer.meets for answer in sized.results):
        yield "bound by: prefill, decode (scale_up: NVLink; scale_out: RDMA between nodes)"
        yield "max concurrency: most requests in flight, and what limits them"
        yield "tokens, USD, kWh: with that many requests; per million output tokens"


def _case(sized: Sizing, case: UseCase) -> Iterator[str]:
    answers = sized.of(case)
    name = "your use case" if case.name == "own" else case.name
    yield (
        f"{sized.spec.name}, {name}: {case.prompt:,} tokens in, {case.output:,} out, "
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
    cells += [f"{next(iter(a.bounds[1]))}, {next(iter(a.bounds[0]))}", f"{a.max_requests:,} ({a.limited_by})"]
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
        f"{1e3 * a.serving.tpot_s:.1f} ms; would meet the limits with: {alone}; or the whole GPU {machine}; "
        f"or GPU and overhead {everything}"
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
