"""How many parameters a model has, by part and by layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.model.spec import CompleteMoe, CompleteSpec, LinearAttention

__all__ = [
    "PARTS",
    "Parameters",
    "expert_parameters",
    "kv_values",
    "kv_values_per_token",
    "layer_parameters",
    "parameters",
]

#: Columns of `layer_parameters`.
PARTS = ("attention", "dense", "shared", "router", "experts", "other")


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


def parameters(spec: CompleteSpec) -> Parameters:
    """How many parameters a model has, and how many of them one token passes."""
    rows = layer_parameters(spec)
    body, mtp = rows[: spec.layers].sum(axis=0), int(rows[spec.layers :].sum())
    part = dict(zip(PARTS, (int(value) for value in body), strict=True))
    part["other"] += spec.hidden * (2 if spec.norm_bias else 1) + spec.positions * spec.hidden
    matrix = spec.vocab * spec.hidden
    active = 0 if spec.moe is None else part["experts"] // spec.moe.experts * spec.moe.top_k
    return Parameters(embedding=matrix, head=0 if spec.tied else matrix, experts_active=active, mtp=mtp, **part)


@functools.lru_cache(maxsize=256)
def layer_parameters(spec: CompleteSpec, tp: int = 1) -> npt.NDArray[np.float64]:
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
        like = spec.layers - 1 if mtp else i  # an MTP layer repeats the last layer
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


def _add_moe(row: dict[str, int], spec: CompleteSpec, moe: CompleteMoe, tp: int) -> None:
    row["experts"] = moe.experts * sum(expert_parameters(spec))
    row["router"] = moe.experts * (spec.hidden + moe.router_bias)
    shared, bias = _ffn(spec, _share(moe.shared_width, tp))
    row["shared"] = moe.shared * shared
    row["other"] += moe.shared * bias + spec.hidden * moe.shared_gate


def expert_parameters(spec: CompleteSpec) -> tuple[int, int]:
    """Parameters of one routed expert in one layer: (matrices, biases)."""
    return _ffn(spec, spec.moe.width) if spec.moe else (0, 0)


def kv_values(spec: CompleteSpec, tp: int = 1) -> int:
    """Numbers of one token in the KV cache of one softmax layer, as one of `tp` tensor-parallel ranks holds them."""
    a = spec.attention
    if a.kind == "mla":
        return a.kv_lora_rank + a.qk_rope_head_dim
    return _share(a.kv_heads, tp) * (a.head_dim + a.v_head_dim)


def kv_values_per_token(spec: CompleteSpec, tp: int = 1) -> int:
    """The same over all layers, while no window is full; linear attention keeps no cache."""
    return (spec.layers if spec.linear is None else len(spec.full_layers)) * kv_values(spec, tp)


def _ffn(spec: CompleteSpec, width: int) -> tuple[int, int]:
    """Of one feed-forward network: (matrices, biases)."""
    up = 2 if spec.gated else 1
    return (up + 1) * spec.hidden * width, (up * width + spec.hidden) * (spec.ffn_bias and width > 0)


def _attention(spec: CompleteSpec, tp: int) -> tuple[int, int]:
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
