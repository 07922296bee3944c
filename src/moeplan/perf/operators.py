"""Time of each operator on one accelerator: a roofline, with efficiencies and overheads from `constants.json`.

A kernel cuts its work into tiles and hands them to the accelerator's units in waves. A tile takes as long as its
operations or its loads, the kernel as long as its waves or its memory traffic, and nothing is quicker than a launch.
Sizes are numbers or arrays that broadcast; so are the times. Attention is in `moeplan.perf.attention`.

Tile shapes: cuBLAS on Hopper; DeepGEMM (64 or 128 rows, columns by the fewest waves); sgl-kernel's fp8 product (64 x 64
to 128 x 128, by rows, the large ones in clusters of 2 x 1: csrc/gemm/fp8_gemm_kernel.cu, SGLang commit 04ec0bc2; where
each begins follows the fit rows). Roofline: Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.perf.constants import Constants, GemmFit, load_constants
from moeplan.perf.hardware import Hardware

__all__ = [
    "FORMATS",
    "UNITS",
    "Device",
    "Number",
    "NumberFormat",
    "Time",
    "arrays",
    "elementwise",
    "expert_gemm",
    "find_format",
    "gemm",
    "kernel_time",
    "overlap",
]

Number = float | npt.NDArray[np.float64]
#: Processing units that a kernel's tiles are assigned to: an H100's. Other accelerators are taken as so divided.
UNITS = 132
#: Kernels of this length and more run at the clock that the power limit sustains.
SUSTAINED_S = 1e-3


@dataclass(frozen=True)
class Device:
    """One accelerator as kernels see it: the figures of its datasheet, and how much of them kernels reach.

    Attributes:
        hardware: peak rates and links. constants: fitted efficiencies and overheads; default: those moeplan comes with.
    """

    hardware: Hardware
    constants: Constants = field(default_factory=load_constants)


@dataclass(frozen=True)
class Time:
    """A time and what it is made of.

    Attributes:
        seconds: float or array.
        parts: {name: seconds that this part would take alone}; parts overlap, so they add up to more than `seconds`.
    """

    seconds: Number
    parts: dict[str, Number]

    def __mul__(self, count: float) -> Time:
        """The same, `count` times one after the other."""
        return Time(self.seconds * count, {name: part * count for name, part in self.parts.items()})


@dataclass(frozen=True)
class NumberFormat:
    """How a product's numbers are kept: bytes of a weight and of an input, peak rate used, whose constants."""

    weight_bytes: float
    input_bytes: float
    rate: str
    kernel: str


#: fp8: one scale per row; fp8_block: per 128 x 128 weights (DeepSeek-V3). int4 and w8 (8-bit) weights become bf16 on
#: the way. Unmeasured ones borrow a kernel's constants.
FORMATS = {
    "bf16": NumberFormat(2, 2, "bf16", "gemm_bf16"),
    "fp8": NumberFormat(1, 1, "fp8", "gemm_fp8"),
    "fp8_block": NumberFormat(1 + 4 / 128**2, 1 + 4 / 128, "fp8", "gemm_fp8_block"),
    "int8": NumberFormat(1, 1, "int8", "gemm_fp8"),
    "int4": NumberFormat(0.5 + 2 / 128, 2, "bf16", "gemm_bf16"),
    "w8": NumberFormat(1, 2, "bf16", "gemm_bf16"),
    "fp4": NumberFormat(0.5 + 1 / 16, 0.5 + 1 / 16, "fp4", "gemm_fp8_block"),
}


def _tiles(shapes: tuple[tuple[int, int], ...], splits: tuple[int, ...] = (1,)) -> npt.NDArray[np.float64]:
    """float64 [3, tiles]: rows, columns and splits of k of each tile that a kernel may choose."""
    return np.array([(rows, columns, split) for rows, columns in shapes for split in splits], np.float64).T


_TILES = {
    "gemm_bf16": _tiles(((64, 32), (64, 64), (64, 128), (64, 256), (128, 128), (128, 256)), (1, 2, 4, 8, 16)),
    "gemm_fp8": _tiles(((128, 128),)),
    "gemm_fp8_block": _tiles(((128, 32), (128, 64), (128, 128), (128, 256))),
}


def find_format(dtype: str, hardware: Hardware) -> NumberFormat:
    """The format of a dtype that the hardware can compute with.

    Raises:
        UsageError: unknown, or without a peak rate on this hardware.
    """
    if dtype not in FORMATS:
        raise UsageError(f"dtype {dtype} is unknown", hint=f"use one of {', '.join(FORMATS)}")
    found = FORMATS[dtype]
    if found.rate not in hardware.flops:
        fits = [other for other, form in FORMATS.items() if form.rate in hardware.flops]
        raise UsageError(f"{hardware.name} does not compute in {dtype}", hint=f"use one of {', '.join(fits)}")
    return found


def gemm(device: Device, m: Number, n: Number, k: Number, dtype: str = "bf16") -> Time:
    """[m, k] inputs times [k, n] weights, bf16 results; fp8 kernels first convert the inputs from bf16."""
    hardware = device.hardware
    form = find_format(dtype, hardware)
    fit: GemmFit = getattr(device.constants, form.kernel)
    m, n, k = arrays(m, n, k)
    tiles = _TILES[form.kernel]
    rows, columns, split = tiles.reshape(3, tiles.shape[1], *(1,) * np.broadcast(m, n, k).ndim)
    if form.kernel != "gemm_bf16":
        rows = np.where(m <= 64, 64.0, rows)
    if form.kernel == "gemm_fp8":
        columns = np.where(m <= 128, 64.0, columns)
    down = np.ceil(m / rows)
    if form.kernel == "gemm_fp8":
        down = np.where(m > 128, 2 * np.ceil(down / 2), down)  # two tiles of rows make a cluster; a lone one idles
    waves = np.ceil(down * np.ceil(n / columns) * split / UNITS)
    operations = 2 * rows * columns / (hardware.flops[form.rate] / UNITS * fit.compute)
    loads = (rows * form.input_bytes + columns * form.weight_bytes) / (hardware.flops["bf16"] / UNITS * fit.feed)
    tile = (k / split + fit.fill) * np.maximum(operations, loads)
    compute = _throttled((waves * tile + fit.split_s * np.log2(split)).min(axis=0), fit)
    bandwidth = hardware.memory_bytes_per_s
    memory = (form.input_bytes * m * k + form.weight_bytes * n * k + 2 * m * n) / (bandwidth * fit.memory)
    convert = (2 + 2 * form.input_bytes) * m * k / (bandwidth * fit.quantise) if form.input_bytes < 2 else 0.0
    return kernel_time(fit.launch_s, compute, memory, fit.overlap, convert)


def _throttled(compute: Number, fit: GemmFit) -> Number:
    """Long products run slower by the power limit."""
    return compute * (1 + fit.throttle * compute / (compute + SUSTAINED_S))


def expert_gemm(
    device: Device,
    picks: Number,
    experts: Number,
    hidden: Number,
    inter: Number,
    dtype: str = "fp8_block",
    *,
    kernel: str = "deepgemm",
) -> Time:
    """The routed experts of one rank in one layer: gate, up and down products, gated activation, adding up.

    Args:
        picks: (token, pick) pairs that this rank serves; the busiest rank decides a step.
        experts: distinct experts among them, whose weights are read.
        hidden, inter: widths of an expert.
        kernel: `deepgemm` (the masked grouped product of decode), `contiguous` (that of prefill: not measured by
            itself, it takes the dense product's operation rate), or `cutlass` (TensorRT-LLM's, with its permutations).

    Raises:
        UsageError: unknown kernel or dtype.
    """
    if kernel not in ("deepgemm", "contiguous", "cutlass"):
        raise UsageError(f"expert kernel {kernel} is unknown", hint="use deepgemm, contiguous or cutlass")
    hardware, constants = device.hardware, device.constants
    form = find_format(dtype, hardware)
    fit = constants.experts_cutlass if kernel == "cutlass" else constants.experts_deepgemm
    picks, experts, hidden, inter = arrays(picks, experts, hidden, inter)
    weights, rate = 3 * hidden * inter, hardware.flops[form.rate]
    if kernel == "contiguous":  # two grouped products of long blocks, at the rate of a dense one with its power limit
        dense = constants.gemm_fp8_block
        rows = picks + experts * BLOCK_ROWS / 2
        work = 2 * rows * (2 * inter * (hidden + dense.fill) + hidden * (inter + dense.fill))
        compute = _throttled(work / (rate * dense.compute), dense)
    else:
        compute = 2 * (picks + experts * fit.rows) * weights / (rate * fit.compute)
    memory = experts * weights * form.weight_bytes / (hardware.memory_bytes_per_s * fit.memory)
    moved = picks * (hidden * (4 + 2 * form.input_bytes) + inter * (6 + 2 * form.input_bytes))
    moves = moved / (hardware.memory_bytes_per_s * fit.moves)
    return kernel_time(fit.launch_s, compute, memory, fit.overlap, moves)


#: Rows that an expert's block in DeepGEMM's contiguous layout is a multiple of.
BLOCK_ROWS = 128


def elementwise(device: Device, moved_bytes: Number, kernels: Number = 1) -> Time:
    """Norms, activations, residuals, rotations: bytes read and written, by `kernels` launches."""
    constants = device.constants
    memory = np.asarray(moved_bytes, np.float64) / (device.hardware.memory_bytes_per_s * constants.mla_layer.moves)
    return kernel_time(np.asarray(kernels, np.float64) * constants.gemm_bf16.launch_s, 0.0, memory, 1.0)


def arrays(*values: Number) -> tuple[npt.NDArray[np.float64], ...]:
    """As float64 arrays."""
    return tuple(np.asarray(value, np.float64) for value in values)


def overlap(a: Number, b: Number, sharp: float) -> Number:
    """The `sharp`-norm of two times: between their sum (1) and the longer one (infinity)."""
    longer, shorter = np.maximum(a, b), np.minimum(a, b)
    ratio = np.divide(shorter, longer, out=np.zeros_like(longer), where=longer > 0)
    return np.asarray(longer * (1 + ratio**sharp) ** (1 / sharp), np.float64)


def kernel_time(launch: Number, compute: Number, memory: Number, sharp: float, before: Number = 0.0) -> Time:
    """A kernel that overlaps compute and memory, and `before` it a conversion that is memory traffic, too."""
    seconds = launch + before + overlap(compute, memory, sharp)
    parts: dict[str, Number] = {"compute": compute, "memory": memory + before, "overhead": launch}
    return Time(np.asarray(seconds, np.float64)[()], parts)
