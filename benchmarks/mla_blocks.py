"""Whole attention blocks of DeepSeek's latent attention, as SGLang's were measured: for `time_tables`."""

from __future__ import annotations

import numpy as np

from moeplan.perf.attention import MlaShape, absorb, attention_decode, attention_prefill
from moeplan.perf.operators import Device, Number, Time, arrays, gemm, kernel_time, overlap


def mla_layer_decode(
    device: Device, shape: MlaShape, batch: Number, context: Number, *, dtype: str = "bf16", down: bool = True,
    warm: bool = False,
) -> Time:  # fmt: skip
    """A decode attention block on an accelerator that holds shape.heads heads: projections, absorption, attention.

    Args:
        down: with the projection down to latents (the measured blocks of SGLang begin after it).
    """
    rows = np.asarray(batch, np.float64)
    return total(
        *_projections(device, shape, rows, dtype, down),
        absorb(device, shape, rows, shape.nope),
        attention_decode(device, shape, batch, context, warm=warm),
        absorb(device, shape, rows, shape.value),
        _rest(device, rows * shape.hidden, device.constants.mla_layer.decode_s),
    )


def mla_layer_prefill(
    device: Device, shape: MlaShape, batch: Number, tokens: Number, *, context: Number = 0, dtype: str = "bf16",
    down: bool = True, graph: bool = False,
) -> Time:  # fmt: skip
    """A prefill attention block: projections, keys and values from latents, attention of `nope` + `rope` wide keys.

    Without a CUDA graph the block takes at least the host's time to launch it. `down` as in `mla_layer_decode`.
    """
    batch, tokens, context = arrays(batch, tokens, context)
    rows, all_rows = batch * tokens, batch * (tokens + context)
    made, fit = shape.heads * (shape.nope + shape.value), device.constants.mla_layer
    time = total(
        *_projections(device, shape, rows, dtype, down),
        gemm(device, all_rows, made, shape.latent, dtype),
        attention_prefill(device, shape.expanded, batch, tokens, context=context),
        _rest(device, rows * shape.hidden + all_rows * made, 0.0),
    )
    if graph:
        return time
    host = fit.host_s + batch * fit.host_request_s
    return Time(overlap(time.seconds, host, 8.0), {**time.parts, "host": np.zeros_like(time.seconds) + host})


def _projections(device: Device, shape: MlaShape, rows: Number, dtype: str, down: bool) -> list[Time]:
    """Down to latents, up to queries, and out."""
    latents = [gemm(device, rows, shape.query_rank + shape.latent + shape.rope, shape.hidden, dtype)]
    return [
        *(latents if down else []),
        gemm(device, rows, shape.heads * (shape.nope + shape.rope), shape.query_rank, dtype),
        gemm(device, rows, shape.hidden, shape.heads * shape.value, dtype),
    ]


def _rest(device: Device, values: Number, fixed: float) -> Time:
    """Norms, rotation and copies: bf16 values read once and written once."""
    bandwidth = device.hardware.memory_bytes_per_s * device.constants.mla_layer.moves
    return kernel_time(fixed, 0.0, 4 * values / bandwidth, 1.0)


def total(*times: Time) -> Time:
    """One after the other."""
    parts: dict[str, Number] = {}
    for time in times:
        for name, part in time.parts.items():
            parts[name] = parts.get(name, 0.0) + part
    seconds: Number = 0.0
    for time in times:
        seconds = seconds + time.seconds
    return Time(seconds, parts)
