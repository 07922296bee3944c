"""Time of attention on one accelerator: prefill, chunked prefill and decode; multi-head, grouped and latent.

As FlashAttention-3 works on Hopper: a tile of prefill has 128 rows, one of decode 64, and the query heads of a
key-value head share tiles. Latent attention (MLA): DeepSeek-V3 (arXiv 2412.19437, section 2.1.1), absorbed in decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.perf.constants import Constants, Decode, Prefill, constants
from moeplan.perf.hardware import Hardware
from moeplan.perf.operators import DTYPES, UNITS, Number, Time, arrays, dtype, gemm, kernel_time, overlap, total

__all__ = [
    "Heads", "MlaShape", "absorb", "attention_decode", "attention_prefill", "mla_decode", "mla_layer_decode",
    "mla_layer_prefill",
]  # fmt: skip

#: Keys and values up to this many bytes stay in the L2 cache from one call to the next (80 % of an H100's 50 MB).
CACHED_BYTES = 40e6


@dataclass(frozen=True)
class Heads:
    """Multi-head or grouped attention of one layer, on one accelerator; numbers, or arrays that broadcast.

    Attributes:
        heads, kv_heads: that this accelerator holds.
        head_dim, value_dim: width of query and key, and of value (None: the same).
        window: keys that a query sees at most; 0 for all.
    """

    heads: Number
    kv_heads: Number
    head_dim: Number
    value_dim: Number | None = None
    window: Number = 0

    def arrays(self) -> tuple[npt.NDArray[np.float64], ...]:
        """(heads, kv_heads, head_dim, value_dim, window) as float64 arrays."""
        values = self.head_dim if self.value_dim is None else self.value_dim
        return arrays(self.heads, self.kv_heads, self.head_dim, values, self.window)


def attention_prefill(
    hardware: Hardware, shape: Heads, batch: Number, tokens: Number, *, context: Number = 0, kind: str = "bf16",
    c: Constants | None = None,
) -> Time:  # fmt: skip
    """Causal attention of `tokens` new tokens per request, after `context` earlier ones (chunked prefill).

    Args:
        kind: bf16 or fp8.
    """
    fit: Prefill = getattr(c or constants(), f"prefill_{kind}")
    rate, size = (hardware.flops[dtype(kind, hardware).rate], DTYPES[kind].input_bytes)
    batch, tokens, context = arrays(batch, tokens, context)
    heads, kv_heads, head_dim, values, window = shape.arrays()
    seen = np.where(window > 0, window, np.inf)
    tiles = np.ceil(tokens * heads / kv_heads / 128)  # the query heads of a key-value head share tiles
    rows = tiles * 128
    span = np.maximum(128 * kv_heads / heads, 1)  # tokens in a tile
    keys = _causal_pairs(tokens, context, seen) / tokens + np.minimum((span + 128) / 2, seen)  # whole blocks of keys
    pair = (2 * (head_dim + values) / (rate * fit.compute) + fit.softmax / hardware.flops["bf16"]) * UNITS
    work = batch * kv_heads * rows * keys * pair / UNITS
    longest = 128 * np.minimum(context + tokens, seen + 128) * pair
    compute = np.maximum(work, longest) + np.ceil(batch * kv_heads * tiles / UNITS) * fit.tile_s
    moved = batch * tokens * heads * (head_dim + values) + batch * (tokens + context) * kv_heads * (head_dim + values)
    memory = size * moved / (hardware.memory_bytes_per_s * fit.memory)
    return kernel_time(_launches(fit.launch_s, head_dim, values), compute, memory, fit.overlap)


def _launches(launch_s: float, head_dim: Number, values: Number) -> Number:
    """Keys and values of unlike width are copied to one by a kernel more."""
    return np.where(np.equal(head_dim, values), 1.0, 2.0) * launch_s


def _causal_pairs(tokens: Number, context: Number, seen: Number) -> Number:
    """(query, key) pairs: token i sees min(context + i, seen) keys."""
    reach = np.clip(seen - context, 0, tokens)  # tokens that see all there is
    growing = reach * context + reach * reach / 2
    return np.asarray(growing + (tokens - reach) * np.where(np.isinf(seen), 0, seen), np.float64)


def attention_decode(
    hardware: Hardware, shape: Heads, batch: Number, context: Number, *, tokens: Number = 1, kv_kind: str = "bf16",
    warm: bool = False, c: Constants | None = None,
) -> Time:  # fmt: skip
    """Attention of `tokens` new tokens per request (more than one when speculating) over `context` cached ones.

    Args:
        kv_kind: bf16 or fp8 keys and values.
        warm: keys and values up to 40 MB are still in the L2 cache, as when a kernel is timed over and over; in a real
            step the other layers have pushed them out.
    """
    fit: Decode = getattr(c or constants(), f"decode_{kv_kind}")
    batch, context, tokens = arrays(batch, context, tokens)
    heads, kv_heads, head_dim, values, window = shape.arrays()
    keys = np.where(window > 0, np.minimum(context, window), context)
    group = np.ceil(heads / kv_heads * tokens / 64)
    width = head_dim + values
    launches = _launches(fit.launch_s, head_dim, values)
    tiles, read, moved = batch * kv_heads * group, batch * keys * kv_heads * width, 2 * batch * tokens * heads * width
    return _decode(hardware, fit, launches, tiles, keys, read, width, moved, kv_kind, warm)


def mla_decode(
    hardware: Hardware, batch: Number, context: Number, heads: Number, *, tokens: Number = 1, latent: int = 512,
    rope: int = 64, kv_kind: str = "bf16", warm: bool = False, c: Constants | None = None,
) -> Time:  # fmt: skip
    """Multi-head latent attention in its absorbed form: all heads share one latent of `latent` + `rope` values a token.

    fp8 latents are converted to bf16 first, as SGLang 0.5.14 does on Hopper.
    """
    fit = (c or constants()).mla_decode
    batch, context, heads, tokens = arrays(batch, context, heads, tokens)
    group = np.ceil(heads * tokens / 64)
    read = batch * context * (latent + rope)
    moved = 2 * batch * tokens * heads * (2 * latent + rope)
    return _decode(
        hardware, fit, fit.launch_s, batch * group, context, read, 2 * latent + rope, moved, kv_kind, warm, mla=True
    )


def _decode(
    hardware: Hardware, fit: Decode, launches: Number, tiles: Number, keys: Number, values: Number, width: Number,
    moved: Number, kv_kind: str, warm: bool, mla: bool = False,
) -> Time:  # fmt: skip
    """Tiles of 64 rows over `keys` each; `values` cached numbers are read, once; `moved` bytes of q and output."""
    size, bandwidth = DTYPES[kv_kind].input_bytes, hardware.memory_bytes_per_s
    converted = size < 2 and mla
    convert = fit.convert_s + values * (size + 2) / (bandwidth * fit.convert) if converted else 0.0
    held = values * (2 if converted else size)
    speed = np.where(warm & (held <= CACHED_BYTES), fit.cache, 1.0)
    memory = (held / speed + moved) / (bandwidth * fit.memory)
    operations = 2 * 64 * tiles * keys * width / (hardware.flops["bf16"] * fit.compute)
    waves = np.ceil(tiles / UNITS)
    split = np.where((tiles < UNITS) & (keys > 128), fit.split_s, 0.0)
    return kernel_time(launches + split, operations + waves * fit.tile_s, memory, fit.overlap, convert)


@dataclass(frozen=True)
class MlaShape:
    """Widths of multi-head latent attention; DeepSeek-V3's by default (its config.json)."""

    hidden: int = 7168
    heads: int = 128
    query_rank: int = 1536
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def expanded(self) -> Heads:
        """As prefill computes it: keys and values made from the latents, one of each for every head."""
        return Heads(self.heads, self.heads, self.nope + self.rope, self.value)


def mla_layer_decode(
    hardware: Hardware, shape: MlaShape, batch: Number, context: Number, *, tokens: Number = 1, kind: str = "bf16",
    kv_kind: str = "bf16", down: bool = True, warm: bool = False, c: Constants | None = None,
) -> Time:  # fmt: skip
    """A decode attention block on an accelerator that holds shape.heads heads: projections, absorption, attention.

    Args:
        down: with the projection down to latents (the measured blocks of SGLang begin after it).
    """
    c = c or constants()
    batch, tokens = arrays(batch, tokens)
    rows = batch * tokens
    core = mla_decode(
        hardware, batch, context, shape.heads, tokens=tokens, latent=shape.latent, rope=shape.rope, kv_kind=kv_kind,
        warm=warm, c=c,
    )  # fmt: skip
    return total(
        *_projections(hardware, shape, rows, kind, down, c),
        absorb(hardware, shape, rows, shape.nope, c),
        core,
        absorb(hardware, shape, rows, shape.value, c),
        _rest(hardware, rows * shape.hidden, c, c.mla_layer.decode_s),
    )


def mla_layer_prefill(
    hardware: Hardware, shape: MlaShape, batch: Number, tokens: Number, *, context: Number = 0, kind: str = "bf16",
    down: bool = True, graph: bool = False, c: Constants | None = None,
) -> Time:  # fmt: skip
    """A prefill attention block: projections, keys and values from latents, attention of `nope` + `rope` wide keys.

    Without a CUDA graph the block takes at least the host's time to launch it. `down` as in `mla_layer_decode`.
    """
    c = c or constants()
    batch, tokens, context = arrays(batch, tokens, context)
    rows, all_rows = batch * tokens, batch * (tokens + context)
    made = shape.heads * (shape.nope + shape.value)
    time = total(
        *_projections(hardware, shape, rows, kind, down, c),
        gemm(hardware, all_rows, made, shape.latent, kind, c),
        attention_prefill(hardware, shape.expanded, batch, tokens, context=context, c=c),
        _rest(hardware, rows * shape.hidden + all_rows * made, c, 0.0),
    )
    if graph:
        return time
    host = c.mla_layer.host_s + batch * c.mla_layer.host_request_s
    return Time(overlap(time.seconds, host, 8.0), {**time.parts, "host": np.zeros_like(time.seconds) + host})


def _projections(hardware: Hardware, shape: MlaShape, rows: Number, kind: str, down: bool, c: Constants) -> list[Time]:
    """Down to latents, up to queries, and out."""
    latents = [gemm(hardware, rows, shape.query_rank + shape.latent + shape.rope, shape.hidden, kind, c)]
    return [
        *(latents if down else []),
        gemm(hardware, rows, shape.heads * (shape.nope + shape.rope), shape.query_rank, kind, c),
        gemm(hardware, rows, shape.hidden, shape.heads * shape.value, kind, c),
    ]


def absorb(hardware: Hardware, shape: MlaShape, rows: Number, width: int, c: Constants) -> Time:
    """One product per head between its own width and the latent, bf16, heads side by side."""
    fit = c.gemm_bf16
    tiles = np.ceil(rows / 64) * np.ceil(shape.latent / 128) * shape.heads
    compute = np.ceil(tiles / UNITS) * 2 * 64 * 128 * width * UNITS / (hardware.flops["bf16"] * fit.compute)
    moved = 2 * shape.heads * (width * shape.latent + rows * (width + shape.latent))
    return kernel_time(fit.launch_s, compute, moved / (hardware.memory_bytes_per_s * fit.memory), fit.overlap)


def _rest(hardware: Hardware, values: Number, c: Constants, fixed: float) -> Time:
    """Norms, rotation and copies: bf16 values read once and written once."""
    return kernel_time(fixed, 0.0, 4 * values / (hardware.memory_bytes_per_s * c.mla_layer.moves), 1.0)
