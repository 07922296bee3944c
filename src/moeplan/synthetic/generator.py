"""A seeded generator of synthetic workloads: domains, phases, load imbalance, and differences between requests.

A topic model. Each token draws a topic from its request's mixture and all its picks, at every layer, from that topic's
weights: hence picks of one token go together. A request's mixture is Dirichlet around its domain's: hence requests
differ, and a request's decode resembles its prefill. `presets.py` says what sets which figure.

The model's weights belong to the preset and are the same for every seed; the seed draws the requests. A layer's picks
do not depend on which other layers are kept, nor a request's on how requests are cut into chunks.

Names: Z topics, X = 2 Z tables (prefill's, then decode's), L layers, E experts, k picks per token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan._kernels.sampling import alias_tables, mix64, sample_picks
from moeplan.errors import UsageError
from moeplan.progress import Progress, silent
from moeplan.synthetic.presets import Preset, find_preset
from moeplan.trace.format import Requests, Rows, layer_spans
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.writer import TraceWriter
from moeplan.types import ModelShape, expert_dtype

__all__ = ["Workload", "WorkloadSettings", "draw_workload", "generate", "generate_rows"]

#: Picks drawn at once: what the generator holds in memory beside the writer's part.
CHUNK_PICKS = 8 * 1024 * 1024
MAX_REQUESTS, MAX_TOKENS = 10_000_000, 1_000_000
#: Lengths vary as a gamma of this shape: a coefficient of variation of one half.
LENGTH_SHAPE = 4.0

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Experts = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Workload:
    """Everything about a synthetic workload but its picks, which `picks` draws for any run of requests.

    Attributes:
        shape: the model, of the layers asked for.
        requests: lengths and domains.
        mixtures: float64 [R, 2, Z], each request's topics in prefill and in decode; each sums to 1.
        keys: uint64 [R], each request's random key.
        salts: uint64 [L], each layer's.
        aliases: uint32 [X, L, E]; masses: float64 [X, L, G]; see `sample_picks`.
        groups_per_token: expert groups that a token's picks come from.
    """

    shape: ModelShape
    requests: Requests
    mixtures: FloatArray
    keys: npt.NDArray[np.uint64]
    salts: npt.NDArray[np.uint64]
    aliases: npt.NDArray[np.uint32]
    masses: FloatArray
    groups_per_token: int

    def picks(self, first: int, last: int) -> Experts:
        """Picks of requests first .. last - 1: unsigned [rows, L, k], as they follow each other in the trace."""
        rows = self.requests.rows[first:last]
        request = np.repeat(np.arange(first, last), rows)
        position = np.arange(len(request)) - np.repeat(np.cumsum(rows) - rows, rows)
        decode = (position >= self.requests.prefill[request]).astype(np.int64)
        # A token's key: one draw for its topic, the rest for its picks.
        keys = mix64(self.keys[request] + mix64(position.astype(np.uint64)))
        coin = (mix64(~keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        until = np.cumsum(self.mixtures, axis=2)
        topics = until.shape[2]
        topic = np.minimum((coin[:, None] >= until[request, decode]).sum(axis=1), topics - 1)
        shape = self.shape
        out = np.empty((len(request), shape.num_layers, shape.top_k), expert_dtype(shape.num_experts))
        sample_picks(keys, decode * topics + topic, self.salts, self.aliases, self.masses, self.groups_per_token, out)
        return out

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last) of runs of requests of about `CHUNK_PICKS` picks each."""
        limit = max(1, CHUNK_PICKS // (self.shape.num_layers * self.shape.top_k))
        first, held = 0, 0
        for request, rows in enumerate(self.requests.rows):
            if held and held + rows > limit:
                yield first, request
                first, held = request, 0
            held += int(rows)
        yield first, len(self.requests)


@dataclass(frozen=True)
class WorkloadSettings:
    """What is drawn of a preset.

    Attributes:
        requests, prefill, decode: how many, and mean tokens of each; None: the preset's. Domains come equally often, in
            random order. A request's own tokens are gamma distributed (coefficient of variation one half, at most four
            times the mean), at least 1 prefill and 8 decode where the mean allows.
        seed: of the requests.
        layers: keep only the first n MoE layers, or those with these layer ids of the model.
        exact: give every request exactly `prefill` and `decode` tokens.
    """

    requests: int | None = None
    prefill: int | None = None
    decode: int | None = None
    seed: int = 0
    layers: int | Sequence[int] | None = None
    exact: bool = False


def generate(
    preset: str | Preset, out: Path, settings: WorkloadSettings = WorkloadSettings(), progress: Progress = silent
) -> Trace:
    """Write a synthetic trace.

    Raises:
        UsageError: no such preset or layer, or sizes that make no trace.
        OutputError: `out` exists or cannot be written.
    """
    workload = draw_workload(preset, settings)
    table = workload.requests
    source = {"generate": workload.shape.name, "seed": settings.seed, "exact_lengths": settings.exact}
    with TraceWriter(out, workload.shape, source=source, synthetic=True) as writer:
        for first, last in workload.chunks():
            picks = workload.picks(first, last)
            ends = np.cumsum(table.rows[first:last])
            for request, stop in zip(range(first, last), ends, strict=True):
                writer.add(
                    picks[stop - table.rows[request] : stop],
                    prefill=int(table.prefill[request]),
                    domain=table.domains[table.domain[request]],
                )
            progress(last, len(table), f"{int(table.rows[:last].sum())} tokens")
    return open_trace(out)


def generate_rows(
    preset: str | Preset, settings: WorkloadSettings = WorkloadSettings()
) -> tuple[ModelShape, Requests, Rows]:
    """The same workload as `generate` writes, in memory."""
    workload = draw_workload(preset, settings)
    picks = np.concatenate([workload.picks(first, last) for first, last in workload.chunks()])
    table = workload.requests
    return workload.shape, table, Rows(0, picks, table.offsets, table.prefill)


def draw_workload(preset: str | Preset, settings: WorkloadSettings = WorkloadSettings()) -> Workload:
    """Draw the requests (domain, lengths, mixtures) and build the model's tables.

    Raises:
        UsageError: no such preset or layer, or sizes that make no trace.
    """
    preset, seed, exact = find_preset(preset), settings.seed, settings.exact
    requests = preset.requests if settings.requests is None else settings.requests
    prefill = preset.prefill if settings.prefill is None else settings.prefill
    decode = preset.decode if settings.decode is None else settings.decode
    for label, value, low, high in (
        ("requests", requests, 1, MAX_REQUESTS),
        ("prefill tokens", prefill, 0, MAX_TOKENS),
        ("decode tokens", decode, 0, MAX_TOKENS),
        ("tokens", prefill + decode, 1, 2 * MAX_TOKENS),
        ("as seed", seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise UsageError(f"{value} {label} is outside {low}..{high}")
    shape, kept = _layers_kept(preset.shape, settings.layers)
    rng = np.random.default_rng([seed, zlib.crc32(preset.name.encode())])
    domain = rng.permutation(np.arange(requests) % len(preset.domains))
    lengths = _draw_lengths(rng, requests, prefill, 1, exact), _draw_lengths(rng, requests, decode, 8, exact)
    mixtures = _draw_mixtures(rng, preset, domain)
    key = rng.integers(2**63, dtype=np.uint64)
    with np.errstate(over="ignore"):
        keys = mix64(key + mix64(np.arange(requests, dtype=np.uint64)))
    order = list(dict.fromkeys(domain.tolist()))  # in order of first appearance, as a reader finds them
    rank = np.zeros(len(preset.domains), np.int64)
    rank[order] = np.arange(len(order))
    table = Requests(
        rows=lengths[0] + lengths[1],
        prefill=lengths[0],
        domain=rank[domain],
        domains=tuple(preset.domains[d][0] for d in order),
        arrival=np.full(requests, np.nan),
        dp_rank=np.full(requests, -1, np.int64),
    )
    aliases, masses = _tables(preset, kept)
    salts = mix64(np.array([preset.shape.layer_ids[i] for i in kept], np.uint64) + np.uint64(1 << 32))
    return Workload(shape, table, mixtures, keys, salts, aliases, masses, preset.groups_per_token)


def _layers_kept(shape: ModelShape, layers: int | Sequence[int] | None) -> tuple[ModelShape, list[int]]:
    """The shape of the layers asked for, and their indices in the whole model."""
    if layers is None:
        return shape, list(range(shape.num_layers))
    if isinstance(layers, int):
        if not 1 <= layers <= shape.num_layers:
            raise UsageError(f"{layers} layers is outside 1..{shape.num_layers}")
        kept = list(range(layers))
    else:
        missing = [layer for layer in layers if layer not in shape.layer_ids]
        if missing or not layers:
            raise UsageError(
                f"{shape.name} has no MoE layer {missing[0]}" if missing else "no layer is left",
                hint=f"its MoE layers are {layer_spans(shape.layer_ids)}",
            )
        kept = sorted({shape.layer_ids.index(layer) for layer in layers})
    ids = tuple(shape.layer_ids[i] for i in kept)
    return replace(shape, num_layers=len(ids), layer_ids=ids), kept


def _draw_lengths(rng: np.random.Generator, requests: int, mean: int, least: int, exact: bool) -> Int64Array:
    """int64 [R], tokens of one phase."""
    drawn = rng.gamma(LENGTH_SHAPE, mean / LENGTH_SHAPE, requests) if mean else np.zeros(requests)
    if exact:
        return np.full(requests, mean, np.int64)
    return np.clip(np.rint(drawn), min(least, mean), 4 * mean).astype(np.int64)


def _draw_mixtures(rng: np.random.Generator, preset: Preset, domain: Int64Array) -> FloatArray:
    """float64 [R, 2, Z]: topics of each request, in prefill and in decode."""
    centre = _domain_mixtures(preset)
    alpha = preset.concentration * centre[domain]
    first, second = rng.standard_gamma(alpha), rng.standard_gamma(alpha)
    first /= first.sum(axis=1, keepdims=True)
    second /= second.sum(axis=1, keepdims=True)
    return np.stack([first, (1 - preset.drift) * first + preset.drift * second], axis=1)


def _domain_mixtures(preset: Preset) -> FloatArray:
    """float64 [domains, Z]: its own topics, its family's, and a little of everything."""
    families = [family for _, family in preset.domains]
    owner = np.repeat(np.arange(len(families)), preset.topics_per_domain)
    own = owner[None, :] == np.arange(len(families))[:, None]
    kin = np.array([[families[d] == families[o] for o in owner] for d in range(len(families))])
    share = 1.0 - preset.family_share - preset.common_share
    mixture: FloatArray = (
        share * own / own.sum(axis=1, keepdims=True)
        + preset.family_share * kin / kin.sum(axis=1, keepdims=True)
        + preset.common_share / len(owner)
    )
    return mixture


def _tables(preset: Preset, kept: Sequence[int]) -> tuple[npt.NDArray[np.uint32], FloatArray]:
    """Alias tables uint32 [X, L, E] and group masses float64 [X, L, G] of the layers kept."""
    experts, groups = preset.shape.num_experts, preset.shape.routing_groups
    weights = np.empty((2 * preset.num_topics, len(kept), experts))
    for row, index in enumerate(kept):
        weights[:, row] = _layer_weights(preset, index)
    aliases = np.empty(weights.shape, np.uint32)
    alias_tables(weights.reshape(-1, experts), groups, aliases.reshape(-1, experts))
    return aliases, weights.reshape(*weights.shape[:2], groups, -1).sum(axis=3)


def _layer_weights(preset: Preset, index: int) -> FloatArray:
    """float64 [X, E]: every topic's expert weights in prefill, then in decode, at one layer of the whole model."""
    experts, topics = preset.shape.num_experts, preset.num_topics
    rng = np.random.default_rng([zlib.crc32(preset.name.encode()), index])
    popularity = preset.base_spread * rng.uniform(0.7, 1.3) * rng.standard_normal(experts)
    phase = preset.phase_spread * rng.standard_normal(experts)
    topic = preset.topic_spread * rng.standard_normal((topics, experts))
    logs: FloatArray = np.concatenate([popularity + phase + topic, popularity - phase + topic])
    return np.exp(logs)
