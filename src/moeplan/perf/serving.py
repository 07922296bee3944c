"""Time to first token, time per output token and throughput, from steps: aggregated and disaggregated serving.

Aggregated: the same accelerators prefill and decode. In the steady state of B requests at a time, each of `output`
tokens, B prompts are prefilled while B requests decode, so that a token waits for (B - 1) / output prefills of others.
With mixed steps (vLLM, TensorRT-LLM; Sarathi-Serve, arXiv 2403.02310) a prompt's chunk shares a step with the decoding
requests and costs what it adds to it; without (SGLang), a step of its own.

Disaggregated: workers of either kind, each with its own layout; the keys and values move once (DistServe, arXiv
2401.09670).

Speculation: a step verifies `drafts` + 1 tokens and yields `accepted` of them (arXiv 2211.17192); its distinct experts
are those of the larger step. Beams share their prompt's cache; each has its own of what it wrote, and a step copies the
last block of each beam's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.model.spec import ModelSpec
from moeplan.perf.collectives import send
from moeplan.perf.constants import Constants
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import Memory, Parallel, Precision, kv_bytes, largest_batch, memory
from moeplan.perf.operators import Number, elementwise
from moeplan.perf.routing import Routing
from moeplan.perf.step import Operator, Step, decode_step, prefill_step

__all__ = [
    "CHUNK",
    "Layout",
    "Load",
    "Serving",
    "aggregated",
    "cost",
    "disaggregated",
    "holds",
    "prefill_seconds",
    "used",
]

#: Tokens of a prefill chunk, engines' usual default.
CHUNK = 8192
#: Tokens of a cache block (vLLM's default): what a beam copies when it branches.
BLOCK = 16


@dataclass(frozen=True)
class Layout:
    """A set-up that serves: model, accelerators, how the one is spread over the other, and how steps run.

    Attributes as in `moeplan.perf.step.decode_step`; `redundant` slots are in `parallel`.
    """

    spec: ModelSpec
    hardware: Hardware
    parallel: Parallel
    precision: Precision
    mode: Dispatch | None = None
    overlap: bool = False
    gpus_per_node: int | None = None
    balanced: bool = False
    skew: float = 1.0
    c: Constants | None = None

    def decode(self, batch: float, context: float, load: Load | None = None, routing: Routing | None = None) -> Step:
        """A decode step of `batch` requests of a data-parallel rank, each with `context` tokens."""
        load = load or Load(1, 1)
        step = decode_step(
            self.spec, self.hardware, self.parallel, self.precision, batch * load.beams, context, routing=routing,
            mode=self.mode, overlap=self.overlap, tokens=load.drafts + 1, drafts=load.drafts if load.module else 0,
            beams=load.beams, prefix=min(load.prompt, context), gpus_per_node=self.gpus_per_node,
            balanced=self.balanced, skew=self.skew, c=self.c,
        )  # fmt: skip
        return step if load.beams == 1 else self._reordered(step, batch * load.beams)

    def prefill(
        self, batch: float, tokens: float, context: float = 0.0, *, decoding: tuple[float, float] = (0, 0),
        routing: Routing | None = None,
    ) -> Step:  # fmt: skip
        """A prefill step of `tokens` tokens of each of `batch` prompts, after `context` earlier ones."""
        return prefill_step(
            self.spec, self.hardware, self.parallel, self.precision, batch, tokens, context=context, routing=routing,
            mode=self.mode if self.mode is not Dispatch.PICK else None, overlap=self.overlap,
            gpus_per_node=self.gpus_per_node, balanced=self.balanced, skew=self.skew, decoding=decoding, c=self.c,
        )  # fmt: skip

    def _reordered(self, step: Step, sequences: float) -> Step:
        """With the copy of each beam's last block, read and written."""
        block = kv_bytes(self.spec, BLOCK, self.precision.kv, self.parallel.tp)
        time = elementwise(self.hardware, 2 * sequences * block, 1, self.c)
        return replace(step, operators=(*step.operators, Operator("beam reorder", time.seconds, 0.0, time.parts)))


@dataclass(frozen=True)
class Load:
    """What a request asks for.

    Attributes:
        prompt, output: tokens. beams: sequences kept per request.
        drafts: tokens drafted per step; accepted: tokens that a step yields, 1 to drafts + 1 (the acceptance length).
        module: the model's own multi-token module makes the drafts, and takes its time; else they cost nothing.
    """

    prompt: int
    output: int
    beams: int = 1
    drafts: int = 0
    accepted: float = 1.0
    module: bool = True

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1 or self.beams < 1 or self.drafts < 0:
            raise UsageError("prompt, output and beams must be at least 1, drafts at least 0", hint="correct them")
        if not 1 <= self.accepted <= self.drafts + 1:
            raise UsageError(
                f"a step with {self.drafts} drafts cannot yield {self.accepted:g} tokens",
                hint=f"give an acceptance length of 1 to {self.drafts + 1}",
            )

    @property
    def context(self) -> float:
        """Tokens of a request, mean over its decode."""
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Serving:
    """What a set-up gives in the steady state.

    Attributes:
        ttft_s, tpot_s: seconds to the first token, and per token after it.
        output_per_s, total_per_s: tokens per second and accelerator, of answers, and with prompts.
        gpus: accelerators of all workers. running: requests of a data-parallel rank that decode at a time: those asked
            for, or as many as the memory holds. decode: its step.
        prefill_share: of the time, on the accelerators that decode.
    """

    ttft_s: float
    tpot_s: float
    output_per_s: float
    total_per_s: float
    gpus: int
    running: float
    decode: Step
    prefill_share: float


def prefill_seconds(
    layout: Layout, prompt: int, *, chunk: int = CHUNK, decoding: tuple[float, float] = (0, 0)
) -> float:
    """One prompt, chunk after chunk; beside decoding requests, only what it adds to their steps."""
    total, done = 0.0, 0
    alone = _seconds(layout.decode(*decoding).seconds) if decoding[0] else 0.0
    while done < prompt:
        tokens = min(chunk, prompt - done)
        total += max(_seconds(layout.prefill(1, tokens, done, decoding=decoding).seconds) - alone, 0.0)
        done += tokens
    return total


def aggregated(
    layout: Layout, load: Load, concurrency: float, *, mixed: bool = True, chunk: int = CHUNK, usable: float = 0.9
) -> Serving:
    """Prefill and decode on the same accelerators.

    Args:
        concurrency: requests at a time, of one data-parallel rank. mixed: chunks share steps with decoding requests.

    Raises:
        UsageError: not even one request fits the memory.
    """
    running = min(concurrency, _holds(layout, load, chunk, usable))
    step = layout.decode(running, load.context, load)
    token = _seconds(step.seconds) / load.accepted
    alone = prefill_seconds(layout, load.prompt, chunk=chunk)
    beside = (running * load.beams, load.context) if mixed and running >= 1 else (0.0, 0.0)
    added = min(prefill_seconds(layout, load.prompt, chunk=chunk, decoding=beside), alone) if mixed else alone
    tpot = token + (running - 1) / load.output * added if running > 1 else token
    life = alone + load.output * tpot  # of a request that finds a place at once
    waiting = max(concurrency / running - 1, 0.0) * life
    ttft = alone + waiting + _seconds(step.seconds) / 2
    rate = running * layout.parallel.dp / life / layout.parallel.gpus
    share = min(running * alone / life, 1.0)
    return Serving(
        ttft, tpot, rate * load.output, rate * (load.output + load.prompt), layout.parallel.gpus, running, step, share
    )  # fmt: skip


def disaggregated(
    prefill: Layout, decode: Layout, load: Load, concurrency: float, *, prefill_workers: int = 1,
    decode_workers: int = 1, chunk: int = CHUNK, usable: float = 0.9,
) -> Serving:  # fmt: skip
    """Prefill and decode on workers of their own.

    Args:
        concurrency: requests that decode at a time, of one data-parallel rank of a decode worker.

    Raises:
        UsageError: not even one request fits the memory.
    """
    running = min(concurrency, _holds(decode, load, 0, usable))
    step = decode.decode(running, load.context, load)
    tpot = _seconds(step.seconds) / load.accepted
    alone = prefill_seconds(prefill, load.prompt, chunk=chunk)
    cache = kv_bytes(prefill.spec, load.prompt, prefill.precision.kv, 1) / prefill.parallel.tp
    moved = _seconds(send(prefill.hardware, cache, c=prefill.c).seconds)
    wanted = running * decode.parallel.dp * decode_workers / (load.output * tpot)
    most = prefill.parallel.dp * prefill_workers / alone
    rate, busy = min(wanted, most), min(wanted / most, 1.0)
    queue = busy * alone / (2 * max(1 - busy, 0.05)) / max(prefill.parallel.dp * prefill_workers, 1)  # M/D/1, capped
    gpus = prefill.parallel.gpus * prefill_workers + decode.parallel.gpus * decode_workers
    return Serving(
        alone + moved + queue + tpot, tpot, rate * load.output / gpus, rate * (load.output + load.prompt) / gpus, gpus,
        running, step, 0.0,
    )  # fmt: skip


def cost(
    hardware: Hardware, per_gpu_s: float, *, usd_per_hour: float | None = None, watts: float | None = None
) -> tuple[float, float]:
    """(USD, kWh) per million tokens, at `per_gpu_s` tokens per second and accelerator.

    The accelerator's own price and board power, at full power all the time: an upper bound on energy, less the host.
    """
    hours = 1e6 / per_gpu_s / 3600
    price = hardware.usd_per_hour if usd_per_hour is None else usd_per_hour
    return hours * price, hours * (hardware.watts if watts is None else watts) / 1000


def holds(layout: Layout, load: Load, *, chunk: int = CHUNK, usable: float = 0.9) -> int:
    """Requests that a data-parallel rank's memory holds; of beams, the prompt once and each answer. 0: not even one."""
    return largest_batch(
        layout.spec, layout.hardware, layout.parallel, layout.precision, context=_held(load),
        prefill_tokens=min(chunk, load.prompt), usable=usable, mtp=load.drafts > 0 and load.module,
    )  # fmt: skip


def used(layout: Layout, load: Load, each: int) -> Memory:
    """What `each` requests of a data-parallel rank take, counted as `holds` counts."""
    return memory(
        layout.spec, layout.hardware, layout.parallel, layout.precision, batch=each, context=_held(load),
        prefill_tokens=min(CHUNK, load.prompt), mtp=load.drafts > 0 and load.module,
    )  # fmt: skip


def _held(load: Load) -> int:
    """Cached tokens of a request, mean over its decode."""
    return round(load.prompt + load.beams * load.output / 2)


def _holds(layout: Layout, load: Load, chunk: int, usable: float) -> int:
    """`holds`, at least 1."""
    most = holds(layout, load, chunk=chunk, usable=usable)
    if most < 1:
        p = layout.parallel
        raise UsageError(
            f"{layout.spec.name} with one request of {_held(load)} tokens does not fit {layout.hardware.name} at tp "
            f"{p.tp}, dp {p.dp}, ep {p.ep}, pp {p.pp}",
            hint="use more accelerators, or smaller dtypes",
        )
    return most


def _seconds(value: Number) -> float:
    return float(np.mean(value))
