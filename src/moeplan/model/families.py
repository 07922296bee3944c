"""What differs between the families of models that Transformers names by `model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["FAMILIES", "Family"]


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


_DEEPSEEK_V2 = Family(
    mla=True,
    bias="never",
    experts="n_routed_experts",
    moe_layers="deepseek",
    shared="n_shared_experts",
    may_be_dense=True,
)
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, router_bias=True)
_QWEN3_MOE = Family(qk_norm="head", experts="num_experts", moe_layers="qwen", window="unclear")
_ALL_EXPERTS = Family(experts="num_local_experts", width="intermediate_size", dense_width="")

#: By model_type, as in Transformers 5.23 (`models/*/configuration_*.py`) and the models' own repositories.
FAMILIES = {
    "llama": Family(ffn_bias="mlp_bias"),
    "mistral": Family(bias="never", window="all"),
    "mixtral": replace(_ALL_EXPERTS, bias="never", window="all"),
    "llama4_text": replace(
        _ALL_EXPERTS, moe_layers="llama4", dense_width="intermediate_size_mlp", shared="one", window="llama4"
    ),
    "qwen2": Family(bias="always", window="qwen"),
    "qwen2_moe": replace(_QWEN3_MOE, bias="qkv_bias", biased=True, qk_norm="none", shared="gated"),
    "qwen3": Family(qk_norm="head", window="qwen"),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_5_moe_text": Family(qk_norm="head", output_gate=True, experts="num_experts", dense_width="", shared="gated"),
    "olmoe": replace(_ALL_EXPERTS, qk_norm="full", experts="num_experts"),
    "gpt_oss": replace(_ALL_EXPERTS, biased=True, ffn_bias="always", sinks=True, router_bias=True, window="alternate"),
    "minimax_m2": replace(_ALL_EXPERTS, bias="never", qk_norm="full", router_bias=True),
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, may_be_dense=False),
}
