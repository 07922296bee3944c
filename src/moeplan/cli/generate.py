"""`moeplan generate`: a synthetic trace from a preset."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import progress
from moeplan.cli.text.made import show_trace
from moeplan.errors import UsageError

__all__ = ["generate"]


@Parameter(name="*", group=Group("Size", sort_key=2))
@dataclass(frozen=True)
class SizeFlags:
    """How much is generated."""

    requests: o.Int | None = None
    """Number of requests. Default: the preset's."""
    prefill: o.Int | None = None
    """Mean prefill tokens of a request. Default: the preset's."""
    decode: o.Int | None = None
    """Mean decode tokens of a request. Default: the preset's."""
    exact: bool = False
    """Give every request exactly the mean lengths."""
    layers: o.Int | None = None
    """Generate only the first N MoE layers."""
    layer_ids: o.Layers = ()
    """Generate only these layers of the model, e.g. 42 or 3,42."""


def generate(
    preset: str, /, *, output: o.TraceOut, size: SizeFlags = SizeFlags(), seed: o.Seed = 0, json: o.Json = None
) -> None:
    """Write a synthetic trace: requests of several domains, both phases, experts of unequal load.

    Every figure made from it is labelled synthetic.

    Args:
        preset: demo, deepseek-v3, llama-4-maverick or qwen3-235b.
    """
    from moeplan.synthetic import generator

    if size.layers is not None and size.layer_ids:
        raise UsageError("--layers and --layer-ids exclude each other")
    with progress("generating requests") as tick:
        layers = list(size.layer_ids) or size.layers
        settings = generator.WorkloadSettings(size.requests, size.prefill, size.decode, seed, layers, size.exact)
        trace = generator.generate(preset, output, settings, tick)
    show_trace(trace, json)
