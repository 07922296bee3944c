"""From a trace to the requests that a plan can be fitted and judged on.

Each usable request has two spans of rows: its *signature* (what is known before it decodes) and its *use* (what the
plan is for). With prefill and decode recorded these are the two phases; `signature_tokens=N` lets the first N decode
rows (or prompt rows, where there is no decode) stand in for the prefill and the rest for the decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_ranges
from moeplan.errors import UsageError
from moeplan.planning.plan import PlanningTask, Signature
from moeplan.planning.problem import Problem, TokenRows
from moeplan.trace import Trace
from moeplan.trace.stages import MIN_DECODE, MIN_PREFILL, Stages
from moeplan.types import ModelShape, expert_dtype

__all__ = ["PHASES_MEASURED", "RequestSet", "read_requests"]

Int64Array = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint32]

PHASES_MEASURED = ("decode", "prefill", "mixed")


@dataclass(frozen=True)
class RequestSet:
    """The usable requests of a trace.

    Attributes:
        shape: the model. experts: unsigned [T, L, k], all rows of the trace; none where it is aggregated.
        index: int64 [n], each request's number in the trace. total: requests in the trace.
        domain: int64 [n] into `domains`.
        signature_span, use_span, measured_span: int64 [n, 2], first row and end: what is known before, what plans are
            fitted on, and what they are measured on (the same as use unless another phase was asked for).
        prefill_rows: int64 [n], recorded prefill rows (0 where none).
        column: what the measured rows are called: decode, prefill, prefill and decode, rest of prompt, rest of rows.
        known: what the signature rests on.
        notes: what a reader must know, one line each.
        sums: uint32 [2, n, L, E], picks of prefill and decode of an aggregated trace: each sum stands for a request.
        trace: where they come from; None for requests made by hand.
    """

    shape: ModelShape
    experts: npt.NDArray[np.unsignedinteger]
    index: Int64Array
    total: int
    domain: Int64Array
    domains: tuple[str, ...]
    signature_span: Int64Array
    use_span: Int64Array
    measured_span: Int64Array
    prefill_rows: Int64Array
    column: str
    known: Signature
    notes: tuple[str, ...]
    sums: Counts | None = None
    trace: Trace | None = None

    def __len__(self) -> int:
        return len(self.index)

    def _count(self, span: Int64Array) -> Counts:
        out = np.zeros((len(span), self.shape.num_layers, self.shape.num_experts), np.uint32)
        start, stop = np.ascontiguousarray(span[:, 0]), np.ascontiguousarray(span[:, 1])
        count_ranges(self.experts, start, stop, np.arange(len(span)), out)
        return out

    @cached_property
    def signature(self) -> Counts:
        """uint32 [n, L, E], picks in the signature rows."""
        return self.sums[0] if self.sums is not None else self._count(self.signature_span)

    @cached_property
    def use(self) -> Counts:
        """uint32 [n, L, E], picks in the rows that plans are fitted on."""
        return self.sums[1] if self.sums is not None else self._count(self.use_span)

    @cached_property
    def measured(self) -> Counts:
        """uint32 [n, L, E], picks in the rows that plans are measured on."""
        return self.use if self.measured_span is self.use_span else self._count(self.measured_span)

    @property
    def stands_in(self) -> str | None:
        """What the signature rests on, in words, when it is not the prefill; else None."""
        return self.known.stands_in

    @property
    def measured_rows(self) -> Int64Array:
        """int64 [n], how many rows each request is measured on."""
        return self.measured_span[:, 1] - self.measured_span[:, 0]

    def problem(self, task: PlanningTask, fit: Int64Array | None = None) -> Problem:
        """What a strategy is given: only what the fit requests did, int64 positions; None: all of them."""
        fit = np.arange(len(self)) if fit is None else fit
        span = self.use_span[fit]
        rows = TokenRows(self.experts, np.ascontiguousarray(span[:, 0]), np.ascontiguousarray(span[:, 1]))
        return Problem(
            self.shape, task.cluster, task.redundant, self.use[fit], self.signature[fit], rows,
            task.replica_rule, task.dispatch,
        )  # fmt: skip


def read_requests(
    trace: Trace, *, signature_tokens: int | None = None, phase: str = "decode", rows: bool = True
) -> RequestSet:
    """Load a trace's rows and sort its requests into usable and not.

    Usable: a prefill of at least 1 row and a decode of at least 8; with `signature_tokens` N, at least 2N rows of
    decode (of the prompt, where the trace has no decode; of all rows, where no phase is known).

    Args:
        trace: an opened trace.
        signature_tokens: N, to let the first N rows stand in for the prefill.
        phase: what is measured: decode, prefill or mixed.
        rows: False where counts are enough, to read an aggregated trace too, whose sums then stand for requests.

    Raises:
        UsageError: no usable request, with what to do instead; sums, where rows are needed.
    """
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
    start, stop = requests.offsets[:-1], requests.offsets[1:]
    signature = np.stack((start + stages.first, start + stages.middle), 1)
    use = np.stack((start + stages.middle, stop), 1)
    usable, known, column = stages.usable, Signature(), "decode"
    need = f"a prefill of at least {MIN_PREFILL} row and a decode of at least {MIN_DECODE}"
    if signature_tokens is not None:
        known = Signature(stages.source, signature_tokens)
        column = "decode" if known.source == "decode" else stages.decode
        need = f"at least {2 * signature_tokens} {known.unit} tokens"
    if phase != "decode":
        if not (usable & (requests.prefill_known > 0)).any() or column != "decode":
            raise UsageError(f"--phase {phase} needs prefill and decode rows, which this trace does not have")
        usable = usable & (requests.prefill_known > 0)
        need += ", and prefill rows"
        column = "prefill" if phase == "prefill" else "prefill and decode"
    if not usable.any():
        raise UsageError(
            f"none of the {len(requests)} requests has {need}",
            where=str(trace.path),
            hint=_mend(trace),
        )
    index = np.flatnonzero(usable)
    use = use[index]
    measured = {
        "decode": use,
        "prefill": np.stack((start, start + requests.prefill_known), 1)[index],
        "mixed": np.stack((start, stop), 1)[index],
    }[phase]
    notes = [f"{len(index)} of {len(requests)} requests are usable (they have {need})"]
    if known.tokens is not None:
        notes.append(
            f"the {known} stand in for the prefill; figures are for the "
            + ("rest" if phase == "decode" else f"{column} rows")
        )
    if not trace.complete:
        notes.append("the trace is of a recording that was cut off; its finished parts are used")
    return RequestSet(
        trace.shape, trace.load().experts, index, len(requests), requests.domain[index], requests.domains,
        signature[index], use, measured, requests.prefill_known[index], column, known, tuple(notes), trace=trace,
    )  # fmt: skip


def _read_sums(trace: Trace) -> RequestSet:
    """The sums that have rows of both phases, each in a request's place."""
    requests = trace.requests
    usable = Stages.from_requests(requests).usable
    index = np.flatnonzero(usable)
    if not len(index):
        raise UsageError(
            f"none of the {len(requests)} sums has prefill and decode rows",
            where=str(trace.path),
            hint="record both phases",
        )
    parts = [part.counts[:2, usable[part.first : part.first + len(part)]] for part in trace.sums()]
    none = np.zeros((len(index), 2), np.int64)
    notes = (
        f"{len(index)} of {len(requests)} sums of {trace.aggregate} requests are usable; each stands for a request",
    )
    return RequestSet(
        trace.shape, np.empty((0, trace.shape.num_layers, trace.shape.top_k), expert_dtype(trace.shape.num_experts)),
        index, len(requests), requests.domain[index], requests.domains, none, none, none,
        requests.prefill_known[index], "decode", Signature(), notes, np.concatenate(parts, axis=1), trace,
    )  # fmt: skip


def _mend(trace: Trace) -> str:
    requests = trace.requests
    if not (requests.decode > 0).any() and (requests.prefill > 0).any():
        return "the trace has no decode rows: give --signature-tokens N to let the first N prompt tokens stand in"
    return "give --signature-tokens N to let the first N tokens of each request stand in for its prefill"
