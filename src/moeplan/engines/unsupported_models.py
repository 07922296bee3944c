"""Models for which an engine ignores any placement file."""

from __future__ import annotations

__all__ = ["without_placement"]

#: Served by SGLang 0.5.23 (`srt/models/`) in a class without `get_model_config_for_expert_location`: it then
#: silently starts without any placement.
_SGLANG_WITHOUT = (
    "MixtralForCausalLM", "QuantMixtralForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration",
    "OlmoeForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM",
    "Ernie4_5_MoeForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
    "Lfm2MoeForCausalLM", "Cohere2MoeForCausalLM", "Qwen3OmniMoeForConditionalGeneration", "XverseMoeForCausalLM",
)  # fmt: skip
#: TensorRT-LLM's wide_ep README, 2a595f81: families with a load balancer.
_TENSORRT_LLM_WITH = ("DeepseekV3", "Mixtral", "Llama4", "Qwen2Moe", "Qwen3Moe")


def without_placement(engine: str, architectures: tuple[str, ...]) -> str | None:
    """A warning if the engine ignores or refuses any placement of this model; else None.

    Args:
        architectures: class names that the model's config.json gives.
    """
    for name in architectures:
        if engine == "sglang" and name in _SGLANG_WITHOUT:
            return f"SGLang 0.5.23 silently serves {name} without any placement"
        if engine == "tensorrt-llm" and not name.startswith(_TENSORRT_LLM_WITH):
            return f"TensorRT-LLM names {', '.join(_TENSORRT_LLM_WITH)} as models with a load balancer, not {name}"
    return None
