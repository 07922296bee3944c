"""The trace format: what is written is read, and everything else is one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import FormatError, MoeplanError, OutputError, UsageError
from moeplan.io.files import sha256
from moeplan.io.json import read_json
from moeplan.trace import UNKNOWN, TraceWriter, open_trace
from moeplan.types import ModelShape

SHAPE = ModelShape(name="tiny", num_layers=3, num_experts=8, top_k=2, layer_ids=(1, 3, 45), hidden=64)


def picks(rows: int, shape: ModelShape = SHAPE, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, shape.num_experts, (rows, shape.num_layers, shape.top_k))


def write(path: Path, lengths: list[tuple[int, int]], shape: ModelShape = SHAPE, **options: Any) -> list[np.ndarray]:
    """A trace of requests of (rows, prefill); returns their picks."""
    blocks = [picks(rows, shape, seed) for seed, (rows, _) in enumerate(lengths)]
    with TraceWriter(path, shape, source={"test": True}, **options) as writer:
        for number, (block, (_, prefill)) in enumerate(zip(blocks, lengths, strict=True)):
            writer.add(block, prefill=prefill, domain=f"d{number % 2}")
    return blocks


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four requests in two parts."""
    write(tmp_path / "t", [(4, 2), (3, 0), (5, UNKNOWN), (2, 2)], part_picks=7 * 6)
    return tmp_path / "t"


def repaint(trace: Path, change: Callable[[pa.Table], pa.Table], file: str = "part-00000.parquet") -> None:
    """Change a parquet file and mend the checksums, as somebody who wants to be believed would."""
    path = trace / file
    pq.write_table(change(pq.read_table(path)), path)
    mend_checksums(trace)


def mend_checksums(trace: Path) -> None:
    head = json.loads((trace / "trace.json").read_text())
    for part in head["parts"]:
        part["sha256"] = sha256(trace / part["file"])
    digest = hashlib.sha256("".join(part["sha256"] for part in head["parts"]).encode()).hexdigest()
    reshape_head(trace, parts=head["parts"], checksum=digest, requests_sha256=sha256(trace / "requests.parquet"))


def reshape_head(trace: Path, **changes: Any) -> None:
    head = json.loads((trace / "trace.json").read_text())
    (trace / "trace.json").write_text(json.dumps({**head, **changes}))


def with_column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    experts = data.draw(st.sampled_from([1, 8, 256, 257, 1000]))
    shape = ModelShape("m", data.draw(st.integers(1, 4)), experts, data.draw(st.integers(1, min(4, experts))))
    rows = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    lengths = [(n, data.draw(st.integers(UNKNOWN, n))) for n in rows]
    with tempfile.TemporaryDirectory() as folder:
        part_picks = data.draw(st.integers(1, 400))
        blocks = write(Path(folder) / "t", lengths, shape, part_picks=part_picks)
        trace = open_trace(Path(folder) / "t")
        loaded = trace.load()
        parts = list(trace.parts())
    assert trace.shape == shape and trace.complete and not trace.synthetic
    np.testing.assert_array_equal(loaded.experts, np.concatenate(blocks))
    np.testing.assert_array_equal(np.concatenate([part.experts for part in parts]), loaded.experts)
    assert [part.first for part in parts] == list(np.cumsum([0] + [len(part) for part in parts[:-1]]))
    assert trace.requests.prefill.tolist() == [prefill for _, prefill in lengths]
    assert [trace.requests.domains[d] for d in trace.requests.domain] == [f"d{i % 2}" for i in range(len(lengths))]
    assert np.isnan(trace.requests.arrival).all()


def test_phases_of_a_part(trace: Path) -> None:
    rows = open_trace(trace).load()
    assert [list(zip(*rows.phase_ranges(p), strict=True)) for p in ("prefill", "decode", "unknown")] == [
        [(0, 2), (4, 4), (7, 7), (12, 14)],
        [(2, 4), (4, 7), (12, 12), (14, 14)],
        [(0, 0), (4, 4), (7, 12), (12, 12)],
    ]
    assert open_trace(trace).requests.decode.tolist() == [2, 3, 0, 0]


def test_layers_left_out(trace: Path) -> None:
    whole, some = open_trace(trace), open_trace(trace, without_layers=[45])
    np.testing.assert_array_equal(some.load().experts, whole.load().experts[:, :2])
    assert some.shape.layer_ids == (1, 3) and some.checksum == whole.checksum
    with pytest.raises(UsageError, match="no such layer; its MoE layers are 1, 3, 45"):
        open_trace(trace, without_layers=[2])
    with pytest.raises(UsageError, match="leaves no layer"):
        open_trace(trace, without_layers=[1, 3, 45])


def test_weights_and_arrival(tmp_path: Path) -> None:
    gates = np.random.default_rng(0).random((4, 3, 2)).astype(np.float16)
    with TraceWriter(tmp_path / "t", SHAPE, source={}, weights=True) as writer:
        writer.add(picks(4), prefill=1, weights=gates, arrival=2.5)
        with pytest.raises(FormatError, match="gate weights are missing"):
            writer.add(picks(4), prefill=1)
    trace = open_trace(tmp_path / "t", without_layers=[3])
    (part,) = trace.parts(weights=True)
    np.testing.assert_array_equal(part.weights, gates[:, [0, 2]])
    assert trace.requests.arrival.tolist() == [2.5]


def test_a_trace_without_weights_says_so(trace: Path) -> None:
    with pytest.raises(UsageError, match="no gate weights"):
        next(open_trace(trace).parts(weights=True))


def test_other_tools_open_it(trace: Path) -> None:
    table = pq.read_table(trace / "part-00001.parquet")
    assert table.column_names == ["request", "position", "phase", "experts"]
    assert table.schema.field("experts").type == pa.list_(pa.field("item", pa.uint8(), nullable=False), 6)
    assert table["request"].to_pylist() == [2] * 5 + [3] * 2
    assert table["phase"].to_pylist() == ["unknown"] * 5 + ["prefill"] * 2
    assert pq.read_table(trace / "requests.parquet")["decode"].to_pylist() == [2, 3, None, 0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda w: w.add(picks(2)[:, :2], prefill=0), r"rows of shape \[2, 2\], but the trace has 3 layers x 2 picks"),
        (lambda w: w.add(picks(2) + 8, prefill=0, where="a.json"), "a.json: row 0, layer 1: expert .* outside 0..7"),
        (lambda w: w.add(picks(2) - 8, prefill=0), "request 0: row 0, layer 1: expert -. is outside"),
        (lambda w: w.add(picks(0), prefill=0), "without any token row"),
        (lambda w: w.add(picks(2), prefill=3), "prefill length 3 does not fit 2 rows"),
        (lambda w: w.add(picks(2), prefill=0, domain="a\nb"), "domain label"),
        (lambda w: w.add(picks(2), prefill=0, positions=np.arange(3)), "positions"),
        (lambda w: None, "no request to write"),
    ],
)
def test_bad_requests_leave_nothing(tmp_path: Path, fault: Callable[[TraceWriter], Any], message: str) -> None:
    with pytest.raises(FormatError, match=message), TraceWriter(tmp_path / "t", SHAPE, source={}) as writer:
        fault(writer)
    assert not (tmp_path / "t").exists()


def test_output_that_exists_or_cannot_be_made(tmp_path: Path, trace: Path) -> None:
    before = sorted((p.name, p.stat().st_size) for p in trace.iterdir())
    with pytest.raises(OutputError, match="already exists"):
        write(trace, [(1, 0)])
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "t"):
        with pytest.raises(OutputError):
            write(place, [(1, 0)])
    assert sorted((p.name, p.stat().st_size) for p in trace.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_a_stop_keeps_what_was_added(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), TraceWriter(tmp_path / "t", SHAPE, source={}, part_picks=30) as writer:
        for number in range(5):
            writer.add(picks(3, seed=number), prefill=1)
        raise kind
    trace = open_trace(tmp_path / "t")
    assert not trace.complete and len(trace.requests) == 5
    np.testing.assert_array_equal(trace.load().experts, np.concatenate([picks(3, seed=i) for i in range(5)]))


def test_a_kill_between_any_two_files_leaves_a_readable_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the directory before each rename: what a kill at that moment would leave."""
    states: list[Path] = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path / "t":
            states.append(Path(shutil.copytree(tmp_path / "t", tmp_path / f"state{len(states)}")))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    blocks = write(tmp_path / "t", [(3, 1)] * 6, part_picks=2 * 18)
    assert len(states) == 9  # three parts, each with its requests and its json
    for number, state in enumerate(states):
        if number < 3:
            with pytest.raises(FormatError, match="not a moeplan trace"):
                open_trace(state)
            continue
        trace = open_trace(state)
        finished = 2 * (number // 3)
        assert not trace.complete and len(trace.requests) == finished
        np.testing.assert_array_equal(trace.load().experts, np.concatenate(blocks[:finished]))


def read(trace: Path) -> None:
    for _ in open_trace(trace).parts():
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_column("experts", pa.array([[0] * 6] * 6 + [[0, 0, 9, 0, 0, 0]], pa.list_(pa.uint8(), 6))),
            r"part-00000.parquet: row 6: expert 9 is outside 0..7",
        ),
        (
            with_column("experts", pa.array([[0] * 6] * 6 + [[0] * 5], pa.list_(pa.uint8()))),
            r"part-00000.parquet: row 6: 5 picks, expected 6",
        ),
        (with_column("experts", pa.array([[0] * 4] * 7, pa.list_(pa.uint8(), 4))), "4 picks, expected 6"),
        (with_column("experts", pa.array([[-1] * 6] * 7, pa.list_(pa.int8(), 6))), "not unsigned ids"),
        (with_column("experts", pa.array([[0.5] * 6] * 7)), "not unsigned ids"),
        (with_column("experts", pa.array([[0] * 6] * 6 + [None], pa.list_(pa.uint8(), 6))), "null|had size=0"),
        (with_column("experts", pa.array([0] * 7)), "a list column was expected"),
        (
            with_column("request", pa.array([0] * 3 + [1] * 4, pa.uint32())),
            "row 3: request 1 where .* has 0",
        ),
        (with_column("phase", pa.array(["decode"] * 7)), "row 0: phase 'decode', expected 'prefill'"),
        (with_column("phase", pa.array([None] * 7, pa.string()).dictionary_encode()), "row 0: phase"),
        (lambda t: t.slice(0, 5), "5 rows, but requests.parquet counts 7"),
        (lambda t: pa.concat_tables([t, t]), "declares 14 rows, expected at most 7"),
        (lambda t: t.drop_columns(["phase"]), "phase"),
    ],
)
def test_a_part_that_lies(trace: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    repaint(trace, change)
    with pytest.raises(FormatError, match=message):
        read(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_column("prefill", pa.array([5, 0, None, 2])), "row 0: 5 prefill rows of 4"),
        (with_column("rows", pa.array([4, 0, 5, 2])), "row 1: 0 prefill rows of 0"),
        (with_column("rows", pa.array([4, 3, 5, 9])), "counts 21 rows, the parts hold 14"),
        (with_column("rows", pa.array(list("abcd"))), "column rows does not hold numbers"),
        (with_column("arrival", pa.array(list("abcd"))), "column arrival does not hold numbers"),
        (lambda t: t.slice(0, 2), "2 requests, but trace.json counts 4"),
        (
            lambda t: t.append_column("dp_rank", pa.array([0, 1, None, -7])),
            "row 3: data-parallel rank -7 is outside 0..2147483647",
        ),
        (lambda t: t.append_column("dp_rank", pa.array(list("abcd"))), "column dp_rank does not hold numbers"),
    ],
)
def test_a_table_of_requests_that_lies(trace: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    repaint(trace, change, "requests.parquet")
    with pytest.raises(FormatError, match=message):
        read(trace)


def test_cut_off_and_changed_files(trace: Path) -> None:
    part = trace / "part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    with pytest.raises(FormatError, match=r"part-00001.parquet: checksum differs from trace.json"):
        read(trace)
    mend_checksums(trace)
    with pytest.raises(FormatError, match=r"part-00001.parquet: is not a valid parquet file"):
        read(trace)
    part.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read(trace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4}, "is of version 4, this moeplan reads up to 3; update moeplan"),
        ({"version": True}, "is of version True"),
        ({"requires": ["fewer-picks", "more"]}, "requires 'more', which this moeplan does not know; update moeplan"),
        ({"requires": ["aggregated"]}, "is of version 3 and sums 1 requests a row"),
        ({"prompts": {"kind": "words"}}, "prompts.kind is words, which is not supported"),
        ({"format": "other"}, "is not a moeplan-trace file"),
        ({"parts": []}, "holds no request"),
        (
            {"parts": [{"file": "../secret", "rows": 1, "requests": 1, "sha256": ""}]},
            r"parts\[0\].file: '../secret' is not part-00000.parquet",
        ),
        ({"checksum": "0"}, "checksum does not match"),
        ({"requests_sha256": "0"}, r"requests.parquet: checksum differs"),
        ({"model": {**SHAPE.to_dict(), "top_k": 99}}, "top-99 of 8 experts"),
        ({"model": {**SHAPE.to_dict(), "num_layers": "x"}}, "model.num_layers is x, not a whole number"),
        ({"model": 3}, "not an object"),
    ],
)
def test_a_head_that_lies(trace: Path, changes: dict[str, Any], message: str) -> None:
    reshape_head(trace, **changes)
    with pytest.raises(MoeplanError, match=message):
        read(trace)


def test_json_bombs(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json"
    path.write_text("[" * 200_000)
    with pytest.raises(FormatError, match="nested too deeply"):
        read_json(path)
    path.write_text('{"a": 1')
    with pytest.raises(FormatError, match=r"invalid or truncated JSON .*; the file may be truncated"):
        read_json(path)
    path.write_text("[1, 2, 3]")
    with pytest.raises(FormatError, match="9 bytes of JSON are more than the 8"):
        read_json(path, max_bytes=8)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read_json(path)


def begin(path: Path, lengths: list[tuple[int, int]], stop: BaseException, **options: Any) -> None:
    """A recording that ends in `stop` after these requests."""
    with contextlib.suppress(type(stop)), TraceWriter(path, SHAPE, source={"test": True}, **options) as writer:
        add_all(writer, lengths)
        raise stop


def add_all(writer: TraceWriter, lengths: list[tuple[int, int]]) -> None:
    for number in range(len(writer), len(lengths)):
        rows, prefill = lengths[number]
        gates = np.random.default_rng(number).random((rows, 3, 2)) if writer.weights else None
        arrival = None if number % 3 else number / 2
        writer.add(
            picks(rows, seed=number), prefill=prefill, domain=f"d{number % 2}", weights=gates, arrival=arrival,
            positions=np.arange(rows) + number,
        )  # fmt: skip


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("weights", [False, True])
def test_a_resumed_recording_equals_an_uninterrupted_one(tmp_path: Path, weights: bool) -> None:
    lengths = [(4, 2), (3, 0), (5, UNKNOWN), (2, 2), (6, 1), (1, 1), (7, 3)]
    options: dict[str, Any] = {"weights": weights, "part_picks": 8 * 6}
    with TraceWriter(tmp_path / "whole", SHAPE, source={"test": True}, **options) as writer:
        add_all(writer, lengths)
    for cut in range(1, len(lengths) + 1):
        path = tmp_path / f"cut-{cut}"
        begin(path, lengths[:cut], KeyboardInterrupt(), **options)
        begin(path, lengths[: cut + 1], RuntimeError(), mode="resume", **options)
        with TraceWriter(path, SHAPE, source={"test": True}, mode="resume", **options) as writer:
            assert len(writer) == min(cut + 1, len(lengths))
            add_all(writer, lengths)
        assert files_of(path) == files_of(tmp_path / "whole")


def test_a_kill_while_the_last_part_is_rewritten_leaves_the_parts_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "t", [(4, 2), (3, 0), (5, 1)], KeyboardInterrupt(), part_picks=8 * 6)
    snapshots: list[Path] = []
    rename = Path.replace

    def snapshot(path: Path, target: Path) -> Path:
        """Path.replace, with a copy of everything taken after each rename: what a kill would leave."""
        rename(path, target)
        snapshots.append(Path(shutil.copytree(tmp_path / "t", tmp_path / f"kill-{len(snapshots)}")))
        return target

    with TraceWriter(tmp_path / "t", SHAPE, source={"test": True}, part_picks=8 * 6, mode="resume") as writer:
        monkeypatch.setattr(Path, "replace", snapshot)
        add_all(writer, [(4, 2), (3, 0), (5, 1), (2, 2), (6, 1)])
    monkeypatch.undo()
    assert len(snapshots) >= 5
    for copy in snapshots:
        trace = open_trace(copy)
        assert len(trace.load().experts) == trace.requests.rows.sum() >= 7


def test_only_the_same_recording_is_resumed(tmp_path: Path, trace: Path) -> None:
    begin(tmp_path / "t2", [(4, 2), (3, 0)], KeyboardInterrupt())
    other = dataclasses.replace(SHAPE, name="other")
    for path, shape, options, message in (
        (trace, SHAPE, {}, "is complete; there is nothing to resume"),
        (tmp_path / "t2", other, {}, "another shape"),
        (tmp_path / "t2", SHAPE, {"source": {"test": False}}, "begun with test True, not False"),
        (tmp_path / "t2", SHAPE, {"weights": True}, "resume without --keep-gate-weights"),
        (tmp_path / "none", SHAPE, {}, "does not exist"),
    ):
        before = files_of(path) if path.exists() else {}
        with pytest.raises(MoeplanError, match=message):
            TraceWriter(path, shape, **{"source": {"test": True}, "mode": "resume", **options})
        assert (files_of(path) if path.exists() else {}) == before
