"""Accelerators and their links, from the catalogue `data/hardware.json`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Hardware", "Link"]


@dataclass(frozen=True)
class Link:
    """A network of one level.

    Attributes:
        bytes_per_s: of one GPU, one way, by datasheet.
        latency_s: of one message between two neighbours, by datasheet or measurement.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """One accelerator and the networks it sits in.

    Attributes:
        name: as in the catalogue.
        flops: dense peak operations per second (2 per multiply-add) by dtype: bf16, fp8, int8, fp4, where it has them.
        memory_bytes, memory_bytes_per_s: capacity and peak bandwidth of one accelerator.
        scale_up: the fast network inside a node or rack; scale_up_size: how many accelerators it joins.
        scale_out: the network between those.
        watts: board power; usd_per_hour: a stated price of one accelerator; both the user may override.
        sources: where each figure is from, by field.
    """

    name: str
    flops: dict[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    scale_up: Link
    scale_up_size: int
    scale_out: Link
    watts: float
    usd_per_hour: float
    sources: dict[str, str]
