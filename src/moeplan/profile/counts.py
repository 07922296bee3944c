"""One streaming pass over a trace: counts of picks, and a sample of token rows.

Names: R requests of the trace, n sampled requests, D domains, S stages, L layers, E experts, k picks.
All sizes are known before the pass, so memory does not grow with the number of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan._kernels.counting import count_ranges
from moeplan.errors import UsageError
from moeplan.progress import Progress, silent
from moeplan.trace import Requests, Trace
from moeplan.trace.stages import Stages
from moeplan.types import ModelShape

__all__ = ["DECODE", "OTHER", "PREFILL", "STAGES", "WITHOUT_ROWS", "Counts", "Reservoir", "count", "stratified"]

Int64Array = npt.NDArray[np.int64]

#: "other": rows of unknown phase, and rows that `signature_tokens` leaves out.
STAGES = ("prefill", "decode", "other")
PREFILL, DECODE, OTHER = range(3)

#: Why a measure of token rows has no figure.
WITHOUT_ROWS = "the trace is aggregated and has no token rows"

MAX_DOMAINS, LUMPED = 64, "(other)"
MAX_SAMPLE, SAMPLE_BYTES = 2_000, 256 * 2**20
RESERVOIR_ROWS, RESERVOIR_BYTES = 65_536, 64 * 2**20


@dataclass(frozen=True)
class Reservoir:
    """A seeded sample of token rows, uniform within each stage.

    Attributes:
        experts: unsigned [m, L, k]; request: int64 [m]; stage: int64 [m], index into `STAGES`.
    """

    experts: npt.NDArray[np.unsignedinteger]
    request: Int64Array
    stage: Int64Array

    def serving_stage(self) -> int:
        """Decode where there is any, else prefill, else rows of unknown phase."""
        return next(stage for stage in (DECODE, PREFILL, OTHER) if (self.stage == stage).any())


@dataclass(frozen=True)
class Counts:
    """Result of the pass.

    Attributes:
        shape: the model; requests: all of them; stages: which rows belong to each.
        domains: D labels; domain: int64 [R]. More than 64 labels are folded by the part before their first "/";
            if that is not enough, the rarest are lumped under "(other)".
        labels: how many labels the trace has; lumped: how many (after folding) were lumped.
        totals: int64 [2, D, S, L, E], picks of all requests; first axis: requests not usable, usable for
            measures that need both stages.
        sample: int64 [n], the sampled requests, rising.
        by_request: uint32 [2, n, L, E], their counts in prefill and decode.
        reservoir: token rows; none of an aggregated trace.
    """

    shape: ModelShape
    requests: Requests
    stages: Stages
    domains: tuple[str, ...]
    domain: Int64Array
    labels: int
    lumped: int
    totals: Int64Array
    sample: Int64Array
    by_request: npt.NDArray[np.uint32]
    reservoir: Reservoir

    @property
    def by_domain_stage(self) -> Int64Array:
        """int64 [D, S, L, E], all requests."""
        return np.asarray(self.totals.sum(axis=0))

    def members(self, stage: int) -> list[npt.NDArray[np.intp]]:
        """Per domain, rows of the sample whose requests have rows of the stage; none for the lump of rare domains."""
        domain = np.where(self.stages.lengths(stage)[self.sample] > 0, self.domain[self.sample], -1)
        return [np.flatnonzero((domain == d) & ~lump) for d, lump in enumerate(self.is_lump)]

    @property
    def is_lump(self) -> npt.NDArray[np.bool_]:
        """bool [D]: whether it is the lump of rare labels instead of one domain."""
        lump = np.zeros(len(self.domains), np.bool_)
        lump[-1] = self.lumped > 0
        return lump

    @property
    def sample_text(self) -> str:
        """'on 2000 of 9000 requests', or '' when all are sampled."""
        whole = len(self.requests)
        return "" if len(self.sample) == whole else f"on {len(self.sample)} of {whole} requests"


def count(
    trace: Trace,
    *,
    seed: int = 0,
    signature_tokens: int | None = None,
    max_sample: int = MAX_SAMPLE,
    reservoir_rows: int = RESERVOIR_ROWS,
    progress: Progress | None = None,
) -> Counts:
    """Read the trace once and count.

    Args:
        trace: an opened trace.
        seed: of the sample of requests and of the reservoir of rows.
        signature_tokens: see `Stages.from_requests`.
        max_sample, reservoir_rows: upper bounds; memory bounds them further.
        progress: called with (requests done, requests, "").

    Raises:
        UsageError: `signature_tokens` on an aggregated trace, or larger than any request.
    """
    if signature_tokens is not None and trace.aggregate > 1:
        raise UsageError(
            f"--signature-tokens needs token rows, the trace is aggregated over {trace.aggregate} requests",
            where=str(trace.path),
            hint="leave it out",
        )
    shape, requests = trace.shape, trace.requests
    layers, experts = shape.num_layers, shape.num_experts
    stages = Stages.from_requests(requests, signature_tokens)
    domains, domain, lumped = _fold_domains(requests)
    rng = np.random.default_rng([seed, 1])
    sample = stratified(requests.domain, min(max_sample, max(1, SAMPLE_BYTES // (layers * experts * 4))), rng)
    slot = np.full(len(requests), -1, np.int64)
    slot[sample] = np.arange(len(sample))
    tally = _Tally(
        totals=np.zeros((2, len(domains), len(STAGES), layers, experts), np.int64),
        by_request=np.zeros((2, len(sample), layers, experts), np.uint32),
        cell=(stages.usable * len(domains) + domain) * len(STAGES),
        slot=slot,
        progress=progress or silent,
    )
    if trace.aggregate > 1:
        reservoir = _count_aggregated(trace, tally)
    else:
        chosen = _choose_rows(stages, min(reservoir_rows, max(1, RESERVOIR_BYTES // trace.row_bytes)), rng)
        reservoir = _count_rows(trace, stages, chosen, tally)
    return Counts(
        shape=shape,
        requests=requests,
        stages=stages,
        domains=domains,
        domain=domain,
        labels=len(requests.domains),
        lumped=lumped,
        totals=tally.totals,
        sample=sample,
        by_request=tally.by_request,
        reservoir=reservoir,
    )


@dataclass(frozen=True)
class _Tally:
    """Arrays that the pass adds to.

    Attributes:
        totals: as in `Counts`; cell: int64 [R], where a request's first stage is in it, all but the last axes flat.
        by_request: as in `Counts`; slot: int64 [R], a request's place in it or -1.
    """

    totals: Int64Array
    by_request: npt.NDArray[np.uint32]
    cell: Int64Array
    slot: Int64Array
    progress: Progress


def _count_rows(trace: Trace, stages: Stages, chosen: Int64Array, tally: _Tally) -> Reservoir:
    row, request, stage_of = chosen
    kept = np.empty((len(row), trace.shape.num_layers, trace.shape.top_k), trace.expert_dtype)
    totals = tally.totals
    scratch = np.zeros((totals[..., 0, 0].size, *totals.shape[-2:]), np.uint32)
    for rows in trace.parts():
        part = slice(rows.first, rows.first + len(rows))
        for stage in range(len(STAGES)):
            starts = rows.offsets[:-1] + stages.starts(stage)[part]
            stops = starts + stages.lengths(stage)[part]
            count_ranges(rows.experts, starts, stops, tally.cell[part] + stage, scratch)
            if stage != OTHER:
                count_ranges(rows.experts, starts, stops, tally.slot[part], tally.by_request[stage])
        totals += scratch.reshape(totals.shape)
        scratch[:] = 0
        first_row = trace.requests.offsets[rows.first]
        low, high = np.searchsorted(row, [first_row, first_row + len(rows.experts)])
        kept[low:high] = rows.experts[row[low:high] - first_row]
        tally.progress(part.stop, len(trace.requests), "counting")
        del rows  # otherwise two parts are in memory while the next one is read
    return Reservoir(kept, request, stage_of)


def _count_aggregated(trace: Trace, tally: _Tally) -> Reservoir:
    """The same of an aggregated trace, whose phases are the stages; it has no token rows."""
    cells = tally.totals.reshape(-1, *tally.totals.shape[-2:])
    for sums in trace.sums():
        for number, counts in enumerate(sums.counts.swapaxes(0, 1), sums.first):
            cells[tally.cell[number] : tally.cell[number] + len(STAGES)] += counts
            if tally.slot[number] >= 0:
                tally.by_request[:, tally.slot[number]] = counts[[PREFILL, DECODE]]
        tally.progress(sums.first + len(sums), len(trace.requests), "counting")
    none = np.empty(0, np.int64)
    return Reservoir(np.empty((0, trace.shape.num_layers, trace.shape.top_k), np.uint8), none, none)


def _fold_domains(requests: Requests) -> tuple[tuple[str, ...], Int64Array, int]:
    """At most 64 domains: as labelled, else folded by the part before "/", else the most frequent and one lump."""
    labels, domain = requests.domains, requests.domain
    if len(labels) <= MAX_DOMAINS:
        return labels, domain, 0
    stems = [label.split("/", 1)[0] for label in labels]
    names = tuple(dict.fromkeys(stems))
    domain = np.array([names.index(stem) for stem in stems], np.int64)[domain]
    if len(names) <= MAX_DOMAINS:
        return names, domain, 0
    size = np.bincount(domain, minlength=len(names))
    kept = np.sort(np.argsort(-size, kind="stable")[: MAX_DOMAINS - 1])
    index = np.full(len(names), MAX_DOMAINS - 1, np.int64)
    index[kept] = np.arange(len(kept))
    return (*(names[i] for i in kept), LUMPED), index[domain], len(names) - len(kept)


def stratified(domain: Int64Array, limit: int, rng: np.random.Generator) -> Int64Array:
    """At most `limit` requests, each domain in proportion (remainders to the largest fractions), rising."""
    if len(domain) <= limit:
        return np.arange(len(domain))
    share = np.bincount(domain) * (limit / len(domain))
    quota = np.floor(share).astype(np.int64)
    quota[np.argsort(quota - share, kind="stable")[: limit - int(quota.sum())]] += 1
    drawn = [rng.choice(np.flatnonzero(domain == d), q, replace=False) for d, q in enumerate(quota) if q]
    return np.sort(np.concatenate(drawn))


def _choose_rows(stages: Stages, limit: int, rng: np.random.Generator) -> Int64Array:
    """As many rows of each stage that has any (long prompts must not displace decode), uniform within a stage.

    Returns:
        int64 [3, m], rising: row in the whole trace, its request, its stage.
    """
    present = [stage for stage in (PREFILL, DECODE) if stages.lengths(stage).any()] or [OTHER]
    begin = np.concatenate(([0], np.cumsum(stages.rows)[:-1]))
    found = []
    for stage in present:
        ends = np.cumsum(stages.lengths(stage))
        total = int(ends[-1])
        size = min(total, limit // len(present))
        index = rng.choice(total, size, replace=False, shuffle=False) if size < total else np.arange(total)
        request = np.searchsorted(ends, index, side="right")
        inside = index - (ends - stages.lengths(stage))[request]
        row = begin[request] + stages.starts(stage)[request] + inside
        found.append(np.stack([row, request, np.full(size, stage)]))
    chosen = np.concatenate(found, axis=1)
    return chosen[:, np.argsort(chosen[0], kind="stable")]
