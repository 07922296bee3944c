"""Time of each operator on one accelerator: a roofline, with efficiencies and overheads from `constants.json`.

A kernel cuts its work into tiles and hands them to the accelerator's units in waves. A tile takes as long as its
operations or its loads, the kernel as long as its waves or its memory traffic, and nothing is quicker than a launch.
Sizes are numbers or arrays that broadcast; so are the times. Attention is in `moeplan.perf.attention`.

Tile shapes: cuBLAS on Hopper; DeepGEMM (64 or 128 rows, columns by the fewest waves); sgl-kernel's fp8 product (64 x 64
to 128 x 128, by rows, the large ones in clusters of 2 x 1: csrc/gemm/fp8_gemm_kernel.cu, SGLang commit 04ec0bc2; where
each begins follows the fit rows). Roofline: Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.errors import UsageError
from moeplan.perf.constants import Constants, Gemm, constants
from moeplan.perf.hardware import Hardware

__all__ = [
    "DTYPES",
    "UNITS",
    "Dtype",
    "Number",
    "Time",
    "arrays",
    "dtype",
    "elementwise",
    "expert_gemm",
    "gemm",
    "kernel_time",
    "overlap",
    "total",
]

Number = float | npt.NDArray[np.float64]
#: Processing units that a kernel's tiles are dealt to: an H100's. Other accelerators are taken as so divided.
UNITS = 132
#: Kernels of this length and more run at the clock that the power limit sustains.
SUSTAINED_S = 1e-3


@dataclass(frozen=True)
class Time:
    """A time and what it is made of.

    Attributes:
        seconds: float or array.
        parts: {name: seconds that this part would take alone}; parts overlap, so they add up to more than `seconds`.
    """

    seconds: Number
    parts: dict[str, Number]

    @property
    def bound(self) -> str | npt.NDArray[np.str_]:
        """The part that takes longest alone."""
        names = list(self.parts)
        longest = np.argmax(np.stack(np.broadcast_arrays(*self.parts.values())), axis=0)
        if longest.ndim == 0:
            return names[int(longest)]
        named: npt.NDArray[np.str_] = np.array(names)[longest]
        return named

    def __mul__(self, count: float) -> Time:
        """The same, `count` times one after the other."""
        return Time(self.seconds * count, {name: part * count for name, part in self.parts.items()})


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


@dataclass(frozen=True)
class Dtype:
    """How a product's numbers are kept: bytes of a weight and of an input, peak rate used, whose constants."""

    weight_bytes: float
    input_bytes: float
    rate: str
    kernel: str


#: fp8: one scale per row; fp8_block: per 128 x 128 weights (DeepSeek-V3). int4 and w8 (8-bit) weights become bf16 on
#: the way. Unmeasured ones borrow a kernel's constants.
DTYPES = {
    "bf16": Dtype(2, 2, "bf16", "gemm_bf16"),
    "fp8": Dtype(1, 1, "fp8", "gemm_fp8"),
    "fp8_block": Dtype(1 + 4 / 128**2, 1 + 4 / 128, "fp8", "gemm_fp8_block"),
    "int8": Dtype(1, 1, "int8", "gemm_fp8"),
    "int4": Dtype(0.5 + 2 / 128, 2, "bf16", "gemm_bf16"),
    "w8": Dtype(1, 2, "bf16", "gemm_bf16"),
    "fp4": Dtype(0.5 + 1 / 16, 0.5 + 1 / 16, "fp4", "gemm_fp8_block"),
}
_FEWEST_WAVES = ((128, 32), (128, 64), (128, 128), (128, 256))
_CUBLAS = ((64, 32), (64, 64), (64, 128), (64, 256), (128, 128), (128, 256))
_TILES = {"gemm_bf16": _CUBLAS, "gemm_fp8": ((128, 128),), "gemm_fp8_block": _FEWEST_WAVES}


def dtype(name: str, hardware: Hardware) -> Dtype:
    """A dtype that the hardware can compute with.

    Raises:
        UsageError: unknown, or without a peak rate on this hardware.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    found = DTYPES[name]
    if found.rate not in hardware.flops:
        fits = [other for other, kind in DTYPES.items() if kind.rate in hardware.flops]
        raise UsageError(f"{hardware.name} does not compute in {name}", hint=f"use one of {', '.join(fits)}")
    return found


def gemm(hardware: Hardware, m: Number, n: Number, k: Number, kind: str = "bf16", c: Constants | None = None) -> Time:
    """[m, k] inputs times [k, n] weights, bf16 results; fp8 kernels first convert the inputs from bf16."""
    form = dtype(kind, hardware)
    fit: Gemm = getattr(c or constants(), form.kernel)
    m, n, k = arrays(m, n, k)
    tiles = _TILES[form.kernel]
    splits = (1, 2, 4, 8, 16) if form.kernel == "gemm_bf16" else (1,)
    shape = (len(tiles) * len(splits),) + (1,) * np.broadcast(m, n, k).ndim
    rows, columns, split = np.array([(r, c, s) for r, c in tiles for s in splits], np.float64).T.reshape(3, *shape)
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
    compute = (waves * tile + fit.split_s * np.log2(split)).min(axis=0)
    compute = compute * (1 + fit.throttle * compute / (compute + SUSTAINED_S))
    bandwidth = hardware.memory_bytes_per_s
    memory = (form.input_bytes * m * k + form.weight_bytes * n * k + 2 * m * n) / (bandwidth * fit.memory)
    convert = (2 + 2 * form.input_bytes) * m * k / (bandwidth * fit.quantise) if form.input_bytes < 2 else 0.0
    return kernel_time(fit.launch_s, compute, memory, fit.overlap, convert)


def expert_gemm(
    hardware: Hardware,
    picks: Number,
    experts: Number,
    hidden: Number,
    inter: Number,
    kind: str = "fp8_block",
    *,
    kernel: str = "deepgemm",
    c: Constants | None = None,
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
    form, c = dtype(kind, hardware), c or constants()
    fit = c.experts_cutlass if kernel == "cutlass" else c.experts_deepgemm
    picks, experts, hidden, inter = arrays(picks, experts, hidden, inter)
    weights = 3 * hidden * inter
    if kernel == "contiguous":
        compute = _contiguous(hardware, form, picks, experts, hidden, inter, c.gemm_fp8_block)
    else:
        compute = 2 * (picks + experts * fit.rows) * weights / (hardware.flops[form.rate] * fit.compute)
    memory = experts * weights * form.weight_bytes / (hardware.memory_bytes_per_s * fit.memory)
    moved = picks * (hidden * (4 + 2 * form.input_bytes) + inter * (6 + 2 * form.input_bytes))
    moves = moved / (hardware.memory_bytes_per_s * fit.moves)
    return kernel_time(fit.launch_s, compute, memory, fit.overlap, moves)


#: Rows that an expert's block in DeepGEMM's contiguous layout is a multiple of.
BLOCK_ROWS = 128


def _contiguous(
    hardware: Hardware, form: Dtype, picks: Number, experts: Number, hidden: Number, inter: Number, fit: Gemm
) -> Number:
    """Operations of two grouped products of long blocks, at the rate of a dense product with its power limit."""
    rows = picks + experts * BLOCK_ROWS / 2
    work = 2 * rows * (2 * inter * (hidden + fit.fill) + hidden * (inter + fit.fill))
    compute = work / (hardware.flops[form.rate] * fit.compute)
    return compute * (1 + fit.throttle * compute / (compute + SUSTAINED_S))


def elementwise(hardware: Hardware, moved_bytes: Number, kernels: Number = 1, c: Constants | None = None) -> Time:
    """Norms, activations, residuals, rotations: bytes read and written, by `kernels` launches."""
    c = c or constants()
    memory = np.asarray(moved_bytes, np.float64) / (hardware.memory_bytes_per_s * c.mla_layer.moves)
    return kernel_time(np.asarray(kernels, np.float64) * c.gemm_bf16.launch_s, 0.0, memory, 1.0)


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
