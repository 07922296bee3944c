"""Bounds of the dimensions that are read from files: far above any real model, far below what would exhaust memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from moeplan.errors import FormatError
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

Layers = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Meta(ge=1, le=1 << 24)]
Heads = Annotated[int, Meta(ge=1, le=1 << 16)]
Window = Annotated[int, Meta(ge=1, le=1 << 30)]
Experts = Annotated[int, Meta(ge=1, le=MAX_EXPERTS)]
Picks = Annotated[int, Meta(ge=1, le=MAX_K)]
#: The same, or none of them.
NoLayers = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
NoHeads = Annotated[int, Meta(ge=0, le=1 << 16)]
NoWidth = Annotated[int, Meta(ge=0, le=1 << 24)]
NoExperts = Annotated[int, Meta(ge=0, le=MAX_EXPERTS)]
MtpLayers = Annotated[int, Meta(ge=0, le=64)]


def layer_list(values: Sequence[int], key: str, layers: int) -> tuple[int, ...]:
    """A list of layer indices, checked and sorted."""
    if any(not 0 <= i < layers for i in values) or len(set(values)) < len(values):
        raise FormatError(f"{key} is not a list of different layers in 0..{layers - 1}", hint="correct it")
    return tuple(sorted(values))
