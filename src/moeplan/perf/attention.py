"""Time of attention on one accelerator: prefill, chunked prefill and decode; multi-head, grouped and latent.

As FlashAttention-3 works on Hopper: a tile of prefill has 128 rows, one of decode 64, and the query heads of a
key-value head share tiles. Latent attention (MLA): DeepSeek-V3 (arXiv 2412.19437, section 2.1.1), absorbed in decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.perf.constants import DecodeFit, PrefillFit
from moeplan.perf.operators import FORMATS, UNITS, Device, Number, Time, arrays, find_format, kernel_time

__all__ = ["Heads", "MlaShape", "absorb", "attention_decode", "attention_prefill"]

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

    @property
    def absorbed(self) -> Heads:
        """As decode computes it: all heads share one latent, `latent` + `rope` wide, which holds keys and values."""
        return Heads(self.heads, 1, self.latent + self.rope, self.latent)


def attention_prefill(
    device: Device, shape: Heads, batch: Number, tokens: Number, *, context: Number = 0, dtype: str = "bf16"
) -> Time:
    """Causal attention of `tokens` new tokens per request, after `context` earlier ones (chunked prefill).

    Args:
        dtype: bf16 or fp8.
    """
    hardware = device.hardware
    fit: PrefillFit = getattr(device.constants, f"prefill_{dtype}")
    rate, size = hardware.flops[find_format(dtype, hardware).rate], FORMATS[dtype].input_bytes
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
    device: Device,
    shape: Heads | MlaShape,
    batch: Number,
    context: Number,
    *,
    tokens: Number = 1,
    kv_dtype: str = "bf16",
    warm: bool = False,
) -> Time:
    """Attention of `tokens` new tokens per request (more than one when speculating) over `context` cached ones.

    Latent attention is absorbed, and converts fp8 latents to bf16 first, as SGLang 0.5.14 does on Hopper.

    Args:
        kv_dtype: bf16 or fp8 keys and values.
        warm: keys and values up to 40 MB are still in the L2 cache, as when a kernel is timed over and over; in a real
            step the other layers have pushed them out.
    """
    latent = isinstance(shape, MlaShape)
    fit: DecodeFit = getattr(device.constants, "mla_decode" if latent else f"decode_{kv_dtype}")
    size, bandwidth = FORMATS[kv_dtype].input_bytes, device.hardware.memory_bytes_per_s
    batch, context, tokens = arrays(batch, context, tokens)
    heads, kv_heads, head_dim, values, window = (shape.absorbed if isinstance(shape, MlaShape) else shape).arrays()
    width = head_dim + values
    keys = np.where(window > 0, np.minimum(context, window), context)
    tiles = batch * kv_heads * np.ceil(heads / kv_heads * tokens / 64)  # of 64 rows
    cached = batch * keys * kv_heads * (head_dim if latent else width)  # numbers that are read, once
    moved = 2 * batch * tokens * heads * width  # queries and outputs
    converted = latent and size < 2
    convert = fit.convert_s + cached * (size + 2) / (bandwidth * fit.convert) if converted else 0.0
    held = cached * (2 if converted else size)
    speed = np.where(warm & (held <= CACHED_BYTES), fit.cache, 1.0)
    memory = (held / speed + moved) / (bandwidth * fit.memory)
    operations = 2 * 64 * tiles * keys * width / (device.hardware.flops["bf16"] * fit.compute)
    compute = operations + np.ceil(tiles / UNITS) * fit.tile_s
    launch = fit.launch_s if latent else _launches(fit.launch_s, head_dim, values)
    split = np.where((tiles < UNITS) & (keys > 128), fit.split_s, 0.0)
    return kernel_time(launch + split, compute, memory, fit.overlap, convert)


def absorb(device: Device, shape: MlaShape, rows: Number, width: int) -> Time:
    """One product per head between its own width and the latent, bf16, heads side by side."""
    fit, hardware = device.constants.gemm_bf16, device.hardware
    tiles = np.ceil(rows / 64) * np.ceil(shape.latent / 128) * shape.heads
    compute = np.ceil(tiles / UNITS) * 2 * 64 * 128 * width * UNITS / (hardware.flops["bf16"] * fit.compute)
    moved = 2 * shape.heads * (width * shape.latent + rows * (width + shape.latent))
    return kernel_time(fit.launch_s, compute, moved / (hardware.memory_bytes_per_s * fit.memory), fit.overlap)
