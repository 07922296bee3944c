"""Megatron's router traces come in as they were recorded; everything else is one clear line and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engine_files import refused_when_cut, same, save
from moeplan.errors import FormatError
from moeplan.importers.megatron import import_megatron
from moeplan.importers.options import ImportOptions
from moeplan.model.config import described

E8 = ImportOptions(described(num_experts=8))


def line(layer: int, indices: Any, *, step: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": 0,
        "num_tokens": len(indices),
        "topk": len(indices[0]) if indices else 2,
        "top_indices": indices,
        **changes,
    }


def test_megatron_file(engines: Path, tmp_path: Path) -> None:
    trace = import_megatron(
        [engines / "router_trace_rank0.jsonl"], tmp_path / "t", ImportOptions(described(num_experts=4))
    )
    same(trace, np.array([[[0, 3], [0, 3]], [[1, 2], [1, 2]]]), (2, 3))
    assert trace.requests.prefill.tolist() == [-1] and "no request ids" in trace.source["notes"][0]


def test_megatron_file_cut_off(engines: Path, tmp_path: Path) -> None:
    config = {"num_experts": 4, "num_hidden_layers": 4, "first_k_dense_replace": 2}
    spec = described(save(tmp_path / "c.json", config))
    whole, path, out = (
        (engines / "router_trace_rank0.jsonl").read_bytes().rstrip(),
        tmp_path / "r.jsonl",
        tmp_path / "t",
    )
    refused_when_cut(whole, path, out, lambda: import_megatron([path], out, ImportOptions(spec)))


def test_megatron_steps_are_pseudo_requests(tmp_path: Path) -> None:
    first, second = [[0, 3], [1, 2]], [[4, 5]]
    lines = [line(2, first), line(1, first), line(0, first, block="mtp")]
    lines += [line(1, [], step=1), line(2, [], step=1), line(1, second, step=2), line(2, second, step=2)]
    trace = import_megatron([save(tmp_path / "router_trace_rank0.jsonl", *lines)], tmp_path / "t", E8)
    assert trace.requests.rows.tolist() == [2, 1] and trace.shape.layer_ids == (1, 2)
    assert any("lines of block mtp were left out" in note for note in trace.source["notes"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"step": 0}], "line 1: block is missing"),
        ([line(1, [[0, 1]], block="mtp")], "holds no decoder line"),
        ([line(1, [[0, 1]]), line(1, [[0, 1]])], "line 2: layer 1 appears twice in step 0"),
        ([line(1, [[0, 1]]), line(2, [[0, 1], [2, 3]])], "step 0: its layers differ in tokens or k"),
        ([line(1, [[0, 1]]), line(2, [[0, 1, 2]])], "its layers differ in tokens or k"),
        ([line(1, [[0, 1]]), line(2, [[0, 1]]), line(1, [[0, 1]], step=1)], "step 1: has layers 1, the first step 1-2"),
        ([line(1, [[0, 1]]), line(1, [[0, 1, 2]], step=1)], "step 1: 3 picks per token, expected 2"),
        ([line(1, [[0, 1]], step=1), line(1, [[0, 1]], step=0)], "step 0 after step 1; steps must increase"),
        ([line(1, [[0, 1]]), line(2, [[0, 1]], rank=1)], "rank 1 in a file of rank 0"),
        ([line(1, [[0, 1]], topk=3)], "topk is 3, but top_indices has 2"),
        ([line(1, [[0, 1]], num_tokens=3)], "num_tokens is 3, but top_indices has 1"),
        ([line(1, [[0, 1], [2]])], "top_indices is not .tokens..k. expert ids"),
        ([line(1, [[0.5, 1]])], r"top_indices\[0\]\[0\] is 0.5, not a whole number"),
        ([line(1, [[0, 8]])], "row 0, layer 1: expert 8 is outside 0..7"),
        ([line(1, [[-1, 2]])], "row 0, layer 1: expert -1 is outside 0..7"),
        ([line(1, [[2, 2]])], "row 0, layer 1: expert 2 is picked twice"),
        ([], "holds no decoder line"),
    ],
)
def test_bad_megatron_traces(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_megatron([save(tmp_path / "r.jsonl", *lines)], tmp_path / "t", E8)
    assert not (tmp_path / "t").exists()
