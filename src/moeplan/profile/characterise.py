"""`profile_trace`: one pass over the trace, then every measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.errors import expect
from moeplan.profile.coactivation import Coactivation, coactivation
from moeplan.profile.common import Skipped, plain
from moeplan.profile.counts import DECODE, PREFILL, STAGES, Counts, count
from moeplan.profile.distinct import Distinct, distinct
from moeplan.profile.imbalance import Imbalance, imbalance
from moeplan.profile.leakage import Leakage, leakage
from moeplan.profile.phases import Phases, phases
from moeplan.profile.privacy import Privacy, privacy
from moeplan.profile.request_map import RequestMap, request_map
from moeplan.profile.similarity import Similarity, similarity
from moeplan.progress import Progress
from moeplan.trace import UNKNOWN, Trace

__all__ = ["Profile", "profile_trace"]


@dataclass(frozen=True)
class Profile:
    """Measures of a trace. One that cannot be computed is a `Skipped` with the reason.

    Attributes:
        trace, seed, counts: what was measured.
        notices: read before any figure (synthetic, sampled, substituted phases, layers left out of means).
        similarity, maps: by stage, keys "prefill" and "decode".
    """

    trace: Trace
    seed: int
    counts: Counts
    notices: tuple[str, ...]
    imbalance: Imbalance
    similarity: dict[str, Similarity | Skipped]
    phases: Phases | Skipped
    leakage: Leakage | Skipped
    privacy: Privacy
    maps: dict[str, RequestMap | Skipped]
    coactivation: Coactivation | Skipped
    distinct: Distinct | Skipped

    @property
    def stage_labels(self) -> dict[str, str]:
        """Label of each stage: 'prefill', or 'first 48 decode tokens' where those are used in its place."""
        return {name: self.counts.stages.label(s) for s, name in enumerate(STAGES)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a measure that could not be computed is null or {"skipped": reason}."""
        counts, trace = self.counts, self.trace
        figures: dict[str, Any] = plain(
            {
                "trace": {
                    "path": trace.path.name,
                    "checksum": trace.checksum,
                    "model": trace.shape.to_dict(),
                    "synthetic": trace.synthetic,
                    "complete": trace.complete,
                    "without_layers": trace.without_layers,
                    "requests": len(trace.requests),
                    "aggregate": trace.aggregate,
                    "dropped": trace.dropped,
                    "left_over": trace.left_over,
                    "tokens": trace.requests.rows.sum(),
                    "rows_by_stage": {name: counts.stages.lengths(s).sum() for s, name in enumerate(STAGES)},
                    "requests_by_domain": {name: (counts.domain == d).sum() for d, name in enumerate(counts.domains)},
                },
                "seed": self.seed,
                "signature_tokens": counts.stages.signature_tokens,
                "stages": self.stage_labels,
                "usable_requests": counts.stages.usable.sum(),
                "sampled_requests": len(counts.sample),
                "notices": self.notices,
                "imbalance": self.imbalance,
                "similarity": self.similarity,
                "predictability": self.phases,
                "request_types": self.leakage,
                "privacy": self.privacy,
                "map": self.maps,
                "coactivation": self.coactivation,
                "distinct_experts": self.distinct,
            }
        )
        return figures


def profile_trace(
    trace: Trace, *, seed: int = 0, signature_tokens: int | None = None, progress: Progress | None = None
) -> Profile:
    """Characterise a trace.

    Args:
        trace: opened; its parts are read once, one at a time.
        seed: random seed; the same seed gives the same figures.
        signature_tokens: N: use the first N rows in place of the prefill; every label then says so.
        progress: called with (done, total, note).

    Raises:
        UsageError: no request is long enough for `signature_tokens`.
        FormatError: an invalid part.
    """
    expect(trace, Trace, 'moeplan.open_trace("PATH")')
    import sklearn.linear_model
    import sklearn.manifold  # noqa: F401  (threadpoolctl limits only libraries that are loaded)
    from threadpoolctl import threadpool_limits

    counts = count(trace, seed=seed, signature_tokens=signature_tokens, progress=progress)
    stages = {"prefill": PREFILL, "decode": DECODE}
    # One thread: there are thousands of small matrix products, and on a busy machine synchronising threads makes them
    # ten times slower. The figures then do not depend on the number of cores either.
    with threadpool_limits(1):
        load = imbalance(counts, seed=seed)
        kept = load.kept
        return Profile(
            trace=trace,
            seed=seed,
            counts=counts,
            notices=_notices(trace, counts, load),
            imbalance=load,
            similarity={name: similarity(counts, stage, kept, seed=seed) for name, stage in stages.items()},
            phases=phases(counts, kept, seed=seed),
            leakage=leakage(counts, kept, seed=seed, progress=progress),
            privacy=privacy(counts, kept, trace.aggregate, seed=seed),
            maps={name: request_map(counts, stage, kept, seed=seed) for name, stage in stages.items()},
            coactivation=coactivation(counts, seed=seed),
            distinct=distinct(counts, kept, seed=seed),
        )


def _notices(trace: Trace, counts: Counts, load: Imbalance) -> tuple[str, ...]:
    requests, stages = trace.requests, counts.stages
    found = []
    if trace.synthetic:
        found.append("Synthetic: this workload was generated, it is not a recording of a model.")
    if not trace.complete:
        found.append("The recording is incomplete: only its finished parts are used.")
    if trace.aggregate > 1:
        found.append(
            f"Each row is the sum of {trace.aggregate} requests of one domain (--aggregate), called a request below."
        )
    if stages.signature_tokens is not None:
        found.append(
            f"The {stages.prefill} stand in for the prefill and the {stages.decode} for the decode (--signature-tokens "
            f"{stages.signature_tokens}); {int(stages.usable.sum())} of {len(requests)} requests are long enough."
        )
    else:
        unknown = int((requests.prefill == UNKNOWN).sum())
        if unknown:
            found.append(f"{unknown} of {len(requests)} requests have unknown phases.")
    found += [
        f"Layer {load.layer_ids[layer]}: expert {load.largest[layer]} takes {load.largest_share[layer]:.1%} of all "
        "picks; the layer is reported and left out of every mean."
        for layer in np.flatnonzero(load.flagged)
    ]
    if trace.without_layers:
        found.append(f"Without layers {', '.join(map(str, trace.without_layers))}.")
    if counts.sample_text:
        found.append(
            f"Per-request measures are {counts.sample_text}, drawn by domain (fixed seed); totals are of all requests."
        )
    if len(counts.domains) < counts.labels:
        found.append(
            f"{counts.labels} domain labels are too many to show: folded by the part before '/'"
            + (f", and the {counts.lumped} rarest lumped under '(other)'." if counts.lumped else ".")
        )
    return tuple(found)
