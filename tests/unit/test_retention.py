"""Storing less: short requests dropped, sums of N requests in place of token rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.cli.app import run
from moeplan.errors import FormatError, UsageError
from moeplan.io.files import sha256
from moeplan.trace import UNKNOWN, Trace, TraceWriter, open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

SHAPE = ModelShape(name="tiny", num_layers=3, num_experts=8, top_k=2, layer_ids=(1, 3, 45))
#: (picks [rows, L, k], prefill, domain)
Request = tuple[np.ndarray, int, str]


def draw(lengths: list[tuple[int, int, str]]) -> list[Request]:
    """Requests of (rows, prefill, domain), each with picks of its own."""
    found = []
    for number, (rows, prefill, domain) in enumerate(lengths):
        score = np.random.default_rng(number).random((rows, SHAPE.num_layers, SHAPE.num_experts))
        found.append((score.argsort(axis=2)[:, :, : SHAPE.top_k], prefill, domain))
    return found


def write(
    path: Path,
    requests: list[Request],
    keep: RetentionPolicy,
    stop: RuntimeError | None = None,
    *,
    resume: bool = False,
    **options: Any,
) -> Any:
    """Record the requests that are still pending; `stop` ends the recording before it is complete.

    Returns:
        The trace, or None where nothing was written before the stop.
    """
    writer = TraceWriter(path, SHAPE, source={}, retention=keep, mode="resume" if resume else "record", **options)
    with contextlib.suppress(RuntimeError), writer:
        pending = writer.pending([domain for _, _, domain in requests])
        for (picks, prefill, domain), new in zip(requests, pending, strict=True):
            if new:
                writer.add(picks, prefill=prefill, domain=domain)
        if stop:
            raise stop
    return open_trace(path) if (path / "trace.json").exists() else None


def by_hand(requests: list[Request], keep: RetentionPolicy) -> list[tuple[str, int, int, np.ndarray]]:
    """(domain, rows, prefill, counts [3, L, E]) of each sum in the order in which they fill, by plain loops."""
    assert keep.aggregate
    open_: dict[str, list[Request]] = {}
    done = []
    for request in requests:
        if len(request[0]) < keep.min_tokens:
            continue
        members = open_.setdefault(request[2], [])
        members.append(request)
        if len(members) < keep.aggregate:
            continue
        counts = np.zeros((3, SHAPE.num_layers, SHAPE.num_experts), int)
        unknown = any(prefill == UNKNOWN for _, prefill, _ in members)
        for picks, prefill, _ in members:
            for row, token in enumerate(picks):
                for layer, chosen in enumerate(token):
                    counts[2 if unknown else int(row >= prefill), layer, chosen] += 1
        rows = sum(len(picks) for picks, _, _ in members)
        done.append((request[2], rows, UNKNOWN if unknown else sum(p for _, p, _ in members), counts))
        del open_[request[2]]
    return done


LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(-1, 9), st.sampled_from("abc")).map(lambda r: (r[0], min(r[:2]), r[2])),
    min_size=1,
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, aggregate=st.integers(2, 4), min_tokens=st.integers(1, 4), part_picks=st.integers(1, 200))
def test_a_sum_is_the_sum(lengths: list[Any], aggregate: int, min_tokens: int, part_picks: int) -> None:
    requests, keep = draw(lengths), RetentionPolicy(min_tokens, aggregate)
    expected = by_hand(requests, keep)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        if not expected:
            with pytest.raises(FormatError, match="no sum to write"):
                write(path, requests, keep, part_picks=part_picks)
            assert not path.exists()
            return
        trace = write(path, requests, keep, part_picks=part_picks)
        short = sum(len(picks) < min_tokens for picks, _, _ in requests)
        assert (trace.aggregate, trace.dropped) == (aggregate, short)
        assert trace.left_over == len(requests) - short - aggregate * len(expected)
        counts = np.concatenate([part.counts for part in trace.sums()], axis=1)
        assert counts.shape[1] == len(trace.requests) == len(expected)
        for i, (domain, rows, prefill, of) in enumerate(expected):
            np.testing.assert_array_equal(counts[:, i], of)
            assert (trace.requests.rows[i], trace.requests.prefill[i]) == (rows, prefill)
            assert trace.requests.domains[trace.requests.domain[i]] == domain
        fewer = open_trace(path, without_layers=[3])
        np.testing.assert_array_equal(
            np.concatenate([part.counts for part in fewer.sums()], axis=1), counts[:, :, [0, 2]]
        )


def test_nothing_of_a_single_request_is_on_disk(tmp_path: Path) -> None:
    requests = draw([(4 + i, 2, "ab"[i % 2]) for i in range(13)])
    for name, stop in (("whole", None), ("stopped", RuntimeError())):
        path = tmp_path / name
        trace = write(path, requests, RetentionPolicy(aggregate=3), stop, part_picks=50)
        assert trace.complete == (stop is None) and len(trace.requests) == 4 and trace.left_over == 1
        assert {f.name for f in path.iterdir()} == {
            "trace.json", "requests.parquet", *(f"part-{i:05d}.parquet" for i in range(len(list(trace.sums()))))
        }  # fmt: skip
        for part in path.glob("part-*"):
            assert set(pq.read_schema(part).names) == {"request", "phase", "counts"}
        table = pq.read_table(path / "requests.parquet").to_pydict()
        assert table["taken"] == [3, 3, 6, 6] and table["arrival"] == [None] * 4
        assert json.loads((path / "trace.json").read_text())["counts"]["requests"] == 12
        with pytest.raises(UsageError, match=r"is aggregated \(sums of 3 requests\): it has no token rows"):
            trace.load()


def test_short_requests_are_dropped_and_counted(tmp_path: Path) -> None:
    requests = draw([(3, 1, "a"), (5, 2, "a"), (4, UNKNOWN, "b"), (8, 8, "a")])
    trace = write(tmp_path / "t", requests, RetentionPolicy(min_tokens=5))
    assert trace.requests.rows.tolist() == [5, 8] and (trace.dropped, trace.left_over) == (2, 0)
    np.testing.assert_array_equal(trace.load().experts, np.concatenate([requests[1][0], requests[3][0]]))
    with pytest.raises(FormatError, match=r"none of the 4 requests has 9 tokens; use a smaller --min-tokens"):
        write(tmp_path / "none", requests, RetentionPolicy(min_tokens=9))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("keep", [RetentionPolicy(min_tokens=4), RetentionPolicy(aggregate=3), RetentionPolicy(4, 2)])
def test_a_resumed_recording_equals_an_uninterrupted_one(tmp_path: Path, keep: RetentionPolicy) -> None:
    rng = np.random.default_rng(0)
    lengths = [(int(n), int(rng.integers(0, n + 1)), "abbbbbc"[rng.integers(7)]) for n in rng.integers(1, 9, 40)]
    requests = draw(lengths)
    whole = write(tmp_path / "whole", requests, keep, part_picks=60)
    assert whole.dropped == sum(n < keep.min_tokens for n, _, _ in lengths)
    begun = 0
    for cut in range(1, 40, 3):
        path = tmp_path / f"cut-{cut}"
        for end in (cut, min(cut + 7, 40)):
            write(path, requests[:end], keep, RuntimeError(), part_picks=60, resume=(path / "trace.json").exists())
        begun += (path / "trace.json").exists()
        write(path, requests, keep, part_picks=60, resume=(path / "trace.json").exists())
        assert {f.name: f.read_bytes() for f in path.iterdir()} == {
            f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
        }
    assert begun > 8


def test_a_recording_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    requests = draw([(4, 2, "a")] * 7)
    for name, keep, other, message in (
        ("sums", RetentionPolicy(aggregate=3), RetentionPolicy(aggregate=2), "begun with aggregate 3, not 2"),
        ("sums", RetentionPolicy(aggregate=3), RetentionPolicy(), "begun with aggregate 3, not None"),
        ("rows", RetentionPolicy(min_tokens=2), RetentionPolicy(aggregate=3), "begun with aggregate None, not 3"),
    ):
        path = tmp_path / name
        if not path.exists():
            write(path, requests, keep, RuntimeError())
        before = {f.name: f.read_bytes() for f in path.iterdir()}
        with pytest.raises(UsageError, match=message):
            write(path, requests, other, resume=True)
        assert {f.name: f.read_bytes() for f in path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "is of version 1 and sums 3 requests a row"),
        ({"aggregate": 1}, "is of version 3 and sums 1 requests a row"),
        ({"aggregate": "3"}, "aggregate is 3, not a whole number"),
        ({"aggregate": True}, "aggregate is True, not a whole number"),
    ],
)
def test_a_head_that_lies(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "t", draw([(4, 2, "a")] * 6), RetentionPolicy(aggregate=3))
    head = json.loads((tmp_path / "t" / "trace.json").read_text())
    (tmp_path / "t" / "trace.json").write_text(json.dumps({**head, **change}))
    with pytest.raises(FormatError, match=message):
        open_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("request", [0, 0, 0, 1], "row 2: request 0, expected prefill of 1"),
        ("phase", ["prefill", "decode", "decode", "prefill"], "row 2: request 1, expected prefill of 1"),
        ("counts", [[1] * 24] * 4, r"row 0: its counts are not 2 picks a layer for each of 6 tokens"),
        ("counts", [[1] * 23] * 4, "row 0: 23 counts, expected 24"),
        ("counts", [[-1, 13, *[0] * 6] * 3] * 4, "its counts are not 2 picks a layer"),
        ("counts", [[0.5] * 24] * 4, "column counts holds float64, not integers"),
    ],
)
def test_a_part_that_lies(tmp_path: Path, column: str, value: Any, message: str) -> None:
    path = tmp_path / "t"
    write(path, draw([(4, 2, "a")] * 6), RetentionPolicy(aggregate=3))
    part = path / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(value)), part)
    head = json.loads((path / "trace.json").read_text())
    head["parts"][0]["sha256"] = sha256(part)
    head["checksum"] = hashlib.sha256(sha256(part).encode()).hexdigest()
    (path / "trace.json").write_text(json.dumps(head))
    with pytest.raises(FormatError, match=message):
        list(open_trace(path).sums())


def test_what_cannot_be_stored_so(tmp_path: Path) -> None:
    for flags, message in (
        ({"min_tokens": 0}, "--min-tokens 0 is not positive"),
        ({"aggregate": 1}, "--aggregate 1 must be at least 2"),
        ({"aggregate": -3}, "--aggregate -3 must be at least 2"),
    ):
        with pytest.raises(UsageError, match=message):
            RetentionPolicy(**flags)
    with pytest.raises(UsageError, match=r"no domain has so many requests, the largest has 2; .* --domain"):
        RetentionPolicy(aggregate=3).check(["a", "b", "a"])
    with pytest.raises(UsageError, match="no gate weights; leave --keep-gate-weights or --aggregate out"):
        RetentionPolicy(aggregate=2).check(["a", "a"], weights=True)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A trace of token rows with weights, positions, arrivals and ranks."""
    with TraceWriter(tmp_path / "full", SHAPE, source={"test": 1}, weights=True, part_picks=60) as writer:
        for number, (picks, prefill, domain) in enumerate(draw([(3 + i % 4, i % 3, "ab"[i % 2]) for i in range(11)])):
            gates = np.random.default_rng(number).random(picks.shape)
            arrival = number / 2 if number % 2 else None
            writer.add(
                picks,
                prefill=prefill,
                domain=domain,
                weights=gates,
                arrival=arrival,
                positions=np.arange(len(picks)) + 5,
                dp_rank=number % 3 if number % 4 else None,
            )
    return tmp_path / "full"


def test_import_trace_stores_less(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(name: str, *flags: str) -> tuple[Trace, str]:
        assert run(["import", "trace", str(full), "-o", str(tmp_path / name), *flags]) == 0
        return open_trace(tmp_path / name), capsys.readouterr().out

    copy, _ = convert("copy")
    np.testing.assert_array_equal(copy.load().experts, open_trace(full).load().experts)
    np.testing.assert_array_equal(copy.requests.arrival, open_trace(full).requests.arrival)
    assert copy.requests.dp_rank.tolist() == [n % 3 if n % 4 else -1 for n in range(11)]
    long, said = convert("long", "--min-tokens", "5")
    assert long.requests.rows.min() == 5 and "not stored: 6 requests of fewer than 5 tokens" in said
    (rows,) = list(long.parts(weights=True, positions=True))[:1]
    assert rows.positions is not None and rows.positions[0] == 5 and rows.weights is not None
    sums, said = convert("sums", "--aggregate", "3", "--without-layers", "3")
    assert sums.shape.layer_ids == (1, 45) and not sums.has_weights and (sums.requests.dp_rank == -1).all()
    assert "3 sums of 3 requests" in said and "not stored: 2 requests that do not fill a sum of 3" in said
    original = open_trace(full, without_layers=[3]).load()
    members = [i for i in range(11) if i % 2 == 0][:3]
    (part,) = sums.sums()
    expected = np.zeros((2, 8), int)
    for i in members:
        for token in original.experts[original.offsets[i] : original.offsets[i + 1]]:
            np.add.at(expected, (np.arange(2)[:, None], token), 1)
    np.testing.assert_array_equal(part.counts[:, 0].sum(axis=0), expected)
    mixed, _ = convert("mixed", "--aggregate", "5", "--domain", "all")
    assert mixed.requests.domains == ("all",) and mixed.left_over == 1


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("full", ["--aggregate", "7"], "no domain has so many requests, the largest has 6"),
        ("full", ["--aggregate", "1"], "--aggregate 1 must be at least 2"),
        ("full", ["--min-tokens", "0"], "--min-tokens 0 is not positive"),
        ("full", ["--min-tokens", "9"], "none of the 11 requests has 9 tokens"),
        ("full", ["--min-tokens", "6", "--aggregate", "4"], "no domain has 4 requests of at least 6 tokens"),
        ("sums", ["--aggregate", "2"], "is aggregated (sums of 2 requests): it has no token rows"),
        ("none", [], "does not exist"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, flags: list[str], message: str
) -> None:
    if source == "sums":
        assert run(["import", "trace", str(full), "-o", str(tmp_path / "sums"), "--aggregate", "2"]) == 0
        capsys.readouterr()
    assert run(["import", "trace", str(tmp_path / source), "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
