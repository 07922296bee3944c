"""What is in a trace or a counts profile, as plain values: the JSON of the verbs that make one."""

from __future__ import annotations

from typing import Any

from moeplan.profile.imbalance import imbalance_factor
from moeplan.trace.counts import CountsProfile
from moeplan.trace.reader import Trace

__all__ = ["counts_summary", "trace_summary"]


def trace_summary(trace: Trace) -> dict[str, Any]:
    """Model, requests, tokens by phase and domain of a trace."""
    requests, shape = trace.requests, trace.shape
    unknown = requests.prefill < 0
    tokens = int(requests.rows.sum())
    counts = [(requests.domain == i).sum() for i in range(len(requests.domains))]
    return {
        "trace": str(trace.path),
        "model": shape.name,
        "synthetic": trace.synthetic,
        "requests": len(requests),
        "tokens": tokens,
        "picks": None if trace.fewer_picks else tokens * shape.num_layers * shape.top_k,
        "layers": shape.num_layers,
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "hidden": shape.hidden,
        "without_layers": list(trace.without_layers),
        "domains": {label: int(count) for label, count in zip(requests.domains, counts, strict=True)},
        "prefill_tokens": int(requests.prefill_known.sum()),
        "decode_tokens": int(requests.decode.sum()),
        "unknown_tokens": int(requests.rows[unknown].sum()),
        "requests_with_unknown_phases": int(unknown.sum()),
        "requests_without_prefill": int((requests.prefill == 0).sum()),
        "requests_without_decode": int(((requests.decode == 0) & ~unknown).sum()),
        "aggregate": trace.aggregate,
        "dropped": trace.dropped,
        "left_over": trace.left_over,
        "min_tokens": trace.source.get("min_tokens", 1),
        "checksum": trace.checksum,
    }


def counts_summary(profile: CountsProfile) -> dict[str, Any]:
    """Model, picks and load imbalance by layer of a counts profile."""
    factors = imbalance_factor(profile.counts)
    return {
        "counts": str(profile.path),
        "model": profile.name,
        "layers": len(profile.layer_ids),
        "layer_ids": list(profile.layer_ids),
        "experts": profile.counts.shape[1],
        "top_k": profile.top_k,
        "phase": profile.phase,
        "picks": int(profile.counts.sum()),
        "imbalance": [float(factor) for factor in factors],
        "mean_imbalance": float(factors.mean()),
        "largest_expert": [int(expert) for expert in profile.counts.argmax(axis=1)],
        "notes": list(profile.source.get("notes", ())),
        "checksum": profile.checksum,
    }
