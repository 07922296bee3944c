"""`moeplan size`: the smallest cluster that a use case needs, per hardware, and what would have to improve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli import perf_options as p
from moeplan.cli.terminal import echo, progress, show
from moeplan.cli.text.perf import size_lines

if TYPE_CHECKING:
    from moeplan.perf.use_cases import UseCase

__all__ = ["size"]


@Parameter(name="*", group=Group("Use case", sort_key=2))
@dataclass(frozen=True)
class UseFlags:
    """Lengths and limits of a use case; what is given changes that of --use-case."""

    use_case: Literal["qa", "summarise", "chat", "code", "all"] | None = None
    """Use case with predefined lengths, beams and limits."""
    prompt_tokens: o.Int | None = None
    """Tokens of a prompt."""
    output_tokens: o.Int | None = None
    """Tokens of an answer."""
    beams: o.Int | None = None
    """Beams of a request."""
    ttft: p.Milliseconds | None = None
    """Limit on the time to the first token."""
    tpot: p.Milliseconds | None = None
    """Limit on the time per output token."""
    concurrency: o.Int = 1
    """Requests in flight at the same time."""

    def cases(self, drafts: p.DraftFlags) -> list[UseCase]:
        """The use cases, with speculative decoding."""
        from moeplan.perf.use_cases import find_use_cases

        lengths = {"prompt": self.prompt_tokens, "output": self.output_tokens, "beams": self.beams}
        found = find_use_cases(self.use_case, **lengths, ttft_ms=self.ttft, tpot_ms=self.tpot)
        return [replace(case, drafts=drafts.mtp, accepted=drafts.tokens) for case in found]


def size(
    *,
    model: p.ModelIn,
    hardware: p.HardwareList = "all",
    use: UseFlags = UseFlags(),
    max_gpus: o.Int = 8192,
    gpus_per_node: p.GpusPerNode = None,
    sensitivity: bool = False,
    drafts: p.DraftFlags = p.DraftFlags(),
    precision: p.PrecisionFlags = p.PrecisionFlags(),
    prices: p.PriceFlags = p.PriceFlags(),
    output: o.PageOut = None,
    json: o.Json = None,
) -> int:
    """Find the smallest cluster of each hardware that meets the limits of a use case, and its bottleneck.

    Exit status 1: no hardware meets the limits of some use case.

    Args:
        max_gpus: Largest cluster to try.
        sensitivity: Also show the sensitivity of TTFT and TPOT to each part of the hardware.
    """
    from moeplan.perf import sizing
    from moeplan.report.page import write_page
    from moeplan.report.perf_page import size_html

    cases = use.cases(drafts)
    settings = sizing.SizingSettings(
        use.concurrency, max_gpus, gpus_per_node, sensitivity=sensitivity, **precision.values()
    )
    with progress("size") as tick:
        sized = sizing.size(model, prices.hardware(hardware), cases, settings, tick)
    show(size_lines(sized, cases), json, sized.to_dict())
    if output is not None:
        write_page(output, size_html(sized))
        echo(f"wrote {output}")
    return 0 if sized.met else 1
