"""Time of one step, decode or prefill: operators of the slowest rank, communication, what hides behind what, and waits.

    step = sum over operators of (seconds - hidden)

holds exactly. In each MoE layer all ranks wait for the slowest: dispatch for the busiest link, experts for the busiest
GPU, combine for the busiest link again.

Two-batch overlap runs two halves of the batch one after the other, so that messages of one half travel while the other
computes. Which messages hide behind which stage is SGLang's order (`batch_overlap/operations_strategy.py`, commit
0e02cef9, after DeepSeek's profile-data):

| | dispatch hides behind | combine hides behind |
|---|---|---|
| decode | shared experts, the other half's projections | the other half's attention |
| prefill, first half | attention and shared experts of the other | experts of the other, shared experts |
| prefill, second half | experts of the other | attention of the other, both halves' shared experts |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from moeplan.cluster import Dispatch
from moeplan.errors import UsageError
from moeplan.model.spec import CompleteSpec
from moeplan.perf import layers as ops
from moeplan.perf.collectives import all_reduce, send
from moeplan.perf.constants import Constants
from moeplan.perf.experts import MoeTimes, slower
from moeplan.perf.hardware import Hardware
from moeplan.perf.layers import Call, Rows
from moeplan.perf.memory import Parallel, Precision
from moeplan.perf.operators import Number
from moeplan.perf.operators import overlap as overlapped
from moeplan.perf.routing import Routing, uniform
from moeplan.perf.setup import Operator, Setup, merged, setup_of

__all__ = ["Operator", "Step", "decode_step", "prefill_step"]

#: The host schedules the next step while the accelerator works: the longer of the two decides.
HOST_OVERLAP = 8.0
#: How a breakdown is read: along a layer, then what is once a step.
ORDER = (
    "qkv projection", "attention", "output projection", "router", "dispatch", "shared experts", "experts", "combine",
    "dense ffn", "tp all-reduce", "norms and rest", "head", "sampling", "drafts", "send", "pipeline", "engine",
)  # fmt: skip
NETWORK = ("tp all-reduce", "dispatch", "combine", "send")


@dataclass(frozen=True)
class Step:
    """A step of all data-parallel ranks. Numbers, or arrays [...] where the routing is of several steps.

    Attributes:
        operators: their exposed seconds add up to `seconds`.
        waiting: seconds that a GPU waits, on average, for the network or for the slowest rank's experts.
        rows: tokens that a data-parallel rank works on. mode: how tokens reach their experts; None: they do not travel.
        routing: where the loads are from: replay, uniform, balanced; None in a dense model.
        load_ratio: picks of the busiest GPU over the mean.
    """

    operators: tuple[Operator, ...]
    waiting: Number
    rows: float
    mode: Dispatch | None
    routing: str | None
    load_ratio: float

    @property
    def seconds(self) -> Number:
        total: Number = 0.0
        for operator in self.operators:
            total = total + operator.exposed
        return total

    @property
    def idle_share(self) -> Number:
        """Share of the step in which a GPU waits for the slowest rank or for the network."""
        return self.waiting / self.seconds

    def mean(self) -> Step:
        """One step of mean times, where the routing is of several; its operators still add up."""

        def one(value: Number) -> float:
            return float(np.mean(value))

        operators = tuple(
            Operator(o.name, one(o.seconds), one(o.hidden), {name: one(part) for name, part in o.parts.items()})
            for o in self.operators
        )
        return replace(self, operators=operators, waiting=one(self.waiting))

    def exposed(self, name: str) -> Number:
        """Exposed seconds of one operator; 0 where there is none."""
        return next((operator.exposed for operator in self.operators if operator.name == name), 0.0)


def decode_step(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, precision: Precision, batch: float, context: float, *,
    routing: Routing | None = None, mode: Dispatch | None = None, overlap: bool = False, tokens: int = 1,
    drafts: int = 0, beams: int = 1, prefix: float = 0.0, gpus_per_node: int | None = None, balanced: bool = False,
    skew: float = 1.0, c: Constants | None = None,
) -> Step:  # fmt: skip
    """One decode step.

    Args:
        batch: sequences of one data-parallel rank (a GPU, where tp is 1). context: tokens each has before the step.
        routing: what the step's routing did, of the whole batch; None: uniform.
        mode: how tokens reach their experts; None: `default_mode`'s.
        overlap: two-batch overlap. tokens: new tokens per sequence (more than 1 when drafts are verified).
        drafts: draft tokens that the model's own multi-token module makes, one after the other.
        beams: sequences of `batch` that share the cache of their first `prefix` tokens.
        gpus_per_node: GPUs that the fast network joins (default: the hardware's).
        balanced: uniform routing without the chance that loads one GPU more than another; skew: see `uniform`.

    Raises:
        PlanError: a layout that cannot be. UsageError: a dtype or mode that this set-up cannot have.
    """
    rows = Rows(batch, tokens, context, False, batch * tokens, beams, prefix)
    setup = setup_of(spec, hardware, parallel, precision, mode, gpus_per_node, overlap, balanced, skew, c, False)
    step = _step(setup, rows, routing)
    if not drafts:
        return step
    if not spec.mtp_layers:
        raise UsageError(f"{spec.name} has no module for multi-token prediction", hint="leave drafts out")
    module = replace(setup, spec=_draft_module(spec), overlap=False, parallel=replace(parallel, pp=1))
    one = _step(module, replace(rows, tokens=1, logits=batch), None, engine=False)
    parts: dict[str, Number] = {}
    for operator in one.operators:
        parts[operator.bound] = parts.get(operator.bound, 0.0) + drafts * operator.exposed
    draft = Operator("drafts", drafts * one.seconds, 0.0, parts)
    return replace(step, operators=(*step.operators, draft), waiting=step.waiting + drafts * one.waiting)


def prefill_step(
    spec: CompleteSpec, hardware: Hardware, parallel: Parallel, precision: Precision, batch: float, tokens: float, *,
    context: float = 0.0, routing: Routing | None = None, mode: Dispatch | None = None, overlap: bool = False,
    gpus_per_node: int | None = None, balanced: bool = False, skew: float = 1.0, decoding: tuple[float, float] = (0, 0),
    c: Constants | None = None,
) -> Step:  # fmt: skip
    """One prefill step: `tokens` new tokens of each of `batch` prompts of a data-parallel rank, after `context` others.

    Args:
        decoding: (sequences, context of each) that decode one token in the same step: a mixed step.

    Other arguments and errors as in `decode_step`.
    """
    beside = Rows(decoding[0], 1, decoding[1], False, decoding[0]) if decoding[0] else None
    rows = Rows(batch, tokens, context, True, batch + decoding[0], beside=beside)
    setup = setup_of(spec, hardware, parallel, precision, mode, gpus_per_node, overlap, balanced, skew, c, True)
    return _step(setup, rows, routing)


@functools.lru_cache(maxsize=64)
def _draft_module(spec: CompleteSpec) -> CompleteSpec:
    """One layer like the last, with a head."""
    moe = replace(spec.moe, layers=(0,)) if spec.moe else None
    return replace(spec, layers=1, full_layers=(0,), moe=moe, mtp_layers=0)


def _step(s: Setup, rows: Rows, routing: Routing | None, *, engine: bool = True) -> Step:
    """One part of the batch (a pipeline's micro-batch, or half of it) through all layers, then what all parts take."""
    micro = max(1, min(s.parallel.pp, int(rows.batch)))
    halves = 2 if s.overlap else 1
    if s.overlap and rows.rows < 2 * micro:
        raise UsageError("two-batch overlap needs at least two tokens to halve", hint="leave it out")
    part = _part(_part(rows, micro), halves)
    if s.spec.moe is not None:
        routing = _uniform(s, part) if routing is None else routing.part(1 / micro / halves)
    calls = _compute(s, part)
    moe = None if routing is None else MoeTimes.of(s, part, routing)
    operators = merged(calls, halves)
    if s.mode is None and s.spec.moe is not None:
        operators = [_beside_experts(operator) for operator in operators]
    operators += _collectives(s, part, halves)
    waiting: Number = 0.0
    if moe is not None:
        operators += moe.operators(s, _stage_seconds(s, calls), halves)
        waiting = halves * moe.wait
    operators += _sends(s, part, micro * halves, operators, rows.prefill)
    if engine:
        operators += _engine(s, rows, operators)
    for operator in operators:
        if operator.name in NETWORK:
            waiting = waiting + operator.exposed
    operators.sort(key=lambda operator: ORDER.index(operator.name))
    source, load = (None, 1.0) if routing is None else (routing.source, routing.load_ratio)
    return Step(tuple(operators), waiting, rows.rows, s.mode, source, load)


def _part(rows: Rows, count: int) -> Rows:
    """One of `count` equal parts; of a single prompt, its tokens are parted."""
    if count == 1:
        return rows
    beside = _part(rows.beside, count) if rows.beside else None
    if rows.prefill and rows.batch < count:
        before = rows.context + rows.tokens * (count - 1) / count / 2
        return replace(rows, tokens=rows.tokens / count, context=before, logits=rows.logits / count, beside=beside)
    return replace(rows, batch=rows.batch / count, logits=rows.logits / count, beside=beside)


def _uniform(s: Setup, part: Rows) -> Routing:
    assert s.spec.moe is not None
    p = s.parallel
    return uniform(
        s.spec.moe, part.rows * p.dp, p.ep, redundant=p.redundant, mode=s.mode, nodes=s.nodes,
        own_tokens=part.rows / p.tp, balanced=s.balanced, skew=s.skew,
    )  # fmt: skip


def _compute(s: Setup, part: Rows) -> list[Call]:
    """All that a GPU does by itself, but for the routed experts."""
    spec, hw, p, c = s.spec, s.hardware, s.parallel, s.c
    full, moe = len(spec.full_layers), s.moe_layers
    made = [ops.attention_calls(spec, hw, p, s.kinds, part, (full, spec.layers - full), c)]
    if spec.layers > moe:
        made.append(ops.dense_calls(spec, hw, p, s.kinds, part, spec.layers - moe, c))
    if moe:
        made.append(ops.router_calls(spec, hw, part.rows / (p.tp if s.mode else 1), moe, c))
        made.append(ops.shared_calls(spec, hw, p, s.kinds, part, moe, c))
    made.append(ops.head_calls(spec, hw, p, part, c))
    products = [product for some, _ in made for product in some]
    calls = [*ops.timed(hw, c, products), *(call for _, some in made for call in some)]
    longer = slower(s, part)
    return calls if longer == 1 else [replace(call, time=call.time * longer) for call in calls]


def _stage_seconds(s: Setup, calls: list[Call]) -> dict[str, float]:
    """Seconds of each stage in one layer: the mean over layers, or over those that have it."""
    out = {"prepare": 0.0, "core": 0.0, "shared": 0.0}
    for call in calls:
        if call.stage in out:
            layers = s.moe_layers if call.stage == "shared" else s.spec.layers
            out[call.stage] += float(call.time.seconds) * call.count / max(layers, 1)
    return out


def _beside_experts(operator: Operator) -> Operator:
    """Where tokens do not travel, shared experts run as one more expert of the grouped product (SGLang), or on a stream
    of their own (TensorRT-LLM, vLLM): only their operations, or their reads, still take time."""
    if operator.name != "shared experts":
        return operator
    work = np.maximum(operator.parts["compute"], operator.parts["memory"])
    return replace(operator, hidden=np.maximum(operator.seconds - work, 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Tensor and pipeline parallelism, and the engine


def _collectives(s: Setup, part: Rows, halves: int) -> list[Operator]:
    """All-reduces of tensor parallelism: two a layer; where tokens travel, a reduce-scatter and an all-gather, which
    together are one."""
    p, spec = s.parallel, s.spec
    if p.tp == 1:
        return []
    one = all_reduce(s.hardware, part.rows * spec.hidden * 2, p.tp, s.c)
    count = 2 * (spec.layers - s.moe_layers) + s.moe_layers * (1 if s.mode else 2) + 1
    return merged([Call("tp all-reduce", "other", one, count)], halves)


def _sends(s: Setup, part: Rows, parts: int, operators: list[Operator], prefill: bool) -> list[Operator]:
    """Between pipeline stages, and what the slowest stage adds.

    Decode: a token waits until the slowest stage has served all micro-batches. Prefill: all micro-batches must leave.
    """
    p, spec = s.parallel, s.spec
    if p.pp == 1:
        return []
    halves = 2 if s.overlap else 1
    micro = parts // halves
    between = p.tp * p.dp >= s.gpus_per_node
    hop = send(s.hardware, part.rows * halves * spec.hidden * 2, between_nodes=between, c=s.c)
    sends = merged([Call("send", "other", hop, p.pp - 1)], 1)
    ends = ("head", "sampling")
    body = sum((o.exposed for o in operators if o.name not in ends), start=0.0)
    tail = sum((o.exposed for o in operators if o.name in ends), start=0.0)
    slowest = body * -(-spec.layers // p.pp) / spec.layers + tail
    idle = micro * slowest - (body + tail + sends[0].exposed)
    more = (micro - 1) * slowest if prefill else np.maximum(idle, 0.0)
    return [*sends, Operator("pipeline", more, 0.0, {"slowest stage": more})]


def _engine(s: Setup, rows: Rows, operators: list[Operator]) -> list[Operator]:
    """What the engine adds: between steps, and where the host's work for all requests outlasts the kernels."""
    fit = s.c.engine
    kernels: Number = 0.0
    for operator in operators:
        kernels = kernels + operator.exposed
    host = 0.0 if rows.prefill else rows.batch * fit.request_s
    longer = overlapped(kernels, host, HOST_OVERLAP) - kernels
    return [Operator("engine", longer + fit.step_s, 0.0, {"overhead": longer + fit.step_s})]
