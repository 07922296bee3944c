"""A model from a Transformers `config.json`, read as data.

Nothing is executed and nothing is guessed: what a family's configuration must say and does not is unknown, what it may
leave out has the default of Transformers 5.23. Of a family that moeplan does not know, only what recordings and
placements need is read: layers, experts, picks per token, MoE layers, routing groups and the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

from msgspec import Struct

from moeplan import embedded
from moeplan.errors import FormatError
from moeplan.io.files import read_json
from moeplan.io.json import convert
from moeplan.model.bounds import (
    Experts,
    Heads,
    Layers,
    MtpLayers,
    NoExperts,
    NoLayers,
    NoWidth,
    Picks,
    Width,
    Window,
    layer_list,
)
from moeplan.model.families import FAMILIES, Family
from moeplan.model.spec import Attention, LinearAttention, ModelSpec, Moe, Overrides

__all__ = ["config_file", "described", "of_config", "read_config", "read_file"]

#: A configuration larger than this is refused unread.
MAX_BYTES = 4 * 1024 * 1024


class Routing(Struct):
    """The keys that say how a model routes, by all the names that Transformers 5.23 and models' repositories use."""

    num_hidden_layers: Layers | None = None
    hidden_size: Width | None = None
    num_experts: NoExperts | None = None
    n_routed_experts: NoExperts | None = None
    num_local_experts: NoExperts | None = None
    num_experts_per_tok: Picks | None = None
    num_experts_per_token: Picks | None = None
    experts_per_token: Picks | None = None
    n_group: Experts | None = None
    topk_method: Any = None
    first_k_dense_replace: NoLayers | None = None
    moe_layer_freq: Layers | list[Literal[0, 1]] | None = None
    decoder_sparse_step: Layers | None = None
    mlp_only_layers: list[int] | None = None
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: Layers | None = None

    def need(self, key: str) -> int:
        """The number under a key that the family's configuration must have."""
        value = getattr(self, key)
        if value is None:
            raise FormatError(f"{key} is missing", hint="add it; docs/catalogue.md says what it is")
        return int(value)


class Config(Routing):
    """All keys of the families below."""

    vocab_size: Width | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    attention_bias: bool | None = None
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    q_lora_rank: Width | None = None
    kv_lora_rank: Width | None = None
    qk_nope_head_dim: Width | None = None
    qk_rope_head_dim: NoWidth | None = None
    v_head_dim: Width | None = None
    linear_num_key_heads: Heads | None = None
    linear_num_value_heads: Heads | None = None
    linear_key_head_dim: Heads | None = None
    linear_value_head_dim: Heads | None = None
    linear_conv_kernel_dim: Heads | None = None
    layer_types: list[str] | None = None
    sliding_window: Window | None = None
    use_sliding_window: bool | None = None
    max_window_layers: NoLayers | None = None
    attention_chunk_size: Window | None = None
    no_rope_layers: list[Literal[0, 1]] | None = None
    no_rope_layer_interval: Layers | None = None
    intermediate_size: Width | None = None
    intermediate_size_mlp: Width | None = None
    moe_intermediate_size: Width | None = None
    shared_expert_intermediate_size: Width | None = None
    n_shared_experts: NoExperts | None = None
    topk_group: Experts | None = None
    tie_word_embeddings: bool | None = None
    num_nextn_predict_layers: MtpLayers | None = None
    mtp_num_hidden_layers: MtpLayers | None = None
    quantization_config: dict[str, Any] | None = None


def read_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file that describes a model.

    Raises:
        FormatError: it cannot be read, is too large, or holds something else.
    """
    data = read_json(path, max_bytes=MAX_BYTES)
    if not isinstance(data, dict):
        raise FormatError("is not a model's configuration (a JSON object)", where=str(path), hint="check the path")
    return data


def config_file(given: str | Path) -> Path:
    """The config.json meant by a path: the file itself, the folder that holds it, or the word `embedded`."""
    path = embedded.named(given, embedded.MODEL)
    return path / "config.json" if path.is_dir() else path


def read_config(path: str | Path) -> ModelSpec:
    """A model from a config.json: all that the file says of it.

    Args:
        path: the file, the folder that holds it, or the word `embedded`.

    Raises:
        FormatError: the file cannot be read, or what it says of layers and experts is wrong. What else is missing or
            wrong stays None, and `ModelSpec.complete` says why.
    """
    file = config_file(path)
    return of_config(file, read_file(file))


def of_config(path: Path, data: dict[str, Any]) -> ModelSpec:
    """The same from the file's content; of a multimodal model, its text part.

    Raises:
        FormatError: as `read_config`.
    """
    text = data
    if isinstance(data.get("text_config"), dict):
        outer = {key: data.get(key) for key in ("model_type", "tie_word_embeddings", "quantization_config")}
        text = outer | {key: value for key, value in data["text_config"].items() if value is not None}
    kind, architectures = text.get("model_type"), data.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    try:
        spec = ModelSpec(
            name=path.parent.name if path.stem == "config" and path.parent.name else path.stem,
            architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
            source=str(path),
            **_routing(convert(text, Routing, str(path)), family),
        )
    except FormatError as error:
        raise FormatError(error.what, where=str(path), hint=error.hint) from None
    try:
        if family is None:
            known = f"it knows {', '.join(FAMILIES)}; or write the dimensions as docs/catalogue.md shows"
            raise FormatError(f"model_type {str(kind)[:40]} is not one that moeplan knows", hint=known)
        return _with_dimensions(spec, convert(text, Config, str(path)), family).complete()
    except FormatError as error:
        return replace(spec, obstacle=FormatError(error.what, where=str(path), hint=error.hint))


def _routing(c: Routing, family: Family | None) -> dict[str, Any]:
    """Layers, hidden size and what is known of the experts."""
    experts = _same(c, "num_experts", "n_routed_experts", "num_local_experts")
    moe = Moe(
        layers=None if c.num_hidden_layers is None else _moe_layers(c, family, c.num_hidden_layers),
        experts=experts or None,
        top_k=_same(c, "num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
        groups=1 if c.topk_method == "greedy" else c.n_group or 1,
    )
    return {"layers": c.num_hidden_layers, "hidden": c.hidden_size, "moe": None if moe == Moe() else moe}


def _same(c: Routing, *keys: str) -> int | None:
    """The one number under keys that mean the same; None where none is there."""
    found = {key: getattr(c, key) for key in keys if getattr(c, key) is not None}
    if len(set(found.values())) > 1:
        raise FormatError(f"{' and '.join(found)} differ", hint="keep the right one")
    return next(iter(found.values()), None)


def _moe_layers(c: Routing, family: Family | None, layers: int) -> tuple[int, ...] | None:
    """The MoE layers by the family's rule; without a family, by the rules whose keys are there, if they agree."""
    if family is not None and family.moe_layers == "all":
        return tuple(range(layers)) if family.experts else None
    found = {
        rule(c, layers)
        for name, (keys, rule) in RULES.items()
        if (family.moe_layers == name if family else any(getattr(c, key) is not None for key in keys))
    }
    return found.pop() if len(found) == 1 else None


def _deepseek_layers(c: Routing, layers: int) -> tuple[int, ...]:
    first, every = c.first_k_dense_replace or 0, c.moe_layer_freq
    if isinstance(every, list):
        if len(every) != layers:
            raise FormatError(f"moe_layer_freq is not {layers} zeros and ones", hint="correct it")
        return tuple(i for i in range(layers) if every[i])
    if first > layers:
        raise FormatError(
            f"first_k_dense_replace is {first}, but there are {layers} layers", hint="correct one of them"
        )
    return tuple(i for i in range(first, layers) if i % (every or 1) == 0)


def _qwen_layers(c: Routing, layers: int) -> tuple[int, ...]:
    step, dense = c.decoder_sparse_step or 1, layer_list(c.mlp_only_layers or (), "mlp_only_layers", layers)
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _llama4_layers(c: Routing, layers: int) -> tuple[int, ...] | None:
    if c.moe_layers is not None:
        return layer_list(c.moe_layers, "moe_layers", layers)
    step = c.interleave_moe_layer_step
    return None if step is None else tuple(range(step - 1, layers, step))


#: Which layers have experts, as the engines and Transformers 5.23 decide it: (keys that speak of it, rule).
RULES: dict[str, tuple[tuple[str, ...], Callable[[Routing, int], tuple[int, ...] | None]]] = {
    "deepseek": (("first_k_dense_replace", "moe_layer_freq"), _deepseek_layers),
    "qwen": (("decoder_sparse_step", "mlp_only_layers"), _qwen_layers),
    "llama4": (("moe_layers", "interleave_moe_layer_step"), _llama4_layers),
}


def _with_dimensions(spec: ModelSpec, c: Config, family: Family) -> ModelSpec:
    """The spec with the dimensions of a known family."""
    layers = c.need("num_hidden_layers")
    full, window = _full_layers(c, family, layers)
    moe = _moe(spec.moe or Moe(), c, family)
    dense = moe is None or moe.layers is None or len(moe.layers) < layers
    return replace(
        spec,
        hidden=c.need("hidden_size"),
        vocab=c.need("vocab_size"),
        attention=_attention(c, family),
        full_layers=full,
        window=window,
        linear=_linear(c) if len(full) < layers and not window else None,
        dense_width=c.need(family.dense_width) if dense and family.dense_width else 0,
        moe=moe,
        ffn_bias=family.ffn_bias == "always" or bool(family.ffn_bias and c.mlp_bias),
        tied=bool(c.tie_word_embeddings),
        mtp_layers=(c.mtp_num_hidden_layers or 0) if c.num_nextn_predict_layers is None else c.num_nextn_predict_layers,
        checkpoint=_checkpoint(c.quantization_config, Path(spec.source)),
    )


def _attention(c: Config, family: Family) -> Attention:
    heads = c.need("num_attention_heads")
    if family.mla:
        return Attention(
            "mla",
            heads,
            q_lora_rank=c.q_lora_rank or 0,
            kv_lora_rank=c.need("kv_lora_rank"),
            qk_nope_head_dim=c.need("qk_nope_head_dim"),
            qk_rope_head_dim=c.need("qk_rope_head_dim"),
            v_head_dim=c.need("v_head_dim"),
        )
    kv_heads, hidden = c.num_key_value_heads or heads, c.need("hidden_size")
    if c.head_dim is None and hidden % heads:
        raise FormatError(f"hidden_size does not divide into {heads} heads", hint="add head_dim")
    head_dim = c.head_dim or hidden // heads
    bias = {"always": True, "never": False}.get(family.bias)
    if bias is None:
        given = getattr(c, family.bias)
        bias = family.biased if given is None else given
    return Attention(
        "mha" if kv_heads == heads else "gqa",
        heads,
        kv_heads,
        head_dim,
        qk_norm=family.qk_norm,
        qkv_bias=bias,
        out_bias=bias and family.bias == "attention_bias",
        sinks=family.sinks,
        output_gate=family.output_gate,
    )


def _linear(c: Config) -> LinearAttention:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    return LinearAttention(*(c.need(f"linear_{name}") for name in names))


def _full_layers(c: Config, family: Family, layers: int) -> tuple[tuple[int, ...], int]:
    """The layers with full attention, and the window of the others (0: they are linear, or there are none)."""
    everywhere = tuple(range(layers))
    if c.layer_types is not None:
        kinds, known = c.layer_types, ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise FormatError(f"layer_types is not {layers} of {', '.join(known)}", hint="correct it")
        full = tuple(i for i in everywhere if kinds[i] == "full_attention")
        if len(full) == layers or "linear_attention" in kinds:
            return full, 0
        return full, c.need("attention_chunk_size" if "chunked_attention" in kinds else "sliding_window")
    if family.window == "llama4" and c.attention_chunk_size is not None:
        rope, every = c.no_rope_layers, c.no_rope_layer_interval or 4
        if rope and len(rope) != layers:
            raise FormatError(f"no_rope_layers is not {layers} zeros and ones", hint="correct it")
        full = tuple(i for i in everywhere if not (rope[i] if rope else (i + 1) % every))
        return full, c.attention_chunk_size
    if family.window in ("never", "llama4") or c.sliding_window is None:
        return everywhere, 0
    if family.window == "alternate":
        return everywhere[1::2], c.sliding_window
    if family.window == "all":
        return (), c.sliding_window
    if not c.use_sliding_window:
        return everywhere, 0
    if family.window == "unclear":
        raise FormatError("use_sliding_window does not say for which layers", hint="add layer_types")
    return everywhere[: 28 if c.max_window_layers is None else c.max_window_layers], c.sliding_window


def _moe(known: Moe, c: Config, family: Family) -> Moe | None:
    """The experts; None for a dense model, also of a family that can have experts (n_routed_experts null or 0)."""
    if not family.experts or (family.may_be_dense and not c.n_routed_experts):
        return None
    if known.experts is None:
        c.need(family.experts)
    if known.top_k is None:
        c.need("experts_per_token" if family.sinks else "num_experts_per_tok")
    if family.moe_layers == "deepseek":
        c.need("first_k_dense_replace")
    if known.layers is None:
        c.need("interleave_moe_layer_step")
    shared, width = 0, c.need(family.width)
    if family.shared == "n_shared_experts":
        shared = c.n_shared_experts or 0
    elif family.shared:
        shared = 1
    shared_width = c.need("shared_expert_intermediate_size") if family.shared == "gated" else width
    grouped = family.mla and c.n_group is not None and c.topk_method != "greedy"
    return replace(
        known,
        width=width,
        shared=shared,
        shared_width=shared_width if shared else 0,
        shared_gate=family.shared == "gated",
        router_bias=family.router_bias,
        groups=known.groups if grouped else 1,
        groups_kept=c.need("topk_group") if grouped else 1,
    )


def _checkpoint(quantised: dict[str, Any] | None, path: Path) -> tuple[str, str] | None:
    """Dtypes of the published weights; None for a way of quantising whose parts the configuration does not tell."""
    if quantised is None:
        # ModelOpt describes the checkpoint in a file of its own.
        return None if path.with_name("hf_quant_config.json").exists() else ("bf16", "bf16")
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


def described(config: str | Path | None = None, **given: Unpack[Overrides]) -> ModelSpec:
    """A model as a config.json, if there is one, and its user describe it; the name is the user's alone.

    Raises:
        FormatError: as `read_config`. UsageError: as `ModelSpec.override`.
    """
    spec = ModelSpec() if config is None else replace(read_config(config), name=None)
    return spec.override(**given)
