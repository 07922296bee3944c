"""Tokens with fewer than k picks: stored, read, counted and planned on as if the missing ones were not there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan as mp
from moeplan.cli.app import run
from moeplan.cluster import Dispatch
from moeplan.errors import FormatError
from moeplan.profile.counts import count
from moeplan.profile.distinct import Distinct, distinct
from moeplan.replay.settings import EvaluationSettings
from moeplan.trace import TraceWriter, open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

FEWER = RetentionPolicy(fewer_picks=True)
FIGURES = (
    "remote_share",
    "remote_nodes_per_token",
    "padded_ratio",
    "gpu_load_ratio",
    "node_load_total",
    "experts_per_gpu",
)


def write(path: Path, blocks: list[np.ndarray], experts: int, retention: RetentionPolicy = FEWER) -> Path:
    shape = ModelShape("m", blocks[0].shape[1], experts, blocks[0].shape[2], hidden=2048)
    with TraceWriter(path, shape, source={}, retention=retention, part_picks=2000) as writer:
        for number, block in enumerate(blocks):
            writer.add(block, prefill=len(block) // 2, domain="ab"[number % 2])
    return path


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 8, 255, 256, 257]), st.integers(0, 999))
def test_what_is_written_is_read(experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(-1, experts, (int(rng.integers(1, 9)), 2, min(experts, 3))) for _ in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        trace = open_trace(write(Path(folder) / "t", blocks, experts))
        loaded = trace.load()
        (part,) = trace.parts()
    expected = np.concatenate(blocks)
    expected = np.where(expected < 0, experts, expected)
    np.testing.assert_array_equal(loaded.experts, expected)
    assert trace.requires == ("fewer-picks",) and trace.fewer_picks
    assert loaded.experts.dtype == part.experts.dtype == (np.uint8 if experts < 256 else np.uint16)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_they_are_refused_unless_they_are_expected(wrong: int, tmp_path: Path) -> None:
    block = np.full((4, 2, 2), wrong)
    with pytest.raises(FormatError, match=f"row 0, layer 0: expert {wrong} is outside"):
        write(tmp_path / "t", [block], 8, RetentionPolicy())
    with pytest.raises(FormatError, match="expert 9 is outside"):
        write(tmp_path / "t", [block * 0 + 9], 8)


def npz(path: Path, picks: np.ndarray, **more: Any) -> list[str]:
    offsets = np.array([0, len(picks)])
    np.savez(path, experts=picks, request_offsets=offsets, prefill_lengths=[1], num_experts=8, **more)
    return ["import", "arrays", str(path), "-o", str(path.with_suffix(""))]


def test_arrays_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picks = np.arange(12).reshape(3, 2, 2) % 9 - 1
    assert run(npz(tmp_path / "a.npz", picks)) == 2
    assert "expert -1 is outside" in capsys.readouterr().err
    assert run(npz(tmp_path / "b.npz", picks, fewer_picks=True)) == 0
    np.testing.assert_array_equal(open_trace(tmp_path / "b").load().experts, np.where(picks < 0, 8, picks))
    assert run(["import", "trace", str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 0
    np.testing.assert_array_equal(open_trace(tmp_path / "c").load().experts, np.where(picks < 0, 8, picks))


def test_sums_leave_them_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.integers(-1, 8, (6, 2, 3)) for _ in range(4)]
    write(tmp_path / "t", blocks, 8, RetentionPolicy(aggregate=2, fewer_picks=True))
    trace = open_trace(tmp_path / "t")
    assert trace.requires == ("aggregated", "fewer-picks")
    (sums,) = trace.sums()
    for layer in range(2):
        picks = np.concatenate(blocks[::2])[:, layer]
        assert sums.counts[:, 0, layer].sum() == (picks >= 0).sum()
    write(tmp_path / "u", blocks[:2], 8)
    head = (tmp_path / "t" / "trace.json").read_text().replace('"fewer-picks"', "")
    (tmp_path / "t" / "trace.json").write_text(head.replace('"aggregated",', '"aggregated"'))
    with pytest.raises(FormatError, match="are not 3 picks a layer"):
        list(open_trace(tmp_path / "t").sums())


def test_a_missing_pick_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """A top-2 trace, and the same one written as top-3 with one pick of every token missing, at any place."""
    rng = np.random.default_rng(1)
    popular = rng.dirichlet(np.full(8, 0.5), (2, 2))
    blocks, padded = [], []
    for number in range(60):
        rows = [
            [rng.choice(8, 2, replace=False, p=popular[number % 2, layer] * 0.9 + 0.1 / 8) for layer in range(2)]
            for _ in range(24)
        ]
        block = np.array(rows)
        blocks.append(block)
        order = np.argsort(rng.random((24, 2, 3)), axis=2)
        padded.append(np.take_along_axis(np.concatenate((block, np.full((24, 2, 1), -1)), axis=2), order, axis=2))
    plain, fewer = (
        open_trace(write(tmp_path / "a", blocks, 8, RetentionPolicy())),
        open_trace(write(tmp_path / "b", padded, 8)),
    )
    for dispatch in (Dispatch.PICK, Dispatch.NODE):
        how: Any = {"dispatch": dispatch, "settings": EvaluationSettings(folds=2, steps=20, bootstrap_draws=20)}
        tables = [
            mp.compare(trace, mp.Cluster(2, 2), ("linear", "moeplan"), redundant=4, **how) for trace in (plain, fewer)
        ]
        one, other = (table.to_dict()["strategies"] for table in tables)
        for row, key in ((row, key) for row in one for key in FIGURES):
            assert one[row][key]["value"] == pytest.approx(other[row][key]["value"], rel=1e-9), (dispatch, row, key)
    first, second = (distinct(count(trace), np.arange(2)) for trace in (plain, fewer))
    assert isinstance(first, Distinct) and isinstance(second, Distinct)
    for key in ("mixed", "single", "uniform", "popular"):
        np.testing.assert_allclose(getattr(first, key), getattr(second, key))
