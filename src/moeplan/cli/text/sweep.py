"""A sweep as text: the Pareto front, and the best set-up within the limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeplan.cli.terminal import aligned

if TYPE_CHECKING:
    from moeplan.perf.sweep import Sweep

__all__ = ["sweep_lines"]

#: Rows of a front that the text shows; `--json` has all.
SHOWN = 14
_HEAD = ("TPOT ms", "tokens/s/GPU", "hardware", "GPUs", "layout", "batch", "USD/M", "kWh/M", "bound by")


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
    yield from aligned(_HEAD, rows, left=(2, 4, 8))
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
