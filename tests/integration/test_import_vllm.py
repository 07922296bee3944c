"""vLLM's responses come in as they were recorded; everything else is one clear line and leaves nothing."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.engine_files import changed, picks, refused_when_cut, same, save
from moeplan.errors import FormatError, UsageError
from moeplan.importers.options import ImportOptions
from moeplan.importers.vllm_responses import import_vllm
from moeplan.model.config import described
from moeplan.model.spec import ModelSpec
from moeplan.trace import open_trace
from moeplan.trace.prompts import PromptPolicy
from moeplan.trace.retention import RetentionPolicy

E8 = ImportOptions(described(num_experts=8))


def npy64(array: np.ndarray, **kwargs: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return base64.b64encode(file.getvalue()).decode()


def vllm(ids: np.ndarray | None = None, *, prompt: Any = 3, completion: Any = 3, **choice: Any) -> dict[str, Any]:
    """A response of one choice; five rows by default."""
    ids = picks(5) if ids is None else ids
    return {
        "model": "m",
        "choices": [{"index": 0, "text": "secret", "routed_experts": npy64(ids.astype(np.uint8)), **choice}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
    }


def test_vllm_file_is_the_known_truth(engines: Path, tmp_path: Path) -> None:
    truth = np.load(engines / "routed_experts_truth.npy")
    trace = import_vllm([engines / "vllm_completion_response.json"], tmp_path / "t", E8)
    same(trace, truth[:, 1:], (1, 2, 3))
    assert trace.requests.prefill.tolist() == [5] and trace.shape.name == "m"


def test_vllm_file_cut_off(engines: Path, tmp_path: Path) -> None:
    whole, path, out = (engines / "vllm_completion_response.json").read_bytes(), tmp_path / "r.json", tmp_path / "t"
    refused_when_cut(whole, path, out, lambda: import_vllm([path], out, E8))


def test_vllm_lines_lists_and_folders(tmp_path: Path) -> None:
    first, second = picks(5), picks(9, seed=1)
    answers = vllm(first), vllm(second, completion=7)
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "chat-1.jsonl", *answers)
    (tmp_path / "list.json").write_text(json.dumps(answers, indent=1))
    for number, source in enumerate([tmp_path / "in", tmp_path / "list.json"]):
        trace = import_vllm([source], tmp_path / f"t{number}", E8)
        same(trace, np.concatenate([first, second])[:, 1:], (1, 2))
        assert trace.requests.rows.tolist() == [5, 9] and trace.requests.prefill.tolist() == [3, 3]
    assert trace.requests.domains == ("list",)


def test_vllm_prompt_tokens(tmp_path: Path) -> None:
    """Of completions in the choice, of chats beside the choices; stored only where that is wanted."""
    chat = {**vllm(picks(5, seed=1), token_ids=[1, 2, 3]), "prompt_token_ids": [4, 5, 6]}
    answers = [vllm(prompt_token_ids=[7, 8, 9], token_ids=[1, 2, 3]), chat, vllm(picks(5, seed=2))]
    save(tmp_path / "r.jsonl", *answers)
    plain = import_vllm([tmp_path / "r.jsonl"], tmp_path / "plain", E8)
    assert plain.prompts is None
    kept = replace(E8, retention=RetentionPolicy(prompts=PromptPolicy("ids")))
    prompts = import_vllm([tmp_path / "r.jsonl"], tmp_path / "t", kept).prompts
    assert prompts is not None and [prompts.of(i)[0].tolist() for i in range(3)] == [[7, 8, 9], [4, 5, 6], []]
    assert "return_token_ids" in open_trace(tmp_path / "t").source["notes"][0]
    save(tmp_path / "bad.json", vllm(prompt_token_ids=[7, "x", 9], token_ids=[1, 2, 3]))
    with pytest.raises(FormatError, match="prompt_token_ids is not a list of token ids"):
        import_vllm([tmp_path / "bad.json"], tmp_path / "u", kept)


def test_vllm_raw_form_and_start(tmp_path: Path) -> None:
    ids = picks(5)
    raw = {"data": base64.b64encode(ids[2:].astype("<u2").tobytes()).decode(), "shape": [3, 3, 2], "dtype": "uint16"}
    response = vllm(ids) | {"nvext": {"routed_experts": {**raw, "start": 2}}}
    response["choices"] = [{"index": 0, "message": {}}]
    trace = import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", E8)
    same(trace, ids[2:, 1:], (1, 2))
    assert trace.requests.prefill.tolist() == [1]
    assert pq.read_table(tmp_path / "t" / "part-00000.parquet")["position"].to_pylist() == [2, 3, 4]


def test_vllm_start_of_the_npy_form_comes_from_a_flag(tmp_path: Path) -> None:
    path = save(tmp_path / "r.json", vllm(picks(5)[2:]))
    with pytest.raises(FormatError, match=r"3 rows, but 3 prompt and 3 completion tokens make 5 .*: --start 2"):
        import_vllm([path], tmp_path / "t", E8)
    assert import_vllm([path], tmp_path / "t", E8, start=2).requests.prefill.tolist() == [1]
    with pytest.raises(FormatError, match="a start of 4 lies behind the prompt's 3 tokens"):
        import_vllm([path], tmp_path / "u", E8, start=4)


def test_vllm_phases(tmp_path: Path) -> None:
    def prefill(name: str, response: dict[str, Any]) -> list[int]:
        trace = import_vllm([save(tmp_path / f"{name}.json", response)], tmp_path / name, E8)
        return trace.requests.prefill.tolist()

    two = vllm(picks(5)) | {"choices": vllm(picks(5))["choices"] + vllm(picks(4))["choices"]}
    assert prefill("usage", vllm()) == [3]
    assert prefill("none", vllm() | {"usage": None}) == [-1]
    assert prefill("no-completion", vllm(completion=None)) == [3]
    assert prefill("samples", two | {"usage": {"prompt_tokens": 3, "completion_tokens": 5}}) == [3, 3]
    assert prefill("batch", two | {"usage": {"prompt_tokens": 6, "completion_tokens": 5}}) == [-1, -1]
    ids = {"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5, 6]}
    assert prefill("ids", vllm(**ids)) == [2]
    with pytest.raises(FormatError, match="9 rows in 2 choices fit neither one prompt of 4 tokens nor a batch"):
        prefill("odd", two | {"usage": {"prompt_tokens": 4, "completion_tokens": 5}})


def test_top_1_needs_to_know_its_dense_layers(tmp_path: Path) -> None:
    ids = picks(5, k=1)
    path = save(tmp_path / "r.json", vllm(ids))
    with pytest.raises(UsageError, match="with top-1, a dense layer's zeros cannot be told from expert 0"):
        import_vllm([path], tmp_path / "t", E8)
    same(import_vllm([path], tmp_path / "t", replace(E8, dense_layers=(0,))), ids[:, 1:], (1, 2))
    same(import_vllm([path], tmp_path / "u", replace(E8, dense_layers=())), ids, (0, 1, 2))
    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 3, "first_k_dense_replace": 1})
    same(import_vllm([path], tmp_path / "v", ImportOptions(described(config))), ids[:, 1:], (1, 2))


def test_the_number_of_experts_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say how many experts a layer has; give --num-experts"):
        import_vllm([save(tmp_path / "r.json", vllm())], tmp_path / "t", ImportOptions(ModelSpec()))


def test_what_a_config_adds(tmp_path: Path) -> None:
    spec = ModelSpec().override(num_experts=8, hidden=64, expert_groups=4)
    path = save(tmp_path / "r.json", vllm())
    shape = import_vllm([path], tmp_path / "t", ImportOptions(spec, without_layers=(2,))).shape
    assert (shape.hidden, shape.routing_groups, shape.layer_ids) == (64, 4, (1,))
    mine = spec.override(name="mine", hidden=32, expert_groups=2)
    shape = import_vllm([path], tmp_path / "u", ImportOptions(mine)).shape
    assert (shape.name, shape.hidden, shape.routing_groups) == ("mine", 32, 2)


def test_no_text_comes_into_a_trace(tmp_path: Path) -> None:
    import_vllm([save(tmp_path / "r.json", vllm())], tmp_path / "t", E8)
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "t").iterdir())


def lying(shape: tuple[int, ...]) -> str:
    """A .npy whose header declares another shape than its data have."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return base64.b64encode(file.getvalue() + bytes(30)).decode()


def objects() -> str:
    return npy64(np.array([[[None]]]), allow_pickle=True)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({}, "r.json, line 1: choices is missing; give responses of completions or chats"),
        ({"choices": []}, "choices is empty"),
        (
            vllm(routed_experts=None),
            "choice 0: has no routed_experts; start the server with --enable-return-routed-experts",
        ),
        (vllm(routed_experts=[1]), r"choices\[0\].routed_experts is a list, not text or an object"),
        (vllm(routed_experts="%%%"), "routed_experts is not base64"),
        (vllm(routed_experts="AAA"), "routed_experts is not base64 .*; the response may be cut off"),
        (vllm(routed_experts="AAAA"), "is not a whole .npy array"),
        (vllm(routed_experts=vllm()["choices"][0]["routed_experts"][:-8]), "needs 30 bytes, 25 are there"),
        (vllm(routed_experts=objects()), "holds Python objects, which are never loaded"),
        (vllm(routed_experts=npy64(picks(5) * 1.0)), "picks of type float64 in 3 dimensions"),
        (vllm(routed_experts=npy64(picks(5)[0])), "picks of type int64 in 2 dimensions"),
        (vllm(routed_experts=lying((10**9, 3, 2))), r"the shape \[1000000000, 3, 2\] of uint8 needs 6000000000 bytes"),
        (vllm(routed_experts=lying((4, 3, 2))), "needs 24 bytes, 30 are there"),
        (vllm(routed_experts=lying((5, 10**9, 2))), "is no .tokens, layers, picks."),
        (vllm(routed_experts={"data": "AAAA", "shape": [3], "dtype": "uint8"}), "in 1 dimensions"),
        (vllm(routed_experts={"data": "AAAA", "shape": "3", "dtype": "uint8"}), "shape is 3, not a list"),
        (
            vllm(routed_experts={"data": "AAAA", "shape": [1, 1, 3], "dtype": "object"}),
            "dtype is object, which is not supported",
        ),
        (
            vllm(routed_experts={"data": "AAAA", "shape": [1, 1, 3], "dtype": "uint8", "start": -1}),
            "start is -1, not a whole number >= 0",
        ),
        (vllm(changed(2, 1, [8, 1])), "row 2, layer 1: expert 8 is outside 0..7"),
        (vllm(changed(2, 1, [3, 3])), "row 2, layer 1: expert 3 is picked twice"),
        (vllm(changed(3, 2, [0, 0])), "row 3, layer 2: expert 0 is picked twice; .* did not capture this token"),
        (vllm(picks(5) * 0), "no layer has a pick"),
        (
            vllm(routed_experts={"data": "AAAA", "shape": [1, 3, 1], "dtype": "uint8", "start": 10**19}, prompt=None),
            "a start of 10000000000000000000 is beyond any sequence",
        ),
        (vllm(prompt=-1), "usage.prompt_tokens is -1, not a whole number"),
        (vllm(prompt=9, completion=None), "5 rows are fewer than the prompt's 9"),
        (vllm(picks(0), prompt=1, completion=0), "holds no response with a row"),
        (7, "r.json, line 1: is 7, not an object"),
    ],
)
def test_bad_vllm_responses(tmp_path: Path, response: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", E8)
    assert not (tmp_path / "t").exists()


def test_a_signed_minus_one_is_out_of_range(tmp_path: Path) -> None:
    response = vllm(routed_experts=npy64(changed(1, 2, [-1, 2])))
    with pytest.raises(FormatError, match=r"row 1, layer 2: expert -1 is outside 0\.\.7"):
        import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", E8)


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        (vllm(picks(5, layers=4)), E8, "line 2, choice 0: 4 layers, top-2, but the first response has 3 and top-2"),
        (vllm(picks(5, k=3)), E8, "3 layers, top-3"),
        (vllm(picks(5, dense=0)), E8, "row 0: layer 0 has picks, but is dense .*were taken to be 1-2"),
        (
            vllm(),
            ImportOptions(described(num_experts=8, num_layers=4)),
            "3 hidden layers, but the config or a flag says 4",
        ),
        (
            vllm(),
            ImportOptions(described(num_experts=8, top_k=4)),
            "2 picks per token, but the config or a flag says 4",
        ),
    ],
)
def test_responses_that_do_not_belong_together(
    tmp_path: Path, second: dict[str, Any], options: ImportOptions, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        import_vllm([save(tmp_path / "r.jsonl", vllm(), second)], tmp_path / "t", options)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"r\.json"):
        import_vllm([tmp_path / "r.json"], tmp_path / "t", E8)


def test_a_later_line_that_is_cut_off_names_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "r.jsonl", vllm(), vllm())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        FormatError, match=r"r.jsonl, line 2: is invalid or truncated JSON .*; the file may be truncated"
    ):
        import_vllm([path], tmp_path / "t", E8)
    assert not (tmp_path / "t").exists()
