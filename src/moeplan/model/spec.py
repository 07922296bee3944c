"""One description of a model, by its dimensions; what is not known of it is None.

Words: hidden is the width of the residual stream, a width is that of a feed-forward network, and layers count from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict, TypeVar, Unpack

from msgspec import Meta

from moeplan.errors import FormatError, UsageError, located
from moeplan.model.bounds import Heads, NoHeads, NoWidth
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS, ModelShape

__all__ = ["Attention", "CompleteMoe", "CompleteSpec", "LinearAttention", "ModelSpec", "Moe", "Overrides"]

T = TypeVar("T")

#: What to do where a model is not known.
GIVE_MODEL = 'give model=moeplan.load_model("config.json") (command line: --config, or --num-layers and --dense-layers)'

#: Dimensions that latent attention must have, and other attention has not.
LATENT = ("kv_lora_rank", "qk_nope_head_dim")


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one layer.

    Attributes:
        kind: mha (every head has its own keys and values), gqa (groups of heads share them), mla (DeepSeek's latent).
        heads, kv_heads: for mha and mla, kv_heads = heads.
        head_dim: of a query and key; for mla, qk_nope_head_dim + qk_rope_head_dim. v_head_dim: of a value, by default
            head_dim.
        q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim: of mla; q_lora_rank 0: a full query matrix.
        qk_norm: none, head (one norm of head_dim for queries, one for keys) or full (over all heads together).
        qkv_bias, out_bias: biases of the projections. sinks: one learned logit per head (gpt-oss).
        output_gate: the query projection is doubled to gate the output (Qwen3.5).
    """

    kind: Annotated[str, Meta(pattern="^(mha|gqa|mla)$")]
    heads: Heads
    kv_heads: NoHeads = 0
    head_dim: NoWidth = 0
    v_head_dim: NoWidth = 0
    q_lora_rank: NoWidth = 0
    kv_lora_rank: NoWidth = 0
    qk_nope_head_dim: NoWidth = 0
    qk_rope_head_dim: NoWidth = 0
    qk_norm: Annotated[str, Meta(pattern="^(none|head|full)$")] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        mla = self.kind == "mla"
        needed = {"mha": ("head_dim",), "gqa": ("kv_heads", "head_dim")}.get(self.kind, (*LATENT, "v_head_dim"))
        for key in needed:
            if not getattr(self, key):
                raise ValueError(f"{key} is missing")
        for key in () if mla else ("q_lora_rank", "qk_rope_head_dim", *LATENT):
            if getattr(self, key):
                raise ValueError(f"{key} is a dimension of mla")
        head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim if mla else self.head_dim
        object.__setattr__(self, "kv_heads", self.heads if mla else self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", head_dim)
        object.__setattr__(self, "v_head_dim", self.v_head_dim or head_dim)


@dataclass(frozen=True)
class LinearAttention:
    """A gated delta net (Qwen3.5): a state of [value_heads, key_dim, value_dim] per request instead of a KV cache."""

    key_heads: Heads
    value_heads: Heads
    key_dim: Heads
    value_dim: Heads
    conv: Heads

    @property
    def channels(self) -> int:
        """Width of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Moe:
    """The routed and shared experts of the MoE layers; None where not known.

    Attributes:
        layers: the model's own index of each MoE layer, rising.
        experts: E, routed experts. top_k: k, picks per token. width: of one routed expert.
        shared: experts that every token passes, each of shared_width; shared_gate: scaled by a learned gate.
        router_bias: one number per expert in the gate. groups: groups of consecutive experts that the gate first
            chooses among, of which it keeps groups_kept.
    """

    layers: tuple[int, ...] | None = None
    experts: int | None = None
    top_k: int | None = None
    width: int | None = None
    shared: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    groups: int = 1
    groups_kept: int = 1


@dataclass(frozen=True, kw_only=True)
class CompleteMoe(Moe):
    """Experts of which everything is known."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    width: int


class Overrides(TypedDict, total=False):
    """What a user says of a model, by the names of `ModelSpec.override`; None leaves the spec as it is."""

    name: str | None
    hidden: int | None
    expert_bytes: int | None
    kv_bytes_per_token: int | None
    expert_groups: int | None
    num_experts: int | None
    num_layers: int | None
    top_k: int | None
    dense_layers: Sequence[int] | None
    moe_layers: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's config, possibly incomplete: a decoder (the text part of a multimodal model); None where not known.

    Attributes:
        name: the model's name.
        layers: all hidden layers, dense ones included. hidden, vocab: widths.
        full_layers: layers whose attention sees the whole context. The others have `window` (it sees the last `window`
            tokens; a chunked attention counts as a window of its chunk) or, where the window is 0, `linear`.
        dense_width: feed-forward width of the layers that are not in `moe.layers`; 0 where there is none.
        moe: the experts; None in a dense model.
        gated: a feed-forward network has three matrices (SwiGLU), else two; ffn_bias: each with a bias.
        norm_bias: LayerNorm with a bias. positions: learned position embeddings. tied: the head is the embedding.
        mtp_layers: MTP (NextN) layers, counted apart.
        checkpoint: dtypes of the published weights (of the matrices, of the routed experts); None where not known.
        expert_bytes: weights of one expert in one layer, bytes. kv_bytes_per_token: KV cache of one token over all
            layers, bytes. Both only where somebody gave them: `moeplan.perf` computes them for any dtype.
        architectures: class names that the model's config.json gives.
        source: the file that the description was read from.
        obstacle: why the file does not give all dimensions.
    """

    name: str | None = None
    layers: int | None = None
    hidden: int | None = None
    vocab: int | None = None
    attention: Attention | None = None
    full_layers: tuple[int, ...] | None = None
    window: int = 0
    linear: LinearAttention | None = None
    dense_width: int = 0
    moe: Moe | None = None
    gated: bool = True
    ffn_bias: bool = False
    norm_bias: bool = False
    positions: int = 0
    tied: bool = False
    mtp_layers: int = 0
    checkpoint: tuple[str, str] | None = ("bf16", "bf16")
    expert_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    architectures: tuple[str, ...] = field(default=(), compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)
    obstacle: FormatError | None = field(default=None, compare=False, repr=False)

    @property
    def num_experts(self) -> int | None:
        """E, routed experts per MoE layer."""
        return self.moe.experts if self.moe else None

    @property
    def top_k(self) -> int | None:
        """k, picks per token and MoE layer."""
        return self.moe.top_k if self.moe else None

    @property
    def moe_layers(self) -> tuple[int, ...] | None:
        """The model's own index of each MoE layer, rising."""
        return self.moe.layers if self.moe else None

    def need_experts(self, where: str) -> int:
        """E, or an error that says how to give it."""
        return _need(self.num_experts, "how many experts a layer has", "--num-experts, e.g. 128", where)

    def override(self, **given: Unpack[Overrides]) -> ModelSpec:
        """The spec with what a user says of the model.

        `name`, `hidden`, `expert_bytes`, `kv_bytes_per_token` and `expert_groups` (but 1) replace what was known. The
        counts `num_experts`, `num_layers` and `top_k`, the `moe_layers` and the `dense_layers` (hidden layers without
        experts; of no effect while `num_layers` is not known) complete it.

        Raises:
            UsageError: a count out of bounds, or anything of those that contradicts what was known.
        """
        moe = self.moe or Moe()
        layers = _completed("num_layers", given.get("num_layers"), self.layers, MAX_LAYERS, self.source)
        experts = _completed("num_experts", given.get("num_experts"), moe.experts, MAX_EXPERTS, self.source)
        top_k = _completed("top_k", given.get("top_k"), moe.top_k, MAX_K, self.source)
        dense, moe_layers = given.get("dense_layers"), given.get("moe_layers")
        if dense is not None and layers is not None:
            moe_layers = [i for i in range(layers) if i not in set(dense)]
        found = moe.layers if moe_layers is None else tuple(moe_layers)
        if moe.layers not in (None, found):
            raise UsageError(f"--dense-layers contradicts {self.source}", hint="leave one of the two out")
        groups = given.get("expert_groups") or 1
        moe = replace(moe, layers=found, experts=experts, top_k=top_k, groups=moe.groups if groups == 1 else groups)
        replaced = {key: given.get(key) for key in ("name", "hidden", "expert_bytes", "kv_bytes_per_token")}
        changes: dict[str, Any] = {key: value for key, value in replaced.items() if value is not None}
        return ModelSpec(**{**vars(self), **changes, "layers": layers, "moe": None if moe == Moe() else moe})

    def moe_shape(
        self,
        *,
        name: str = "",
        num_experts: int | None = None,
        top_k: int | None = None,
        layer_ids: Sequence[int] | None = None,
        where: str = "",
    ) -> ModelShape:
        """What traces and plans know of the model.

        Args:
            name: a name where the spec has none.
            num_experts: routed experts per layer of a recording; default: the spec's.
            top_k: picks per token of a recording; default: the spec's.
            layer_ids: MoE layers of a recording; default: the spec's.
            where: what an error is about.

        Raises:
            UsageError: a number that nobody gave. FormatError: an impossible shape.
        """
        found = self.moe_layers if layer_ids is None else layer_ids
        layers = _need(found, "which layers have experts", "--num-layers and --dense-layers", where)
        with located(where):
            return ModelShape(
                name=name if self.name is None else self.name,
                num_layers=len(layers),
                num_experts=self.need_experts(where) if num_experts is None else num_experts,
                top_k=_need(self.top_k if top_k is None else top_k, "how many experts a token picks", "--top-k", where),
                layer_ids=tuple(layers),
                hidden=self.hidden,
                routing_groups=self.moe.groups if self.moe else 1,
                expert_bytes=self.expert_bytes,
                kv_bytes_per_token=self.kv_bytes_per_token,
            )

    def complete(self) -> CompleteSpec:
        """The same spec where every dimension is known, as the models of time and memory need it.

        Raises:
            FormatError: dimensions that are not known, by name, or that no model can have.
        """
        moe = self.moe
        needed = {key: getattr(self, key) for key in ("layers", "hidden", "vocab", "attention", "full_layers")}
        needed |= {f"moe.{key}": getattr(moe, key) for key in ("layers", "experts", "top_k", "width") if moe}
        missing = [key for key, value in needed.items() if value is None]
        if missing:
            raise self.obstacle or FormatError(
                f"does not say {', '.join(missing)}",
                where=self.source or self.name or "",
                hint="give a model of the catalogue, or its config.json",
            )
        own = {"name": self.name or "", "moe": CompleteMoe(**vars(moe)) if moe else None, "obstacle": None}
        spec = CompleteSpec(**{**vars(self), **own})
        for wrong, what, hint in _impossible(spec):
            if wrong:
                raise FormatError(what, where=self.source or spec.name, hint=hint)
        return spec


@dataclass(frozen=True, kw_only=True)
class CompleteSpec(ModelSpec):
    """A model with every dimension, as `load_model` and `ModelSpec.complete` give it."""

    name: str
    layers: int
    hidden: int
    vocab: int
    attention: Attention
    full_layers: tuple[int, ...]
    moe: CompleteMoe | None


def _need(value: T | None, what: str, flag: str, where: str) -> T:
    if value is None:
        raise UsageError(
            f"the source does not say {what}", where=where, hint=f"give {flag}, or the model's config.json (--config)"
        )
    return value


def _completed(key: str, given: int | None, known: int | None, top: int, source: str) -> int | None:
    """A count that the user gave, or that was known."""
    flag = f"--{key.replace('_', '-')}"
    if given is None:
        return known
    if not 1 <= given <= top:
        raise UsageError(f"{flag} {given} is outside 1..{top}")
    if known not in (None, given):
        raise UsageError(f"{flag} {given}, but {source} says {known}", hint="leave one of the two out")
    return given


def _impossible(spec: CompleteSpec) -> Iterable[tuple[bool, str, str]]:
    """What no model can have: (whether it is so here, in words, what to do)."""
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
