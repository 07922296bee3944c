"""Models from a Transformers config.json: all dimensions of known families, and what any file says of its experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT
from helpers.engine_files import save
from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.config import FAMILIES, described
from moeplan.model.parameters import parameters

QWEN_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
DEEPSEEK = {
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_shared_experts": 1, "num_experts_per_tok": 8, "num_hidden_layers": 61, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "noaux_tc",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA4 = {
    "attention_bias": False, "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "model_type": "llama4_text", "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "vocab_size": 202048,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "experts_per_token": 4, "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"}, "vocab_size": 201088,
}  # fmt: skip
QWEN35_LAYERS = (["linear_attention"] * 3 + ["full_attention"]) * 15

#: The keys that count of each model's published config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "Llama-4-Scout": {
        "model_type": "llama4", "text_config": LLAMA4 | {"num_local_experts": 16, "interleave_moe_layer_step": 1},
    },
    "Llama-4-Maverick": {
        "model_type": "llama4", "text_config": LLAMA4 | {"num_local_experts": 128, "interleave_moe_layer_step": 2},
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "sliding_window": None, "vocab_size": 32000,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
    "DeepSeek-V3": DEEPSEEK | {
        "model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_group": 8, "n_routed_experts": 256,
        "num_attention_heads": 128, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "topk_group": 4,
        "vocab_size": 129280,
    },
    "Kimi-K2": DEEPSEEK | {
        "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "n_routed_experts": 384,
        "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "topk_group": 1,
        "vocab_size": 163840,
    },
    "Qwen3-14B": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 5120,
        "intermediate_size": 17408,
        "max_window_layers": 40, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": QWEN_MOE | {
        "model_type": "qwen3_moe", "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-235B-A22B": QWEN_MOE | {
        "model_type": "qwen3_moe", "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94, "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
    "Qwen3.5-397B-A17B": {
        "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_moe_text", "attention_bias": False, "head_dim": 256, "hidden_size": 4096,
            "layer_types": QWEN35_LAYERS, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_num_key_heads": 16, "linear_num_value_heads": 64, "linear_value_head_dim": 128,
            "moe_intermediate_size": 1024, "mtp_num_hidden_layers": 1, "num_attention_heads": 32, "num_experts": 512,
            "num_experts_per_tok": 10, "num_hidden_layers": 60, "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 1024, "vocab_size": 248320,
        },
    },
    "gpt-oss-20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": GPT_OSS | {
        "num_hidden_layers": 36, "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "attention_bias": False, "hidden_size": 2048, "intermediate_size": 1024,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "vocab_size": 50304,
    },
    "MiniMax-M2.5": {
        "model_type": "minimax_m2", "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536,
        "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
        "num_local_experts": 256, "quantization_config": {"quant_method": "fp8"}, "vocab_size": 200064,
    },
}  # fmt: skip
#: Families that the catalogue has no model of, to be held to Transformers alone.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 131072,
        "vocab_size": 152064,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 2, "hidden_size": 512, "intermediate_size": 1408,
        "mlp_only_layers": [3], "moe_intermediate_size": 176, "num_attention_heads": 8, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 8, "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 704, "vocab_size": 1000,
    },
    "mistral": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32000,
    },
    "tied, biased llama": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 8, "num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "vocab_size": 999,
    },
    "deepseek_v3 without experts before layer 5": DEEPSEEK | {
        "model_type": "deepseek_v3", "first_k_dense_replace": 5, "n_group": 2, "n_routed_experts": 8,
        "num_attention_heads": 16, "num_hidden_layers": 9, "topk_group": 1, "vocab_size": 500, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_config_gives_the_catalogue_s_numbers(name: str, tmp_path: Path) -> None:
    write(tmp_path, CONFIGS[name])
    assert dataclasses.replace(load_model(tmp_path), name=name) == load_model(name)
    assert load_model(tmp_path / "config.json").name == tmp_path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_counts_are_transformers_own(name: str, tmp_path: Path) -> None:
    """The model that Transformers builds from the same configuration (on no device) has as many parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = CONFIGS.get(name) or OTHERS[name]
    spec = load_model(write(tmp_path, config))
    text = config.get("text_config", config)
    kind = "deepseek_v3" if text["model_type"] == "kimi_k2" else text["model_type"]
    given = {key: value for key, value in text.items() if key not in ("model_type", "quantization_config")}
    if "experts_per_token" in given:
        given["num_experts_per_tok"] = given.pop("experts_per_token")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **given))
    corrections = sum(b.numel() for key, b in theirs.named_buffers() if key.endswith("e_score_correction_bias"))
    assert parameters(spec).total == sum(p.numel() for p in theirs.parameters()) + corrections


def test_every_family_is_tried() -> None:
    kinds = {c.get("text_config", c)["model_type"] for c in (*CONFIGS.values(), *OTHERS.values())}
    assert kinds == set(FAMILIES)


def test_the_embedded_model(tmp_path: Path) -> None:
    spec = load_model(ROOT / "src" / "moeplan" / "embedded" / "model")
    assert spec.tied and spec.moe is not None and spec.moe.experts == 32
    assert parameters(spec).total == pytest.approx(6.0e6, rel=0.01)  # docs/concepts/demo-model.md


def test_layers_by_config(tmp_path: Path) -> None:
    sliding = OTHERS["qwen2"] | {"use_sliding_window": True, "max_window_layers": 21}
    spec = load_model(write(tmp_path, sliding))
    assert spec.full_layers == tuple(range(21)) and spec.window == 131072
    assert load_model(write(tmp_path, OTHERS["mistral"])).full_layers == ()
    assert load_model(write(tmp_path, OTHERS["qwen2_moe"])).moe.layers == (1, 5, 7)
    rope = CONFIGS["Llama-4-Scout"]["text_config"] | {"no_rope_layers": [1] * 47 + [0]}
    assert load_model(write(tmp_path, rope)).full_layers == (47,)
    k25 = CONFIGS["Kimi-K2"] | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            "ignore": ["lm_head", "re:.*self_attn.*"],
        }
    }
    assert dataclasses.replace(load_model(write(tmp_path, k25)), name="Kimi-K2.5") == load_model("Kimi-K2.5")
    assert load_model(write(tmp_path, k25 | {"quantization_config": {"quant_method": "new"}})).checkpoint is None
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert load_model(write(tmp_path, k25 | {"quantization_config": None})).checkpoint is None


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen3-14B", {"hidden_size": None}, "hidden_size is missing"),
    ("Qwen3-14B", {"hidden_size": "5120"}, "hidden_size is 5120, not a whole number"),
    ("Qwen3-14B", {"hidden_size": True}, "hidden_size is True, not a whole number"),
    ("Qwen3-14B", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("Qwen3-14B", {"num_key_value_heads": 7}, "40 heads do not divide into 7 KV heads"),
    ("Qwen3-14B", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("Qwen3-14B", {"model_type": "mamba"}, "model_type mamba is not one that moeplan knows"),
    ("Qwen3-14B", {"model_type": ["qwen3"]}, "model_type"),
    ("Qwen3-14B", {"model_type": None}, "model_type None"),
    ("Qwen3-14B", {"layer_types": ["full_attention"]}, "layer_types is not 40 of"),
    ("Qwen3-14B", {"layer_types": "full"}, "layer_types is full, not a list"),
    ("Qwen3-14B", {"attention_bias": "no"}, "attention_bias is no, not true or false"),
    ("Qwen3-14B", {"use_sliding_window": True, "sliding_window": -1}, "sliding_window is -1"),
    ("Qwen3-14B", {"quantization_config": "fp8"}, "quantization_config is fp8, not an object"),
    ("Qwen3-30B-A3B", {"num_experts": None}, "num_experts is missing"),
    ("Qwen3-30B-A3B", {"num_local_experts": 64}, "num_experts and num_local_experts differ"),
    ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, "top-129 of 128 experts is impossible"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [48]}, "mlp_only_layers is not a list of different layers"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "the model has experts, but no MoE layer"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2, "intermediate_size": None}, "intermediate_size is missing"),
    ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window does not say"),
    ("DeepSeek-V3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ("DeepSeek-V3", {"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
    ("DeepSeek-V3", {"n_group": 7}, "256 experts do not divide into 7 groups"),
    ("DeepSeek-V3", {"topk_group": 9}, "8 groups, 9 kept"),
    ("DeepSeek-V2-Lite", {"q_lora_rank": 1.5}, "q_lora_rank is 1.5"),
    ("gpt-oss-20b", {"experts_per_token": None}, "experts_per_token is missing"),
    ("Mixtral-8x7B", {"num_attention_heads": 24}, "24 heads"),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD, ids=[said for _, _, said in BAD])
def test_bad_config_is_one_line(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, CONFIGS[name] | change)
    with pytest.raises(FormatError) as caught:
        load_model(path)
    line = caught.value.line()
    assert line.startswith(str(path)) and said in line and "; " in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "invalid or truncated JSON"),
        ('{"model_type": ', "invalid or truncated JSON"), ("[1, 2]", "is a list, not an object"),
        ("[" * 100_000, "not"), ('{"a": ' + "1" * 5000 + "}", "does not accept"),
        ('{"a": "' + "x" * (5 << 20) + '"}', "are more than"),
    ],
)  # fmt: skip
def test_bad_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        load_model(write(tmp_path, text))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(FormatError, match="UTF-8"):
        load_model(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        load_model(tmp_path / "absent" / "config.json")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.data(),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        st.lists(st.lists(st.none()), min_size=1, max_size=2),
    ),
)  # fmt: skip
def test_any_value_gives_a_model_or_one_line(tmp_path_factory: Any, name: str, data: Any, value: Any) -> None:
    config = json.loads(json.dumps(CONFIGS[name]))
    inner = config.get("text_config", config)
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    path = write(tmp_path_factory.getbasetemp(), json.dumps(config))
    try:
        assert parameters(load_model(path)).total > 0
    except MoeplanError as error:
        assert "\n" not in error.line()


# --- what recordings and placements need to know, of any family, with flags


@pytest.mark.parametrize(
    ("config", "experts", "moe"),
    [
        ({"n_routed_experts": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1}, 8, (3, 4, 5)),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 1, 1, 0, 1, 1]}, 8, (1, 2, 4, 5)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [5]}, 8, (1, 3)),
        ({"num_local_experts": 8, "interleave_moe_layer_step": 2}, 8, (1, 3, 5)),
        ({"num_local_experts": 8}, 8, None),
        ({"num_experts": 8, "first_k_dense_replace": 1, "decoder_sparse_step": 2}, 8, None),
        ({"num_experts": 8, "num_local_experts": 8}, 8, None),
    ],
)
def test_configs(tmp_path: Path, config: dict[str, Any], experts: int, moe: tuple[int, ...] | None) -> None:
    save(tmp_path / "c.json", {"num_hidden_layers": 6, "num_experts_per_tok": 2, "hidden_size": 64, **config})
    spec = described(tmp_path / "c.json")
    assert (spec.num_experts, spec.moe_layers, spec.top_k, spec.hidden) == (experts, moe, 2, 64)


def test_a_multimodal_config_keeps_its_numbers_inside(tmp_path: Path) -> None:
    inner = {"num_hidden_layers": 4, "num_local_experts": 16, "num_experts_per_tok": 1, "moe_layers": [1, 3]}
    spec = described(save(tmp_path / "c.json", {"hidden_size": 1, "text_config": inner}))
    assert (spec.num_experts, spec.top_k, spec.moe_layers) == (16, 1, (1, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "is a list, not an object"),
        ({"num_experts": 8, "num_local_experts": 4}, "num_experts and num_local_experts differ"),
        ({"num_experts": "8"}, "num_experts is 8, not a whole number"),
        ({"num_hidden_layers": 2, "moe_layer_freq": [1]}, "moe_layer_freq is not 2 zeros and ones"),
        ({"num_hidden_layers": 2, "mlp_only_layers": [7]}, "mlp_only_layers is not a list of different layers in 0..1"),
    ],
)
def test_bad_configs(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        described(save(tmp_path / "c.json", config))


def test_flags_and_config_may_not_differ(tmp_path: Path) -> None:
    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 4, "first_k_dense_replace": 1})
    with pytest.raises(UsageError, match=r"--num-experts 16, but .* says 8; leave one of the two out"):
        described(config, num_experts=16)
    with pytest.raises(UsageError, match="--dense-layers contradicts"):
        described(config, dense_layers=[2])
    with pytest.raises(UsageError, match=r"--top-k 0 is outside"):
        described(config, top_k=0)
    assert described(config, dense_layers=[0]).moe_layers == (1, 2, 3)
