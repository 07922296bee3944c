"""Importer of TensorRT-LLM's expert statistics: counts without requests.

A folder with `meta_info.json` and one `rank{r}.safetensors` per EP rank, with keys "{iteration}_{layer}", int64 [E]
each (EXPERT_STATISTIC_PATH; tensorrt_llm/_torch/.../expert_statistic.py as of 0fccc5b9).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError
from moeplan.importers.options import ImportOptions
from moeplan.io.json import read_json
from moeplan.io.paths import readable
from moeplan.io.safetensors import read_integer_vectors
from moeplan.trace.counts import CountsProfile, equal_ranks_notes, make_counts, write_counts
from moeplan.types import MAX_EXPERTS, MAX_K

__all__ = ["import_tensorrt_llm"]


class _Meta(msgspec.Struct):
    """What `meta_info.json` holds."""

    num_experts: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPERTS)]
    num_experts_per_token: Annotated[int, msgspec.Meta(ge=1, le=MAX_K)]


def import_tensorrt_llm(
    folder: Path, out: Path, options: ImportOptions = ImportOptions(), *, phase: str = "unknown"
) -> CountsProfile:
    """A folder of statistics into a counts profile: sums over iterations and ranks.

    Raises:
        FormatError: a rank missing or truncated, ranks that differ in iterations or layers, another number of experts.
    """
    meta_path = folder / "meta_info.json"
    meta: _Meta = read_json(meta_path, _Meta, max_bytes=1024 * 1024)
    experts, top_k = meta.num_experts, meta.num_experts_per_token
    files = _rank_files(folder)
    ranks = [_read_rank(path, experts) for path in files]
    for path, rank in zip(files, ranks, strict=True):
        if rank.keys() != ranks[0].keys():
            raise FormatError(f"has other iterations or layers than {files[0].name}", where=str(path))
    layers = sorted({layer for _, layer in ranks[0]})
    iterations = sorted({iteration for iteration, _ in ranks[0]})
    per_rank = np.zeros((len(ranks), len(layers), experts), np.int64)
    for own, rank in zip(per_rank, ranks, strict=True):
        for (_, layer), counts in rank.items():
            own[layers.index(layer)] += counts
    spans, notes = [iterations[0], iterations[-1]], equal_ranks_notes(list(per_rank))
    source = {"import": "tensorrt-llm", "files": len(files), "iterations": spans, "notes": notes}
    known: Any = {"layer_ids": tuple(layers), "name": options.model.name or "", "top_k": top_k, "phase": phase}
    return write_counts(make_counts(per_rank.sum(axis=0), where=str(folder), source=source, **known), out)


def _rank_files(folder: Path) -> list[Path]:
    """rank0.safetensors .. without a gap."""
    with readable(folder):
        names = [path.name for path in folder.iterdir()]
    ranks = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"rank([0-9]{1,6})\.safetensors", name)))
    if not ranks or ranks != list(range(len(ranks))):
        missing = next(i for i in range(len(ranks) + 1) if i not in ranks)
        raise FormatError(
            f"has no rank{missing}.safetensors", where=str(folder), hint="copy the files of all ranks (as many as EP)"
        )
    return [folder / f"rank{rank}.safetensors" for rank in ranks]


def _read_rank(path: Path, experts: int) -> dict[tuple[int, int], Int64Array]:
    """{(iteration, layer): int64 [E]} of one file."""
    counts: dict[tuple[int, int], Int64Array] = {}
    for key, vector in read_integer_vectors(path).items():
        match = re.fullmatch(r"([0-9]{1,12})_([0-9]{1,6})", key)
        if not match:
            raise FormatError(f"key {key[:40]!r} is not iteration_layer", where=str(path))
        if len(vector) != experts:
            raise FormatError(f"{key}: {len(vector)} counts for {experts} experts", where=str(path))
        if (vector < 0).any() or (vector >= 2**40).any():
            raise FormatError(f"{key}: a count is negative or too large", where=str(path))
        counts[int(match[1]), int(match[2])] = vector
    if not counts:
        raise FormatError("holds no counts", where=str(path))
    iterations, layers = {i for i, _ in counts}, {layer for _, layer in counts}
    if len(counts) != len(iterations) * len(layers):
        raise FormatError("an iteration lacks a layer that another one has", where=str(path))
    return counts
