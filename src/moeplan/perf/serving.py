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

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplan.errors import UsageError
from moeplan.perf.collectives import send
from moeplan.perf.hardware import Hardware
from moeplan.perf.memory import USABLE, Memory, MemoryModel, kv_bytes
from moeplan.perf.operators import Number
from moeplan.perf.step import Step
from moeplan.perf.step_model import StepModel, Workload

__all__ = ["CHUNK", "ServingFigures", "aggregated", "cost", "disaggregated", "holds", "prefill_seconds", "used"]

#: Tokens of a prefill chunk, engines' usual default.
CHUNK = 8192


@dataclass(frozen=True)
class ServingFigures:
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
    model: StepModel, prompt: int, *, chunk: int = CHUNK, decoding: tuple[float, float] = (0, 0)
) -> float:
    """One prompt, chunk after chunk; beside decoding requests, only what it adds to their steps."""
    total, done = 0.0, 0
    alone = _seconds(model.decode(*decoding).seconds) if decoding[0] else 0.0
    while done < prompt:
        tokens = min(chunk, prompt - done)
        total += max(_seconds(model.prefill(1, tokens, done, decoding=decoding).seconds) - alone, 0.0)
        done += tokens
    return total


def aggregated(
    model: StepModel,
    workload: Workload,
    concurrency: float,
    *,
    mixed: bool = True,
    chunk: int = CHUNK,
    usable: float = USABLE,
) -> ServingFigures:
    """Prefill and decode on the same accelerators.

    Args:
        concurrency: requests at a time, of one data-parallel rank. mixed: chunks share steps with decoding requests.

    Raises:
        UsageError: not even one request fits the memory.
    """
    running = min(concurrency, _holds(model, workload, chunk, usable))
    step = model.decode(running, workload.context, workload)
    token = _seconds(step.seconds) / workload.accepted
    alone = prefill_seconds(model, workload.prompt, chunk=chunk)
    beside = (running * workload.beams, workload.context) if mixed and running >= 1 else (0.0, 0.0)
    added = min(prefill_seconds(model, workload.prompt, chunk=chunk, decoding=beside), alone) if mixed else alone
    tpot = token + (running - 1) / workload.output * added if running > 1 else token
    life = alone + workload.output * tpot  # of a request that finds a place at once
    waiting = max(concurrency / running - 1, 0.0) * life
    ttft = alone + waiting + _seconds(step.seconds) / 2
    rate = running * model.parallel.dp / life / model.parallel.gpus
    share = min(running * alone / life, 1.0)
    output, total = rate * workload.output, rate * (workload.output + workload.prompt)
    return ServingFigures(ttft, tpot, output, total, model.parallel.gpus, running, step, share)


def disaggregated(
    prefill: StepModel,
    decode: StepModel,
    workload: Workload,
    concurrency: float,
    *,
    prefill_workers: int = 1,
    decode_workers: int = 1,
    chunk: int = CHUNK,
    usable: float = USABLE,
) -> ServingFigures:
    """Prefill and decode on workers of their own.

    Args:
        concurrency: requests that decode at a time, of one data-parallel rank of a decode worker.

    Raises:
        UsageError: not even one request fits the memory.
    """
    running = min(concurrency, _holds(decode, workload, 0, usable))
    step = decode.decode(running, workload.context, workload)
    tpot = _seconds(step.seconds) / workload.accepted
    alone = prefill_seconds(prefill, workload.prompt, chunk=chunk)
    cache = kv_bytes(prefill.spec, workload.prompt, prefill.precision.kv, 1) / prefill.parallel.tp
    moved = _seconds(send(prefill.device, cache).seconds)
    wanted = running * decode.parallel.dp * decode_workers / (workload.output * tpot)
    most = prefill.parallel.dp * prefill_workers / alone
    rate, busy = min(wanted, most), min(wanted / most, 1.0)
    queue = busy * alone / (2 * max(1 - busy, 0.05)) / max(prefill.parallel.dp * prefill_workers, 1)  # M/D/1, capped
    gpus = prefill.parallel.gpus * prefill_workers + decode.parallel.gpus * decode_workers
    output, total = rate * workload.output / gpus, rate * (workload.output + workload.prompt) / gpus
    return ServingFigures(alone + moved + queue + tpot, tpot, output, total, gpus, running, step, 0.0)


class Cost(NamedTuple):
    """USD and kWh of a million tokens."""

    usd: float
    kwh: float


def cost(hardware: Hardware, per_gpu_s: float) -> Cost:
    """Of a million tokens, at `per_gpu_s` tokens per second and accelerator.

    The accelerator's own price and board power, at full power all the time: an upper bound on energy, less the host.
    """
    hours = 1e6 / per_gpu_s / 3600
    return Cost(hours * hardware.usd_per_hour, hours * hardware.watts / 1000)


def holds(model: StepModel, workload: Workload, *, chunk: int = CHUNK, usable: float = USABLE) -> int:
    """Requests that a data-parallel rank's memory holds; of beams, the prompt once and each answer. 0: not even one."""
    return _memory(model, workload, usable).largest_batch(_held(workload), min(chunk, workload.prompt))


def used(model: StepModel, workload: Workload, batch: int) -> Memory:
    """What `batch` requests of a data-parallel rank take, counted as `holds` counts."""
    return _memory(model, workload, USABLE).need(batch, _held(workload), min(CHUNK, workload.prompt))


def _memory(model: StepModel, workload: Workload, usable: float) -> MemoryModel:
    return MemoryModel(model.spec, model.hardware, model.parallel, model.precision, workload.mtp, usable)


def _held(workload: Workload) -> int:
    """Cached tokens of a request, mean over its decode."""
    return round(workload.prompt + workload.beams * workload.output / 2)


def _holds(model: StepModel, workload: Workload, chunk: int, usable: float) -> int:
    """`holds`, at least 1."""
    most = holds(model, workload, chunk=chunk, usable=usable)
    if most < 1:
        p = model.parallel
        raise UsageError(
            f"{model.spec.name} with one request of {_held(workload)} tokens does not fit {model.hardware.name} at tp "
            f"{p.tp}, dp {p.dp}, ep {p.ep}, pp {p.pp}",
            hint="use more accelerators, or smaller dtypes",
        )
    return most


def _seconds(value: Number) -> float:
    return float(np.mean(value))
