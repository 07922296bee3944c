"""Importer of dumps of SGLang's ExpertDistributionRecorder (0.5.23, srt/eplb/expert_distribution.py).

`stat` and `per_pass` are counts: they become a counts profile. `per_token` has a row per token but no request ids: its
requests are rebuilt (`sglang_requests.py`) or it is refused, and `counts=True` counts it. Its ids are physical slots,
mapped back with `last_physical_to_logical_map`; its width is always 8, padded with -1. `input_ids` is not read, nor is
`misc_objects`, one list that all records share, so that every record shows the last pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int32Array, Int64Array
from moeplan.errors import FormatError, UsageError, located
from moeplan.importers.options import ImportOptions, write_trace
from moeplan.importers.routed_experts import check_picks
from moeplan.importers.sglang_requests import COUNTS_HINT, Pass, rebuild
from moeplan.importers.sources import source_files
from moeplan.io.torch import integers, load_pt
from moeplan.progress import Progress, silent
from moeplan.trace.counts import CountsProfile, equal_ranks_notes, make_counts, write_counts
from moeplan.trace.format import Request
from moeplan.trace.reader import Trace
from moeplan.types import MAX_EXPERTS

__all__ = ["import_sglang_recorder"]

EXTEND, DECODE, IDLE = 1, 2, 4  # srt/model_executor/forward_batch_info.py, ForwardMode

#: Picks of one expert in one pass; what may be added up without overflow.
MAX_COUNT = 2**40

REBALANCED = "ids were mapped back with the last expert map: a rebalance during the recording would make them wrong"
REBUILT = "requests were rebuilt from positions and the order in the batch; a retracted request counts as two"

Picks = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Dump:
    """One rank's file with records; `slots` int64 [hidden layers, P], the logical expert in each physical slot."""

    path: Path
    records: list[dict[str, Any]]
    slots: Int64Array

    @property
    def num_experts(self) -> int:
        return int(self.slots.max()) + 1


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a dump; `picks` int32 [rows, MoE layers, k], logical, in the order of the passes."""

    dump: _Dump
    passes: list[Pass]
    picks: Picks
    moe_layers: tuple[int, ...]


def import_sglang_recorder(
    sources: Sequence[Path],
    out: Path,
    options: ImportOptions = ImportOptions(),
    *,
    counts: bool = False,
    phase: str = "unknown",
    progress: Progress = silent,
) -> Trace | CountsProfile:
    """Turn the dumps of one recording, a file per rank, into a trace (`per_token`) or a counts profile.

    Args:
        counts: make a counts profile of `per_token` as well.
        phase: what was counted, where the dump does not say it.

    Raises:
        UsageError: torch is missing; options for a trace on a dump of counts.
        FormatError: a file that is truncated or no dump, ranks that do not belong together, requests that cannot be
            rebuilt.
    """
    files = source_files(sources, ".pt")
    loaded = [(path, load_pt(path)) for path in files]
    kinds = {_kind(data, path) for path, data in loaded}
    if len(kinds) > 1:
        raise FormatError(f"dumps of {' and '.join(sorted(kinds))}", where=str(files[0].parent), hint="give one kind")
    kind = kinds.pop()
    if kind != "per_token" and (options.domain is not None or options.without_layers):
        raise UsageError(
            f"a {kind} dump is counts without requests: --domain and --without-layers have no meaning",
            where=str(files[0]),
        )
    if kind == "stat":
        return write_counts(_count_stat(loaded, options, phase), out)
    dumps = []
    for path, data in loaded:
        with located(str(path)):
            dumps.append(_dump(data, path))
    _check_ranks(dumps)
    if kind == "per_pass":
        return write_counts(_count_passes(dumps, options, phase), out)
    ranks = [_read_tokens(dump) for dump in dumps]
    if counts:
        return write_counts(_count_tokens(ranks, options), out)
    return _write_requests(ranks, out, options, progress)


def _kind(data: dict[str, Any], path: Path) -> str:
    if "logical_count" in data:
        return "stat"
    records = data.get("records")
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise FormatError(
            "is no dump of SGLang's expert recorder: it has no logical_count and no records", where=str(path)
        )
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _dump(data: dict[str, Any], path: Path) -> _Dump:
    slots = integers(data.get("last_physical_to_logical_map"), 2, "last_physical_to_logical_map")
    if not slots.size or int(slots.min()) < 0 or int(slots.max()) >= MAX_EXPERTS:
        raise FormatError("last_physical_to_logical_map holds no expert, or ids out of range")
    experts = np.arange(int(slots.max()) + 1)
    for layer, row in enumerate(slots):
        if not np.isin(experts, row).all():
            missing = int(experts[~np.isin(experts, row)][0])
            raise FormatError(f"last_physical_to_logical_map, layer {layer}: expert {missing} has no slot")
    return _Dump(path, data["records"], slots)


def _check_ranks(dumps: Sequence[_Dump]) -> None:
    """Files of one recording: one per rank, with the same map."""
    seen: dict[int, Path] = {}
    for dump in dumps:
        ranks = [record.get("rank") for record in dump.records]
        rank = ranks[0]
        with located(str(dump.path)):
            if type(rank) is not int or rank < 0 or any(type(other) is not int or other != rank for other in ranks):
                raise FormatError("its records are not of one rank")
            if rank in seen:
                what = f"is of rank {rank}, as is {seen[rank].name}"
                raise FormatError(what, hint="import one recording at a time")
            if not np.array_equal(dump.slots, dumps[0].slots):
                hint = "give the ranks of one recording, without a rebalance in between"
                raise FormatError(f"has another expert map than {dumps[0].path.name}", hint=hint)
        seen[rank] = dump.path


# --- counts ---------------------------------------------------------------------------------------------------------


def _count_stat(loaded: Sequence[tuple[Path, dict[str, Any]]], options: ImportOptions, phase: str) -> CountsProfile:
    if len(loaded) > 1:
        raise UsageError(
            f"{len(loaded)} stat dumps are {len(loaded)} recordings: rank 0 writes one for all ranks",
            hint="import them into counts profiles of their own",
        )
    path, data = loaded[0]
    passes = integers(data["logical_count"], 3, "logical_count", f"{path}")
    expected = options.model.num_experts
    if expected is not None and passes.shape[2] != expected:
        raise FormatError(f"counts {passes.shape[2]} experts, expected {expected}", where=str(path))
    if passes.size and not (int(passes.min()) >= 0 and int(passes.max()) < MAX_COUNT):
        raise FormatError("logical_count holds a count that is negative or too large", where=str(path))
    notes = []
    if len(passes) and passes.any(axis=(1, 2)).all():
        notes.append(
            f"all {len(passes)} passes of the buffer are used: if it was full, earlier ones (such as prefill) are lost"
        )
    source = {"import": "sglang-recorder", "kind": "stat", "file": path.name, "passes": len(passes), "notes": notes}
    name, top_k = options.model.name or "", options.model.top_k
    return make_counts(passes.sum(axis=0), where=str(path), source=source, name=name, top_k=top_k, phase=phase)


def _count_passes(dumps: Sequence[_Dump], options: ImportOptions, phase: str) -> CountsProfile:
    per_rank = []
    for dump in dumps:
        physical = np.zeros(dump.slots.shape, np.int64)
        for number, record in enumerate(dump.records):
            with located(f"{dump.path}, record {number}"):
                found = integers(record.get("global_physical_count"), 2, "global_physical_count")
                if found.shape != physical.shape or (found < 0).any() or (found >= MAX_COUNT).any():
                    shapes = f"{list(found.shape)} is not counts of {list(physical.shape)} slots"
                    raise FormatError(f"global_physical_count {shapes}")
            physical += found
        per_rank.append(_to_logical(physical, dump))
    return _profile(dumps, per_rank, "per_pass", options, options.model.top_k, phase)


def _count_tokens(ranks: Sequence[_Tokens], options: ImportOptions) -> CountsProfile:
    per_rank, modes = [], set()
    for rank in ranks:
        totals = np.zeros((len(rank.dump.slots), rank.dump.num_experts), np.int64)
        for column, layer in enumerate(rank.moe_layers):
            totals[layer] = np.bincount(rank.picks[:, column].reshape(-1), minlength=rank.dump.num_experts)
        per_rank.append(totals)
        modes |= {"decode" if step.lengths is None else "prefill" for step in rank.passes}
    phase, top_k = modes.pop() if len(modes) == 1 else "mixed", ranks[0].picks.shape[2]
    return _profile([rank.dump for rank in ranks], per_rank, "per_token", options, top_k, phase)


def _profile(
    dumps: Sequence[_Dump],
    per_rank: Sequence[Int64Array],
    kind: str,
    options: ImportOptions,
    top_k: int | None,
    phase: str,
) -> CountsProfile:
    notes = [REBALANCED, *equal_ranks_notes(per_rank)]
    passes = max(len(dump.records) for dump in dumps)
    source = {"import": "sglang-recorder", "kind": kind, "files": len(dumps), "passes": passes, "notes": notes}
    totals, where, name = np.sum(per_rank, axis=0), str(dumps[0].path), options.model.name or ""
    return make_counts(totals, where=where, source=source, name=name, top_k=top_k, phase=phase)


def _to_logical(physical: Int64Array, dump: _Dump) -> Int64Array:
    """Counts of slots [L, P] as counts of experts [L, E]; an expert's copies add up."""
    logical = np.zeros((len(physical), dump.num_experts), np.int64)
    for layer, slots in enumerate(dump.slots):
        np.add.at(logical[layer], slots, physical[layer])
    return logical


# --- tokens ---------------------------------------------------------------------------------------------------------


def _read_tokens(dump: _Dump) -> _Tokens:
    """The tokens of one rank."""
    passes: list[Pass] = []
    blocks: list[Int32Array] = []
    moe_layers: tuple[int, ...] = ()
    k = 0
    for number, record in enumerate(dump.records):
        where = f"{dump.path}, record {number}"
        with located(where):
            step = _read_pass(record, where)
            if not len(step.positions):
                continue
            ids = integers(record.get("topk_ids_of_layer"), 3, "topk_ids_of_layer")
            layers, tokens = len(dump.slots), len(step.positions)
            if ids.shape[:2] != (layers, tokens):
                what = f"topk_ids_of_layer {list(ids.shape)} does not fit {layers} layers and {tokens} tokens"
                raise FormatError(what)
            if not moe_layers:
                moe_layers = tuple(int(i) for i in np.flatnonzero((ids != -1).any(axis=(1, 2))))
                k = int((ids != -1).sum(axis=2).max())
            if not moe_layers:
                raise FormatError("no layer has a pick", hint="check how it was recorded")
            blocks.append(_logical_picks(ids, moe_layers, k, dump.slots))
        passes.append(step)
    if not passes:
        raise FormatError("holds no token", where=str(dump.path), hint="record while requests run")
    return _Tokens(dump, passes, np.concatenate(blocks), moe_layers)


def _read_pass(record: dict[str, Any], where: str) -> Pass:
    if record.get("gatherer_key", "primary") != "primary":
        raise FormatError("was recorded with two-batch overlap: a pass is split in two", hint="record without it")
    mode = record.get("forward_mode")
    positions = integers(record.get("positions"), 1, "positions")
    if (positions < 0).any() or (positions >= 2**31).any():
        raise FormatError("positions are out of range")
    if mode == EXTEND:
        return Pass(positions, integers(record.get("extend_seq_lens"), 1, "extend_seq_lens"), where)
    if mode == DECODE:
        return Pass(positions, None, where)
    if mode == IDLE:
        return Pass(positions[:0], None, where)
    hint = "record without mixed chunks and speculative decoding, or use stat mode"
    raise FormatError(f"forward_mode {str(mode)[:20]} is neither extend (1) nor decode (2)", hint=hint)


def _logical_picks(ids: Int64Array, moe_layers: Sequence[int], k: int, slots: Int64Array) -> Int32Array:
    """Logical picks int32 [tokens, MoE layers, k] of one pass's physical ids [layers, tokens, 8], -1 being padding."""
    used = (ids != -1).sum(axis=2)
    expected = np.zeros(len(ids), np.int64)
    expected[list(moe_layers)] = k
    odd = np.argwhere(used != expected[:, None])
    if len(odd) or (ids[list(moe_layers), :, :k] == -1).any():
        layer, token = odd[0] if len(odd) else (moe_layers[0], 0)
        raise FormatError(f"layer {layer}, token {token}: {used[layer, token]} picks, expected {expected[layer]}")
    picks = np.empty((ids.shape[1], len(moe_layers), k), np.int32)
    for column, layer in enumerate(moe_layers):
        physical = ids[layer, :, :k]
        if int(physical.min()) < 0 or int(physical.max()) >= slots.shape[1]:
            hint = "fused shared experts are not supported: record with --disable-shared-experts-fusion"
            raise FormatError(f"layer {layer}: a slot is outside 0..{slots.shape[1] - 1}", hint=hint)
        picks[:, column] = slots[layer][physical]
    return picks


def _write_requests(ranks: Sequence[_Tokens], out: Path, options: ImportOptions, progress: Progress) -> Trace:
    _refuse_same_tokens(ranks)
    path, experts, layers = ranks[0].dump.path, ranks[0].dump.num_experts, ranks[0].moe_layers
    top_k = ranks[0].picks.shape[2]
    shape = options.shape(num_experts=experts, top_k=top_k, layer_ids=layers, where=str(path))
    owners = [rebuild(rank.passes) for rank in ranks]
    source = {"import": "sglang-recorder", "kind": "per_token", "files": len(ranks), "notes": [REBUILT, REBALANCED]}

    def requests() -> Iterator[Request]:
        for done, (rank, owner) in enumerate(zip(ranks, owners, strict=True)):
            own = rank.dump.path
            if rank.moe_layers != layers or rank.picks.shape[2] != top_k:
                raise FormatError(f"has other MoE layers or another k than {path.name}", where=str(own))
            positions = np.concatenate([step.positions for step in rank.passes])
            order = np.argsort(owner.request, kind="stable")  # a request's rows, in the order of the passes
            ends = np.cumsum(np.bincount(owner.request, minlength=len(owner.prefill)))
            for request, rows in enumerate(np.split(order, ends[:-1])):
                where = f"{own}, request {request}"
                picks = check_picks(rank.picks[rows], range(len(layers)), experts, where, layer_ids=layers)
                prefill, domain = int(owner.prefill[request]), options.label(own)
                yield Request(picks, prefill, domain, positions=positions[rows], where=where)
            progress(done + 1, len(ranks), own.name)

    return write_trace(out, shape, requests(), options, source)


def _refuse_same_tokens(ranks: Sequence[_Tokens]) -> None:
    """Without data-parallel attention every rank records every token: imported together they would be there twice."""
    first = ranks[0]
    for rank in ranks[1:]:
        if np.array_equal(rank.picks, first.picks):
            raise FormatError(
                f"holds the same tokens as {first.dump.path.name} (attention without data parallelism)",
                where=str(rank.dump.path),
                hint=f"give the file of one rank only; {COUNTS_HINT}",
            )
