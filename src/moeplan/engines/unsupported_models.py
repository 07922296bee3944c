"""Models that an engine serves without a placement, whatever file it is given."""

from __future__ import annotations

from pathlib import Path

from moeplan import embedded
from moeplan.io.files import read_json
from moeplan.model.facts import MAX_CONFIG_BYTES

__all__ = ["architectures_of", "without_placement"]

#: Served by SGLang 0.5.23 (`srt/models/`) in a class without `get_model_config_for_expert_location`: it then starts
#: without any placement and does not say so.
_SGLANG_WITHOUT = (
    "MixtralForCausalLM", "QuantMixtralForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration",
    "OlmoeForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM",
    "Ernie4_5_MoeForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
    "Lfm2MoeForCausalLM", "Cohere2MoeForCausalLM", "Qwen3OmniMoeForConditionalGeneration", "XverseMoeForCausalLM",
)  # fmt: skip
#: TensorRT-LLM's wide_ep README, 2a595f81: families with a load balancer.
_TENSORRT_LLM_WITH = ("DeepseekV3", "Mixtral", "Llama4", "Qwen2Moe", "Qwen3Moe")


def architectures_of(config: Path | None) -> tuple[str, ...]:
    """The class names in a model's config.json; none where there is no config, or none in it."""
    if config is None:
        return ()
    place = embedded.named(config, embedded.MODEL)
    data = read_json(place / "config.json" if place.is_dir() else place, max_bytes=MAX_CONFIG_BYTES)
    found = data.get("architectures") if isinstance(data, dict) else None
    return tuple(str(name) for name in found) if isinstance(found, list) else ()


def without_placement(engine: str, architectures: tuple[str, ...]) -> str | None:
    """A line to warn with where the engine would ignore or refuse any placement of this model; else None."""
    for name in architectures:
        if engine == "sglang" and name in _SGLANG_WITHOUT:
            return f"SGLang 0.5.23 serves {name} without any placement, and does not say so"
        if engine == "tensorrt-llm" and not name.startswith(_TENSORRT_LLM_WITH):
            return f"TensorRT-LLM names {', '.join(_TENSORRT_LLM_WITH)} as models with a load balancer, not {name}"
    return None
