"""What differs between the families of models that Transformers names by `model_type`: `data/families.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeplan.io.catalogue import read_object
from moeplan.io.json import convert

__all__ = ["FAMILIES", "Family"]

DATA = Path(__file__).parent / "data" / "families.json"


@dataclass(frozen=True)
class Family:
    """How one model_type writes what others write otherwise.

    Attributes:
        mla: latent attention. qk_norm: as in `Attention`. sinks, output_gate: likewise.
        bias: key of the projections' bias (q, k, v and output), or always / never for q, k, v; biased: its default.
        ffn_bias: key of the feed-forward networks' bias, or always.
        experts: key of the number of experts, for errors; empty for a dense family.
        moe_layers: the rule that says which layers have experts (`RULES`), or all.
        width: key of one expert's width. dense_width: of the dense layers; empty where the family has none.
        shared: how many shared experts: their key, or one; gated: of their own width, scaled by a gate.
        router_bias: as in `Moe`. may_be_dense: no experts where n_routed_experts is null or 0.
        window: how the layers with a sliding window are told (`_full_layers`), where `layer_types` does not say it.
    """

    mla: bool = False
    qk_norm: str = "none"
    sinks: bool = False
    output_gate: bool = False
    bias: str = "attention_bias"
    biased: bool = False
    ffn_bias: str = ""
    experts: str = ""
    moe_layers: str = "all"
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    shared: str = ""
    router_bias: bool = False
    may_be_dense: bool = False
    window: str = "never"


#: By model_type, as in Transformers 5.23 (`models/*/configuration_*.py`) and the models' own repositories.
FAMILIES = convert(read_object(DATA), dict[str, Family], str(DATA))
