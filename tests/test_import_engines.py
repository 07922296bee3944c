"""What engines leave behind comes in as it was recorded; everything else is one clear line and leaves nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moeplan.capture.hf_config import ModelFacts, model_facts
from moeplan.capture.megatron import import_megatron
from moeplan.capture.model import ModelExtras
from moeplan.capture.sglang_responses import import_sglang
from moeplan.capture.vllm_responses import import_vllm
from moeplan.cli.app import run
from moeplan.errors import FormatError, UsageError
from moeplan.trace.reader import Trace

E8 = model_facts(num_experts=8)
SGLANG = model_facts(num_experts=8, num_layers=3, top_k=2)


@pytest.fixture
def engines(shared: Path) -> Path:
    folder = shared / "engines"
    if not folder.is_dir():
        pytest.skip("the engines' files (../shared/engines) are not on this machine")
    return folder


def picks(rows: int, layers: int = 3, k: int = 2, *, dense: int = 1, seed: int = 0) -> np.ndarray:
    """Distinct ids below 8, [rows, layers, k]; the first `dense` layers are zeros."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(8), (rows, layers, 1)), axis=2)[:, :, :k]
    ids[:, :dense] = 0
    return ids


def npy64(array: np.ndarray, **kwargs: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return base64.b64encode(file.getvalue()).decode()


def raw64(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def vllm(ids: np.ndarray | None = None, *, prompt: Any = 3, completion: Any = 3, **choice: Any) -> dict[str, Any]:
    """A response of one choice; five rows by default."""
    ids = picks(5) if ids is None else ids
    return {
        "model": "m",
        "choices": [{"index": 0, "text": "secret", "routed_experts": npy64(ids.astype(np.uint8)), **choice}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
    }


def sglang(text: Any = None, *, prompt: Any = 3, completion: Any = 3) -> dict[str, Any]:
    text = raw64(picks(5)) if text is None else text
    meta = {"prompt_tokens": prompt, "completion_tokens": completion, "dp_rank": 1, "routed_experts": text}
    return {"text": "secret", "output_ids": [1, 2, 3], "meta_info": meta}


def save(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def same(trace: Trace, expected: np.ndarray, layer_ids: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(trace.load().experts, expected)
    assert trace.shape.layer_ids == layer_ids and trace.complete


def refused_when_cut(whole: bytes, path: Path, out: Path, load: Callable[[], Any], *, step: int = 1) -> None:
    """Every proper beginning of a file is refused and leaves nothing."""
    for cut in range(0, len(whole), step):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError) as error:
            load()
        assert "\n" not in str(error.value) and path.name in str(error.value)
        assert not out.exists()


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "experts", "moe"),
    [
        ({"n_routed_experts": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1}, 8, (3, 4, 5)),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 1, 1, 0, 1, 1]}, 8, (1, 2, 4, 5)),
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [5]}, 8, (1, 3)),
        ({"num_local_experts": 8, "interleave_moe_layer_step": 2}, 8, (1, 3, 5)),
        ({"num_local_experts": 8}, 8, None),
        ({"num_experts": 8, "first_k_dense_replace": 1, "decoder_sparse_step": 2}, 8, None),
        ({"num_experts": 8, "num_local_experts": 8}, 8, None),
    ],
)
def test_configs(tmp_path: Path, config: dict[str, Any], experts: int, moe: tuple[int, ...] | None) -> None:
    save(tmp_path / "c.json", {"num_hidden_layers": 6, "num_experts_per_tok": 2, "hidden_size": 64, **config})
    facts = model_facts(tmp_path / "c.json")
    assert (facts.num_experts, facts.moe_layers, facts.top_k, facts.hidden) == (experts, moe, 2, 64)


def test_a_multimodal_config_keeps_its_numbers_inside(tmp_path: Path) -> None:
    inner = {"num_hidden_layers": 4, "num_local_experts": 16, "num_experts_per_tok": 1, "moe_layers": [1, 3]}
    facts = model_facts(save(tmp_path / "c.json", {"hidden_size": 1, "text_config": inner}))
    assert (facts.num_experts, facts.top_k, facts.moe_layers) == (16, 1, (1, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "is not a model's configuration"),
        ({"num_experts": 8, "num_local_experts": 4}, "num_experts and num_local_experts differ"),
        ({"num_experts": "8"}, "num_experts is 8, not a whole number in 1..65535"),
        ({"num_hidden_layers": 2, "moe_layer_freq": [1]}, "moe_layer_freq is not 2 zeros and ones"),
        ({"num_hidden_layers": 2, "mlp_only_layers": [7]}, "mlp_only_layers is not a list of layers in 0..1"),
    ],
)
def test_bad_configs(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        model_facts(save(tmp_path / "c.json", config))


def test_flags_and_config_may_not_differ(tmp_path: Path) -> None:
    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 4, "first_k_dense_replace": 1})
    with pytest.raises(UsageError, match=r"--num-experts 16, but .* says 8; leave one of the two out"):
        model_facts(config, num_experts=16)
    with pytest.raises(UsageError, match="--dense-layers contradicts"):
        model_facts(config, dense_layers=[2])
    with pytest.raises(UsageError, match=r"--top-k 0 is outside"):
        model_facts(config, top_k=0)
    assert model_facts(config, dense_layers=[0]).moe_layers == (1, 2, 3)


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm_file_is_the_known_truth(engines: Path, tmp_path: Path) -> None:
    truth = np.load(engines / "routed_experts_truth.npy")
    trace = import_vllm([engines / "vllm_completion_response.json"], tmp_path / "t", facts=E8)
    same(trace, truth[:, 1:], (1, 2, 3))
    assert trace.requests.prefill.tolist() == [5] and trace.shape.name == "m"


def test_vllm_file_cut_off(engines: Path, tmp_path: Path) -> None:
    whole, path, out = (engines / "vllm_completion_response.json").read_bytes(), tmp_path / "r.json", tmp_path / "t"
    refused_when_cut(whole, path, out, lambda: import_vllm([path], out, facts=E8))


def test_vllm_lines_lists_and_folders(tmp_path: Path) -> None:
    first, second = picks(5), picks(9, seed=1)
    answers = vllm(first), vllm(second, completion=7)
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "chat-1.jsonl", *answers)
    (tmp_path / "list.json").write_text(json.dumps(answers, indent=1))
    for number, source in enumerate([tmp_path / "in", tmp_path / "list.json"]):
        trace = import_vllm([source], tmp_path / f"t{number}", facts=E8)
        same(trace, np.concatenate([first, second])[:, 1:], (1, 2))
        assert trace.requests.rows.tolist() == [5, 9] and trace.requests.prefill.tolist() == [3, 3]
    assert trace.requests.domains == ("list",)


def test_vllm_raw_form_and_start(tmp_path: Path) -> None:
    ids = picks(5)
    raw = {"data": base64.b64encode(ids[2:].astype("<u2").tobytes()).decode(), "shape": [3, 3, 2], "dtype": "uint16"}
    response = vllm(ids) | {"nvext": {"routed_experts": {**raw, "start": 2}}}
    response["choices"] = [{"index": 0, "message": {}}]
    trace = import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", facts=E8)
    same(trace, ids[2:, 1:], (1, 2))
    assert trace.requests.prefill.tolist() == [1]
    assert pq.read_table(tmp_path / "t" / "part-00000.parquet")["position"].to_pylist() == [2, 3, 4]


def test_vllm_start_of_the_npy_form_comes_from_a_flag(tmp_path: Path) -> None:
    path = save(tmp_path / "r.json", vllm(picks(5)[2:]))
    with pytest.raises(FormatError, match=r"3 rows, but 3 prompt and 3 completion tokens make 5 .*: --start 2"):
        import_vllm([path], tmp_path / "t", facts=E8)
    assert import_vllm([path], tmp_path / "t", facts=E8, start=2).requests.prefill.tolist() == [1]
    with pytest.raises(FormatError, match="a start of 4 lies behind the prompt's 3 tokens"):
        import_vllm([path], tmp_path / "u", facts=E8, start=4)


def test_vllm_phases(tmp_path: Path) -> None:
    def prefill(name: str, response: dict[str, Any]) -> list[int]:
        trace = import_vllm([save(tmp_path / f"{name}.json", response)], tmp_path / name, facts=E8)
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
        import_vllm([path], tmp_path / "t", facts=E8)
    same(import_vllm([path], tmp_path / "t", facts=E8, dense_layers=[0]), ids[:, 1:], (1, 2))
    same(import_vllm([path], tmp_path / "u", facts=E8, dense_layers=[]), ids, (0, 1, 2))
    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 3, "first_k_dense_replace": 1})
    same(import_vllm([path], tmp_path / "v", facts=model_facts(config)), ids[:, 1:], (1, 2))


def test_the_number_of_experts_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say how many experts a layer has; give --num-experts"):
        import_vllm([save(tmp_path / "r.json", vllm())], tmp_path / "t", facts=ModelFacts())


def test_what_a_config_adds(tmp_path: Path) -> None:
    facts = ModelFacts(num_experts=8, hidden=64, routing_groups=4)
    path = save(tmp_path / "r.json", vllm())
    shape = import_vllm([path], tmp_path / "t", facts=facts, without_layers=[2]).shape
    assert (shape.hidden, shape.routing_groups, shape.layer_ids) == (64, 4, (1,))
    extras = ModelExtras(name="mine", hidden=32, routing_groups=2)
    shape = import_vllm([path], tmp_path / "u", facts=facts, extras=extras).shape
    assert (shape.name, shape.hidden, shape.routing_groups) == ("mine", 32, 2)


def test_no_text_comes_into_a_trace(tmp_path: Path) -> None:
    import_vllm([save(tmp_path / "r.json", vllm())], tmp_path / "t", facts=E8)
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "t").iterdir())


def lying(shape: tuple[int, ...]) -> str:
    """A .npy whose header declares another shape than its data have."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return base64.b64encode(file.getvalue() + bytes(30)).decode()


def changed(row: int, layer: int, values: Any) -> np.ndarray:
    ids = picks(5)
    ids[row, layer] = values
    return ids


def objects() -> str:
    return npy64(np.array([[[None]]]), allow_pickle=True)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({}, "r.json, line 1: is no completion or chat response: it has no choices"),
        ({"choices": []}, "it has no choices"),
        (
            vllm(routed_experts=None),
            "choice 0: has no routed_experts; start the server with --enable-return-routed-experts",
        ),
        (vllm(routed_experts=[1]), "routed_experts is a list, not base64 text"),
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
        (vllm(routed_experts={"data": "AAAA", "shape": "3", "dtype": "uint8"}), "shape is not a list"),
        (vllm(routed_experts={"data": "AAAA", "shape": [1, 1, 3], "dtype": "object"}), "dtype is 'object'"),
        (vllm(routed_experts={"data": "AAAA", "shape": [1, 1, 3], "dtype": "uint8", "start": -1}), "start is '-1'"),
        (vllm(changed(2, 1, [8, 1])), "row 2, layer 1: expert 8 is outside 0..7"),
        (vllm(changed(2, 1, [3, 3])), "row 2, layer 1: expert 3 is picked twice"),
        (vllm(changed(3, 2, [0, 0])), "row 3, layer 2: expert 0 is picked twice; .* did not capture this token"),
        (vllm(picks(5) * 0), "no layer has a pick"),
        (
            vllm(routed_experts={"data": "AAAA", "shape": [1, 3, 1], "dtype": "uint8", "start": 10**19}, prompt=None),
            "a start of 10000000000000000000 is beyond any sequence",
        ),
        (vllm(prompt=-1), "usage.prompt_tokens is '-1', not a whole number"),
        (vllm(prompt=9, completion=None), "5 rows are fewer than the prompt's 9"),
        (vllm(picks(0), prompt=1, completion=0), "holds no answer with a row"),
        (7, "r.json, line 1: is no object"),
    ],
)
def test_bad_vllm_responses(tmp_path: Path, response: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", facts=E8)
    assert not (tmp_path / "t").exists()


def test_a_signed_minus_one_is_out_of_range(tmp_path: Path) -> None:
    response = vllm(routed_experts=npy64(changed(1, 2, [-1, 2])))
    with pytest.raises(FormatError, match=r"row 1, layer 2: expert -1 is outside 0\.\.7"):
        import_vllm([save(tmp_path / "r.json", response)], tmp_path / "t", facts=E8)


@pytest.mark.parametrize(
    ("second", "facts", "message"),
    [
        (vllm(picks(5, layers=4)), E8, "line 2, choice 0: 4 layers, top-2, but the first answer has 3 and top-2"),
        (vllm(picks(5, k=3)), E8, "3 layers, top-3"),
        (vllm(picks(5, dense=0)), E8, "row 0: layer 0 has picks, but is dense .*were taken to be 1-2"),
        (vllm(), model_facts(num_experts=8, num_layers=4), "3 hidden layers, but the config or a flag says 4"),
        (vllm(), model_facts(num_experts=8, top_k=4), "2 picks per token, but the config or a flag says 4"),
    ],
)
def test_responses_that_do_not_belong_together(
    tmp_path: Path, second: dict[str, Any], facts: ModelFacts, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        import_vllm([save(tmp_path / "r.jsonl", vllm(), second)], tmp_path / "t", facts=facts)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"r\.json"):
        import_vllm([tmp_path / "r.json"], tmp_path / "t", facts=E8)


def test_a_later_line_that_is_cut_off_names_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "r.jsonl", vllm(), vllm())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FormatError, match=r"r.jsonl, line 2: is not whole JSON .*; the file may be cut off"):
        import_vllm([path], tmp_path / "t", facts=E8)
    assert not (tmp_path / "t").exists()


# --- SGLang responses -------------------------------------------------------------------------------------------------


def test_sglang_file_is_the_known_truth(engines: Path, tmp_path: Path) -> None:
    truth = np.load(engines / "routed_experts_truth.npy")
    facts = model_facts(num_experts=8, num_layers=4, top_k=2)
    trace = import_sglang([engines / "sglang_generate_response.json"], tmp_path / "t", facts=facts)
    same(trace, truth[:, 1:], (1, 2, 3))
    assert trace.requests.prefill.tolist() == [5]


def test_sglang_file_cut_off(engines: Path, tmp_path: Path) -> None:
    facts = model_facts(num_experts=8, num_layers=4, top_k=2)
    whole, path, out = (engines / "sglang_generate_response.json").read_bytes(), tmp_path / "r.json", tmp_path / "t"
    refused_when_cut(whole, path, out, lambda: import_sglang([path], out, facts=facts))


def test_sglang_wrong_shape_of_the_right_size_is_noticed(engines: Path, tmp_path: Path) -> None:
    facts = model_facts(num_experts=8, num_layers=2, top_k=4)
    with pytest.raises(FormatError, match="is picked twice; the shape or the model is another one"):
        import_sglang([engines / "sglang_generate_response.json"], tmp_path / "t", facts=facts)
    assert not (tmp_path / "t").exists()


def test_the_rank_that_served_is_kept_where_the_engine_names_it(tmp_path: Path) -> None:
    silent = sglang()
    silent["meta_info"]["dp_rank"] = None
    import_sglang([save(tmp_path / "r.jsonl", sglang(), silent)], tmp_path / "t", facts=SGLANG)
    assert pq.read_table(tmp_path / "t" / "requests.parquet")["dp_rank"].to_pylist() == [1, None]
    import_sglang([save(tmp_path / "s.json", silent)], tmp_path / "u", facts=SGLANG)
    assert "dp_rank" not in pq.read_schema(tmp_path / "u" / "requests.parquet").names
    for rank in (-1, "0", 2**31):
        silent["meta_info"]["dp_rank"] = rank
        with pytest.raises(FormatError, match="rank"):
            import_sglang([save(tmp_path / "b.json", silent)], tmp_path / "v", facts=SGLANG)


def test_sglang_openai_form(tmp_path: Path) -> None:
    response = {
        "model": "m",
        "choices": [{"text": "secret"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "sglext": {"routed_experts": raw64(picks(5))},
    }
    trace = import_sglang([save(tmp_path / "r.json", response)], tmp_path / "t", facts=SGLANG)
    same(trace, picks(5)[:, 1:], (1, 2))
    assert trace.shape.name == "m" and trace.requests.prefill.tolist() == [3]
    several = response | {"choices": [{}, {}]}
    trace = import_sglang([save(tmp_path / "s.json", several)], tmp_path / "u", facts=SGLANG)
    assert trace.requests.prefill.tolist() == [-1]
    assert "a response of several choices carries the picks of one only" in trace.source["notes"]


def test_sglang_start_length_and_builds_that_ignore_it(tmp_path: Path) -> None:
    obeyed = save(tmp_path / "a.json", sglang(raw64(picks(5)[2:])))
    assert import_sglang([obeyed], tmp_path / "t", facts=SGLANG, start=2).requests.prefill.tolist() == [1]
    with pytest.raises(FormatError, match=r"3 rows, but 3 prompt and 3 completion tokens make 5"):
        import_sglang([obeyed], tmp_path / "u", facts=SGLANG)
    ignored = import_sglang([save(tmp_path / "b.json", sglang())], tmp_path / "v", facts=SGLANG, start=2)
    assert ignored.requests.prefill.tolist() == [3] and "ignored the start length" in ignored.source["notes"][0]
    with pytest.raises(FormatError, match=r"4 rows, .* make 3"):
        import_sglang([save(tmp_path / "c.json", sglang(raw64(picks(4))))], tmp_path / "w", facts=SGLANG, start=2)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"meta_info": {}}, "has no routed_experts in meta_info or sglext; start the server"),
        (sglang("not base64"), "routed_experts is not base64"),
        (sglang(raw64(picks(5))[:-4]), "117 bytes are no whole rows of 3 layers x top-2 int32"),
        (sglang(raw64(picks(5, layers=4))), "160 bytes are no whole rows of 3 layers"),
        (sglang(raw64(changed(1, 2, [-1, 2]))), "row 1, layer 2: expert -1 is outside 0..7"),
        (sglang(raw64(changed(1, 2, [2**31 - 1, 2]))), "expert 2147483647 is outside 0..7"),
        (sglang(""), "0 rows, but 3 prompt and 3 completion tokens make 5"),
        (sglang(raw64(picks(4))), "4 rows, but 3 prompt and 3 completion tokens make 5"),
    ],
)
def test_bad_sglang_responses(tmp_path: Path, response: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_sglang([save(tmp_path / "r.json", response)], tmp_path / "t", facts=SGLANG)
    assert not (tmp_path / "t").exists()


def test_sglang_needs_a_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SGLang sends picks without their shape; give --config"):
        import_sglang([save(tmp_path / "r.json", sglang())], tmp_path / "t", facts=E8)


# --- Megatron ---------------------------------------------------------------------------------------------------------


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
    trace = import_megatron([engines / "router_trace_rank0.jsonl"], tmp_path / "t", facts=model_facts(num_experts=4))
    same(trace, np.array([[[0, 3], [0, 3]], [[1, 2], [1, 2]]]), (2, 3))
    assert trace.requests.prefill.tolist() == [-1] and "no request ids" in trace.source["notes"][0]


def test_megatron_file_cut_off(engines: Path, tmp_path: Path) -> None:
    config = {"num_experts": 4, "num_hidden_layers": 4, "first_k_dense_replace": 2}
    facts = model_facts(save(tmp_path / "c.json", config))
    whole, path, out = (
        (engines / "router_trace_rank0.jsonl").read_bytes().rstrip(),
        tmp_path / "r.jsonl",
        tmp_path / "t",
    )
    refused_when_cut(whole, path, out, lambda: import_megatron([path], out, facts=facts))


def test_megatron_steps_are_pseudo_requests(tmp_path: Path) -> None:
    first, second = [[0, 3], [1, 2]], [[4, 5]]
    lines = [line(2, first), line(1, first), line(0, first, block="mtp")]
    lines += [line(1, [], step=1), line(2, [], step=1), line(1, second, step=2), line(2, second, step=2)]
    trace = import_megatron([save(tmp_path / "router_trace_rank0.jsonl", *lines)], tmp_path / "t", facts=E8)
    assert trace.requests.rows.tolist() == [2, 1] and trace.shape.layer_ids == (1, 2)
    assert any("lines of block mtp were left out" in note for note in trace.source["notes"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"step": 0}], "line 1: is not a line of a router trace"),
        ([line(1, [[0, 1]], block="mtp")], "holds no decoder line"),
        ([line(1, [[0, 1]]), line(1, [[0, 1]])], "line 2: layer 1 is there twice in step 0"),
        ([line(1, [[0, 1]]), line(2, [[0, 1], [2, 3]])], "step 0: its layers differ in tokens or k"),
        ([line(1, [[0, 1]]), line(2, [[0, 1, 2]])], "its layers differ in tokens or k"),
        ([line(1, [[0, 1]]), line(2, [[0, 1]]), line(1, [[0, 1]], step=1)], "step 1: has layers 1, the first step 1-2"),
        ([line(1, [[0, 1]]), line(1, [[0, 1, 2]], step=1)], "step 1: 3 picks per token, expected 2"),
        ([line(1, [[0, 1]], step=1), line(1, [[0, 1]], step=0)], "step 0 after step 1; steps must rise"),
        ([line(1, [[0, 1]]), line(2, [[0, 1]], rank=1)], "rank 1 in a file of rank 0"),
        ([line(1, [[0, 1]], topk=3)], "topk is 3, but top_indices has 2"),
        ([line(1, [[0, 1]], num_tokens=3)], "num_tokens is 3, but top_indices has 1"),
        ([line(1, [[0, 1], [2]])], "top_indices is not .tokens..k. expert ids"),
        ([line(1, [[0.5, 1]])], "top_indices is not .tokens..k. expert ids"),
        ([line(1, [[0, 8]])], "row 0, layer 1: expert 8 is outside 0..7"),
        ([line(1, [[-1, 2]])], "row 0, layer 1: expert -1 is outside 0..7"),
        ([line(1, [[2, 2]])], "row 0, layer 1: expert 2 is picked twice"),
        ([], "holds no decoder line"),
    ],
)
def test_bad_megatron_traces(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_megatron([save(tmp_path / "r.jsonl", *lines)], tmp_path / "t", facts=E8)
    assert not (tmp_path / "t").exists()


# --- command line -----------------------------------------------------------------------------------------------------


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
    facts = moeplan("tensorrt-llm", engines / "trtllm_stats", "--stage", "prefill", "-o", tmp_path / "t")
    assert facts["stage"] == "prefill" and len(facts["imbalance"]) == 2 and facts["imbalance"][0] > 1
    out = capsys.readouterr().out
    assert "imbalance (largest over mean)" in out and "compare, and plans with groups, cannot be made of them" in out
    facts = moeplan("logical-count", save(tmp_path / "x.json", {"logical_count": [[1, 3]]}), "-o", tmp_path / "l")
    assert facts["imbalance"] == [1.5] and facts["largest_expert"] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vllm", "no.json", "--num-experts", "8"], "no.json: does not exist"),
        (["vllm", "no.json", "--dense-layers", "x"], "--dense-layers 'x' is not a list of layers"),
        (["logical-count", "no.json", "--stage", "noon"], "--stage 'noon' is no stage"),
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
