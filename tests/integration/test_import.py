"""Importers: real recordings come in whole; everything else is one clear line and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.cli.app import run
from moeplan.errors import FormatError, MoeplanError, OutputError, UsageError
from moeplan.importers.arrays import import_arrays
from moeplan.importers.expert_selection import import_expert_selection
from moeplan.importers.moe_beyond import import_moe_beyond
from moeplan.importers.options import ImportOptions
from moeplan.importers.sources import domain_of
from moeplan.model.config import described
from moeplan.trace import open_trace

REAL = ("maverick-mmlu", "gpt-oss-20b", "deepseek-v2-lite-chat", "mixtral-8x7b-long-context")


def experts(count: int, **options: Any) -> ImportOptions:
    """Options for sources that do not hold the number of experts."""
    return ImportOptions(described(num_experts=count), **options)


def arrays(**changes: Any) -> dict[str, Any]:
    """Three requests of 4, 3 and 5 rows, 2 layers x 8 experts, top-2."""
    good = {
        "experts": np.random.default_rng(0).integers(0, 8, (12, 2, 2)).astype(np.uint8),
        "request_offsets": np.array([0, 4, 7, 12]),
        "prefill_lengths": np.array([2, 0, -1]),
        "domain": np.array(["a", "b", "a"]),
        "layer_ids": np.array([1, 45]),
        "num_experts": np.array(8),
        "model": np.array("tiny"),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def save(path: Path, **changes: Any) -> Path:
    np.savez_compressed(path, **arrays(**changes))
    return path


# --- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_real_arrays_come_in_whole(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "traces" / f"{name}.npz"
    trace = import_arrays(source, tmp_path / "t")
    with np.load(source) as npz:
        np.testing.assert_array_equal(trace.load().experts, npz["experts"])
        np.testing.assert_array_equal(trace.requests.offsets, npz["request_offsets"])
        np.testing.assert_array_equal(trace.requests.prefill, npz["prefill_lengths"])
        assert [trace.requests.domains[d] for d in trace.requests.domain] == npz["domain"].tolist()
        assert trace.shape.layer_ids == tuple(npz["layer_ids"]) and trace.shape.name == str(npz["model"])


def test_a_layer_is_left_out_at_import(shared: Path, tmp_path: Path) -> None:
    source = shared / "traces" / "maverick-mmlu.npz"
    trace = import_arrays(source, tmp_path / "t", ImportOptions(without_layers=(45,)))
    with np.load(source) as npz:
        np.testing.assert_array_equal(trace.load().experts, npz["experts"][:, npz["layer_ids"] != 45])
    assert trace.shape.num_layers == 23 and 45 not in trace.shape.layer_ids
    with pytest.raises(UsageError, match="--without-layers 46: the trace has no such layer"):
        import_arrays(source, tmp_path / "u", ImportOptions(without_layers=(46,)))
    assert not (tmp_path / "u").exists()


def test_phases_and_extras(tmp_path: Path) -> None:
    model = described(name="mine", hidden=64, expert_bytes=10, kv_bytes_per_token=20, expert_groups=4)
    trace = import_arrays(save(tmp_path / "a.npz"), tmp_path / "t", ImportOptions(model))
    assert (trace.shape.name, trace.shape.hidden, trace.shape.routing_groups) == ("mine", 64, 4)
    assert trace.requests.decode.tolist() == [2, 3, 0] and trace.requests.prefill.tolist() == [2, 0, -1]
    assert trace.source == {"import": "arrays", "file": "a.npz"}


def test_what_may_be_absent(tmp_path: Path) -> None:
    trace = import_arrays(save(tmp_path / "a.npz", domain=None, layer_ids=None, model=None), tmp_path / "t")
    assert trace.requests.domains == ("",) and trace.shape.layer_ids == (0, 1) and trace.shape.name == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"request_offsets": np.array([0, 7, 4, 12])},
            "request_offsets: decrease at request 1: 7 to 4; offsets must increase",
        ),
        ({"request_offsets": np.array([0, 4, 4, 12])}, "request_offsets: leave no row at request 1"),
        ({"request_offsets": np.array([0, 4, 7, 11])}, "run from 0 to 11, but the file has rows 0 to 12"),
        ({"request_offsets": np.array([0.0, 4, 7, 12])}, "is float64 of 1 dimensions, expected whole numbers"),
        ({"request_offsets": None}, "has no array 'request_offsets'; it holds experts"),
        ({"prefill_lengths": np.array([5, 0, -1])}, "request 0: 5 prefill rows of 4"),
        ({"prefill_lengths": np.array([2, 0, -2])}, "request 2: -2 prefill rows of 5; use -1 where unknown"),
        ({"prefill_lengths": np.array([2, 0])}, "2 lengths for 3 requests"),
        ({"domain": np.array(["a"])}, "1 labels for 3 requests"),
        ({"domain": np.array(["a", "b", "\x1b[31m"])}, "request 2 .*: the domain label"),
        ({"layer_ids": np.array([1, 2, 3])}, "3 layer_ids for 2 layers"),
        ({"layer_ids": np.array([2, 1])}, "layer ids must rise"),
        ({"num_experts": np.array(4)}, r"a.npz, request 0 \(from row 0\): row ., layer .*: expert . is outside 0..3"),
        ({"num_experts": np.array(10**9)}, "1000000000 experts is outside 1..65535"),
        ({"num_experts": np.array([8])}, "is int64 of 1 dimensions, expected whole numbers of 0"),
        ({"experts": np.zeros((12, 2), np.uint8)}, "is uint8 of 2 dimensions, expected whole numbers of 3"),
        ({"experts": np.zeros((12, 2, 2))}, "is float64 of 3 dimensions"),
        ({"experts": np.array([[[None]]])}, "holds Python objects, which are never loaded"),
        ({"experts": np.asfortranarray(np.zeros((12, 2, 2), np.uint8))}, "is stored column by column"),
        ({"experts": np.zeros((0, 2, 2), np.uint8), "request_offsets": np.array([0])}, "there is no request to import"),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / "a.npz", **changes)
    with pytest.raises(FormatError, match=message):
        import_arrays(tmp_path / "a.npz", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_every_cut_of_an_npz_is_one_line(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npz").read_bytes()
    for cut in range(0, len(whole), 37):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(FormatError, match=r"not a whole .npz .*; it may be cut off"):
            import_arrays(tmp_path / "cut.npz", tmp_path / "t")


def test_changed_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npz").read_bytes()
    for place in range(0, len(whole), 11):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        out = tmp_path / f"t{place}"
        try:
            import_arrays(tmp_path / "bad.npz", out)
        except MoeplanError:
            assert not out.exists()


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    save(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as good, zipfile.ZipFile(tmp_path / "bomb.npz", "w") as bomb:
        for name in good.namelist():
            data = good.read(name)
            if name == "request_offsets.npy":
                data = data.replace(b"(4,), }", b"(4" + b"0" * 12 + b",), }")[: len(data)]
            bomb.writestr(name, data)
    with pytest.raises(FormatError, match=r"request_offsets: declares .* bytes, more than the 268435456"):
        import_arrays(tmp_path / "bomb.npz", tmp_path / "t")


# --- expert-selection JSON ------------------------------------------------------------------------------------------


def steps() -> list[dict[str, Any]]:
    """A prefill of two tokens and two decode steps; layer 0 is dense, layers 1 and 3 have top-2."""
    prefill = {"0": None, "1": [[1, 2], [3, 4]], "3": [[5, 6], [7, 0]]}
    return [prefill, {"0": None, "1": [[0, 1]], "3": [[2, 3]]}, {"0": None, "1": [[4, 5]], "3": [[6, 7]]}]


def put(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_real_json_equals_the_arrays_made_from_it(shared: Path, tmp_path: Path) -> None:
    folder = shared / "traces" / "formats" / "expert_selection_json"
    trace = import_expert_selection([folder], tmp_path / "t", experts(128))
    assert trace.requests.domains == ("anatomy",) and len(trace.requests) == 3
    with np.load(shared / "traces" / "maverick-mmlu.npz") as npz:
        known = {tuple(row) for row in npz["experts"].reshape(len(npz["experts"]), -1)}
        assert trace.shape.layer_ids == tuple(npz["layer_ids"])
    rows = trace.load().experts
    assert sum(tuple(row) in known for row in rows.reshape(len(rows), -1)) == len(rows)


def test_json_rows_and_phases(tmp_path: Path) -> None:
    for name in ("req-10.json", "req-9.json"):
        put(tmp_path / name, steps())
    trace = import_expert_selection([tmp_path], tmp_path / "t", experts(8, without_layers=(3,)))
    assert trace.shape.layer_ids == (1,) and trace.requests.prefill.tolist() == [2, 2]
    assert trace.load().experts[:4, 0].tolist() == [[1, 2], [3, 4], [0, 1], [4, 5]]
    empty = [{"0": None, "1": [], "3": []}, *steps()[1:]]
    again = import_expert_selection([put(tmp_path / "e-1.json", empty)], tmp_path / "u", experts(8, domain="mine"))
    assert again.requests.prefill.tolist() == [0] and again.requests.domains == ("mine",)


def changed(step: int, layer: str, value: Any) -> list[dict[str, Any]]:
    made = steps()
    made[step][layer] = value
    return made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(steps())[:-20], "invalid or truncated JSON .*; the file may be truncated"),
        ({"1": []}, "not a list of steps"),
        ([1], "not a list of steps"),
        ([], "holds no step"),
        ([{"0": None}], "step 0 has no MoE layer"),
        ([{"1": []}], "holds no token"),
        (changed(1, "3", None), "step 1: layer '3' has picks in one step and none in another"),
        (changed(1, "x", [[1, 2]]), "step 1: layer 'x'"),
        ([{"x": [[1]]}], "has a layer that is not a number"),
        (changed(0, "3", [[5, 6], [7]]), "step 0: layer 3 has 2 picks in its first token and another number"),
        (changed(0, "3", [[5, 6]]), "step 0: layer 3 has other tokens or another k than layer 1"),
        (changed(0, "3", [[5, 6], [7, "0"]]), "layer 3 is not .tokens..k. whole numbers"),
        (changed(0, "3", [[5, 6], [7, 0.5]]), "layer 3 is not .tokens..k. whole numbers"),
        (changed(0, "3", [[5, 6], [7, 10**30]]), "ids too large"),
        (changed(0, "3", 5), "layer 3 is not"),
        ([*steps(), {"0": None, "1": [[1]], "3": [[1]]}], "step 3: 1 picks per token, 2 before"),
        ([*steps(), steps()[0]], "step 3: 2 tokens, but a decode step holds one"),
        (changed(2, "3", [[6, 8]]), "a-1.json: row 3, layer 3: expert 8 is outside 0..7; check the number of experts"),
        (changed(2, "3", [[6, -1]]), "expert -1 is outside"),
    ],
)
def test_bad_json(tmp_path: Path, content: Any, message: str) -> None:
    put(tmp_path / "a-1.json", content)
    with pytest.raises(FormatError, match=message):
        import_expert_selection([tmp_path / "a-1.json"], tmp_path / "t", experts(8))
    assert not (tmp_path / "t").exists()


def test_json_files_of_different_models(tmp_path: Path) -> None:
    put(tmp_path / "a-1.json", steps())
    put(tmp_path / "a-2.json", [{"1": [[1, 2]]}])
    with pytest.raises(FormatError, match=r"a-2.json: 1 MoE layers and top-2, but a-1.json has 2 layers and top-2"):
        import_expert_selection([tmp_path], tmp_path / "t", experts(8))
    assert not (tmp_path / "t").exists()


def test_a_huge_json_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(FormatError, match="bytes of JSON are more than"):
        import_expert_selection([tmp_path / "big.json"], tmp_path / "t", experts(8))


# --- MoE-Beyond CSV -------------------------------------------------------------------------------------------------

CSV = """\
Layer ID,Batch Number,Token,Activated Expert IDs
1,0,Hi,"[1, 2]"
1,0,",","[3, 4]"
2,0,Hi,"[5, 6]"
2,0,",","[7, 0]"
1,1,You,"[0, 1]"
2,1,You,"[2, 3]"
"""


def test_real_csv(shared: Path, tmp_path: Path) -> None:
    folder = shared / "traces" / "formats" / "moe_beyond_csv"
    trace = import_moe_beyond([folder], tmp_path / "t", experts(64))
    assert (trace.shape.num_layers, trace.shape.top_k, len(trace.requests)) == (26, 6, 3)
    assert trace.requests.prefill.tolist() == [12, 12, 12] == trace.requests.rows.tolist()
    first = (folder / "prompt_622_data.csv").read_text(encoding="utf-8").splitlines()[1]
    assert str(trace.load().experts[0, 0].tolist()) in first
    assert all(b"crazy" not in path.read_bytes() for path in (tmp_path / "t").iterdir())


def test_each_batch_is_a_request(tmp_path: Path) -> None:
    trace = import_moe_beyond([put(tmp_path / "prompt_7_data.csv", CSV)], tmp_path / "t", experts(8))
    assert trace.requests.rows.tolist() == [2, 1] and trace.requests.domains == ("prompt",)
    assert trace.load().experts.tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 0]], [[0, 1], [2, 3]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "", "does not begin with Layer ID"),
        (lambda t: t.splitlines()[0], "holds no row of picks"),
        (lambda t: t[:-5], "row 7 is not layer, batch, token and a list of expert ids; the file may be cut off"),
        (
            lambda t: "\n".join(t.splitlines()[:-3]),
            "batch 0: 1 tokens in layer 2, 2 in layer 1; the file may be cut off",
        ),
        (lambda t: "\n".join(t.splitlines()[:-1]), "batch 1: other layers than the first batch"),
        (lambda t: t.replace("[7, 0]", "[7]"), "row 5: 1 expert ids, 2 before"),
        (lambda t: t.replace("[7, 0]", "[7, x]"), "row 5 is not"),
        (lambda t: t.replace("[7, 0]", "[7, 99999999]"), "row 5 is not"),
        (lambda t: t.replace("[7, 0]", "[7, 8]"), "row 1, layer 2: expert 8 is outside 0..7"),
        (lambda t: t.replace("Hi", "x" * 200_000), "is not CSV"),
    ],
)
def test_bad_csv(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    put(tmp_path / "a.csv", change(CSV))
    with pytest.raises(FormatError, match=message):
        import_moe_beyond([tmp_path / "a.csv"], tmp_path / "t", experts(8))
    assert not (tmp_path / "t").exists()


# --- all of them ----------------------------------------------------------------------------------------------------


def test_num_experts_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the source does not say .*; give --num-experts"):
        import_expert_selection([put(tmp_path / "a-1.json", steps())], tmp_path / "t")
    with pytest.raises(UsageError, match=r"the source does not say .*; give --num-experts"):
        import_moe_beyond([put(tmp_path / "a.csv", CSV)], tmp_path / "t")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="nope: does not exist"):
        import_expert_selection([tmp_path / "nope"], tmp_path / "t", experts(8))
    with pytest.raises(FormatError, match=r"empty: holds no .csv file"):
        import_moe_beyond([tmp_path / "empty"], tmp_path / "t", experts(8))
    for source in (tmp_path / "nope", tmp_path / "empty"):
        with pytest.raises(FormatError, match=r"does not exist|cannot be read"):
            import_arrays(source, tmp_path / "t")


def test_a_place_for_figures_that_cannot_be_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, facts = save(tmp_path / "a.npz"), str(tmp_path / "none" / "facts.json")
    for words in (
        ["import", "arrays", str(source), "-o", str(tmp_path / "t")],
        ["generate", "demo", "-o", str(tmp_path / "t")],
        ["record", "transformers", "--model", "no", "--prompts", "no", "-o", str(tmp_path / "t")],
        ["record", "vllm", "--prompts", "no", "-o", str(tmp_path / "t")],
    ):
        assert run([*words, "--json", facts]) == 2
        assert "facts.json: cannot be written (its folder does not exist)" in capsys.readouterr().err
        assert not (tmp_path / "t").exists()


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz")
    import_arrays(source, tmp_path / "t")
    with pytest.raises(OutputError, match="t: already exists; choose another place"):
        import_arrays(source, tmp_path / "t")
    assert open_trace(tmp_path / "t").complete
    with pytest.raises(OutputError, match="choose a place that you may write to"):
        import_arrays(source, source / "t")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="cannot be made"):
            import_arrays(source, tmp_path / "locked" / "t")


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    source = save(tmp_path / "a.npz")
    with pytest.raises(KeyboardInterrupt):
        import_arrays(source, tmp_path / "t", progress=stop)
    trace = open_trace(tmp_path / "t")
    assert not trace.complete and len(trace.requests) == 2
    np.testing.assert_array_equal(trace.load().experts, arrays()["experts"][:7])


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from moeplan.cli.app import run
from moeplan.trace.writer import TraceWriter
add = TraceWriter.add_request
def slow(self, *args, **kwargs):
    add(self, *args, **kwargs)
    print(len(self) - 1, flush=True)
    time.sleep(0.05)
TraceWriter.add_request = slow
sys.exit(run(["import", "arrays", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_real_sigint_ends_the_command_with_130(tmp_path: Path) -> None:
    offsets = np.arange(0, 1201, 4)
    many = {
        "experts": np.zeros((1200, 2, 2), np.uint8),
        "request_offsets": offsets,
        "prefill_lengths": np.ones(300, np.int64),
        "domain": None,
    }
    command = [sys.executable, "-c", SLOW, str(save(tmp_path / "a.npz", **many)), "-o", str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "3":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    trace = open_trace(tmp_path / "t")
    assert not trace.complete and 4 <= len(trace.requests) < 300


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save(tmp_path / "a.npz"))
    assert run(["import", "arrays", source, "-o", str(tmp_path / "t"), "--hidden", "64", "--json", "-"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["requests"], facts["tokens"], facts["layers"], facts["experts"], facts["top_k"]) == (3, 12, 2, 8, 2)
    assert (facts["prefill_tokens"], facts["decode_tokens"], facts["unknown_tokens"]) == (2, 5, 5)
    assert (facts["requests_with_unknown_phases"], facts["requests_without_prefill"]) == (1, 1)
    assert facts["domains"] == {"a": 2, "b": 1}
    assert "next: moeplan profile" in captured.err and "1 of 3 requests have unknown phases" in captured.err
    assert run(["import", "arrays", source, "-o", str(tmp_path / "t")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "already exists" in captured.err
    json_source = str(put(tmp_path / "a-1.json", steps()))
    assert run(["import", "expert-selection", json_source, "-o", str(tmp_path / "u"), "--num-experts", "8"]) == 0
    assert "2 layers x 8 experts, top-2" in capsys.readouterr().out
    csv_source = str(put(tmp_path / "p.csv", CSV))
    assert run(["import", "moe-beyond", csv_source, "-o", str(tmp_path / "v"), "--num-experts", "8"]) == 0
    assert run(["import", "arrays", source, "-o", str(tmp_path / "w"), "--without-layers", "x"]) == 2


@pytest.mark.parametrize(
    ("name", "label"),
    [("anatomy-100.json", "anatomy"), ("prompt_622_data.csv", "prompt"), ("42.json", "42"), ("chat.json", "chat")],
)
def test_labels_from_file_names(name: str, label: str) -> None:
    assert domain_of(Path(name)) == label
