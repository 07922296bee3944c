"""A model from a Transformers `config.json`, read as data.

Nothing is executed and nothing is guessed: what a family's configuration must say and does not is unknown, what it may
leave out has the default of Transformers 5.23. Of a family that moeplan does not know, only what recordings and
placements need is read: layers, experts, picks per token, MoE layers, expert groups and the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

from moeplan import embedded
from moeplan.errors import FormatError, located
from moeplan.io.catalogue import read_object
from moeplan.model.bounds import MAX_HEADS, MAX_MTP, MAX_WIDTH, MAX_WINDOW, layer_list
from moeplan.model.families import FAMILIES, Family
from moeplan.model.spec import Attention, LinearAttention, ModelSpec, Moe, Overrides
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

__all__ = ["config_file", "described", "of_config", "read_config"]

T = TypeVar("T")


class Keys:
    """The keys of a configuration, checked as they are read; null counts as absent, as in Transformers."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def get(self, key: str, top: int, low: int = 1) -> int | None:
        """A whole number in low..top, or None."""
        value = self.data.get(key)
        if value is not None and (type(value) is not int or not low <= value <= top):
            raise FormatError(f"{key} is {str(value)[:40]}, not a whole number in {low}..{top}", hint="correct it")
        return value

    def need(self, key: str, top: int, low: int = 1) -> int:
        """The same where it may not be absent."""
        value = self.get(key, top, low)
        if value is None:
            raise FormatError(f"{key} is missing", hint="add it; docs/reference/catalogue.md says what it is")
        return value

    def other(self, key: str, kind: type[T], words: str) -> T | None:
        """A value of another type, or None."""
        value = self.data.get(key)
        if value is not None and type(value) is not kind:
            raise FormatError(f"{key} is {str(value)[:40]}, not {words}", hint="correct it")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.other(key, bool, "true or false")
        return default if value is None else value

    def items(self, key: str) -> list[Any] | None:
        return self.other(key, list, "a list")

    def layers(self, key: str, layers: int) -> tuple[int, ...] | None:
        """A list of different layers, sorted."""
        found = self.items(key)
        return None if found is None else layer_list(found, key, layers)

    def flags(self, key: str, layers: int) -> list[int] | None:
        """A zero or one for each layer."""
        found = self.items(key)
        if found is not None and (len(found) != layers or any(flag not in (0, 1) for flag in found)):
            raise FormatError(f"{key} is not {layers} zeros and ones", hint="correct it")
        return found

    def same(self, keys: tuple[str, ...], top: int, low: int = 1) -> int | None:
        """The one number under keys that mean the same, or None."""
        found = {key: value for key in keys if (value := self.get(key, top, low)) is not None}
        if len(set(found.values())) > 1:
            raise FormatError(f"{' and '.join(found)} differ", hint="keep the right one")
        return next(iter(found.values()), None)


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
    return of_config(file, read_object(file))


def of_config(path: Path, data: dict[str, Any]) -> ModelSpec:
    """The same from the file's content; of a multimodal model, its text part.

    Raises:
        FormatError: as `read_config`.
    """
    text = data
    if isinstance(data.get("text_config"), dict):
        outer = {key: data.get(key) for key in ("model_type", "tie_word_embeddings", "quantization_config")}
        text = outer | {key: value for key, value in data["text_config"].items() if value is not None}
    kind, architectures, c = text.get("model_type"), data.get("architectures"), Keys(text)
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    with located(str(path)):
        layers, hidden = c.get("num_hidden_layers", MAX_LAYERS), c.get("hidden_size", MAX_WIDTH)
        moe = _routing(c, family, layers)
    spec = ModelSpec(
        name=_name(path),
        layers=layers,
        hidden=hidden,
        moe=None if moe == Moe() else moe,
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        source=str(path),
    )
    try:
        if family is None:
            known = f"it knows {', '.join(FAMILIES)}; or write the dimensions as docs/reference/catalogue.md shows"
            raise FormatError(f"model_type {str(kind)[:40]} is not one that moeplan knows", hint=known)
        return _with_dimensions(spec, c, family).complete()
    except FormatError as error:
        return replace(spec, obstacle=FormatError(error.what, where=str(path), hint=error.hint))


def _name(path: Path) -> str:
    """A model is called after its folder, or after its file where that is not named config.json."""
    if path.parent == embedded.MODEL:
        return embedded.WORD
    return path.parent.name if path.stem == "config" and path.parent.name else path.stem


def _routing(c: Keys, family: Family | None, layers: int | None) -> Moe:
    """What recordings and placements need to know of the experts."""
    groups = c.get("n_group", MAX_EXPERTS)
    return Moe(
        layers=None if layers is None else _moe_layers(c, family, layers),
        experts=c.same(("num_experts", "n_routed_experts", "num_local_experts"), MAX_EXPERTS, 0) or None,
        top_k=c.same(("num_experts_per_tok", "num_experts_per_token", "experts_per_token"), MAX_K),
        groups=1 if groups is None or c.data.get("topk_method") == "greedy" else groups,
    )


def _moe_layers(c: Keys, family: Family | None, layers: int) -> tuple[int, ...] | None:
    """The MoE layers by the family's rule; without a family, by the rules whose keys are there, if they agree."""
    if family is not None and family.moe_layers == "all":
        return tuple(range(layers)) if family.experts else None
    found = {
        rule(c, layers)
        for name, (keys, rule) in RULES.items()
        if (family.moe_layers == name if family else any(c.data.get(key) is not None for key in keys))
    }
    return found.pop() if len(found) == 1 else None


def _deepseek_layers(c: Keys, layers: int) -> tuple[int, ...]:
    if isinstance(c.data.get("moe_layer_freq"), list):
        return tuple(i for i, flag in enumerate(c.flags("moe_layer_freq", layers) or ()) if flag)
    first, every = c.get("first_k_dense_replace", layers, 0) or 0, c.get("moe_layer_freq", MAX_LAYERS) or 1
    return tuple(i for i in range(first, layers) if i % every == 0)


def _qwen_layers(c: Keys, layers: int) -> tuple[int, ...]:
    step, dense = c.get("decoder_sparse_step", MAX_LAYERS) or 1, c.layers("mlp_only_layers", layers) or ()
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _llama4_layers(c: Keys, layers: int) -> tuple[int, ...] | None:
    step = c.get("interleave_moe_layer_step", MAX_LAYERS)
    listed = c.layers("moe_layers", layers)
    return listed if listed is not None or step is None else tuple(range(step - 1, layers, step))


#: Which layers have experts, as the engines and Transformers 5.23 decide it: (keys that speak of it, rule).
RULES: dict[str, tuple[tuple[str, ...], Callable[[Keys, int], tuple[int, ...] | None]]] = {
    "deepseek": (("first_k_dense_replace", "moe_layer_freq"), _deepseek_layers),
    "qwen": (("decoder_sparse_step", "mlp_only_layers"), _qwen_layers),
    "llama4": (("moe_layers", "interleave_moe_layer_step"), _llama4_layers),
}


def _with_dimensions(spec: ModelSpec, c: Keys, family: Family) -> ModelSpec:
    """The spec with the dimensions of a known family."""
    layers = c.need("num_hidden_layers", MAX_LAYERS)
    full, window = _full_layers(c, family, layers)
    moe = _moe(spec.moe or Moe(), c, family)
    dense = moe is None or moe.layers is None or len(moe.layers) < layers
    mtp = c.get("num_nextn_predict_layers", MAX_MTP, 0)
    return replace(
        spec,
        hidden=c.need("hidden_size", MAX_WIDTH),
        vocab=c.need("vocab_size", MAX_WIDTH),
        attention=_attention(c, family),
        full_layers=full,
        window=window,
        linear=_linear(c) if len(full) < layers and not window else None,
        dense_width=c.need(family.dense_width, MAX_WIDTH) if dense and family.dense_width else 0,
        moe=moe,
        ffn_bias=family.ffn_bias == "always" or (family.ffn_bias != "" and c.flag(family.ffn_bias)),
        tied=c.flag("tie_word_embeddings"),
        mtp_layers=c.get("mtp_num_hidden_layers", MAX_MTP, 0) or 0 if mtp is None else mtp,
        checkpoint=_checkpoint(c.other("quantization_config", dict, "an object"), Path(spec.source)),
    )


def _attention(c: Keys, family: Family) -> Attention:
    heads = c.need("num_attention_heads", MAX_HEADS)
    if family.mla:
        return Attention(
            "mla",
            heads,
            q_lora_rank=c.get("q_lora_rank", MAX_WIDTH) or 0,
            kv_lora_rank=c.need("kv_lora_rank", MAX_WIDTH),
            qk_nope_head_dim=c.need("qk_nope_head_dim", MAX_WIDTH),
            qk_rope_head_dim=c.need("qk_rope_head_dim", MAX_WIDTH, 0),
            v_head_dim=c.need("v_head_dim", MAX_WIDTH),
        )
    kv_heads, head_dim = c.get("num_key_value_heads", heads) or heads, c.get("head_dim", MAX_WIDTH)
    hidden = c.need("hidden_size", MAX_WIDTH)
    if head_dim is None and hidden % heads:
        raise FormatError(f"hidden_size does not divide into {heads} heads", hint="add head_dim")
    bias = family.bias == "always" or (family.bias != "never" and c.flag(family.bias, family.biased))
    return Attention(
        "mha" if kv_heads == heads else "gqa",
        heads,
        kv_heads,
        head_dim or hidden // heads,
        qk_norm=family.qk_norm,
        qkv_bias=bias,
        out_bias=bias and family.bias == "attention_bias",
        sinks=family.sinks,
        output_gate=family.output_gate,
    )


def _linear(c: Keys) -> LinearAttention:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    return LinearAttention(*(c.need(f"linear_{name}", MAX_HEADS) for name in names))


def _full_layers(c: Keys, family: Family, layers: int) -> tuple[tuple[int, ...], int]:
    """The layers with full attention, and the window of the others (0: they are linear, or there are none)."""
    everywhere, kinds = tuple(range(layers)), c.items("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise FormatError(f"layer_types is not {layers} of {', '.join(known)}", hint="correct it")
        full = tuple(i for i in everywhere if kinds[i] == "full_attention")
        if len(full) == layers or "linear_attention" in kinds:
            return full, 0
        return full, c.need("attention_chunk_size" if "chunked_attention" in kinds else "sliding_window", MAX_WINDOW)
    if family.window == "llama4" and (chunk := c.get("attention_chunk_size", MAX_WINDOW)):
        every = c.get("no_rope_layer_interval", MAX_LAYERS) or 4
        rope = c.flags("no_rope_layers", layers) if c.data.get("no_rope_layers") != [] else None
        return tuple(i for i in everywhere if not (rope[i] if rope else (i + 1) % every)), chunk
    if family.window in ("never", "llama4") or c.data.get("sliding_window") is None:
        return everywhere, 0
    if family.window in ("qwen", "unclear") and not c.flag("use_sliding_window"):
        return everywhere, 0
    if family.window == "unclear":
        raise FormatError("use_sliding_window does not say for which layers", hint="add layer_types")
    most = c.get("max_window_layers", MAX_LAYERS, 0)
    full = {"alternate": everywhere[1::2], "all": ()}.get(family.window, everywhere[: 28 if most is None else most])
    return full, c.need("sliding_window", MAX_WINDOW)


def _moe(known: Moe, c: Keys, family: Family) -> Moe | None:
    """The experts; None for a dense model, also of a family that can have experts (n_routed_experts null or 0)."""
    if not family.experts or (family.may_be_dense and not c.data.get("n_routed_experts")):
        return None
    if known.experts is None:
        c.need(family.experts, MAX_EXPERTS)
    if known.top_k is None:
        c.need("experts_per_token" if family.sinks else "num_experts_per_tok", MAX_K)
    if family.moe_layers == "deepseek":
        c.need("first_k_dense_replace", MAX_LAYERS, 0)
    if known.layers is None:
        c.need("interleave_moe_layer_step", MAX_LAYERS)
    shared, width = 1 if family.shared else 0, c.need(family.width, MAX_WIDTH)
    if family.shared == "n_shared_experts":
        shared = c.get("n_shared_experts", MAX_EXPERTS, 0) or 0
    gated = family.shared == "gated"
    grouped = family.mla and c.data.get("n_group") is not None and c.data.get("topk_method") != "greedy"
    return replace(
        known,
        width=width,
        shared=shared,
        shared_width=c.need("shared_expert_intermediate_size", MAX_WIDTH) if gated else width if shared else 0,
        shared_gate=gated,
        router_bias=family.router_bias,
        groups=known.groups if grouped else 1,
        groups_kept=c.need("topk_group", MAX_EXPERTS) if grouped else 1,
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
