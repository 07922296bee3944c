"""The commands that import what engines leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.engine_files import save
from moeplan.cli.app import run


@pytest.mark.slow
def test_the_commands(engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def moeplan(*words: Any) -> dict[str, Any]:
        assert run(["import", *map(str, words), "--json", str(tmp_path / "facts.json")]) == 0
        facts: dict[str, Any] = json.loads((tmp_path / "facts.json").read_text())
        return facts

    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 4, "num_experts_per_tok": 2})
    facts = moeplan("vllm", engines / "vllm_completion_response.json", "--config", config, "-o", tmp_path / "a")
    assert (facts["tokens"], facts["prefill_tokens"], facts["layers"]) == (7, 5, 3)
    facts = moeplan("sglang", engines / "sglang_generate_response.json", "--config", config, "-o", tmp_path / "b")
    assert facts["tokens"] == 7
    facts = moeplan("megatron", engines / "router_trace_rank0.jsonl", "--num-experts", 4, "-o", tmp_path / "m")
    assert facts["unknown_tokens"] == 2 and "note: Megatron records no request ids" in capsys.readouterr().out
    facts = moeplan("tensorrt-llm", engines / "trtllm_stats", "--phase", "prefill", "-o", tmp_path / "t")
    assert facts["phase"] == "prefill" and len(facts["imbalance"]) == 2 and facts["imbalance"][0] > 1
    out = capsys.readouterr().out
    assert "imbalance (largest over mean)" in out and "compare, and plans with groups, cannot be made of them" in out
    facts = moeplan("logical-count", save(tmp_path / "x.json", {"logical_count": [[1, 3]]}), "-o", tmp_path / "l")
    assert facts["imbalance"] == [1.5] and facts["largest_expert"] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vllm", "no.json", "--num-experts", "8"], "no.json: does not exist"),
        (["vllm", "no.json", "--dense-layers", "x"], "--dense-layers 'x' is not a list of layer numbers"),
        (["logical-count", "no.json", "--phase", "noon"], 'Invalid value "noon" for --phase'),
        (["tensorrt-llm", "no"], "meta_info.json: cannot be read"),
        (["megatron", "no.jsonl"], "no.jsonl: does not exist"),
        (["sglang", "no.json", "--num-experts", "8"], "SGLang sends picks without their shape"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["import", *words, "-o", str(tmp_path / "t")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "t").exists()
