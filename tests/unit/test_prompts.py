"""Prompt features: hashing, files, importing, and what a trace of format 3 holds beside token rows."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan._kernels import ngrams
from moeplan.cli.app import run
from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.io.files import sha256
from moeplan.trace import TraceWriter, open_trace
from moeplan.trace.prompts import PromptFeatures, PromptPolicy, key_id, make_secret, read_secret, secret_beside
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

SHAPE = ModelShape(name="tiny", num_layers=2, num_experts=8, top_k=2)
SECRET = bytes(range(32))
#: Of the prompt 1, 2, 1 under SECRET.
KNOWN = {1356993878: 1, 1996077363: 2, 2490656832: 1, 3833726477: 1}
KEY = "e70d4306bad5bae5"
PROMPTS = [[3, 4, 3, 4, 9], [], [7], [2**32 - 1, 0, 2**32 - 1]]


def picks(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 8, (rows, 2, 2))


def write(path: Path, policy: PromptPolicy | None, **options: Any) -> None:
    """Four requests with PROMPTS, one part each."""
    retention = RetentionPolicy(prompts=policy)
    with TraceWriter(path, SHAPE, source={}, retention=retention, part_picks=8, **options) as writer:
        for number, prompt in enumerate(PROMPTS):
            features = PromptFeatures.of_ids([prompt]) if number != 1 else None
            writer.add(picks(3 + number), prefill=2, prompt=features, session=number // 2 if number else None, turn=1)


def npz(path: Path, **more: Any) -> Path:
    offsets = np.cumsum([0, 3, 4, 5, 6])
    arrays = {
        "experts": np.concatenate([picks(n) for n in (3, 4, 5, 6)]).astype(np.uint8),
        "request_offsets": offsets,
        "prefill_lengths": np.full(4, 2),
        "num_experts": 8,
        "prompt_tokens": np.concatenate(PROMPTS).astype(np.uint32),
        "prompt_offsets": np.cumsum([0, *map(len, PROMPTS)]),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **more}.items() if value is not None})
    return path


def test_the_hash_is_siphash() -> None:
    """First and last vectors of the authors' own list (reference implementation, vectors.h)."""
    key = np.frombuffer(bytes(range(16)), "<u8")
    assert ngrams.siphash_reference(b"", key) == int.from_bytes(bytes.fromhex("310e0edd47db6f72"), "little")
    assert ngrams.siphash_reference(bytes(range(15)), key) == 0xA129CA6149BE45E5


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 4), max_size=40), max_size=12),
    key=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    block=st.integers(1, 60),
)
def test_hashes_equal_the_reference(prompts: list[list[int]], key: tuple[int, int], block: int) -> None:
    features, words = PromptFeatures.of_ids(prompts), np.array(key, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "BLOCK", block)
        ends, hashes, counts = ngrams.count_ngrams(features.tokens, features.offsets, words)
    for number in range(len(prompts)):
        part = slice(ends[number], ends[number + 1])
        expected = ngrams.count_ngrams_reference(features.of(number)[0], words)
        np.testing.assert_array_equal(hashes[part], expected[0])
        np.testing.assert_array_equal(counts[part], expected[1])


def test_counts_saturate() -> None:
    hashed = PromptFeatures.of_ids([[5] * 70_000]).hashed(SECRET)
    assert hashed.counts is not None and hashed.counts.tolist() == [65535, 65535]


def test_a_hash_stays_what_it_is() -> None:
    """Plans and gateways hash by themselves: another result would make stored plans useless."""
    tokens, counts = PromptFeatures.of_ids([[1, 2, 1]]).hashed(SECRET).of(0)
    assert counts is not None
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == KNOWN
    assert key_id(SECRET) == KEY


def test_order_of_tokens_is_not_kept_but_pairs_are() -> None:
    one, other = (PromptFeatures.of_ids([ids]).hashed(SECRET) for ids in ([1, 2, 3, 1, 2], [3, 1, 2, 3, 1]))
    assert set(one.tokens) == set(other.tokens)  # 1, 2, 3, (1, 2), (2, 3), (3, 1)
    assert not set(one.tokens) & set(PromptFeatures.of_ids([[1, 2, 3, 1, 2]]).hashed(bytes(32)).tokens)


def test_take() -> None:
    for features in (PromptFeatures.of_ids(PROMPTS), PromptFeatures.of_ids(PROMPTS).hashed(SECRET)):
        some = features.take([3, 0, 0])
        assert len(some) == 3
        for place, number in enumerate((3, 0, 0)):
            np.testing.assert_array_equal(some.of(place)[0], features.of(number)[0])
        assert features.known.tolist() == [True, False, True, True]
        assert len(features.take(np.array([True, False, True, False]))) == 2
        assert len(features.take([])) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptFeatures("ids", np.array([0, 3]), np.zeros(2, np.uint32)), "rise from 0 to 2"),
        (lambda: PromptFeatures("hashed", np.array([0, 2]), np.zeros(2, np.uint32)), "need a count"),
        (lambda: PromptFeatures.of_ids([[1]]).hashed(b"short"), "a secret of 5 bytes can be guessed"),
        (lambda: PromptFeatures.of_ids([[1]]).hashed(SECRET).hashed(SECRET), "hashed already"),
        (lambda: PromptPolicy("hashed"), "need a secret"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(MoeplanError, match=message):
        make()


@pytest.mark.parametrize("kind", ["ids", "hashed"])
def test_what_is_written_is_read(kind: Any, tmp_path: Path) -> None:
    secret = SECRET if kind == "hashed" else None
    write(tmp_path / "t", PromptPolicy(kind, secret))
    trace, expected = open_trace(tmp_path / "t"), PromptFeatures.of_ids(PROMPTS)
    expected = expected.hashed(SECRET) if secret else expected
    prompts = trace.prompts
    assert prompts is not None and (prompts.kind, prompts.key) == (kind, key_id(SECRET) if secret else "")
    np.testing.assert_array_equal(prompts.offsets, expected.offsets)
    np.testing.assert_array_equal(prompts.tokens, expected.tokens)
    assert (prompts.counts is None) == (secret is None)
    if secret:
        np.testing.assert_array_equal(prompts.counts, expected.counts)
    for file in (tmp_path / "t").glob("prompts-*.parquet"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(list((tmp_path / "t").glob("prompts-*.parquet"))) == len(trace.stored_parts) == 4
    assert trace.requests.session is not None and trace.requests.session.tolist() == [-1, 0, 1, 1]
    assert trace.requests.turn is not None and trace.requests.turn.tolist() == [1] * 4
    assert trace.requests.between(1, 3).session.tolist() == [0, 1]  # type: ignore[union-attr]


def test_nothing_is_kept_unasked(tmp_path: Path) -> None:
    write(tmp_path / "t", None)
    trace = open_trace(tmp_path / "t")
    assert trace.prompts is None and not list((tmp_path / "t").glob("prompts-*"))


def repaint(trace: Path, table: pa.Table) -> None:
    """Change a file of prompts and its checksum."""
    pq.write_table(table, trace / "prompts-00000.parquet")
    head = json.loads((trace / "trace.json").read_text())
    head["parts"][0]["prompts_sha256"] = sha256(trace / "prompts-00000.parquet")
    (trace / "trace.json").write_text(json.dumps(head))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"counts": [[1]]}), "columns tokens"),
        (pa.table({"tokens": [[1], [2]], "counts": [[1], [1]]}), "declares 2 rows, expected at most 1"),
        (pa.table({"tokens": [1], "counts": [[1]]}), "a list column was expected"),
        (pa.table({"tokens": [[-1]], "counts": [[1]]}), "not uint32"),
        (pa.table({"tokens": [[None]], "counts": [[1]]}), r"empty \(null\)"),
        (pa.table({"tokens": [[1, 2]], "counts": [[1]]}), "counts do not match"),
        (pa.table({"tokens": [[2, 1]], "counts": [[1, 1]]}), "row 0: hashes must rise"),
        (pa.table({"tokens": [[1]], "counts": [[0]]}), "a count is 0"),
    ],
)
def test_damaged_prompts(table: pa.Table, message: str, tmp_path: Path) -> None:
    write(tmp_path / "t", PromptPolicy("hashed", SECRET))
    repaint(tmp_path / "t", table)
    with pytest.raises(FormatError, match=message):
        _ = open_trace(tmp_path / "t").prompts


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "t", PromptPolicy("ids"))
    (tmp_path / "t" / "prompts-00001.parquet").write_bytes(b"")
    trace = open_trace(tmp_path / "t")
    trace.load()  # rows do not need it
    with pytest.raises(FormatError, match=r"prompts-00001.parquet: checksum differs"):
        _ = trace.prompts


def test_secrets(tmp_path: Path) -> None:
    secret = make_secret(tmp_path / "s")
    assert read_secret(tmp_path / "s") == secret and len(secret) == 32
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    with pytest.raises(MoeplanError, match="already exists"):
        make_secret(tmp_path / "s")
    for text, message in (("no hex", "is not a secret"), ("00ff", "too short")):
        (tmp_path / "t").write_text(text)
        with pytest.raises(FormatError, match=message):
            read_secret(tmp_path / "t")


def test_import_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = npz(tmp_path / "a.npz", session=[5, 5, -1, 6], turn=[0, 1, -1, 0], arrival=[0.0, 1.5, np.nan, 3.0])
    out = tmp_path / "t"
    assert run(["import", "arrays", str(source), "-o", str(out), "--keep-prompt-tokens", "ids"]) == 0
    assert "can be read as text" in capsys.readouterr().out
    trace = open_trace(out)
    np.testing.assert_array_equal(trace.prompts.tokens, np.concatenate(PROMPTS))  # type: ignore[union-attr]
    assert trace.requests.session.tolist() == [5, 5, -1, 6]  # type: ignore[union-attr]
    assert trace.requests.turn.tolist() == [0, 1, -1, 0]  # type: ignore[union-attr]
    np.testing.assert_array_equal(trace.requests.arrival, [0.0, 1.5, np.nan, 3.0])


def test_import_hashed_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = npz(tmp_path / "a.npz"), tmp_path / "t"
    assert run(["import", "arrays", str(source), "-o", str(out), "--keep-prompt-tokens", "hashed"]) == 0
    assert "wrote the secret" in capsys.readouterr().out
    secret = read_secret(secret_beside(out))
    expected = PromptFeatures.of_ids(PROMPTS).hashed(secret)
    np.testing.assert_array_equal(open_trace(out).prompts.tokens, expected.tokens)  # type: ignore[union-attr]
    copied = ["import", "trace", str(out), "-o"]
    assert run([*copied, str(tmp_path / "without")]) == 0
    assert open_trace(tmp_path / "without").prompts is None
    capsys.readouterr()
    assert run([*copied, str(tmp_path / "with"), "--keep-prompt-tokens", "hashed"]) == 0
    assert "warning: the trace holds hashed prompt tokens" in capsys.readouterr().out
    np.testing.assert_array_equal(open_trace(tmp_path / "with").prompts.tokens, expected.tokens)  # type: ignore[union-attr]
    assert not secret_beside(tmp_path / "with").exists()
    assert run([*copied, str(tmp_path / "ids"), "--keep-prompt-tokens", "ids"]) == 2
    assert "ids cannot be had from hashed prompts" in capsys.readouterr().err
    assert (
        run(["import", "trace", str(tmp_path / "without"), "-o", str(tmp_path / "x"), "--keep-prompt-tokens", "ids"])
        == 2
    )
    assert "holds no prompt tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt_tokens": None}, "has no array 'prompt_tokens'"),
        ({"prompt_offsets": None}, "has no array 'prompt_offsets'"),
        ({"prompt_offsets": np.array([0, 9])}, "2 offsets for 4 requests"),
        ({"prompt_offsets": np.array([0, 5, 4, 6, 9])}, "do not rise from 0 to 9"),
        ({"prompt_tokens": np.full(9, -1)}, "request 0: a token id is outside"),
        ({"session": np.zeros(3, int)}, "3 values for 4 requests"),
        ({"session": np.full(4, -2)}, "session -2 is outside"),
        ({"arrival": np.full(4, np.inf)}, "a time is infinite"),
    ],
)
def test_bad_arrays(more: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = npz(tmp_path / "a.npz", **more)
    flags = ["--keep-prompt-tokens", "hashed", "--prompt-secret", str(tmp_path / "s")]
    assert run(["import", "arrays", str(source), "-o", str(tmp_path / "t"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"]


def test_flags_that_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = npz(tmp_path / "a.npz")
    assert run(["import", "arrays", str(source), "-o", str(tmp_path / "t"), "--prompt-secret", "s"]) == 2
    assert "--prompt-secret is for --keep-prompt-tokens hashed" in capsys.readouterr().err
    with pytest.raises(UsageError, match="sums over requests have no prompts"):
        RetentionPolicy(aggregate=2, prompts=PromptPolicy("ids"))
