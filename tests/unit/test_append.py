"""Adding requests to a trace: whole parts, readable at every moment, and the parts that are there stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from moeplan.errors import FormatError, UsageError
from moeplan.io.files import sha256
from moeplan.trace import TraceWriter, open_trace
from moeplan.trace.append import open_to_append
from moeplan.trace.prompts import PromptFeatures, PromptPolicy
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

SHAPE = ModelShape(name="tiny", num_layers=2, num_experts=8, top_k=2)
OLD = Path(__file__).parents[1] / "data" / "archives" / "0.1.0"
SECRET = bytes(range(32))


def add(writer: TraceWriter, numbers: range) -> None:
    """Requests whose rows and prompts follow from their numbers."""
    for number in numbers:
        picks = np.random.default_rng(number).integers(0, 8, (3 + number % 4, 2, 2))
        prompt = PromptFeatures.of_ids([[number, number + 1]])
        writer.add(picks, prefill=2, domain=f"d{number % 3}", session=number // 2, turn=number % 2, prompt=prompt)


def make(path: Path, count: int, prompts: PromptPolicy | None = None) -> Path:
    with TraceWriter(path, SHAPE, source={"a": 1}, retention=RetentionPolicy(prompts=prompts), part_picks=60) as writer:
        add(writer, range(count))
    return path


def same(one: Path, other: Path) -> None:
    """Both hold the same requests."""
    a, b = open_trace(one), open_trace(other)
    np.testing.assert_array_equal(a.load().experts, b.load().experts)
    assert [a.requests.domains[d] for d in a.requests.domain] == [b.requests.domains[d] for d in b.requests.domain]
    for name in ("rows", "prefill", "session", "turn"):
        np.testing.assert_array_equal(getattr(a.requests, name), getattr(b.requests, name))
    assert a.prompts_info == b.prompts_info and a.source == b.source
    if a.prompts is not None and b.prompts is not None:
        np.testing.assert_array_equal(a.prompts.tokens, b.prompts.tokens)
        np.testing.assert_array_equal(a.prompts.offsets, b.prompts.offsets)


@pytest.mark.parametrize("prompts", [None, PromptPolicy("ids"), PromptPolicy("hashed", SECRET)])
def test_appended_equals_written_at_once(prompts: PromptPolicy | None, tmp_path: Path) -> None:
    make(tmp_path / "t", 7, prompts)
    before = {file.name: sha256(file) for file in (tmp_path / "t").glob("p*")}
    for first, last in ((7, 8), (8, 15)):
        with open_to_append(tmp_path / "t", prompts=prompts, part_picks=60) as writer:
            add(writer, range(first, last))
    assert open_trace(tmp_path / "t").complete
    same(tmp_path / "t", make(tmp_path / "whole", 15, prompts))
    assert {name: sha256(tmp_path / "t" / name) for name in before} == before
    with open_to_append(tmp_path / "t", prompts=prompts):
        pass
    same(tmp_path / "t", tmp_path / "whole")


def test_it_is_readable_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", 5)
    seen: list[tuple[bool, int]] = []
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        """What a reader finds before and after each file changes."""
        found = replace(self, target)
        trace = open_trace(tmp_path / "t")
        seen.append((trace.complete, len(trace.load())))
        return found

    monkeypatch.setattr(Path, "replace", renamed)
    with open_to_append(tmp_path / "t") as writer:
        add(writer, range(5, 7))
        writer.flush()
        shutil.copytree(tmp_path / "t", tmp_path / "killed")
        add(writer, range(7, 9))
    counts = [count for _, count in seen]
    assert counts == sorted(counts) and set(counts) == {5, 7, 9}
    assert [complete for complete, _ in seen] == [False] * (len(seen) - 1) + [True]
    monkeypatch.undo()
    assert len(open_trace(tmp_path / "killed").requests) == 7 and not open_trace(tmp_path / "killed").complete
    with open_to_append(tmp_path / "killed") as writer:
        add(writer, range(7, 9))
    same(tmp_path / "killed", tmp_path / "t")


def test_an_error_keeps_what_is_there(tmp_path: Path) -> None:
    make(tmp_path / "t", 5)
    with pytest.raises(FormatError, match="outside"), open_to_append(tmp_path / "t") as writer:
        add(writer, range(5, 6))
        writer.add(np.full((2, 2, 2), 8), prefill=1)
    assert len(open_trace(tmp_path / "t").requests) == 6


def test_a_trace_of_an_older_version(tmp_path: Path) -> None:
    shutil.copytree(OLD / "trace", tmp_path / "t")
    old = open_trace(tmp_path / "t")
    shape, count = old.shape, len(old.requests)
    picks = np.zeros((4, shape.num_layers, shape.top_k), int) + np.arange(shape.top_k)
    with open_to_append(tmp_path / "t") as writer:
        writer.add(picks, prefill=1, session=3)
    new = open_trace(tmp_path / "t")
    assert len(new.requests) == count + 1 and old.requests.session is None
    assert new.requests.session is not None and new.requests.session[-2:].tolist() == [-1, 3]
    np.testing.assert_array_equal(new.load().experts[: len(old.load().experts)], old.load().experts)
    shutil.copytree(OLD / "trace-cut-off", tmp_path / "u")
    with open_to_append(tmp_path / "u") as writer:
        writer.add(np.repeat(picks, 1, axis=0)[:, : writer.shape.num_layers, : writer.shape.top_k], prefill=1)
    assert open_trace(tmp_path / "u").complete


def test_what_cannot_be_appended(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is aggregated: requests cannot be added"):
        open_to_append(OLD / "trace-sums")
    make(tmp_path / "t", 3, PromptPolicy("hashed", SECRET))
    for prompts in (PromptPolicy("ids"), PromptPolicy("hashed", bytes(32))):
        with pytest.raises(UsageError, match="keeps other prompt features"):
            open_to_append(tmp_path / "t", prompts=prompts)
    with pytest.raises(UsageError, match="need a secret"), open_to_append(tmp_path / "t") as writer:
        add(writer, range(3, 4))
    assert len(open_trace(tmp_path / "t").requests) == 3
    with pytest.raises(FormatError, match="does not exist"):
        open_to_append(tmp_path / "none")
