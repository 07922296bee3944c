"""Models by their dimensions, from the catalogue `data/models.json`; and how many parameters those make.

Words: hidden is the width of the residual stream, a width is that of a feed-forward network, and layers count from 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.io.catalogue import find_name, read_object

#: The catalogue's folder.
DATA = Path(__file__).parent / "data"

__all__ = [
    "Attention", "LinearAttention", "ModelSpec", "Moe", "Parameters", "expert_parameters", "layer_parameters", "model",
    "model_names", "model_notes", "parameters",
]  # fmt: skip

#: Columns of `layer_parameters`.
PARTS = ("attention", "dense", "shared", "router", "experts", "other")


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one layer.

    Attributes:
        kind: mha (every head has its own keys and values), gqa (groups of heads share them), mla (DeepSeek's latent).
        heads, kv_heads: for mla, kv_heads = heads.
        head_dim: of a query and key; for mla, qk_nope_head_dim + qk_rope_head_dim. v_head_dim: of a value.
        q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim: of mla; q_lora_rank 0: a full query matrix.
        qk_norm: none, head (one norm of head_dim for queries, one for keys) or full (over all heads together).
        qkv_bias, out_bias: biases of the projections. sinks: one learned logit per head (gpt-oss).
        output_gate: the query projection is doubled to gate the output (Qwen3.5).
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    qk_norm: str = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    output_gate: bool = False


@dataclass(frozen=True)
class LinearAttention:
    """A gated delta net (Qwen3.5): a state of [value_heads, key_dim, value_dim] per request instead of a KV cache."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int

    @property
    def channels(self) -> int:
        """Width of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Moe:
    """The routed and shared experts of a MoE layer.

    Attributes:
        layers: the model's own index of each MoE layer, rising.
        experts: E, routed experts. top_k: k, picks per token. width: of one routed expert.
        shared: experts that every token passes, each of shared_width; shared_gate: scaled by a learned gate.
        router_bias: one number per expert in the router. groups: groups of consecutive experts that the router first
            chooses among, of which it keeps groups_kept.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    width: int
    shared: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    groups: int = 1
    groups_kept: int = 1


@dataclass(frozen=True)
class ModelSpec:
    """A decoder by its dimensions (the text part of a multimodal model).

    Attributes:
        layers, hidden, vocab: counts.
        full_layers: layers whose attention sees the whole context. The others have `window` (it sees the last `window`
            tokens; a chunked attention counts as a window of its chunk) or, where the window is 0, `linear`.
        dense_width: feed-forward width of the layers that are not in `moe.layers`; 0 where there is none.
        gated: a feed-forward network has three matrices (SwiGLU), else two; ffn_bias: each with a bias.
        norm_bias: LayerNorm with a bias. positions: learned position embeddings. tied: the head is the embedding.
        mtp_layers: modules for multi-token prediction, counted apart.
        checkpoint: dtypes of the published weights (of the matrices, of the routed experts); None where not known.
    """

    name: str
    layers: int
    hidden: int
    vocab: int
    attention: Attention
    full_layers: tuple[int, ...]
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


@dataclass(frozen=True)
class Parameters:
    """Parameters by part. `other`: norms, biases, position embeddings, convolutions; `mtp` is not in the total.

    `embedding` holds the head too where both are one matrix.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    shared: int
    router: int
    experts: int
    experts_active: int
    other: int
    mtp: int

    @property
    def total(self) -> int:
        ffn = self.dense + self.shared + self.router + self.experts
        return self.embedding + self.head + self.attention + ffn + self.other

    @property
    def active(self) -> int:
        """Those that one token passes: all but the experts it does not pick."""
        return self.total - self.experts + self.experts_active

    @property
    def active_without_embedding(self) -> int:
        """As gpt-oss's model card counts: a look-up in the embedding costs nothing, the head does."""
        return self.active - (self.embedding if self.head else 0)

    @property
    def active_without_vocabulary(self) -> int:
        """Neither embedding nor head."""
        return self.active - self.embedding - self.head


def parameters(spec: ModelSpec) -> Parameters:
    """How many parameters a model has, and how many of them one token passes."""
    rows = layer_parameters(spec)
    body, mtp = rows[: spec.layers].sum(axis=0), int(rows[spec.layers :].sum())
    part = dict(zip(PARTS, (int(value) for value in body), strict=True))
    part["other"] += spec.hidden * (2 if spec.norm_bias else 1) + spec.positions * spec.hidden
    matrix = spec.vocab * spec.hidden
    active = 0 if spec.moe is None else part["experts"] // spec.moe.experts * spec.moe.top_k
    return Parameters(embedding=matrix, head=0 if spec.tied else matrix, experts_active=active, mtp=mtp, **part)


@functools.lru_cache(maxsize=256)
def layer_parameters(spec: ModelSpec, tp: int = 1) -> npt.NDArray[np.float64]:
    """Parameters of each layer by part, as one of `tp` tensor-parallel ranks holds them.

    A rank holds its share of the heads and widths. What engines do not split is whole on every rank: MLA's
    down-projections, the last KV head when there are fewer of them than ranks, router, norms, biases; and here the
    routed experts, whose split is not that of the attention.

    Returns:
        float64 [layers + mtp_layers, 6] (exact to 9e15, and no overflow on absurd input), read-only; columns as in
        `PARTS`. `experts` holds all E experts of a MoE layer.
    """
    out = np.zeros((spec.layers + spec.mtp_layers, len(PARTS)))
    full, moe = set(spec.full_layers), set(spec.moe.layers if spec.moe else ())
    for i in range(len(out)):
        mtp = i >= spec.layers
        like = spec.layers - 1 if mtp else i  # a module for multi-token prediction repeats the last layer
        linear = spec.linear if like not in full else None
        row = dict.fromkeys(PARTS, 0)
        matrices, small = _linear_attention(spec.hidden, linear, tp) if linear and not mtp else _attention(spec, tp)
        row["attention"], row["other"] = matrices, small + 2 * spec.hidden * (2 if spec.norm_bias else 1)
        if spec.moe and like in moe:
            _add_moe(row, spec, spec.moe, tp)
        else:
            row["dense"], bias = _ffn(spec, _share(spec.dense_width, tp))
            row["other"] += bias
        if mtp:  # joins the hidden state and the next token's embedding, each after a norm; one more norm at the end
            row["other"] += 3 * spec.hidden
            row["dense"] += 2 * spec.hidden * spec.hidden
        out[i] = [row[part] for part in PARTS]
    out.setflags(write=False)
    return out


def _add_moe(row: dict[str, int], spec: ModelSpec, moe: Moe, tp: int) -> None:
    row["experts"] = moe.experts * sum(expert_parameters(spec))
    row["router"] = moe.experts * (spec.hidden + moe.router_bias)
    shared, bias = _ffn(spec, _share(moe.shared_width, tp))
    row["shared"] = moe.shared * shared
    row["other"] += moe.shared * bias + spec.hidden * moe.shared_gate


def expert_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameters of one routed expert in one layer: (matrices, biases)."""
    return _ffn(spec, spec.moe.width) if spec.moe else (0, 0)


def _ffn(spec: ModelSpec, width: int) -> tuple[int, int]:
    """Of one feed-forward network: (matrices, biases)."""
    up = 2 if spec.gated else 1
    return (up + 1) * spec.hidden * width, (up * width + spec.hidden) * (spec.ffn_bias and width > 0)


def _attention(spec: ModelSpec, tp: int) -> tuple[int, int]:
    """Of one layer's softmax attention: (matrices, norms and biases)."""
    a, hidden = spec.attention, spec.hidden
    heads, kv_heads = _share(a.heads, tp), _share(a.kv_heads, tp)
    if a.kind == "mla":
        q = a.q_lora_rank * (hidden + heads * a.head_dim) if a.q_lora_rank else hidden * heads * a.head_dim
        kv = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
        kv += a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
        return q + kv + heads * a.v_head_dim * hidden, a.q_lora_rank + a.kv_lora_rank
    q_width, kv_width = heads * a.head_dim * (2 if a.output_gate else 1), kv_heads * (a.head_dim + a.v_head_dim)
    matrices = hidden * (q_width + kv_width) + heads * a.v_head_dim * hidden
    norm = {"none": 0, "head": 2 * a.head_dim, "full": (heads + kv_heads) * a.head_dim}[a.qk_norm]
    return matrices, norm + (q_width + kv_width) * a.qkv_bias + hidden * a.out_bias + heads * a.sinks


def _linear_attention(hidden: int, linear: LinearAttention, tp: int) -> tuple[int, int]:
    """Of one gated delta net: (projections to queries, keys, values, gate, two per head, and back; the small rest)."""
    heads, channels = _share(linear.value_heads, tp), _share(linear.channels, tp)
    values = heads * linear.value_dim
    return hidden * (channels + 2 * values + 2 * heads), channels * linear.conv + 2 * heads + linear.value_dim


def _share(count: int, tp: int) -> int:
    return -(-count // tp)


def model(name_or_path: str | Path) -> ModelSpec:
    """A model of the catalogue, or of a file.

    Args:
        name_or_path: a name or alias of the catalogue (any case), or the path of a Transformers `config.json`, of the
            folder that holds it, or of a file with one entry in the catalogue's own form.

    Raises:
        UsageError: neither a known name nor a path.
        FormatError: a file with a key missing, of a wrong type or impossible, or of an unknown model_type.
    """
    from moeplan.model.config import read_config, read_entry  # they need this module's classes

    text, path = str(name_or_path), Path(name_or_path)
    if path.exists() or path.suffix == ".json" or path.is_absolute():
        path = path / "config.json" if path.is_dir() else path
        data = read_object(path)
        own = "model_type" not in data and "layers" in data
        return read_entry(path.stem, data, str(path)) if own else read_config(path, data)
    return _from_catalogue(find_name(text, _names(), "model", "; or give the path of a config.json"))


def model_names() -> tuple[str, ...]:
    """All names of the catalogue."""
    return tuple(_raw())


def model_notes(name: str) -> dict[str, Any]:
    """What the catalogue says beside the dimensions: sources, published counts and what they count, a note."""
    return {key: _raw()[name][key] for key in ("sources", "published", "note") if key in _raw()[name]}


@functools.cache
def _raw() -> dict[str, dict[str, Any]]:
    return read_object(DATA / "models.json")


@functools.cache
def _names() -> dict[str, tuple[str, ...]]:
    """Aliases by name; of a Hugging Face name also its last part."""
    return {key: (*e["aliases"], *(alias.rsplit("/")[-1] for alias in e["aliases"])) for key, e in _raw().items()}


@functools.cache
def _from_catalogue(name: str) -> ModelSpec:
    from moeplan.model.config import read_entry

    return read_entry(name, _raw()[name], f"{DATA / 'models.json'}, {name}")
