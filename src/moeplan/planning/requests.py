"""From a trace to the requests that a plan can be fitted and judged on.

Each usable request has two spans of rows: its *signature* (what is known before it decodes) and its *use* (what the
plan is for). With prefill and decode recorded these are the two phases; `signature_tokens=N` lets the first N decode
rows (or prompt rows, where there is no decode) stand in for the prefill and the rest for the decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_ranges
from moeplan.arrays import BoolArray, CountArray, ExpertArray, Float32Array, Int64Array
from moeplan.errors import UsageError, expect
from moeplan.planning.plan import Plan, PlanningTask, Signature
from moeplan.planning.problem import PlanningProblem, TokenRows
from moeplan.planning.sessions import earlier_use
from moeplan.trace import Trace
from moeplan.trace.format import Requests
from moeplan.trace.prompts import PromptFeatures
from moeplan.trace.stages import MIN_DECODE, MIN_PREFILL, Stages
from moeplan.types import ModelShape, expert_dtype

__all__ = ["RequestSet", "Spans", "blocks", "read_requests", "shape_of", "split"]

PHASES_MEASURED = ("decode", "prefill", "mixed")
MOST_BLOCK = 1_000_000_000


@dataclass(frozen=True)
class Spans:
    """Which rows of each request are used for what: int64 [2, n] each, first rows and ends.

    Attributes:
        signature: what is known before a request's group is chosen.
        use: what plans are fitted on.
        measured: what plans are measured on; the same as `use` unless another phase was asked for.
    """

    signature: Int64Array
    use: Int64Array
    measured: Int64Array


@dataclass(frozen=True, repr=False)
class RequestSet:
    """The usable requests of a trace.

    Attributes:
        shape: the model. experts: unsigned [T, L, k], all rows of the trace; none where it is aggregated.
        spans: the requests' rows.
        index: int64 [n], each request's number in the trace. domain: int64 [n], its domain's.
        column: what the measured rows are called: decode, prefill, prefill and decode, rest of prompt, rest of rows.
        known: what the signature rests on.
        notes: what a reader must know, one line each.
        sums: uint32 [2, n, L, E], picks of prefill and decode of an aggregated trace: each sum stands for a request.
        trace: where they come from; None for requests made by hand.
        whole: they are all usable requests of the trace.

    Examples:
        >>> import moeplan
        >>> fit, held_out = moeplan.read_requests(moeplan.open_trace("embedded")).split(fit=0.75)
        >>> len(fit), len(held_out)
        (584, 195)
    """

    shape: ModelShape
    experts: ExpertArray
    spans: Spans
    index: Int64Array
    domain: Int64Array
    column: str = "decode"
    known: Signature = field(default_factory=Signature)
    notes: tuple[str, ...] = ()
    sums: CountArray | None = None
    trace: Trace | None = None
    whole: bool = True

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"RequestSet of {len(self)} requests of {self.shape.name}: {'; '.join(self.notes)}"

    def _count(self, span: Int64Array) -> CountArray:
        out = np.zeros((len(self), self.shape.num_layers, self.shape.num_experts), np.uint32)
        start, stop = span
        count_ranges(self.experts, start, stop, np.arange(len(self)), out)
        return out

    @cached_property
    def signature(self) -> CountArray:
        """uint32 [n, L, E], picks in the signature rows."""
        return self.sums[0] if self.sums is not None else self._count(self.spans.signature)

    @cached_property
    def use(self) -> CountArray:
        """uint32 [n, L, E], picks in the rows that plans are fitted on."""
        return self.sums[1] if self.sums is not None else self._count(self.spans.use)

    @cached_property
    def measured(self) -> CountArray:
        """uint32 [n, L, E], picks in the rows that plans are measured on."""
        return self.use if self.spans.measured is self.spans.use else self._count(self.spans.measured)

    @cached_property
    def prompts(self) -> PromptFeatures | None:
        """Features of the prompts, if the trace keeps any."""
        kept = None if self.trace is None else self.trace.prompts
        return kept.take(self.index) if kept is not None and kept.known[self.index].any() else None

    @cached_property
    def earlier(self) -> Float32Array | None:
        """float32 [n, L, E], picks of earlier answers of each request's session; None where the trace has none."""
        table = None if self.trace is None else self.trace.requests
        if table is None or table.session is None or table.turn is None:
            return None
        found = earlier_use(table.session[self.index], table.turn[self.index].astype(np.int64), self.use)
        return found if found.any() else None

    def problem(self, task: PlanningTask, fit: Int64Array | None = None) -> PlanningProblem:
        """What a strategy is given: only what the fit requests did, int64 positions; None: all of them."""
        fit = np.arange(len(self)) if fit is None else fit
        rows = TokenRows(self.experts, *self.spans.use.take(fit, axis=1))
        signature = self.signature[fit]
        return PlanningProblem(
            self.shape, task.cluster, task.redundant, self.use[fit], signature, rows, task.replica_rule, task.dispatch
        )

    def fitted(self, plan: Plan) -> bool:
        """Whether a plan was fitted on some of these requests."""
        origin = plan.provenance
        same = self.trace is not None and self.trace.checksum == origin.trace_checksum
        return same and (not origin.fit_index or bool(np.isin(self.index, origin.fit_index).any()))

    def select(self, which: npt.ArrayLike) -> RequestSet:
        """Some of these requests: bool [n], or their positions.

        Raises:
            UsageError: none of them, or a position that there is not.
        """
        chosen = np.asarray(which)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or not len(chosen):
            raise UsageError(f"no selection of {len(self)} requests", hint="give a boolean of each, or positions")
        chosen = np.unique(chosen)
        if chosen[0] < 0 or chosen[-1] >= len(self):
            raise UsageError(f"positions {chosen[0]} to {chosen[-1]} are outside 0..{len(self) - 1}")
        use, measured = (span[:, chosen] for span in (self.spans.use, self.spans.measured))
        spans = Spans(self.spans.signature[:, chosen], use, use if self.spans.measured is self.spans.use else measured)
        notes = (*self.notes, f"{len(chosen)} of {len(self)} requests are selected")
        sums = None if self.sums is None else self.sums[:, chosen]
        index, domain = self.index[chosen], self.domain[chosen]
        return replace(self, spans=spans, index=index, domain=domain, notes=notes, sums=sums, whole=False)

    def split(self, fit: float = 0.5, *, seed: int = 0, block: int = 1) -> tuple[RequestSet, RequestSet]:
        """Requests to fit a plan on, and held-out requests to evaluate it on; at random within each domain.

        Args:
            fit: share of the first part. block: neighbouring requests of the trace that stay together.
        """
        fitted = split(self.domain, blocks(self.index, block), fit, np.random.default_rng([seed, 0, 0]))
        return self.select(fitted), self.select(~fitted)


def blocks(index: Int64Array, size: int) -> Int64Array:
    """int64 [n]: the block of each usable request, 0, 1, ..; `size` neighbours in the trace make a block."""
    if size < 1:
        raise UsageError(f"--block {size} is not positive")
    if size > MOST_BLOCK:
        raise UsageError(f"--block {size} is more than any trace has", hint="e.g. 20")
    return np.asarray(np.unique(index // size, return_inverse=True)[1], np.int64)


def split(domain: Int64Array, block: Int64Array, fit: float, rng: np.random.Generator) -> BoolArray:
    """bool [n]: which requests the plan may see, stratified by domain, blocks kept whole.

    A block counts for the domain of its first request. The blocks are shuffled within domains and laid out domain by
    domain; every 1/fit-th goes to the fit part, from a random start, so that each domain gets its share to within one
    block and the whole is right too.
    """
    if not 0.0 < fit < 1.0:
        raise UsageError(
            f"--fit {fit} is not between 0 and 1", hint="e.g. 0.5: plan on half, measure on the other half"
        )
    count = int(block.max()) + 1
    first = np.zeros(count, np.int64)
    first[block[::-1]] = domain[::-1]
    shuffled = rng.permutation(count)
    order = shuffled[np.argsort(first[shuffled], kind="stable")]
    place = np.arange(count + 1) * fit + rng.random()
    chosen = np.zeros(count, np.bool_)
    chosen[order] = np.floor(place[1:]) > np.floor(place[:-1])
    return chosen[block]


def shape_of(requests: Trace | RequestSet) -> ModelShape:
    """The model of requests that may not be read yet."""
    expect(requests, (Trace, RequestSet), 'moeplan.open_trace("PATH"), or moeplan.read_requests of it')
    return requests.shape


def read_requests(
    trace: Trace | RequestSet, *, signature_tokens: int | None = None, phase: str = "decode", rows: bool = True
) -> RequestSet:
    """Load a trace's rows and sort its requests into usable and not.

    Usable: a prefill of at least 1 row and a decode of at least 8; with `signature_tokens` N, at least 2N rows of
    decode (of the prompt, where the trace has no decode; of all rows, where no phase is known).

    Args:
        trace: an opened trace; requests that are already read are returned as they are.
        signature_tokens: N, to let the first N rows stand in for the prefill.
        phase: what is measured: decode, prefill or mixed.
        rows: False where counts are enough, to read an aggregated trace too, whose sums then stand for requests.

    Raises:
        UsageError: no usable request, with what to do instead; sums, where rows are needed.
    """
    if isinstance(trace, RequestSet):
        return trace
    if trace.aggregate > 1:
        if rows or signature_tokens is not None:
            need = "comparing and replaying need" if signature_tokens is None else "--signature-tokens needs"
            raise UsageError(
                f"holds sums of {trace.aggregate} requests; {need} the picks of each token",
                where=str(trace.path),
                hint="use the trace that they were made of",
            )
        return _read_sums(trace)
    if phase not in PHASES_MEASURED:
        raise UsageError(f"--phase {phase!r} is not one of {', '.join(PHASES_MEASURED)}")
    requests = trace.requests
    stages = Stages.from_requests(requests, signature_tokens)
    known, usable = Signature(stages.source, signature_tokens), stages.usable
    column = stages.decode if known.source in ("prompt", "rows") else "decode"
    need = f"a prefill of at least {MIN_PREFILL} row and a decode of at least {MIN_DECODE}"
    if signature_tokens is not None:
        need = f"at least {2 * signature_tokens} {known.unit} tokens"
    if phase != "decode":
        usable = usable & (requests.prefill_known > 0)
        if not usable.any() or column != "decode":
            raise UsageError(f"--phase {phase} needs prefill and decode rows, which this trace does not have")
        need += ", and prefill rows"
        column = "prefill" if phase == "prefill" else "prefill and decode"
    if not usable.any():
        raise UsageError(
            f"none of the {len(requests)} requests has {need}", where=str(trace.path), hint=_ways(requests)
        )
    index = np.flatnonzero(usable)
    notes = [f"{len(index)} of {len(requests)} requests are usable (they have {need})"]
    if signature_tokens is not None:
        rest = "rest" if phase == "decode" else f"{column} rows"
        notes.append(f"the {known} stand in for the prefill; figures are for the {rest}")
    if not trace.complete:
        notes.append("the trace is of a recording that was cut off; its finished parts are used")
    spans, domain = _spans(requests, stages, index, phase), requests.domain[index]
    return RequestSet(trace.shape, trace.load().experts, spans, index, domain, column, known, tuple(notes), trace=trace)


def _spans(requests: Requests, stages: Stages, index: Int64Array, phase: str) -> Spans:
    """The rows of the requests in `index`, by their numbers in the trace."""
    start, stop = requests.offsets[:-1][index], requests.offsets[1:][index]
    middle, prefill_end = start + stages.middle[index], start + requests.prefill_known[index]
    use = np.stack((middle, stop))
    measured = {"decode": use, "prefill": np.stack((start, prefill_end)), "mixed": np.stack((start, stop))}[phase]
    return Spans(np.stack((start + stages.first[index], middle)), use, measured)


def _read_sums(trace: Trace) -> RequestSet:
    """The sums that have rows of both phases, each in a request's place."""
    requests, shape = trace.requests, trace.shape
    usable = Stages.from_requests(requests).usable
    index = np.flatnonzero(usable)
    if not len(index):
        what = f"none of the {len(requests)} sums has prefill and decode rows"
        raise UsageError(what, where=str(trace.path), hint="record both phases")
    parts = [part.counts[:2, usable[part.first : part.first + len(part)]] for part in trace.sums()]
    none = np.zeros((2, len(index)), np.int64)
    experts = np.empty((0, shape.num_layers, shape.top_k), expert_dtype(shape.num_experts))
    spans, domain, counts = Spans(none, none, none), requests.domain[index], np.concatenate(parts, axis=1)
    note = f"{len(index)} of {len(requests)} sums of {trace.aggregate} requests are usable; each stands for a request"
    return RequestSet(shape, experts, spans, index, domain, notes=(note,), sums=counts, trace=trace)


def _ways(requests: Requests) -> str:
    """What to do about a trace without usable requests."""
    if not (requests.decode > 0).any() and (requests.prefill > 0).any():
        return "the trace has no decode rows: give --signature-tokens N to let the first N prompt tokens stand in"
    return "give --signature-tokens N to let the first N tokens of each request stand in for its prefill"
