"""SGLang's responses come in as they were recorded; everything else is one clear line and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.engine_files import changed, picks, raw64, refused_when_cut, same, save
from moeplan.errors import FormatError, UsageError
from moeplan.importers.options import ImportOptions
from moeplan.importers.sglang_responses import import_sglang
from moeplan.model.config import described

SGLANG = ImportOptions(described(num_experts=8, num_layers=3, top_k=2))


def sglang(text: Any = None, *, prompt: Any = 3, completion: Any = 3) -> dict[str, Any]:
    text = raw64(picks(5)) if text is None else text
    meta = {"prompt_tokens": prompt, "completion_tokens": completion, "dp_rank": 1, "routed_experts": text}
    return {"text": "secret", "output_ids": [1, 2, 3], "meta_info": meta}


def test_sglang_file_is_the_known_truth(engines: Path, tmp_path: Path) -> None:
    truth = np.load(engines / "routed_experts_truth.npy")
    spec = described(num_experts=8, num_layers=4, top_k=2)
    trace = import_sglang([engines / "sglang_generate_response.json"], tmp_path / "t", ImportOptions(spec))
    same(trace, truth[:, 1:], (1, 2, 3))
    assert trace.requests.prefill.tolist() == [5]


def test_sglang_file_cut_off(engines: Path, tmp_path: Path) -> None:
    spec = described(num_experts=8, num_layers=4, top_k=2)
    whole, path, out = (engines / "sglang_generate_response.json").read_bytes(), tmp_path / "r.json", tmp_path / "t"
    refused_when_cut(whole, path, out, lambda: import_sglang([path], out, ImportOptions(spec)))


def test_sglang_wrong_shape_of_the_right_size_is_noticed(engines: Path, tmp_path: Path) -> None:
    spec = described(num_experts=8, num_layers=2, top_k=4)
    with pytest.raises(FormatError, match="is picked twice; the shape or the model is another one"):
        import_sglang([engines / "sglang_generate_response.json"], tmp_path / "t", ImportOptions(spec))
    assert not (tmp_path / "t").exists()


def test_the_rank_that_served_is_kept_where_the_engine_names_it(tmp_path: Path) -> None:
    silent = sglang()
    silent["meta_info"]["dp_rank"] = None
    import_sglang([save(tmp_path / "r.jsonl", sglang(), silent)], tmp_path / "t", SGLANG)
    assert pq.read_table(tmp_path / "t" / "requests.parquet")["dp_rank"].to_pylist() == [1, None]
    import_sglang([save(tmp_path / "s.json", silent)], tmp_path / "u", SGLANG)
    assert "dp_rank" not in pq.read_schema(tmp_path / "u" / "requests.parquet").names
    for rank in (-1, "0", 2**31):
        silent["meta_info"]["dp_rank"] = rank
        with pytest.raises(FormatError, match="rank"):
            import_sglang([save(tmp_path / "b.json", silent)], tmp_path / "v", SGLANG)


def test_sglang_openai_form(tmp_path: Path) -> None:
    response = {
        "model": "m",
        "choices": [{"text": "secret"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "sglext": {"routed_experts": raw64(picks(5))},
    }
    trace = import_sglang([save(tmp_path / "r.json", response)], tmp_path / "t", SGLANG)
    same(trace, picks(5)[:, 1:], (1, 2))
    assert trace.shape.name == "m" and trace.requests.prefill.tolist() == [3]
    several = response | {"choices": [{}, {}]}
    trace = import_sglang([save(tmp_path / "s.json", several)], tmp_path / "u", SGLANG)
    assert trace.requests.prefill.tolist() == [-1]
    assert "a response of several choices carries the picks of one only" in trace.source["notes"]


def test_sglang_start_length_and_builds_that_ignore_it(tmp_path: Path) -> None:
    obeyed = save(tmp_path / "a.json", sglang(raw64(picks(5)[2:])))
    assert import_sglang([obeyed], tmp_path / "t", SGLANG, start=2).requests.prefill.tolist() == [1]
    with pytest.raises(FormatError, match=r"3 rows, but 3 prompt and 3 completion tokens make 5"):
        import_sglang([obeyed], tmp_path / "u", SGLANG)
    ignored = import_sglang([save(tmp_path / "b.json", sglang())], tmp_path / "v", SGLANG, start=2)
    assert ignored.requests.prefill.tolist() == [3] and "ignored the start length" in ignored.source["notes"][0]
    with pytest.raises(FormatError, match=r"4 rows, .* make 3"):
        import_sglang([save(tmp_path / "c.json", sglang(raw64(picks(4))))], tmp_path / "w", SGLANG, start=2)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"meta_info": {}}, "has no routed_experts in meta_info or sglext; start the server"),
        (sglang("not base64"), "routed_experts is not base64"),
        (sglang(raw64(picks(5))[:-4]), "117 bytes are not a whole number of rows of 3 layers x top-2 int32"),
        (sglang(raw64(picks(5, layers=4))), "160 bytes are not a whole number of rows of 3 layers"),
        (sglang(raw64(changed(1, 2, [-1, 2]))), "row 1, layer 2: expert -1 is outside 0..7"),
        (sglang(raw64(changed(1, 2, [2**31 - 1, 2]))), "expert 2147483647 is outside 0..7"),
        (sglang(""), "0 rows, but 3 prompt and 3 completion tokens make 5"),
        (sglang(raw64(picks(4))), "4 rows, but 3 prompt and 3 completion tokens make 5"),
    ],
)
def test_bad_sglang_responses(tmp_path: Path, response: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_sglang([save(tmp_path / "r.json", response)], tmp_path / "t", SGLANG)
    assert not (tmp_path / "t").exists()


def test_sglang_needs_a_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SGLang sends picks without their shape; give --config"):
        import_sglang([save(tmp_path / "r.json", sglang())], tmp_path / "t", ImportOptions(described(num_experts=8)))
