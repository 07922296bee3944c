"""`moeplan record vllm` and `record sglang` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.fake_server import DENSE, EXPERTS, LAYERS, TOP_K, Fake, serve
from moeplan.cli.app import run as command_line
from moeplan.trace import open_trace


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve(Fake()) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "secret one", "domain": "a"},
        {"messages": [{"role": "user", "content": "secret two"}], "max_new_tokens": 2},
        {"prompt": "secret three"},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "set.jsonl"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, with a rule for dense layers."""
    config = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "mlp_only_layers": [DENSE],
        "decoder_sparse_step": 1,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def record(engine: str, fake: Fake, prompts: Path, out: Path, *flags: str) -> int:
    fake.engine = engine
    return command_line(["record", engine, "--url", fake.url, "--prompts", str(prompts), "-o", str(out), *flags])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_from_prompts_to_a_profile(
    fake: Fake, prompts: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    flags = ["--config", str(model), "--max-new-tokens", "3", "--json", "-"]
    assert record(engine, fake, prompts, tmp_path / "t", *flags) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert (facts["model"], facts["requests"], facts["domains"]) == ("tiny", 3, {"a": 1, "set": 2})
    assert (facts["layers"], facts["experts"], facts["top_k"], facts["hidden"]) == (LAYERS - 1, EXPERTS, TOP_K, 64)
    assert facts["prefill_tokens"] == 10 + 11 + 12 and facts["seconds"] >= 0 and "next: moeplan profile" in shown.err
    assert record(engine, fake, prompts, tmp_path / "t", *flags) == 2
    assert "already exists" in capsys.readouterr().err
    assert record(engine, fake, prompts, tmp_path / "t", *flags, "--resume") == 0
    assert (
        record(engine, fake, prompts, tmp_path / "u", *flags, "--aggregate", "2", "--domain", "x", "--limit", "2") == 0
    )
    assert open_trace(tmp_path / "u").aggregate == 2
    assert record(engine, fake, prompts, tmp_path / "v", *flags, "--min-tokens", "13", "--name", "mine") == 0
    kept = open_trace(tmp_path / "v")
    assert len(kept.requests) == 1 and kept.dropped == 2 and kept.shape.name == "mine"


def test_without_a_config(fake: Fake, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        record("vllm", fake, prompts, tmp_path / "t", "--num-experts", str(EXPERTS), "--served-model", "/models/tiny")
        == 0
    )
    assert open_trace(tmp_path / "t").shape.layer_ids == (0, 2, 3)  # the dense layer shows by its zeros
    shape = ["--num-experts", str(EXPERTS), "--num-layers", str(LAYERS), "--top-k", str(TOP_K), "--openai"]
    assert record("sglang", fake, prompts, tmp_path / "u", *shape, "--dense-layers", "1") == 0
    assert open_trace(tmp_path / "u").checksum and not fake.bodies("/generate")


def test_the_key_comes_from_the_environment(
    fake: Fake, prompts: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (variable, flags) in enumerate((("MOEPLAN_API_KEY", []), ("MINE", ["--api-key-env", "MINE"]))):
        monkeypatch.setenv(variable, "k3y")
        fake.seen = []
        assert record("vllm", fake, prompts, tmp_path / f"t{number}", "--config", str(model), *flags) == 0
        assert {headers.get("Authorization") for _, _, headers in fake.seen} == {"Bearer k3y"}
        assert "k3y" not in (tmp_path / f"t{number}" / "trace.json").read_text()
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "does not say how many experts a layer has; give --num-experts, e.g. 128, or the model's config.json"),
        (["--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--num-experts", "16", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models: cannot be reached"),
        (["--num-experts", "16", "--url", "nothing"], "--url is not a valid http URL"),
        (
            ["--num-experts", "16", "--served-model", "other"],
            "does not serve other; choose one with --served-model: /models/tiny",
        ),
        (["--num-experts", "16", "--api-key-env", "NO_SUCH"], "the environment has no such variable"),
        (["--num-experts", "16", "--concurrency", "0"], "--concurrency 0 is outside"),
        (["--num-experts", "16", "--timeout", "-1"], "--timeout -1 is outside"),
        (["--num-experts", "16", "--retries", "-1"], "--retries -1 is outside"),
        (["--num-experts", "16", "--dense-layers", "9"], "--dense-layers 9: the recording has layers 0..3"),
        (["--num-experts", "16", "--prompts", "nothing.jsonl"], "nothing.jsonl: does not exist"),
        (["--num-experts", "16", "--aggregate", "9"], "--aggregate 9: no domain has so many requests"),
    ],
)
def test_bad_flags_are_one_line(
    fake: Fake, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert record("vllm", fake, prompts, tmp_path / "t", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "secret" not in error and not (tmp_path / "t").exists()


def test_a_place_that_cannot_be_is_said_before_the_server_is_asked(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts / "deep" / "t"
    words = ["record", "vllm", "--prompts", str(prompts), "--num-experts", "16", "--url", "http://127.0.0.1:1"]
    assert command_line([*words, "-o", str(out)]) == 2
    assert f"{out}: cannot be made ({prompts} is no folder); choose a place" in capsys.readouterr().err
