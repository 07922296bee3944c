"""The operators of one step, layer by layer, on one accelerator of the slowest rank: what `moeplan.perf.step` adds up.

Each operator is a `Call`: a name, the stage of the layer in which it runs (two-batch overlap hides communication behind
stages), the time of one call, and how many calls a step makes. All matrix products of one dtype are timed at once.

Stages of a MoE layer, in order: `prepare` (norm, projections to queries, keys, values), `core` (attention, projection
out, router), `dispatch`, `shared`, `experts`, `combine`. `other`: what is no part of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moeplan.model.spec import LinearAttention
from moeplan.perf.attention import Heads, MlaShape, absorb, attention_decode, attention_prefill
from moeplan.perf.context import StepContext
from moeplan.perf.memory import STATE_BYTES
from moeplan.perf.operators import Number, Time, elementwise, gemm, kernel_time

__all__ = ["Batch", "Call", "LayerCalls"]

#: Tokens of a chunk in which a gated delta net is computed in prefill (flash-linear-attention).
CHUNK = 64


class Product(NamedTuple):
    """Matrix products of [m, k] inputs and [k, n] weights, shape (m, n, k); `times` of them in a step."""

    name: str
    stage: str
    shape: tuple[float, float, float]
    times: float


class Call(NamedTuple):
    """One operator: calls of `time` each, in a stage of the layer; `times` of them in a step."""

    name: str
    stage: str
    time: Time
    times: float


@dataclass(frozen=True)
class Batch:
    """What one accelerator's data-parallel rank works on in a step.

    Attributes:
        sequences: each with its own keys and values. tokens: new tokens of each. context: tokens that each has before
            them. sharing: how many sequences share one cache of the first `prefix` tokens (beams); else 1 and 0.
        logits: rows of logits that the step makes. decoding: sequences that decode beside a prefill.
    """

    sequences: float
    tokens: float
    context: float
    logits: float
    sharing: int = 1
    prefix: float = 0.0
    decoding: Batch | None = None

    @property
    def rows(self) -> float:
        """Tokens of the step: what matrix products see."""
        return self.sequences * self.tokens + (self.decoding.rows if self.decoding else 0.0)

    def part(self, count: int, prefill: bool) -> Batch:
        """One of `count` equal parts; of a single prompt, its tokens are parted."""
        if count == 1:
            return self
        decoding = self.decoding.part(count, False) if self.decoding else None
        logits = self.logits / count
        if prefill and self.sequences < count:
            before = self.context + self.tokens * (count - 1) / count / 2
            return replace(self, tokens=self.tokens / count, context=before, logits=logits, decoding=decoding)
        return replace(self, sequences=self.sequences / count, logits=logits, decoding=decoding)

    def caches(self) -> list[tuple[float, float, float]]:
        """(sequences, cached tokens, new tokens) of each read: beams read their prefix once, then their own."""
        if self.sharing <= 1:
            return [(self.sequences, self.context + self.tokens, self.tokens)]
        own = max(self.context - self.prefix, 0.0) + self.tokens
        shared = (self.sequences / self.sharing, self.prefix, self.tokens * self.sharing)
        return [shared, (self.sequences, own, self.tokens)]


class LayerCalls:
    """The calls of one step, all but the routed experts and what travels.

    Args:
        context: the phase of the step model. batch: what a rank works on.
    """

    def __init__(self, context: StepContext, batch: Batch) -> None:
        self.context, self.batch, self.decoding = context, batch, batch.decoding if context.prefill else batch
        self.spec, self.device, self.tp = context.spec, context.device, context.parallel.tp
        self.weights, self.rows = context.dtypes.weights, batch.rows
        self.products: defaultdict[str, list[Product]] = defaultdict(list)  # by dtype
        self.others: list[Call] = []

    def calls(self) -> list[Call]:
        """Of all layers, the embedding and the head."""
        spec, moe_layers = self.spec, self.context.moe_layers
        self._attention()
        if spec.layers > moe_layers:
            self._ffn("dense ffn", "other", spec.dense_width / self.tp, spec.layers - moe_layers)
            self._moves("norms and rest", "other", 8 * self.rows * spec.hidden, 1, spec.layers - moe_layers)
        if spec.moe is not None and moe_layers:
            self._router(self.rows / (self.tp if self.context.dispatch else 1), moe_layers)
            if spec.moe.shared:  # experts that every token passes
                self._ffn("shared experts", "shared", spec.moe.shared * spec.moe.shared_width / self.tp, moe_layers)
        self._head()
        return [*self._timed(), *self.others]

    def _product(self, name: str, stage: str, shape: tuple[float, float, float], count: float, dtype: str = "") -> None:
        self.products[dtype or self.weights].append(Product(name, stage, shape, count))

    def _call(self, name: str, stage: str, time: Time, count: float) -> None:
        self.others.append(Call(name, stage, time, count))

    def _moves(self, name: str, stage: str, moved_bytes: Number, kernels: int, count: float) -> None:
        """Kernels that read and write, and compute next to nothing."""
        self._call(name, stage, elementwise(self.device, moved_bytes, kernels), count)

    def _timed(self) -> Iterable[Call]:
        """The matrix products, each dtype's at once."""
        for dtype, group in self.products.items():
            m, n, k = np.array([product.shape for product in group], np.float64).T
            time = gemm(self.device, m, n, k, dtype)
            seconds = np.asarray(time.seconds)
            parts = {name: np.broadcast_to(part, seconds.shape) for name, part in time.parts.items()}
            for i, p in enumerate(group):
                one = Time(float(seconds[i]), {name: float(part[i]) for name, part in parts.items()})
                yield Call(p.name, p.stage, one, p.times)

    # Attention

    def _attention(self) -> None:
        """Attention blocks of all layers: with full attention, and with a window or linear attention."""
        spec, a, tp, rows = self.spec, self.spec.attention, self.tp, self.rows
        if a.kind == "mla":
            self._mla(spec.layers)
            return
        full = len(spec.full_layers)
        other = spec.layers - full
        heads, kv_heads = -(-a.heads // tp), -(-a.kv_heads // tp)
        windowed = 0 if spec.linear else other
        queries = heads * a.head_dim * (2 if a.output_gate else 1)
        made, count = queries + kv_heads * (a.head_dim + a.v_head_dim), full + windowed
        self._product("qkv projection", "prepare", (rows, made, spec.hidden), count)
        self._product("output projection", "core", (rows, spec.hidden, heads * a.v_head_dim), count)
        for layers, window in ((full, 0), (windowed, spec.window)):
            if layers:
                self._attend(Heads(heads, kv_heads, a.head_dim, a.v_head_dim, window), layers)
        # rotation with the norms of queries and keys, then the write to the cache
        self._moves("norms and rest", "prepare", 4 * rows * made, 2, count)
        if spec.linear and other:
            self._linear(spec.linear, other)
        self._moves("norms and rest", "prepare", 8 * rows * spec.hidden, 1, spec.layers)

    def _attend(self, shape: Heads | MlaShape, count: int) -> None:
        """Attention of the prompts, if there are any, and of the sequences that decode."""
        batch, device = self.batch, self.device
        if self.context.prefill:
            heads = shape.expanded if isinstance(shape, MlaShape) else shape
            new = attention_prefill(device, heads, batch.sequences, batch.tokens, context=batch.context)
            self._call("attention", "core", new, count)
        for sequences, held, tokens in self.decoding.caches() if self.decoding else ():
            read = attention_decode(device, shape, sequences, held, tokens=tokens, kv_dtype=self.context.dtypes.kv)
            self._call("attention", "core", read, count)

    def _mla(self, count: int) -> None:
        a, hidden, rows, batch, device = self.spec.attention, self.spec.hidden, self.rows, self.batch, self.device
        heads = -(-a.heads // self.tp)
        shape = MlaShape(
            hidden, heads, a.q_lora_rank, a.kv_lora_rank, a.qk_rope_head_dim, a.qk_nope_head_dim, a.v_head_dim
        )
        up, latents = heads * (shape.nope + shape.rope), shape.latent + shape.rope
        self._product("qkv projection", "prepare", (rows, latents + (shape.query_rank or up), hidden), count)
        if shape.query_rank:
            self._product("qkv projection", "prepare", (rows, up, shape.query_rank), count)
        self._product("output projection", "core", (rows, hidden, heads * shape.value), count)
        self._moves("norms and rest", "prepare", 8 * rows * hidden, 1, count)
        if self.context.prefill:
            seen, made = batch.sequences * (batch.tokens + batch.context), heads * (shape.nope + shape.value)
            self._product("qkv projection", "prepare", (seen, made, shape.latent), count)
            self._moves("norms and rest", "prepare", 4 * (rows * (up + latents) + seen * made), 3, count)
        self._attend(shape, count)
        if self.decoding:  # in the absorbed form
            decoded, fit = self.decoding.rows, device.constants.mla_layer
            self._call("attention", "core", absorb(device, shape, decoded, shape.value), count)
            self._call("qkv projection", "prepare", absorb(device, shape, decoded, shape.nope), count)
            moved = 4 * decoded * hidden / (device.hardware.memory_bytes_per_s * fit.moves)
            self._call("norms and rest", "prepare", kernel_time(fit.decode_s, 0.0, moved, 1.0), count)

    def _linear(self, linear: LinearAttention, count: int) -> None:
        """Gated delta nets: the state is read and written once per decode step, or once per chunk of prefill."""
        batch, rows, prefill, hidden = self.batch, self.rows, self.context.prefill, self.spec.hidden
        heads, channels = -(-linear.value_heads // self.tp), -(-linear.channels // self.tp)
        values = heads * linear.value_dim
        self._product("qkv projection", "prepare", (rows, channels + values + 2 * heads, hidden), count)
        self._product("output projection", "core", (rows, hidden, values), count)
        state = heads * linear.key_dim * linear.value_dim
        passes = batch.sequences * (np.ceil(batch.tokens / CHUNK) if prefill else batch.tokens)
        passes += batch.decoding.rows if batch.decoding else 0
        moved = passes * state * 2 * STATE_BYTES + rows * (channels + values) * 4
        inside = heads * CHUNK * (linear.key_dim + linear.value_dim) if prefill else 0
        operations = 2.0 * rows * (2 * state + inside)
        fit, hardware = self.device.constants.gemm_bf16, self.device.hardware
        core = kernel_time(
            (6 if prefill else 2) * fit.launch_s,
            operations / (hardware.flops["bf16"] * fit.compute),
            moved / (hardware.memory_bytes_per_s * fit.memory),
            fit.overlap,
        )
        self._call("attention", "core", core, count)
        for width in (4 * rows * channels, 6 * rows * values):  # convolution, gate
            self._moves("norms and rest", "core", width, 1, count)

    # Feed-forward and head

    def _ffn(self, name: str, stage: str, width: float, count: int) -> None:
        up, hidden = 2 if self.spec.gated else 1, self.spec.hidden
        self._product(name, stage, (self.rows, up * width, hidden), count)
        self._product(name, stage, (self.rows, hidden, width), count)
        self._moves(name, stage, 2 * self.rows * width * (up + 1), 1, count)

    def _router(self, rows: float, count: int) -> None:
        """Norm before the experts, router, choice of the top k, adding up with what is shared."""
        assert self.spec.moe is not None
        experts, hidden = self.spec.moe.experts, self.spec.hidden
        self._product("router", "core", (rows, experts, hidden), count, "bf16")
        self._moves("router", "core", 8 * rows * experts, 1, count)
        self._moves("norms and rest", "core", 8 * rows * hidden, 1, count)
        self._moves("norms and rest", "prepare", 6 * rows * hidden, 1, count)

    def _head(self) -> None:
        """Embedding, last norm, logits, and choosing tokens from them."""
        spec, logits = self.spec, self.batch.logits
        self._product("head", "other", (logits, spec.vocab / self.tp, spec.hidden), 1, "bf16")
        self._moves("head", "other", 4 * self.rows * spec.hidden, 1, 1)
        self._moves("head", "other", 8 * logits * spec.hidden, 1, 1)
        self._moves("sampling", "other", 3 * 4 * logits * spec.vocab, 3, 1)
