"""Bounds of the dimensions that are read from files: far above any real model, far below what would exhaust memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from moeplan.errors import FormatError

MAX_WIDTH, MAX_HEADS, MAX_WINDOW, MAX_MTP = 1 << 24, 1 << 16, 1 << 30, 64

Heads = Annotated[int, Meta(ge=1, le=MAX_HEADS)]
NoHeads = Annotated[int, Meta(ge=0, le=MAX_HEADS)]
Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
NoWidth = Annotated[int, Meta(ge=0, le=MAX_WIDTH)]


def layer_list(values: Sequence[Any], key: str, layers: int) -> tuple[int, ...]:
    """A list of layer indices, checked and sorted."""
    if any(type(i) is not int or not 0 <= i < layers for i in values) or len(set(values)) < len(values):
        raise FormatError(f"{key} is not a list of different layers in 0..{layers - 1}", hint="correct it")
    return tuple(sorted(values))
