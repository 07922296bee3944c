"""Continuous batching over time: instances that run steps, each with its own running batch, queue and cache.

The caller owns all state as arrays and decides where requests go; these loops only pass time. A step is planned when
the one before it ends: first the requests that run (one token each, or the next chunk of a prompt), then requests from
the queue while slots, the token budget and the cache allow. Where the cache is full, the request that joined last is
taken out and computed again later, prompt and answer so far in one prefill.

Names: n requests, G instances, B slots of an instance, L layers, E experts, P GPUs of an instance that share experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import ExpertArray, FloatArray, Int64Array

__all__ = ["Clock", "Lanes", "Limits", "Work", "advance", "enqueue"]


class Work(NamedTuple):
    """Requests, arrays [n].

    Attributes:
        prompt, answer: int64, tokens; an answer of D tokens has D - 1 decode steps after the first token.
        row: int64, the request's first decode row of the trace; -1: its routing is not known.
        goal, done: int64, tokens to compute before it decodes, and tokens in the cache.
        made: int64, tokens of the answer so far. preempted: int64, how often it lost its cache.
        joined, first, end: float64, when its first step began, its first token came, its last one came; NaN before.
    """

    prompt: Int64Array
    answer: Int64Array
    row: Int64Array
    goal: Int64Array
    done: Int64Array
    made: Int64Array
    preempted: Int64Array
    joined: FloatArray
    first: FloatArray
    end: FloatArray


class Lanes(NamedTuple):
    """Instances.

    Attributes:
        running: int64 [G, B], requests in the order in which they joined; chunk: int64 [G, B], tokens of each in the
            current step. size: int64 [G], how many.
        queue: int64 [G, n], a ring; head, length: int64 [G].
        cached: int64 [G], tokens in the cache.
        ends: float64 [G], when the current step ends; inf where idle.
        finished, started: int64 [B + 1], requests that the last step ended, and that it gave their first token; the
            last entry counts them.
        sums: float64 [G, 6]: steps, decoded tokens, tokens x distinct experts (mean over layers), seconds busy,
            prefilled tokens, tokens x live requests.
    """

    running: Int64Array
    chunk: Int64Array
    size: Int64Array
    queue: Int64Array
    head: Int64Array
    length: Int64Array
    cached: Int64Array
    ends: FloatArray
    finished: Int64Array
    started: Int64Array
    sums: FloatArray


class Limits(NamedTuple):
    """slots: requests that run at a time. budget: tokens of a step. cache: tokens of the cache. mixed: prompts share
    steps with decoding requests; else a step has either."""

    slots: int
    budget: int
    cache: int
    mixed: bool


class Clock(NamedTuple):
    """Seconds of a step, tabulated; linear between the entries.

    Attributes:
        batch, context, tokens, before: float64, rising grids: decoding requests, their mean cached tokens, prompt
            tokens of the step, and tokens cached before these.
        decode: float64 [batch, context]; mixed: float64 [batch, context, tokens, before]: all but the experts.
        picks: float64, rising grid. experts: float64 [picks, E / P + 1], a layer's experts by picks and distinct ones.
        owner: int64 [E], the GPU of each expert. top_k: picks per token.
        repeat: layers of the model for each layer of the trace; 0: `decode` and `mixed` have the experts in them.
    """

    batch: FloatArray
    context: FloatArray
    tokens: FloatArray
    before: FloatArray
    decode: FloatArray
    mixed: FloatArray
    picks: FloatArray
    experts: FloatArray
    owner: Int64Array
    top_k: int
    repeat: float


@compiled
def _place(grid: FloatArray, value: float) -> tuple[int, float]:
    """(entry, share of the next one), held inside the grid at its low end and continued beyond its high end."""
    last = grid.size - 2
    if last < 0:
        return 0, 0.0
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        if grid[middle] <= value:
            low = middle
        else:
            high = middle - 1
    return low, max((value - grid[low]) / (grid[low + 1] - grid[low]), 0.0)


@compiled
def _rest(clock: Clock, batch: float, context: float, tokens: float, before: float) -> float:
    """Seconds of a step without its experts."""
    b, wb = _place(clock.batch, batch)
    c, wc = _place(clock.context, context)
    total = 0.0
    if tokens == 0.0:
        for i in range(2):
            for j in range(2):
                weight = (wb if i else 1.0 - wb) * (wc if j else 1.0 - wc)
                if weight != 0.0:
                    total += weight * clock.decode[b + i, c + j]
        return total
    t, wt = _place(clock.tokens, tokens)
    p, wp = _place(clock.before, before)
    for i in range(2):
        for j in range(2):
            for m in range(2):
                for q in range(2):
                    weight = (wb if i else 1.0 - wb) * (wc if j else 1.0 - wc)
                    weight *= (wt if m else 1.0 - wt) * (wp if q else 1.0 - wp)
                    if weight != 0.0:
                        total += weight * clock.mixed[b + i, c + j, t + m, p + q]
    return total


@compiled
def _experts(clock: Clock, distinct: Int64Array, picks: Int64Array, prompt_tokens: float) -> float:
    """Seconds of the experts of all layers: in each, those of the slowest GPU.

    Prompt tokens are taken to pick uniformly: each expert that no decoding request reads is read with the chance that
    one of them picks it.

    Args:
        distinct, picks: int64 [L, P], of the decoding requests.
    """
    layers, gpus = distinct.shape
    held = clock.owner.size / gpus
    missed = (1.0 - clock.top_k / clock.owner.size) ** prompt_tokens
    total = 0.0
    for layer in range(layers):
        slowest = 0.0
        for gpu in range(gpus):
            read = held - (held - distinct[layer, gpu]) * missed
            served = picks[layer, gpu] + prompt_tokens * clock.top_k / gpus
            i, wi = _place(clock.picks, served)
            j = min(int(read), clock.experts.shape[1] - 2)
            wj = read - j
            low = (1.0 - wj) * clock.experts[i, j] + wj * clock.experts[i, j + 1]
            high = (1.0 - wj) * clock.experts[i + 1, j] + wj * clock.experts[i + 1, j + 1]
            slowest = max(slowest, (1.0 - wi) * low + wi * high)
        total += slowest
    return total * clock.repeat


@compiled
def _count(
    experts: ExpertArray, rows: Int64Array, mark: int, marks: Int64Array, owner: Int64Array, out: Int64Array
) -> None:
    """Distinct experts and picks of each layer and GPU: out int64 [2, L, P]; else as `distinct_of_step`."""
    count = np.uint64(marks.shape[1])
    out[:] = 0
    for i in range(rows.size):
        if rows[i] < 0:
            continue
        token = experts[rows[i]]
        for layer in range(token.shape[0]):
            for j in range(token.shape[1]):
                expert = np.uint64(token[layer, j])
                if expert < count:
                    gpu = owner[expert]
                    out[1, layer, gpu] += 1
                    out[0, layer, gpu] += marks[layer, expert] != mark  # without a branch: nobody could guess it
                    marks[layer, expert] = mark


@compiled
def _preempt(g: int, place: int, work: Work, lanes: Lanes) -> None:
    """Take a running request out; it goes to the front of the queue and is computed again."""
    r = lanes.running[g, place]
    lanes.cached[g] -= work.done[r]
    work.goal[r] = work.prompt[r] + work.made[r]
    work.done[r] = 0
    work.preempted[r] += 1
    lanes.size[g] -= 1
    for i in range(place, lanes.size[g]):
        lanes.running[g, i] = lanes.running[g, i + 1]
        lanes.chunk[g, i] = lanes.chunk[g, i + 1]
    size = lanes.queue.shape[1]
    lanes.head[g] = (lanes.head[g] - 1) % size
    lanes.queue[g, lanes.head[g]] = r
    lanes.length[g] += 1


@compiled
def _compose(g: int, now: float, work: Work, lanes: Lanes, limits: Limits) -> None:
    """Choose the next step's tokens: `lanes.chunk` of each running request."""
    left, full, place = limits.budget, False, 0
    while place < lanes.size[g]:
        r = lanes.running[g, place]
        wanted = 1 if work.done[r] >= work.goal[r] else min(work.goal[r] - work.done[r], left)
        while lanes.cached[g] + wanted > limits.cache and lanes.size[g] > 1:
            full = True
            _preempt(g, lanes.size[g] - 1, work, lanes)
            if lanes.size[g] == place:  # it was the last itself
                break
        if place >= lanes.size[g]:
            break
        lanes.chunk[g, place] = wanted
        lanes.cached[g] += wanted
        left -= wanted
        place += 1
    while not full and lanes.length[g] > 0 and lanes.size[g] < limits.slots and left > 0:
        r = lanes.queue[g, lanes.head[g]]
        if lanes.cached[g] + work.goal[r] > limits.cache and lanes.size[g] > 0:
            break
        lanes.head[g] = (lanes.head[g] + 1) % lanes.queue.shape[1]
        lanes.length[g] -= 1
        wanted = min(work.goal[r], left)
        lanes.running[g, lanes.size[g]] = r
        lanes.chunk[g, lanes.size[g]] = wanted
        lanes.size[g] += 1
        lanes.cached[g] += wanted
        left -= wanted
        if np.isnan(work.joined[r]):
            work.joined[r] = now
    if not limits.mixed:
        _keep_prompts(g, work, lanes)


@compiled
def _keep_prompts(g: int, work: Work, lanes: Lanes) -> None:
    """Where the step has prompt tokens, nobody decodes in it."""
    prompts = False
    for i in range(lanes.size[g]):
        r = lanes.running[g, i]
        prompts |= work.done[r] < work.goal[r] and lanes.chunk[g, i] > 0
    if prompts:
        for i in range(lanes.size[g]):
            r = lanes.running[g, i]
            if work.done[r] >= work.goal[r]:
                lanes.cached[g] -= lanes.chunk[g, i]
                lanes.chunk[g, i] = 0


@compiled
def _start(
    g: int, now: float, work: Work, lanes: Lanes, limits: Limits, clock: Clock, experts: ExpertArray, marks: Int64Array
) -> None:
    """Plan the next step of an instance, and when it ends."""
    _compose(g, now, work, lanes, limits)
    decoding, held, tokens, pairs = 0, 0.0, 0.0, 0.0
    rows = np.empty(lanes.size[g], np.int64)
    for i in range(lanes.size[g]):
        r, chunk = lanes.running[g, i], lanes.chunk[g, i]
        if chunk == 0:
            continue
        if work.done[r] >= work.goal[r]:
            rows[decoding] = work.row[r] + work.made[r] - 1 if work.row[r] >= 0 else -1
            decoding += 1
            held += work.done[r]
        else:
            tokens += chunk
            pairs += chunk * (work.done[r] + chunk / 2)
    if decoding == 0 and tokens == 0.0:
        lanes.ends[g] = np.inf
        return
    before = max(pairs / tokens - tokens / 2, 0.0) if tokens > 0 else 0.0
    seconds = _rest(clock, decoding, held / max(decoding, 1), tokens, before)
    sums = lanes.sums[g]
    if experts.shape[0] > 0:
        counts = np.zeros((2, marks.shape[0], clock.owner.max() + 1), np.int64)
        mark = int(lanes.sums[:, 0].sum())
        _count(experts, rows[:decoding], mark, marks, clock.owner, counts)
        if clock.repeat > 0:
            seconds += _experts(clock, counts[0], counts[1], tokens)
        sums[2] += decoding * counts[0].sum() / marks.shape[0]
    sums[0] += 1
    sums[1] += decoding
    sums[3] += seconds
    sums[4] += tokens
    sums[5] += decoding * decoding
    lanes.ends[g] = now + seconds


@compiled
def _finish_step(g: int, now: float, work: Work, lanes: Lanes) -> None:
    """What a step made: cached tokens, answer tokens, first tokens, finished requests."""
    kept, ended, started = 0, 0, 0
    for i in range(lanes.size[g]):
        r, chunk = lanes.running[g, i], lanes.chunk[g, i]
        before = work.done[r]
        work.done[r] += chunk
        if chunk > 0 and work.done[r] >= work.goal[r]:
            work.made[r] += 1
            if before < work.goal[r] and work.made[r] == 1:
                work.first[r] = now
                lanes.started[started] = r
                started += 1
        if work.made[r] >= work.answer[r]:
            work.end[r] = now
            lanes.cached[g] -= work.done[r]
            lanes.finished[ended] = r
            ended += 1
        else:
            lanes.running[g, kept] = r
            kept += 1
    lanes.size[g] = kept
    lanes.chunk[g, :kept] = 0
    lanes.finished[-1], lanes.started[-1] = ended, started


@compiled
def enqueue(
    g: int,
    r: int,
    now: float,
    work: Work,
    lanes: Lanes,
    limits: Limits,
    clock: Clock,
    experts: ExpertArray,
    marks: Int64Array,
) -> None:
    """Give a request to an instance; it starts at once where that is idle."""
    size = lanes.queue.shape[1]
    lanes.queue[g, (lanes.head[g] + lanes.length[g]) % size] = r
    lanes.length[g] += 1
    if lanes.ends[g] == np.inf:
        _start(g, now, work, lanes, limits, clock, experts, marks)


@compiled
def advance(
    until: float, work: Work, lanes: Lanes, limits: Limits, clock: Clock, experts: ExpertArray, marks: Int64Array
) -> tuple[int, float]:
    """Run steps until one ends a request or gives a first token, or until the next would end after `until`.

    Returns:
        (instance, time) of that step; the requests are in `lanes.finished` and `lanes.started`. (-1, until) without.
    """
    while True:
        g = 0
        for i in range(1, lanes.ends.size):
            if lanes.ends[i] < lanes.ends[g]:
                g = i
        now = lanes.ends[g]
        if not now <= until or now == np.inf:
            return -1, until
        _finish_step(g, now, work, lanes)
        _start(g, now, work, lanes, limits, clock, experts, marks)
        if lanes.finished[-1] > 0 or lanes.started[-1] > 0:
            return g, now
