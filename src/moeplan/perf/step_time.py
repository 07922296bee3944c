"""The time of one step, added up from its layers, experts and collectives, and from what an engine adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moeplan.errors import UsageError
from moeplan.perf.collectives import all_reduce, send
from moeplan.perf.context import StepContext
from moeplan.perf.experts import MoeTimes, slowdown
from moeplan.perf.layers import Batch, Call, LayerCalls
from moeplan.perf.operators import Number, overlap
from moeplan.perf.routing import ExpertRanks, Routing, uniform_routing
from moeplan.perf.step import Operator, Step, exposed_seconds

__all__ = ["step_time"]

#: The host schedules the next step while the accelerator works: the longer of the two decides.
HOST_OVERLAP = 8.0
#: How a breakdown is read: along a layer, then what is once a step.
ORDER = [
    *("qkv projection", "attention", "output projection", "router", "dispatch", "shared experts", "experts", "combine"),
    *("dense ffn", "tp all-reduce", "norms and rest", "head", "sampling", "drafts", "send", "pipeline", "engine"),
]
NETWORK = ("tp all-reduce", "dispatch", "combine", "send")


def step_time(context: StepContext, batch: Batch, routing: Routing | None = None, *, engine: bool = True) -> Step:
    """One part of the batch (a pipeline's micro-batch, or half of it) through all layers, then what all parts take.

    Args:
        routing: what the routing of the whole batch did; None: uniform. engine: with what an engine adds.

    Raises:
        UsageError: too few tokens to halve; routing of another number of layers.
    """
    micro = max(1, min(context.parallel.pp, int(batch.sequences)))
    if context.options.overlap and batch.rows < 2 * micro:
        raise UsageError("two-batch overlap needs at least two tokens to halve", hint="leave it out")
    part = batch.part(micro, context.prefill).part(context.halves, context.prefill)
    if context.spec.moe is not None:
        routing = _uniform(context, part) if routing is None else routing.part(1 / micro / context.halves)
    calls = LayerCalls(context, part).calls()
    longer = slowdown(context)
    if longer != 1:
        calls = [call._replace(time=call.time * longer) for call in calls]
    operators = _merged(calls, context.halves)
    if context.dispatch is None and context.spec.moe is not None:
        operators = [_beside_experts(operator) for operator in operators]
    operators += _all_reduces(context, part)
    waiting: Number = 0.0
    if routing is not None:
        moe = MoeTimes.of(context, part, routing)
        operators += moe.operators(_stage_seconds(context, calls))
        waiting = context.halves * moe.wait
    operators += _sends(context, part, micro, operators)
    if engine:
        operators.append(_engine(context, batch, operators))
    waiting = sum((operator.exposed for operator in operators if operator.name in NETWORK), start=waiting)
    operators.sort(key=lambda operator: ORDER.index(operator.name))
    source, load = (None, 1.0) if routing is None else (routing.source, routing.load_ratio)
    return Step(tuple(operators), waiting, batch.rows, context.dispatch, source, load)


def _uniform(context: StepContext, part: Batch) -> Routing:
    assert context.spec.moe is not None
    parallel, options = context.parallel, context.options
    return uniform_routing(
        context.spec.moe,
        part.rows * parallel.dp,
        ExpertRanks(parallel.ep, context.nodes, parallel.redundant, context.dispatch),
        own_tokens=part.rows / parallel.tp,
        balanced=options.balanced,
        skew=options.skew,
    )


def _merged(calls: Sequence[Call], times: int) -> list[Operator]:
    """Calls of one name as one operator, in order of appearance."""
    seconds: dict[str, Number] = {}
    parts: dict[str, dict[str, Number]] = {}
    for call in calls:
        count = call.times * times
        seconds[call.name] = seconds.get(call.name, 0.0) + call.time.seconds * count
        mine = parts.setdefault(call.name, {})
        for name, part in call.time.parts.items():
            mine[name] = mine.get(name, 0.0) + part * count
    return [Operator(name, value, 0.0, parts[name]) for name, value in seconds.items()]


def _stage_seconds(context: StepContext, calls: Sequence[Call]) -> dict[str, float]:
    """Seconds of each stage in one layer: the mean over layers, or over those that have it."""
    out = {"prepare": 0.0, "core": 0.0, "shared": 0.0}
    for call in calls:
        if call.stage in out:
            layers = context.moe_layers if call.stage == "shared" else context.spec.layers
            out[call.stage] += float(call.time.seconds) * call.times / max(layers, 1)
    return out


def _beside_experts(operator: Operator) -> Operator:
    """Where tokens do not travel, shared experts run as one more expert of the grouped product (SGLang), or on a stream
    of their own (TensorRT-LLM, vLLM): only their operations, or their reads, still take time."""
    if operator.name != "shared experts":
        return operator
    work = np.maximum(operator.parts["compute"], operator.parts["memory"])
    return replace(operator, hidden=np.maximum(operator.seconds - work, 0.0))


def _all_reduces(context: StepContext, part: Batch) -> list[Operator]:
    """Of tensor parallelism: two a layer; where tokens travel, a reduce-scatter and an all-gather, which together are
    one."""
    spec, tp, moe = context.spec, context.parallel.tp, context.moe_layers
    if tp == 1:
        return []
    one = all_reduce(context.device, part.rows * spec.hidden * 2, tp)
    count = 2 * (spec.layers - moe) + moe * (1 if context.dispatch else 2) + 1
    return _merged([Call("tp all-reduce", "other", one, count)], context.halves)


def _sends(context: StepContext, part: Batch, micro: int, operators: Sequence[Operator]) -> list[Operator]:
    """Between pipeline stages, and what the slowest stage adds.

    Decode: a token waits until the slowest stage has served all micro-batches. Prefill: all micro-batches must leave.
    """
    parallel, spec = context.parallel, context.spec
    if parallel.pp == 1:
        return []
    between = parallel.tp * parallel.dp >= context.gpus_per_node
    hop = send(context.device, part.rows * context.halves * spec.hidden * 2, between_nodes=between)
    sends = _merged([Call("send", "other", hop, parallel.pp - 1)], 1)
    ends = ("head", "sampling")
    body = exposed_seconds(o for o in operators if o.name not in ends)
    tail = exposed_seconds(o for o in operators if o.name in ends)
    slowest = body * -(-spec.layers // parallel.pp) / spec.layers + tail
    idle = micro * slowest - (body + tail + sends[0].exposed)
    more = (micro - 1) * slowest if context.prefill else np.maximum(idle, 0.0)
    return [*sends, Operator("pipeline", more, 0.0, {"slowest stage": more})]


def _engine(context: StepContext, batch: Batch, operators: Sequence[Operator]) -> Operator:
    """What the engine adds: between steps, and where the host's work for all requests outlasts the kernels."""
    fit = context.device.constants.engine
    kernels = exposed_seconds(operators)
    host = 0.0 if context.prefill else batch.sequences * fit.request_s
    longer = overlap(kernels, host, HOST_OVERLAP) - kernels
    return Operator("engine", longer + fit.step_s, 0.0, {"overhead": longer + fit.step_s})
