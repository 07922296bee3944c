"""What a source of picks does not say about its model, and the user may add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.errors import FormatError
from moeplan.types import ModelShape

__all__ = ["ModelExtras"]


@dataclass(frozen=True)
class ModelExtras:
    """Facts about the model that importers take from flags; None where nobody gave them.

    Attributes:
        name: the model's name; overrides the source's own.
        hidden: width of a token's hidden state.
        expert_bytes: weights of one expert in one layer, bytes.
        kv_bytes_per_token: KV cache of one token over all layers, bytes.
        routing_groups: groups of consecutive experts that the router first chooses among.
    """

    name: str | None = None
    hidden: int | None = None
    expert_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    routing_groups: int = 1

    def shape(self, *, name: str, num_experts: int, top_k: int, layer_ids: Sequence[int], where: str) -> ModelShape:
        """The full shape; an impossible one is blamed on `where`."""
        try:
            return ModelShape(
                name=name if self.name is None else self.name,
                num_layers=len(layer_ids),
                num_experts=num_experts,
                top_k=top_k,
                layer_ids=tuple(layer_ids),
                hidden=self.hidden,
                routing_groups=self.routing_groups,
                expert_bytes=self.expert_bytes,
                kv_bytes_per_token=self.kv_bytes_per_token,
            )
        except FormatError as error:
            raise FormatError(error.what, where=error.where or where, hint=error.hint) from None
