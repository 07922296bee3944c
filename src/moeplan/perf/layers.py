"""The operators of one step, layer by layer, on one accelerator of the slowest rank: what `moeplan.perf.step` adds up.

Each operator is a `Call`: a name, the stage of the layer in which it runs (two-batch overlap hides communication behind
stages), the time of one call, and how many calls a step makes. All matrix products of one dtype are timed at once.

Stages of a MoE layer, in order: `prepare` (norm, projections to queries, keys, values), `core` (attention, projection
out, router), `dispatch`, `shared`, `experts`, `combine`. `other`: what is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moeplan.errors import UsageError
from moeplan.model.spec import CompleteSpec, LinearAttention
from moeplan.perf.attention import Heads, MlaShape, absorb, attention_decode, attention_prefill, mla_decode
from moeplan.perf.constants import Constants
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import STATE_BYTES, Parallel, Precision
from moeplan.perf.operators import Time, elementwise, gemm, kernel_time

__all__ = [
    "Call", "KernelDtypes", "Rows", "attention_calls", "dense_calls", "head_calls", "kinds", "router_calls",
    "shared_calls",
    "timed",
]  # fmt: skip

Product = tuple[str, str, float, float, float, str, float]


@dataclass(frozen=True)
class Call:
    """One operator: `count` calls of `time` each, in a stage of the layer."""

    name: str
    stage: str
    time: Time
    count: float


@dataclass(frozen=True)
class Rows:
    """What one accelerator's data-parallel rank works on in a step.

    Attributes:
        batch: sequences, each with its own keys and values. tokens: new tokens of each. context: tokens that each has
            before them. shared: how many sequences share one cache of the first `prefix` tokens (beams); else 1 and 0.
        prefill: many new tokens at a time, as against decode.
        logits: rows of logits that the step makes. beside: decoding sequences that share a prefill step.
    """

    batch: float
    tokens: float
    context: float
    prefill: bool
    logits: float
    shared: int = 1
    prefix: float = 0.0
    beside: Rows | None = None

    @property
    def rows(self) -> float:
        """Tokens of the step: what matrix products see."""
        return self.batch * self.tokens + (self.beside.rows if self.beside else 0.0)


@dataclass(frozen=True)
class KernelDtypes:
    """Kernels that dtypes lead to on a piece of hardware: of matrices, of experts, of cached keys and values."""

    weights: str
    experts: str
    kv: str


def kinds(spec: CompleteSpec, hardware: Hardware, precision: Precision) -> KernelDtypes:
    """Which kernels run.

    fp8 weights have block scales where the checkpoint has (DeepSeek-V3's recipe), else one scale per row. Weights of a
    dtype that the hardware cannot multiply in are converted to bf16 on the way (weight-only).

    Raises:
        UsageError: keys and values in a dtype that no attention kernel here reads.
    """
    block = spec.checkpoint is not None and "fp8" in spec.checkpoint
    if precision.kv not in ("bf16", "fp8"):
        raise UsageError(f"no attention kernel is modelled for {precision.kv} keys and values", hint="use bf16 or fp8")
    experts = precision.experts or precision.weights
    return KernelDtypes(_kind(precision.weights, hardware, block), _kind(experts, hardware, True), precision.kv)


def _kind(dtype: str, hardware: Hardware, block: bool) -> str:
    if dtype == "fp8":
        if "fp8" not in hardware.flops:
            return "w8"
        return "fp8_block" if block else "fp8"
    if dtype in ("fp4", "mxfp4"):
        return "fp4" if "fp4" in hardware.flops else "int4"
    if dtype == "int8" and "int8" not in hardware.flops:
        return "w8"
    return {"fp32": "bf16"}.get(dtype, dtype)


def timed(hardware: Hardware, c: Constants, products: Iterable[Product]) -> list[Call]:
    """Matrix products (name, stage, m, n, k, kind, count), each kind's at once."""
    by_kind: dict[str, list[Product]] = {}
    for product in products:
        by_kind.setdefault(product[5], []).append(product)
    out = []
    for kind, group in by_kind.items():
        m, n, k = np.array([p[2:5] for p in group], np.float64).T
        time = gemm(hardware, m, n, k, kind, c)
        seconds = np.asarray(time.seconds)
        parts = {name: np.broadcast_to(part, seconds.shape) for name, part in time.parts.items()}
        for i, p in enumerate(group):
            one = Time(float(seconds[i]), {name: float(part[i]) for name, part in parts.items()})
            out.append(Call(p[0], p[1], one, p[6]))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention_calls(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, kind: KernelDtypes, rows: Rows, counts: tuple[int, int],
    c: Constants,
) -> tuple[list[Product], list[Call]]:  # fmt: skip
    """Attention blocks: matrix products, and the rest.

    Args:
        counts: layers with full attention, and with a window or linear attention.
    """
    a, tp, full, other = spec.attention, parallel.tp, *counts
    products: list[Product] = []
    calls: list[Call] = []
    if a.kind == "mla":
        return _mla(spec, hardware, tp, kind, rows, full + other, c)
    heads, kv_heads = -(-a.heads // tp), -(-a.kv_heads // tp)
    windowed = 0 if spec.linear else other
    queries = heads * a.head_dim * (2 if a.output_gate else 1)
    made, n = queries + kv_heads * (a.head_dim + a.v_head_dim), full + windowed
    products.append(("qkv projection", "prepare", rows.rows, made, spec.hidden, kind.weights, n))
    products.append(("output projection", "core", rows.rows, spec.hidden, heads * a.v_head_dim, kind.weights, n))
    for count, window in ((full, 0), (windowed, spec.window)):
        if count:
            shape = Heads(heads, kv_heads, a.head_dim, a.v_head_dim, window)
            core = _softmax(hardware, shape, kind, rows, c)
            calls += [Call("attention", "core", part, count) for part in core]
    # rotation with the norms of queries and keys, then the write to the cache
    calls.append(Call("norms and rest", "prepare", elementwise(hardware, 4 * rows.rows * made, 2, c), n))
    if spec.linear and other:
        gdn = _linear(spec, hardware, spec.linear, tp, kind, rows, other, c)
        products, calls = products + gdn[0], calls + gdn[1]
    norm = elementwise(hardware, 8 * rows.rows * spec.hidden, 1, c)
    calls.append(Call("norms and rest", "prepare", norm, full + other))
    return products, calls


def _softmax(hardware: Hardware, shape: Heads, kind: KernelDtypes, rows: Rows, c: Constants) -> list[Time]:
    """Attention of one layer: of the prompts and, in a mixed step, of the sequences that decode beside them."""
    if rows.prefill:
        new = attention_prefill(hardware, shape, rows.batch, rows.tokens, context=rows.context, c=c)
        return [new, *(_softmax(hardware, shape, kind, rows.beside, c) if rows.beside else [])]
    return [
        attention_decode(hardware, shape, batch, context, tokens=tokens, kv_kind=kind.kv, c=c)
        for batch, context, tokens in _caches(rows)
    ]


def _caches(rows: Rows) -> list[tuple[float, float, float]]:
    """(sequences, cached tokens, new tokens of each) of each read: beams read their prefix once, then their own."""
    if rows.shared <= 1:
        return [(rows.batch, rows.context + rows.tokens, rows.tokens)]
    own = max(rows.context - rows.prefix, 0.0) + rows.tokens
    return [(rows.batch / rows.shared, rows.prefix, rows.tokens * rows.shared), (rows.batch, own, rows.tokens)]


def _mla(
    spec: CompleteSpec, hardware: Hardware, tp: int, kind: KernelDtypes, rows: Rows, n: int, c: Constants
) -> tuple[list[Product], list[Call]]:
    a = spec.attention
    shape = MlaShape(
        spec.hidden, -(-a.heads // tp), a.q_lora_rank, a.kv_lora_rank, a.qk_rope_head_dim, a.qk_nope_head_dim,
        a.v_head_dim,
    )  # fmt: skip
    up = shape.heads * (shape.nope + shape.rope)
    latents = shape.latent + shape.rope
    down = latents + (shape.query_rank or up)
    products: list[Product] = [("qkv projection", "prepare", rows.rows, down, spec.hidden, kind.weights, n)]
    if shape.query_rank:
        products.append(("qkv projection", "prepare", rows.rows, up, shape.query_rank, kind.weights, n))
    products.append(("output projection", "core", rows.rows, spec.hidden, shape.heads * shape.value, kind.weights, n))
    calls = [Call("norms and rest", "prepare", elementwise(hardware, 8 * rows.rows * spec.hidden, 1, c), n)]
    decoding = rows.beside if rows.prefill else rows
    if rows.prefill:
        seen, made = rows.batch * (rows.tokens + rows.context), shape.heads * (shape.nope + shape.value)
        products.append(("qkv projection", "prepare", seen, made, shape.latent, kind.weights, n))
        new = attention_prefill(hardware, shape.expanded, rows.batch, rows.tokens, context=rows.context, c=c)
        moved = 4 * (rows.rows * (up + latents) + seen * made)
        calls.append(Call("attention", "core", new, n))
        calls.append(Call("norms and rest", "prepare", elementwise(hardware, moved, 3, c), n))
    if decoding:
        for batch, context, tokens in _caches(decoding):
            read = mla_decode(
                hardware, batch, context, shape.heads, tokens=tokens, latent=shape.latent, rope=shape.rope,
                kv_kind=kind.kv, c=c,
            )  # fmt: skip
            calls.append(Call("attention", "core", read, n))
        calls.append(Call("attention", "core", absorb(hardware, shape, decoding.rows, shape.value, c), n))
        calls.append(Call("qkv projection", "prepare", absorb(hardware, shape, decoding.rows, shape.nope, c), n))
        moved = 4 * decoding.rows * spec.hidden / (hardware.memory_bytes_per_s * c.mla_layer.moves)
        calls.append(Call("norms and rest", "prepare", kernel_time(c.mla_layer.decode_s, 0.0, moved, 1.0), n))
    return products, calls


#: Tokens of a chunk in which a gated delta net is computed in prefill (flash-linear-attention).
CHUNK = 64


def _linear(
    spec: CompleteSpec,
    hardware: Hardware,
    linear: LinearAttention,
    tp: int,
    kind: KernelDtypes,
    rows: Rows,
    n: int,
    c: Constants,
) -> tuple[list[Product], list[Call]]:
    """Gated delta nets: the state is read and written once per decode step, or once per chunk of prefill."""
    heads, channels = -(-linear.value_heads // tp), -(-linear.channels // tp)
    values = heads * linear.value_dim
    products: list[Product] = [
        ("qkv projection", "prepare", rows.rows, channels + values + 2 * heads, spec.hidden, kind.weights, n),
        ("output projection", "core", rows.rows, spec.hidden, values, kind.weights, n),
    ]
    state = heads * linear.key_dim * linear.value_dim
    passes = rows.batch * (np.ceil(rows.tokens / CHUNK) if rows.prefill else rows.tokens)
    passes += rows.beside.rows if rows.beside else 0
    moved = passes * state * 2 * STATE_BYTES + rows.rows * (channels + values) * 4
    inside = heads * CHUNK * (linear.key_dim + linear.value_dim) if rows.prefill else 0
    operations = 2.0 * rows.rows * (2 * state + inside)
    fit = c.gemm_bf16
    core = kernel_time(
        (6 if rows.prefill else 2) * fit.launch_s,
        operations / (hardware.flops["bf16"] * fit.compute),
        moved / (hardware.memory_bytes_per_s * fit.memory),
        fit.overlap,
    )
    conv = elementwise(hardware, 4 * rows.rows * channels, 1, c)
    gate = elementwise(hardware, 6 * rows.rows * values, 1, c)
    rest = [Call("norms and rest", "core", part, n) for part in (conv, gate)]
    return products, [Call("attention", "core", core, n), *rest]


# ---------------------------------------------------------------------------------------------------------------------
# Feed-forward and head


def dense_calls(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, kind: KernelDtypes, rows: Rows, n: int, c: Constants
) -> tuple[list[Product], list[Call]]:
    """Feed-forward networks of the layers without experts."""
    return _ffn("dense ffn", "other", spec, hardware, spec.dense_width / parallel.tp, kind, rows.rows, n, c)


def shared_calls(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, kind: KernelDtypes, rows: Rows, n: int, c: Constants
) -> tuple[list[Product], list[Call]]:
    """Experts that every token passes."""
    moe = spec.moe
    if moe is None or not moe.shared:
        return [], []
    width = moe.shared * moe.shared_width / parallel.tp
    return _ffn("shared experts", "shared", spec, hardware, width, kind, rows.rows, n, c, norm=False)


def _ffn(
    name: str, stage: str, spec: CompleteSpec, hardware: Hardware, width: float, kind: KernelDtypes, rows: float,
    n: int, c: Constants, norm: bool = True,
) -> tuple[list[Product], list[Call]]:  # fmt: skip
    up = 2 if spec.gated else 1
    products: list[Product] = [
        (name, stage, rows, up * width, spec.hidden, kind.weights, n),
        (name, stage, rows, spec.hidden, width, kind.weights, n),
    ]
    calls = [Call(name, stage, elementwise(hardware, 2 * rows * width * (up + 1), 1, c), n)]
    if norm:
        calls.append(Call("norms and rest", stage, elementwise(hardware, 8 * rows * spec.hidden, 1, c), n))
    return products, calls


def router_calls(
    spec: CompleteSpec, hardware: Hardware, rows: float, n: int, c: Constants
) -> tuple[list[Product], list[Call]]:
    """Norm before the experts, router, choice of the top k, adding up with what is shared."""
    assert spec.moe is not None
    products: list[Product] = [("router", "core", rows, spec.moe.experts, spec.hidden, "bf16", n)]
    top = elementwise(hardware, 8 * rows * spec.moe.experts, 1, c)
    norm = elementwise(hardware, 8 * rows * spec.hidden, 1, c)
    added = elementwise(hardware, 6 * rows * spec.hidden, 1, c)
    rest = [Call("norms and rest", "core", norm, n), Call("norms and rest", "prepare", added, n)]
    return products, [Call("router", "core", top, n), *rest]


def head_calls(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, rows: Rows, c: Constants
) -> tuple[list[Product], list[Call]]:
    """Embedding, last norm, logits, and choosing tokens from them."""
    vocab = spec.vocab / parallel.tp
    embed = elementwise(hardware, 4 * rows.rows * spec.hidden, 1, c)
    norm = elementwise(hardware, 8 * rows.logits * spec.hidden, 1, c)
    sample = elementwise(hardware, 3 * 4 * rows.logits * spec.vocab, 3, c)
    calls = [Call("head", "other", embed, 1), Call("head", "other", norm, 1), Call("sampling", "other", sample, 1)]
    return [("head", "other", rows.logits, vocab, spec.hidden, "bf16", 1)], calls
