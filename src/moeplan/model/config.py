"""A model's dimensions from a file: an entry in the catalogue's own form, or a Transformers `config.json`.

Nothing is executed and nothing is guessed: what a family's configuration must say and does not is an error, what it may
leave out has the default of Transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.errors import FormatError
from moeplan.io.catalogue import Fields
from moeplan.model.spec import Attention, LinearAttention, ModelSpec, Moe
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

__all__ = ["FAMILIES", "read_config", "read_entry"]

MAX_WIDTH, MAX_HEADS, MAX_WINDOW = 1 << 24, 1 << 16, 1 << 30
CHECKPOINT_DTYPES = ("bf16", "fp8", "int8", "int4", "fp4", "mxfp4")


def read_entry(name: str, entry: dict[str, Any], where: str) -> ModelSpec:
    """A model from an entry in the catalogue's form, every key checked."""
    data = Fields(entry, where)
    data.only((
        "layers", "hidden", "vocab", "attention", "full_layers", "window", "linear", "dense_width", "moe", "gated",
        "ffn_bias", "norm_bias", "positions", "tied", "mtp_layers", "checkpoint",
        "aliases", "sources", "published", "note",
    ))  # fmt: skip
    layers = data.whole("layers", 1, MAX_LAYERS)
    checkpoint = data.inner("checkpoint") if data.has("checkpoint") else Fields({"weights": "bf16"}, where)
    weights = checkpoint.choice("weights", CHECKPOINT_DTYPES)
    spec = ModelSpec(
        name=name,
        layers=layers,
        hidden=data.whole("hidden", 1, MAX_WIDTH),
        vocab=data.whole("vocab", 1, MAX_WIDTH),
        attention=_attention_from(data.inner("attention")),
        full_layers=layer_rule(data, "full_layers", layers),
        window=data.whole("window", 1, MAX_WINDOW) if data.has("window") else 0,
        linear=_linear_from(data.inner("linear")) if data.has("linear") else None,
        dense_width=data.whole("dense_width", 0, MAX_WIDTH, 0),
        moe=_moe_from(data.inner("moe"), layers) if data.has("moe") else None,
        gated=data.flag("gated", True),
        ffn_bias=data.flag("ffn_bias"),
        norm_bias=data.flag("norm_bias"),
        positions=data.whole("positions", 0, MAX_WINDOW, 0),
        tied=data.flag("tied"),
        mtp_layers=data.whole("mtp_layers", 0, 64, 0),
        checkpoint=(weights, checkpoint.choice("experts", CHECKPOINT_DTYPES, weights)),
    )
    return check_spec(spec, where)


def _attention_from(data: Fields) -> Attention:
    kind = data.choice("kind", ("mha", "gqa", "mla"))
    heads = data.whole("heads", 1, MAX_HEADS)
    if kind == "mla":
        data.only(
            ("kind", "heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        nope, rope = data.whole("qk_nope_head_dim", 1, MAX_WIDTH), data.whole("qk_rope_head_dim", 0, MAX_WIDTH)
        return Attention(
            kind, heads, heads, nope + rope, data.whole("v_head_dim", 1, MAX_WIDTH),
            data.whole("q_lora_rank", 0, MAX_WIDTH, 0), data.whole("kv_lora_rank", 1, MAX_WIDTH), nope, rope,
        )  # fmt: skip
    flags = ("qkv_bias", "out_bias", "sinks", "output_gate")
    data.only(("kind", "heads", "kv_heads", "head_dim", "qk_norm", *flags))
    kv_heads = data.whole("kv_heads", 1, heads, heads if kind == "mha" else None)
    head_dim = data.whole("head_dim", 1, MAX_WIDTH)
    norm = data.choice("qk_norm", ("none", "head", "full"), "none")
    return Attention(kind, heads, kv_heads, head_dim, head_dim, qk_norm=norm, **{key: data.flag(key) for key in flags})


def _linear_from(data: Fields) -> LinearAttention:
    keys = ("key_heads", "value_heads", "key_dim", "value_dim", "conv")
    data.only(keys)
    return LinearAttention(*(data.whole(key, 1, MAX_HEADS) for key in keys))


def _moe_from(data: Fields, layers: int) -> Moe:
    data.only(tuple(Moe.__dataclass_fields__))
    width, shared = data.whole("width", 1, MAX_WIDTH), data.whole("shared", 0, MAX_EXPERTS, 0)
    return Moe(
        layers=layer_rule(data, "layers", layers),
        experts=data.whole("experts", 1, MAX_EXPERTS),
        top_k=data.whole("top_k", 1, MAX_K),
        width=width,
        shared=shared,
        shared_width=data.whole("shared_width", 0, MAX_WIDTH, width if shared else 0),
        shared_gate=data.flag("shared_gate"),
        router_bias=data.flag("router_bias"),
        groups=data.whole("groups", 1, MAX_EXPERTS, 1),
        groups_kept=data.whole("groups_kept", 1, MAX_EXPERTS, 1),
    )


def layer_rule(data: Fields, key: str, layers: int) -> tuple[int, ...]:
    """The layers that a key names: a list of them, or {"first": f, "every": e} for f, f + e, ...; absent: all."""
    if not data.has(key):
        return tuple(range(layers))
    if isinstance(data.data[key], dict):
        rule = data.inner(key)
        rule.only(("first", "every"))
        return tuple(range(rule.whole("first", 0, layers, 0), layers, rule.whole("every", 1, MAX_LAYERS, 1)))
    return layer_list(data.items(key, layers), key, layers, data.where)


def layer_list(values: list[Any], key: str, layers: int, where: str) -> tuple[int, ...]:
    """A list of layer indices, checked and sorted."""
    if any(type(i) is not int or not 0 <= i < layers for i in values) or len(set(values)) < len(values):
        raise FormatError(f"{key} is not a list of different layers in 0..{layers - 1}", where=where, hint="correct it")
    return tuple(sorted(values))


def check_spec(spec: ModelSpec, where: str) -> ModelSpec:
    """The spec itself; dimensions that no model can have are an error."""
    for wrong, what, hint in _impossible(spec):
        if wrong:
            raise FormatError(what, where=where, hint=hint)
    return spec


def _impossible(spec: ModelSpec) -> Iterable[tuple[bool, str, str]]:
    a, moe = spec.attention, spec.moe
    yield a.heads % a.kv_heads > 0, f"{a.heads} heads do not divide into {a.kv_heads} KV heads", "correct one of them"
    partial = len(spec.full_layers) < spec.layers and not (spec.window or spec.linear)
    yield partial, "full_layers leaves out layers, but no window is given", "add the window or linear of those layers"
    dense = moe is None or len(moe.layers) < spec.layers
    yield dense and not spec.dense_width, "some layers have no experts, but their width is not given", "add dense_width"
    if moe is not None:
        yield not moe.layers, "the model has experts, but no MoE layer", "correct the layers"
        yield moe.top_k > moe.experts, f"top-{moe.top_k} of {moe.experts} experts is impossible", "correct one of them"
        groups = moe.experts % moe.groups > 0 or moe.groups_kept > moe.groups
        yield groups, f"{moe.experts} experts do not divide into {moe.groups} groups, {moe.groups_kept} kept", "correct"


@dataclass(frozen=True)
class Family:
    """How one model_type writes what others write otherwise.

    Attributes:
        mla: latent attention. bias: key of the projections' bias (q, k, v and output), or always / never for q, k, v.
        qk_norm: as in `Attention`; a key's name where a flag decides on it (its absence means no norm).
        experts: keys of the number of experts, by any name the family has used; empty for a dense family.
        width: key of one expert's width. dense_width: of the dense layers; empty where the family has none.
        window: how the layers with a sliding window are told (`_full_layers`), where `layer_types` does not say it.
    """

    mla: bool = False
    bias: str = "attention_bias"
    qk_norm: str = "none"
    experts: tuple[str, ...] = ()
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    window: str = "never"


_DEEPSEEK = Family(mla=True, bias="never", experts=("n_routed_experts", "num_local_experts", "num_experts"))
_QWEN_EXPERTS = ("num_experts", "num_local_experts")

#: By model_type, as in Transformers 5.23 (`models/*/configuration_*.py`) and the models' own repositories.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(bias="never", window="all"),
    "mixtral": Family(
        bias="never", experts=("num_local_experts",), width="intermediate_size", dense_width="", window="all"
    ),
    "llama4_text": Family(
        experts=("num_local_experts",), width="intermediate_size", dense_width="intermediate_size_mlp", window="llama4"
    ),
    "qwen2": Family(bias="always", window="qwen"),
    "qwen2_moe": Family(bias="qkv_bias", experts=_QWEN_EXPERTS, window="unclear"),
    "qwen3": Family(qk_norm="head", window="qwen"),
    "qwen3_moe": Family(qk_norm="head", experts=_QWEN_EXPERTS, window="unclear"),
    "qwen3_5_moe_text": Family(qk_norm="head", experts=_QWEN_EXPERTS, dense_width=""),
    "olmoe": Family(qk_norm="full", experts=_QWEN_EXPERTS, width="intermediate_size", dense_width=""),
    "gpt_oss": Family(experts=("num_local_experts",), width="intermediate_size", dense_width="", window="alternate"),
    "minimax_m2": Family(
        bias="never", qk_norm="full", experts=("num_local_experts",), width="intermediate_size", dense_width=""
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
}


def read_config(path: Path, data: dict[str, Any]) -> ModelSpec:
    """A model from a Transformers configuration; of a multimodal one, its text part.

    Raises:
        FormatError: no or an unknown model_type, a key missing, of a wrong type or impossible.
    """
    outer = Fields(data, str(path))
    config = outer
    if isinstance(data.get("text_config"), dict):
        config = outer.inner("text_config")
        for key in ("tie_word_embeddings", "quantization_config"):
            if not config.has(key) and outer.has(key):
                config.data = config.data | {key: data[key]}
    kind = config.data.get("model_type", data.get("model_type"))
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FormatError(
            f"model_type {str(kind)[:40]} is not one that moeplan knows",
            where=str(path),
            hint=f"it knows {', '.join(FAMILIES)}; or write the dimensions as docs/catalogue.md shows",
        )
    family = FAMILIES[kind]
    layers = config.whole("num_hidden_layers", 1, MAX_LAYERS)
    full, window = _full_layers(config, family, layers)
    moe = _config_moe(config, kind, family, layers)
    dense = moe is None or len(moe.layers) < layers
    spec = ModelSpec(
        name=path.parent.name if path.stem == "config" and path.parent.name else path.stem,
        layers=layers,
        hidden=config.whole("hidden_size", 1, MAX_WIDTH),
        vocab=config.whole("vocab_size", 1, MAX_WIDTH),
        attention=_config_attention(config, kind, family),
        full_layers=full,
        window=window,
        linear=_config_linear(config) if len(full) < layers and not window else None,
        dense_width=config.whole(family.dense_width, 1, MAX_WIDTH) if dense and family.dense_width else 0,
        moe=moe,
        ffn_bias=kind == "gpt_oss" or (kind == "llama" and config.flag("mlp_bias")),
        tied=config.flag("tie_word_embeddings"),
        mtp_layers=config.whole("num_nextn_predict_layers", 0, 64, config.whole("mtp_num_hidden_layers", 0, 64, 0)),
        checkpoint=_checkpoint(config, path),
    )
    return check_spec(spec, str(path))


def _config_attention(config: Fields, kind: str, family: Family) -> Attention:
    heads = config.whole("num_attention_heads", 1, MAX_HEADS)
    if family.mla:
        nope, rope = config.whole("qk_nope_head_dim", 1, MAX_WIDTH), config.whole("qk_rope_head_dim", 0, MAX_WIDTH)
        return Attention(
            "mla", heads, heads, nope + rope, config.whole("v_head_dim", 1, MAX_WIDTH),
            config.whole("q_lora_rank", 1, MAX_WIDTH) if config.has("q_lora_rank") else 0,
            config.whole("kv_lora_rank", 1, MAX_WIDTH), nope, rope,
        )  # fmt: skip
    kv_heads = config.whole("num_key_value_heads", 1, heads, heads)
    if not config.has("head_dim") and config.whole("hidden_size", 1, MAX_WIDTH) % heads:
        raise FormatError(f"hidden_size does not divide into {heads} heads", where=config.where, hint="add head_dim")
    head_dim = config.whole("head_dim", 1, MAX_WIDTH, config.whole("hidden_size", 1, MAX_WIDTH) // heads)
    bias = {"always": True, "never": False}.get(family.bias)
    if bias is None:
        bias = config.flag(family.bias, kind == "qwen2_moe" or kind == "gpt_oss")
    return Attention(
        "mha" if kv_heads == heads else "gqa", heads, kv_heads, head_dim, head_dim, qk_norm=family.qk_norm,
        qkv_bias=bias, out_bias=bias and family.bias == "attention_bias", sinks=kind == "gpt_oss",
        output_gate=kind == "qwen3_5_moe_text",
    )  # fmt: skip


def _config_linear(config: Fields) -> LinearAttention:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    return LinearAttention(*(config.whole(f"linear_{name}", 1, MAX_HEADS) for name in names))


def _full_layers(config: Fields, family: Family, layers: int) -> tuple[tuple[int, ...], int]:
    """The layers with full attention, and the window of the others (0: they are linear, or there are none)."""
    everywhere = tuple(range(layers))
    if config.has("layer_types"):
        kinds = config.items("layer_types", layers)
        known = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise FormatError(
                f"layer_types is not {layers} of {', '.join(known)}", where=config.where, hint="correct it"
            )
        full = tuple(i for i in everywhere if kinds[i] == "full_attention")
        if len(full) == layers or "linear_attention" in kinds:
            return full, 0
        return full, _window(config, "attention_chunk_size" if "chunked_attention" in kinds else "sliding_window")
    if family.window == "llama4":
        if not config.has("attention_chunk_size"):
            return everywhere, 0
        every = config.whole("no_rope_layer_interval", 1, MAX_LAYERS, 4)
        rope = config.items("no_rope_layers", layers) if config.has("no_rope_layers") else []
        if rope and (len(rope) != layers or any(flag not in (0, 1) for flag in rope)):
            raise FormatError(f"no_rope_layers is not {layers} zeros and ones", where=config.where, hint="correct it")
        full = tuple(i for i in everywhere if not (rope[i] if rope else (i + 1) % every))
        return full, _window(config, "attention_chunk_size")
    if family.window == "never" or not config.has("sliding_window"):
        return everywhere, 0
    if family.window == "alternate":
        return everywhere[1::2], _window(config, "sliding_window")
    if family.window == "all":
        return (), _window(config, "sliding_window")
    if not config.flag("use_sliding_window"):
        return everywhere, 0
    if family.window == "unclear":
        raise FormatError(
            "use_sliding_window does not say for which layers", where=config.where, hint="add layer_types"
        )
    return everywhere[: config.whole("max_window_layers", 0, MAX_LAYERS, 28)], _window(config, "sliding_window")


def _window(config: Fields, key: str) -> int:
    return config.whole(key, 1, MAX_WINDOW)


def _config_moe(config: Fields, kind: str, family: Family, layers: int) -> Moe | None:
    """The experts; None for a dense model, also of a family that can have experts (n_routed_experts null or 0)."""
    if not family.experts or (kind.startswith("deepseek") and not config.data.get("n_routed_experts")):
        return None
    given = {key: config.whole(key, 1, MAX_EXPERTS) for key in family.experts if config.has(key)}
    if len(set(given.values())) > 1:
        raise FormatError(f"{' and '.join(given)} differ", where=config.where, hint="keep the right one")
    experts = next(iter(given.values()), 0) or config.whole(family.experts[0], 1, MAX_EXPERTS)
    picks = (
        "experts_per_token" if not config.has("num_experts_per_tok") and kind == "gpt_oss" else "num_experts_per_tok"
    )
    width = config.whole(family.width, 1, MAX_WIDTH)
    shared, shared_width = 0, width
    if family.mla:
        shared = config.whole("n_shared_experts", 0, MAX_EXPERTS, 0)
    elif kind == "llama4_text":
        shared = 1
    elif kind in ("qwen2_moe", "qwen3_5_moe_text"):
        shared, shared_width = 1, config.whole("shared_expert_intermediate_size", 1, MAX_WIDTH)
    grouped = family.mla and config.has("n_group") and config.data.get("topk_method") != "greedy"
    return Moe(
        layers=_moe_layers(config, kind, layers),
        experts=experts,
        top_k=config.whole(picks, 1, MAX_K),
        width=width,
        shared=shared,
        shared_width=shared_width if shared else 0,
        shared_gate=kind in ("qwen2_moe", "qwen3_5_moe_text"),
        router_bias=kind in ("gpt_oss", "minimax_m2", "deepseek_v3", "kimi_k2"),
        groups=config.whole("n_group", 1, MAX_EXPERTS) if grouped else 1,
        groups_kept=config.whole("topk_group", 1, MAX_EXPERTS) if grouped else 1,
    )


def _moe_layers(config: Fields, kind: str, layers: int) -> tuple[int, ...]:
    if kind in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        first = config.whole("first_k_dense_replace", 0, MAX_LAYERS)
        every = config.whole("moe_layer_freq", 1, MAX_LAYERS, 1)
        return tuple(i for i in range(first, layers) if i % every == 0)
    if kind in ("qwen2_moe", "qwen3_moe"):
        step = config.whole("decoder_sparse_step", 1, MAX_LAYERS, 1)
        dense = layer_list(
            config.items("mlp_only_layers", layers) if config.has("mlp_only_layers") else [],
            "mlp_only_layers", layers, config.where,
        )  # fmt: skip
        return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if kind == "llama4_text" and config.has("moe_layers"):
        return layer_list(config.items("moe_layers", layers), "moe_layers", layers, config.where)
    if kind == "llama4_text":
        step = config.whole("interleave_moe_layer_step", 1, MAX_LAYERS)
        return tuple(range(step - 1, layers, step))
    return tuple(range(layers))


def _checkpoint(config: Fields, path: Path) -> tuple[str, str] | None:
    """Dtypes of the published weights; None for a way of quantising whose parts the configuration does not tell."""
    if not config.has("quantization_config"):
        if path.with_name("hf_quant_config.json").exists():  # ModelOpt keeps its account in a file of its own
            return None
        return ("bf16", "bf16")
    quantised = config.inner("quantization_config").data
    method, text = quantised.get("quant_method"), str(quantised)
    if method == "fp8":
        return ("fp8", "fp8")
    if method == "mxfp4":
        return ("bf16", "mxfp4")
    if method in ("gptq", "awq") and quantised.get("bits") == 4:
        return ("int4", "int4")
    if method == "compressed-tensors" and "'num_bits': 4" in text and "'type': 'int'" in text:
        return ("bf16" if "self_attn" in text else "int4", "int4")
    return None
