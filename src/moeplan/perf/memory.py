"""What a model takes of each accelerator's memory: weights, KV cache, activations; what fits, and the largest batch.

How the parts are laid out over a pipeline stage of tp x dp accelerators (as SGLang, vLLM and TensorRT-LLM do):

| part | on one accelerator |
|---|---|
| attention, dense and shared feed-forward, embedding, head | 1 / tp, the same on each of the dp data-parallel ranks |
| routed experts | (E + redundant) / ep slots a layer, each 1 / moe_tp of an expert, moe_tp = tp x dp / ep |
| KV cache of a request | 1 / tp of its KV heads but never less than one; MLA's latent is whole on every rank |
| router, norms, biases, MLA's down-projections | whole |

The figures are of the stage that needs most. Bytes are decimal; nothing is rounded to pages or blocks.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.errors import PlanError, UsageError
from moeplan.model.parameters import PARTS, expert_parameters, kv_values, kv_values_per_token, layer_parameters
from moeplan.model.spec import CompleteSpec
from moeplan.perf.hardware import Hardware

__all__ = [
    "Memory",
    "MemoryModel",
    "ParallelLayout",
    "Precision",
    "activation_bytes",
    "check_parallel",
    "divisors",
    "expert_bytes",
    "kv_bytes",
    "kv_bytes_per_token",
    "weight_bytes",
]

FloatArray = npt.NDArray[np.float64]

#: Bytes per weight of a matrix, its scales included: fp8 a float32 per 128 x 128 block (README_WEIGHTS.md of
#: DeepSeek-V3), int4 a 16-bit scale per 128, fp4 (NVFP4) a byte per 16, mxfp4 a byte per 32 (OCP MX 1.0).
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128**2, "int8": 1.0, "int4": 0.5 + 2 / 128}
DTYPE_BYTES |= {"fp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32}
#: Bytes per number of the KV cache or of an activation; fp8 and int8 have one scale per tensor or head, not counted.
KV_DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5 + 1 / 16}
#: What no engine quantises: embedding, head, router, norms, biases. The state of linear attention is kept in float32.
PLAIN_BYTES, STATE_BYTES, LOGIT_BYTES = 2.0, 4.0, 4.0

#: Columns of `weight_bytes`.
WEIGHTS = ("attention", "ffn", "experts", "redundant", "vocabulary", "other")


@dataclass(frozen=True)
class Precision:
    """Dtypes, each apart.

    Attributes:
        weights: of attention, dense and shared matrices. experts: of the routed experts; None: as `weights`.
        kv, activations: of the KV cache and of what flows between operators.
    """

    weights: str = "bf16"
    experts: str | None = None
    kv: str = "bf16"
    activations: str = "bf16"

    def __post_init__(self) -> None:
        matrices = dict.fromkeys(("weights", "experts"), DTYPE_BYTES)
        for name, known in (matrices | dict.fromkeys(("kv", "activations"), KV_DTYPE_BYTES)).items():
            value = getattr(self, name)
            if value not in known and not (name == "experts" and value is None):
                raise UsageError(f'unknown dtype "{value}" for {name}', hint=f"use {', '.join(known)}")

    @classmethod
    def of_checkpoint(
        cls, spec: CompleteSpec, weights: str | None = None, experts: str | None = None, kv: str = "bf16"
    ) -> Precision:
        """The dtypes given; where none is, those of the published weights.

        Raises:
            UsageError: an unknown dtype, or none given for a model whose checkpoint is not known.
        """
        if weights is None:
            if spec.checkpoint is None:
                what = f"the configuration of {spec.name} does not tell its weights' dtype"
                raise UsageError(what, hint="give the dtype")
            weights, experts = spec.checkpoint[0], experts or spec.checkpoint[1]
        return cls(weights=weights, experts=experts, kv=kv)

    def describe(self, spec: CompleteSpec) -> str:
        """In words: "fp8 weights, bf16 KV cache"; experts only where they have another dtype."""
        own = spec.moe is not None and self.experts not in (None, self.weights)
        return f"{self.weights} weights{f', {self.experts} experts' * own}, {self.kv} KV cache"


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over accelerators.

    Attributes:
        tp: tensor-parallel ranks of attention. dp: data-parallel ranks of attention, each with its own requests.
        ep: ranks among which a layer's expert slots are divided; it divides tp x dp, and each slot is split over the
            tp x dp / ep ranks of its group. pp: pipeline stages, each of tp x dp accelerators.
        redundant: extra expert slots per layer, in total.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    redundant: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def moe_tp(self) -> int:
        return self.tp * self.dp // self.ep


@functools.lru_cache(maxsize=1024)
def check_parallel(spec: CompleteSpec, parallel: ParallelLayout) -> None:
    """Refuse a layout that cannot be, with the nearest one that can.

    Raises:
        PlanError: a count below 1; tp that does not divide heads or widths; ep that does not divide tp x dp or the
            slots; experts asked of a dense model; more stages than layers.
    """
    p, a, moe = parallel, spec.attention, spec.moe
    for name, low in {"tp": 1, "dp": 1, "ep": 1, "pp": 1, "redundant": 0}.items():
        if getattr(p, name) < low:
            raise PlanError(f"{name} is {getattr(p, name)}", hint=f"give at least {low}")
    if p.pp > spec.layers:
        raise PlanError(f"pp {p.pp} is more than the {spec.layers} layers of {spec.name}", hint="lower pp")
    linear = spec.linear.value_heads if spec.linear else a.heads
    for what, count in (("heads", a.heads), ("heads of linear attention", linear), ("dense width", spec.dense_width)):
        _divides("tp", p.tp, count, f"the {count} {what} of {spec.name}")
    if a.kv_heads % p.tp and p.tp % a.kv_heads:
        raise PlanError(f"tp {p.tp} fits not the {a.kv_heads} KV heads of {spec.name}", hint="take one that divides it")
    if moe is None:
        if p.ep > 1 or p.redundant:
            raise PlanError(f"{spec.name} has no experts", hint="leave ep at 1 and redundant at 0")
        return
    _divides("ep", p.ep, p.tp * p.dp, f"tp x dp = {p.tp * p.dp}")
    slots = moe.experts + p.redundant
    if slots % p.ep:
        near = [r for r in (slots // p.ep * p.ep - moe.experts, -(-slots // p.ep) * p.ep - moe.experts) if r >= 0]
        raise PlanError(
            f"{moe.experts} experts and {p.redundant} redundant slots do not divide over ep {p.ep}",
            hint=f"redundant {' or '.join(map(str, near))} does",
        )
    _divides("tp x dp / ep", p.moe_tp, moe.width, f"the width {moe.width} of an expert of {spec.name}")


def _divides(name: str, part: int, whole: int, what: str) -> None:
    if whole % part:
        near = [d for d in divisors(whole) if d < part][-1:] + [d for d in divisors(whole) if d > part][:1]
        raise PlanError(f"{name} {part} does not divide {what}", hint=f"{' or '.join(map(str, near))} does")


@functools.lru_cache(maxsize=512)
def divisors(count: int) -> tuple[int, ...]:
    """All divisors, rising."""
    low = [d for d in range(1, math.isqrt(count) + 1) if count % d == 0]
    return tuple(sorted({*low, *(count // d for d in low)}))


def expert_bytes(spec: CompleteSpec, dtype: str) -> float:
    """Weights of one routed expert in one layer, in bytes."""
    matrices, biases = expert_parameters(spec)
    return matrices * DTYPE_BYTES[dtype] + biases * PLAIN_BYTES


@functools.lru_cache(maxsize=4096)
def weight_bytes(
    spec: CompleteSpec, parallel: ParallelLayout, precision: Precision, *, mtp: bool = False
) -> FloatArray:
    """Weights on one accelerator of each pipeline stage.

    Args:
        mtp: the MTP layers too, on the last stage.

    Returns:
        float64 [pp, 6] bytes, read-only; columns as in `WEIGHTS`. `redundant` is what the redundant slots add to
        `experts`.
    """
    check_parallel(spec, parallel)
    rows = dict(zip(PARTS, layer_parameters(spec, parallel.tp).T, strict=True))
    wide, out = DTYPE_BYTES[precision.weights], np.zeros((parallel.pp, len(WEIGHTS)))
    slot = expert_bytes(spec, precision.experts or precision.weights) / parallel.ep / parallel.moe_tp
    embedding = spec.vocab * spec.hidden / parallel.tp * PLAIN_BYTES
    for stage, (first, last) in enumerate(_stages(spec.layers, parallel.pp)):
        last += spec.mtp_layers if mtp and last == spec.layers else 0
        part = {name: float(row[first:last].sum()) for name, row in rows.items()}
        slots = float((rows["experts"][first:last] > 0).sum()) * slot
        ends = (stage == 0) + (stage == parallel.pp - 1) * (not spec.tied or parallel.pp > 1)
        out[stage] = (
            part["attention"] * wide,
            (part["dense"] + part["shared"]) * wide,
            slots * spec.moe.experts if spec.moe else 0.0,
            slots * parallel.redundant,
            embedding * ends,
            (part["router"] + part["other"]) * PLAIN_BYTES,
        )
    out[0, -1] += spec.positions * spec.hidden * PLAIN_BYTES
    out[-1, -1] += spec.hidden * (2 if spec.norm_bias else 1) * PLAIN_BYTES
    out.setflags(write=False)
    return out


def _stages(layers: int, pp: int) -> list[tuple[int, int]]:
    """Layers [first, last) of each stage: even, the longer ones first."""
    sizes = [layers // pp + (stage < layers % pp) for stage in range(pp)]
    ends = np.cumsum(sizes).tolist()
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def kv_bytes_per_token(spec: CompleteSpec, dtype: str = "bf16", tp: int = 1) -> float:
    """KV cache that one more token takes on one of `tp` ranks, over all layers, while no window is full."""
    return kv_values_per_token(spec, tp) * KV_DTYPE_BYTES[dtype]


def kv_bytes(
    spec: CompleteSpec, context: int, dtype: str = "bf16", tp: int = 1, *, layers: tuple[int, int] | None = None
) -> float:
    """KV cache of one request with `context` tokens on one of `tp` ranks; windows bound it, linear layers keep a state.

    Args:
        layers: only those in [first, last), as a pipeline stage has them.
    """
    first, last = layers or (0, spec.layers)
    full = bisect_left(spec.full_layers, last) - bisect_left(spec.full_layers, first)
    others = last - first - full
    out = full * context * kv_values(spec, tp) * KV_DTYPE_BYTES[dtype]
    if spec.linear is not None:
        n = spec.linear
        state = -(-n.value_heads // tp) * n.key_dim * n.value_dim * STATE_BYTES
        return out + others * (state + -(-n.channels // tp) * (n.conv - 1) * PLAIN_BYTES)
    return out + others * min(context, spec.window) * kv_values(spec, tp) * KV_DTYPE_BYTES[dtype]


def activation_bytes(spec: CompleteSpec, parallel: ParallelLayout, precision: Precision) -> tuple[float, float]:
    """Workspace per token of a data-parallel rank's step, and per row of logits: (bytes, bytes).

    A stated simple formula, not a measurement: the hidden state twice (input and residual) and the widest of what one
    layer holds at a time: queries, keys, values and the heads' output; or gate, up and their product in a dense layer;
    or, in a MoE layer, for each pick served here (top_k x dp / ep a token, if even) its input, gate, up, product and
    output, and the shared experts. Logits are float32, vocab / tp wide, one row per request.
    """
    a, moe, tp = spec.attention, spec.moe, parallel.tp
    branches = 3 if spec.gated else 2
    heads, kv_heads = -(-a.heads // tp), -(-a.kv_heads // tp)
    widest = max(
        heads * (a.head_dim + a.v_head_dim) + kv_heads * (a.head_dim + a.v_head_dim), branches * spec.dense_width / tp
    )
    if moe is not None:
        picks = moe.top_k * parallel.dp / parallel.ep
        routed = picks * (2 * spec.hidden + branches * moe.width / parallel.moe_tp)
        widest = max(widest, routed + branches * moe.shared * moe.shared_width / tp)
    return (2 * spec.hidden + widest) * KV_DTYPE_BYTES[precision.activations], spec.vocab / tp * LOGIT_BYTES


@dataclass(frozen=True)
class Memory:
    """One accelerator of the stage that needs most, in bytes.

    Attributes:
        weights: by part, as in `WEIGHTS`. kv: of the batch. activations: workspace of the largest step.
        capacity: of the accelerator; usable: what of it may be used, the rest being the engine's and the driver's.
    """

    weights: dict[str, float]
    kv: float
    activations: float
    capacity: float
    usable: float

    @property
    def used(self) -> float:
        return sum(self.weights.values()) + self.kv + self.activations

    @property
    def fits(self) -> bool:
        return self.used <= self.usable


#: Share of the memory that weights, KV cache and activations may take: vLLM's default gpu_memory_utilization.
USABLE = 0.9


@dataclass(frozen=True)
class MemoryModel:
    """What a set-up takes of each accelerator's memory.

    Attributes:
        spec, hardware, parallel, precision: the set-up. mtp: with the MTP layers.
        usable: share of the memory that may be used, in (0, 1].
    """

    spec: CompleteSpec
    hardware: Hardware
    parallel: ParallelLayout
    precision: Precision
    mtp: bool = False
    usable: float = USABLE

    def need(self, batch: int, context: int, prefill_tokens: int = 0) -> Memory:
        """What a batch takes.

        Args:
            batch: requests of one data-parallel rank. context: tokens that each of them holds, prompt and answer.
            prefill_tokens: of the largest prefill step of such a rank; a step has at least `batch` tokens.

        Raises:
            PlanError: a layout that cannot be. UsageError: a count below 0, a share outside (0, 1].
        """
        limit = self._limit(batch, context, prefill_tokens)
        weights = weight_bytes(self.spec, self.parallel, self.precision, mtp=self.mtp)
        kv = batch * self._stage_kv(context)
        token, row = activation_bytes(self.spec, self.parallel, self.precision)
        worst = int(np.argmax(weights.sum(axis=1) + kv))
        return Memory(
            weights=dict(zip(WEIGHTS, (float(v) for v in weights[worst]), strict=True)),
            kv=float(kv[worst]),
            activations=token * max(batch, prefill_tokens) + row * batch,
            capacity=self.hardware.memory_bytes,
            usable=limit,
        )

    def largest_batch(self, context: int, prefill_tokens: int = 0) -> int:
        """The most requests that a data-parallel rank can hold at that context; 0 where not even one fits.

        The need is linear in the batch, with a kink where a decode step outgrows a prefill step; so it fits where both
        lines do. Arguments and errors as in `need`.
        """
        limit = self._limit(context, prefill_tokens)
        weights = weight_bytes(self.spec, self.parallel, self.precision, mtp=self.mtp).sum(axis=1)
        token, row = activation_bytes(self.spec, self.parallel, self.precision)
        request = self._stage_kv(context) + row
        beside_prefill = (limit - weights - token * prefill_tokens) / request
        decode_only = (limit - weights) / (request + token)
        return max(0, int(min(beside_prefill.min(), decode_only.min())))

    def _limit(self, *counts: int) -> float:
        if min(counts) < 0 or not 0 < self.usable <= 1:
            raise UsageError("a count below 0, or a usable share of memory outside (0, 1]", hint="correct it")
        return self.hardware.memory_bytes * self.usable

    def _stage_kv(self, context: int) -> FloatArray:
        """KV cache of one request on one accelerator of each stage: float64 [pp] bytes."""
        spec, tp, dtype = self.spec, self.parallel.tp, self.precision.kv
        stages = _stages(spec.layers, self.parallel.pp)
        out = np.array([kv_bytes(spec, context, dtype, tp, layers=stage) for stage in stages])
        out[-1] += spec.mtp_layers * self.mtp * context * kv_values(spec, tp) * KV_DTYPE_BYTES[dtype]
        return out
