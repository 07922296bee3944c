"""`moeplan order`: every line once, untouched, in any form that `record` reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import moeplan
from helpers.command_line import refused
from moeplan.cli.app import run
from moeplan.importers.arrays import import_arrays
from moeplan.importers.options import ImportOptions
from moeplan.replay.order_file import OrderSettings, order_file
from moeplan.trace.prompts import PromptPolicy
from moeplan.trace.retention import RetentionPolicy

KINDS = ("solve the equation for x", "write a poem about the sea", "translate this sentence to French")


def lines(count: int = 60) -> list[bytes]:
    """Prompts in all three forms, some with odd white space."""
    found = []
    for number in range(count):
        text = f"{KINDS[number % 3]} number {number}"
        chat = {"messages": [{"role": "user", "content": text}]}
        body = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": chat}
        row = ({"prompt": text}, chat, body)[number // 3 % 3]
        found.append((json.dumps(row, indent=None) + " " * (number % 2)).encode() + b"\n")
    return found


@pytest.mark.parametrize("zipped", [False, True])
def test_every_line_comes_out_once(tmp_path: Path, zipped: bool) -> None:
    given = lines()
    source = tmp_path / ("q.jsonl.gz" if zipped else "q.jsonl")
    data = b"".join(given[:10]) + b"\n" + b"".join(given[10:]).rstrip(b"\n")
    source.write_bytes(gzip.compress(data) if zipped else data)
    out = tmp_path / "o.jsonl"
    assert run(["order", str(source), "-o", str(out), "--json", str(tmp_path / "o.json")]) == 0
    result = out.read_bytes().splitlines(keepends=True)
    assert sorted(result) == sorted([*given[:-1], given[-1].rstrip(b"\n") + b"\n"])
    places = json.loads((tmp_path / "o.json").read_text())["instances"]
    assert len(places) == 1 and [given[place].strip() for place in places[0]] == [line.strip() for line in result]


def test_instances_and_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "q.jsonl"
    source.write_bytes(b"".join(lines(100)))
    out = tmp_path / "o.jsonl"
    assert run(["order", str(source), "-o", str(out), "--instances", "3", "--window", "40"]) == 0
    parts = [(tmp_path / f"o-{number}.jsonl").read_bytes().splitlines(keepends=True) for number in (1, 2, 3)]
    assert sorted(line for part in parts for line in part) == sorted(lines(100))
    assert all(25 <= len(part) <= 42 for part in parts) and not out.exists()
    assert "over 3 instances" in capsys.readouterr().out


def predictable_trace(folder: Path, count: int = 120) -> moeplan.Trace:
    """Requests whose first token says which half of the experts their answers use."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=count)
    experts = (rng.integers(4, size=(count * 20, 2, 1)) + 4 * np.repeat(kind, 20)[:, None, None]).astype(np.uint8)
    prompts = np.stack((kind, rng.integers(10, 20, count)), axis=1).astype(np.uint32)
    np.savez(
        folder / "t.npz", experts=experts, request_offsets=np.arange(count + 1) * 20, num_experts=8,
        prefill_lengths=np.full(count, 4), domain=np.full(count, "a"), prompt_tokens=prompts.ravel(),
        prompt_offsets=np.arange(count + 1) * 2,
    )  # fmt: skip
    options = ImportOptions(retention=RetentionPolicy(prompts=PromptPolicy("ids")))
    return import_arrays(folder / "t.npz", folder / "trace", options)


def test_a_trace_predicts_and_says_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = predictable_trace(tmp_path)
    prompts = trace.prompts
    assert prompts is not None
    found = moeplan.order(prompts, trace, batch=4)
    kind = np.array([prompts.of(r)[0][0] for r in found.sequence])
    assert found.basis == "predicted" and (np.diff(kind) != 0).sum() <= 2
    assert found.change is not None and found.change < -0.1 and found.measured_on == 60
    rows = [{"input_tok_ids": prompts.of(r)[0].tolist(), "output_toks": 5} for r in range(len(prompts))]
    source = tmp_path / "q.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["order", str(source), "-o", str(tmp_path / "o.jsonl"), "--trace", str(trace.path)]
    assert run(arguments) == 0
    assert "experts read by a decode step" in capsys.readouterr().out
    assert run([*arguments, "--recorded"]) == 0
    assert "earlier answers" in capsys.readouterr().out


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "q.jsonl", tmp_path / "o.jsonl"
    source.write_bytes(b"".join(lines(20)))
    trace = predictable_trace(tmp_path)
    asked = ["order", source, "-o", out]
    assert "no prompt has a token" in refused([*asked, "--trace", trace.path], capsys)
    assert "but the trace has 120 requests" in refused([*asked, "--trace", trace.path, "--recorded"], capsys)
    assert "--recorded needs --trace" in refused([*asked, "--recorded"], capsys)
    assert "--batch 1 is outside" in refused([*asked, "--batch", 1], capsys)
    assert "is not a tokenizer" in refused([*asked, "--tokenizer", source], capsys)
    source.write_bytes(b'{"prompt": "a"}\nnonsense\n')
    assert "row 1: is not JSON" in refused(asked, capsys)
    source.write_bytes(b"\n\n")
    assert "holds no prompt" in refused(asked, capsys)
    assert not list(tmp_path.glob("o*"))


def test_the_file_of_an_instance_is_no_input_and_no_other_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "q-1.jsonl", tmp_path / "q.jsonl"
    source.write_bytes(b"".join(lines()))
    asked = ["order", source, "-o", out, "--instances", 2]
    assert "written over" in refused(asked, capsys)
    with pytest.raises(moeplan.UsageError, match="written over"):
        order_file(source, out, settings=OrderSettings(instances=2))
    other = ["order", source, "-o", tmp_path / "z.jsonl", "--instances", 2, "--json", tmp_path / "z-2.jsonl"]
    assert "are the same file" in refused(other, capsys)
    assert source.read_bytes() == b"".join(lines()) and [p.name for p in tmp_path.iterdir()] == ["q-1.jsonl"]
