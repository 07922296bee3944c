"""Counts without requests, and recordings whose requests must be rebuilt: right, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engine_files import refused_when_cut, save
from moeplan.cli.app import run
from moeplan.errors import FormatError, OutputError, UsageError
from moeplan.importers.logical_count import import_logical_count
from moeplan.importers.options import ImportOptions
from moeplan.importers.sglang_recorder import import_sglang_recorder
from moeplan.importers.sglang_requests import Pass, rebuild
from moeplan.importers.tensorrt_llm import import_tensorrt_llm
from moeplan.trace.counts import CountsProfile, make_counts, read_counts, write_counts
from moeplan.trace.reader import Trace

# --- SGLang recorder --------------------------------------------------------------------------------------------------


def dump(engines: Path, kind: str) -> Path:
    return next((engines / "sgl_rec").glob(f"{kind}__*.pt"))


def recorder_truth(engines: Path) -> np.ndarray:
    """Totals [3, 8] as the recorder itself summed them over all passes, per layer and logical expert."""
    torch = pytest.importorskip("torch", reason="the recorder writes torch files")
    data = torch.load(dump(engines, "stat_inf"), weights_only=True)
    return np.asarray(data["logical_count"].sum(0))


@pytest.mark.parametrize("kind", ["stat_inf", "per_pass", "per_token"])
def test_recorder_counts_agree_with_each_other(engines: Path, tmp_path: Path, kind: str) -> None:
    truth = recorder_truth(engines)
    made = import_sglang_recorder([dump(engines, kind)], tmp_path / "c", counts=True)
    assert isinstance(made, CountsProfile)
    np.testing.assert_array_equal(made.counts, truth[1:])
    assert made.layer_ids == (1, 2) and made.phase == ("mixed" if kind == "per_token" else "unknown")


def test_recorder_stat_says_when_its_buffer_was_full(engines: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    made = import_sglang_recorder([dump(engines, "stat")], tmp_path / "c", phase="decode")
    assert isinstance(made, CountsProfile) and made.counts.sum() == 32 and made.phase == "decode"
    assert any("earlier ones (such as prefill) are lost" in note for note in made.source["notes"])
    with pytest.raises(UsageError, match="2 stat dumps are 2 recordings"):
        import_sglang_recorder([dump(engines, "stat"), dump(engines, "stat_inf")], tmp_path / "d")
    with pytest.raises(UsageError, match="a stat dump is counts without requests"):
        import_sglang_recorder([dump(engines, "stat")], tmp_path / "d", ImportOptions(domain="chat"))


def test_recorder_per_token_that_has_no_requests_is_refused(engines: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    with pytest.raises(FormatError, match=r"record 1: decode tokens at position 0 continue no request .* --counts"):
        import_sglang_recorder([dump(engines, "per_token")], tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["stat", "stat_inf", "per_pass", "per_token"])
def test_recorder_dumps_cut_off(engines: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    whole, path, out = dump(engines, kind).read_bytes(), tmp_path / "x.pt", tmp_path / "c"
    refused_when_cut(whole, path, out, lambda: import_sglang_recorder([path], out, counts=True), step=61)


def records(physical: np.ndarray | None = None, **changes: Any) -> dict[str, Any]:
    """Two requests, prompts of 3 and 2 tokens, then 2 decode passes and one of the second request alone.

    Layers 3 (the first dense), experts 4 on 6 slots (0 and 1 twice), top-2.
    """
    import torch

    slots = np.array([[0, 1, 2, 3, 0, 1]] * 3)
    plan = [(1, [0, 1, 2, 0, 1], [3, 2]), (2, [3, 2], None), (2, [4, 3], None), (2, [4], None)]
    rng = np.random.default_rng(3)
    done = []
    for number, (mode, positions, lengths) in enumerate(plan):
        ids = np.full((3, len(positions), 8), -1, np.int32)
        ids[1:, :, 0] = rng.choice([0, 2, 4], (2, len(positions)))
        ids[1:, :, 1] = rng.choice([1, 3, 5], (2, len(positions)))
        done.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": [7] * len(positions),
                "positions": positions,
                "extend_seq_lens": lengths,
                "forward_mode": mode,
                "topk_ids_of_layer": torch.from_numpy(ids),
                "misc_objects": "shared and wrong",
            }
        )
    return {"records": done, "last_physical_to_logical_map": torch.from_numpy(slots), **changes}


def save_pt(path: Path, data: Any) -> Path:
    import torch

    torch.save(data, path)
    return path


def test_recorder_requests_are_rebuilt(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    data = records()
    trace = import_sglang_recorder([save_pt(tmp_path / "chat-1.pt", data)], tmp_path / "t")
    assert isinstance(trace, Trace)
    assert trace.requests.rows.tolist() == [5, 5] and trace.requests.prefill.tolist() == [3, 2]
    assert (trace.shape.num_experts, trace.shape.top_k, trace.shape.layer_ids) == (4, 2, (1, 2))
    steps = [record["topk_ids_of_layer"].numpy()[1:, :, :2].transpose(1, 0, 2) for record in data["records"]]
    first = [*steps[0][:3], steps[1][0], steps[2][0]]
    second = [*steps[0][3:], steps[1][1], steps[2][1], steps[3][0]]
    logical = np.array([0, 1, 2, 3, 0, 1])[np.array(first + second)]
    np.testing.assert_array_equal(trace.load().experts, logical)


def edit(number: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["records"][number].update(changes)

    return change


def slot(value: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["records"][1]["topk_ids_of_layer"][1, 0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edit(0, positions=[0, 1, 2, 3, 4], extend_seq_lens=[3, 2]),
            "record 1: decode tokens at position 2 continue no request",
        ),
        (edit(0, extend_seq_lens=[3, 3]), "record 0: extend_seq_lens add up to 6, but there are 5 tokens"),
        (edit(0, extend_seq_lens=None), "extend_seq_lens is not a tensor or list of whole numbers"),
        (edit(0, positions=[0, 1, 3, 0, 1]), "positions inside a prompt are not consecutive"),
        (edit(1, positions=[3]), "topk_ids_of_layer .* does not fit 3 layers and 1 tokens"),
        (edit(1, positions=[9, 2]), "record 1: decode tokens at position 9 continue no request"),
        (edit(1, positions=[2, 3]), "in an order that no list of requests gives continue no request"),
        (edit(1, positions=[-1, 2]), "positions are out of range"),
        (edit(1, forward_mode=3), "forward_mode 3 is neither extend"),
        (edit(1, gatherer_key="child_a"), "two-batch overlap"),
        (edit(1, rank=1), "its records are not of one rank"),
        (slot(6), "record 1: layer 1: a slot is outside 0..5"),
        (slot(-1), "layer 1, token 0: 1 picks, expected 2"),
        (lambda data: data.update(records=[]), "is no dump of SGLang's expert recorder"),
        (lambda data: data.pop("last_physical_to_logical_map"), "last_physical_to_logical_map is not a tensor"),
    ],
)
def test_bad_recorder_dumps(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    data = records()
    change(data)
    with pytest.raises(FormatError, match=message):
        import_sglang_recorder([save_pt(tmp_path / "x.pt", data)], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_recorder_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    data = records()
    first = save_pt(tmp_path / "r0.pt", data)
    for record in data["records"]:
        record["rank"] = 1
    second = save_pt(tmp_path / "r1.pt", data)
    with pytest.raises(FormatError, match=r"r1.pt: holds the same tokens as r0.pt"):
        import_sglang_recorder([first, second], tmp_path / "t")
    with pytest.raises(FormatError, match=r"is of rank 0, as is r0.pt"):
        import_sglang_recorder([first, first], tmp_path / "t")
    made = import_sglang_recorder([first, second], tmp_path / "c", counts=True)
    assert any("2 times too large" in note for note in made.source["notes"])
    for record in data["records"]:
        record["topk_ids_of_layer"][1:, :, 0] = 2
    trace = import_sglang_recorder([first, save_pt(tmp_path / "r1.pt", data)], tmp_path / "t")
    assert isinstance(trace, Trace) and len(trace.requests) == 4


def test_a_tensor_that_unfolds_is_not_unfolded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the recorder writes torch files")
    bomb = torch.zeros(1, dtype=torch.int32).expand(1 << 12, 1 << 12, 1 << 12)
    path = save_pt(tmp_path / "x.pt", {"logical_count": bomb})
    assert path.stat().st_size < 10_000
    with pytest.raises(FormatError, match="logical_count declares more than it stores"):
        import_sglang_recorder([path], tmp_path / "t")
    huge = save_pt(tmp_path / "y.pt", {"logical_count": torch.full((2, 1, 1), 2**62)})
    with pytest.raises(FormatError, match="a count that is negative or too large"):
        import_sglang_recorder([huge], tmp_path / "t")


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    path = save_pt(tmp_path / "x.pt", {"records": [Path("boo")]})
    with pytest.raises(FormatError, match=r"is not a whole \.pt file of tensors and plain values"):
        import_sglang_recorder([path], tmp_path / "t")


# --- requests from passes ---------------------------------------------------------------------------------------------


def extend(*prompts: tuple[int, int]) -> Pass:
    """Prompts as (first position, tokens)."""
    positions = np.concatenate([np.arange(start, start + tokens) for start, tokens in prompts])
    return Pass(positions, np.array([tokens for _, tokens in prompts]), "here")


def decode(*positions: int) -> Pass:
    return Pass(np.array(positions, np.int64), None, "here")


def test_rebuild_follows_the_order_in_the_batch() -> None:
    owners = rebuild([extend((0, 2), (0, 2)), decode(2, 2), extend((5, 1)), decode(3, 3, 6), decode(4, 7)][:4])
    assert owners.request.tolist() == [0, 0, 1, 1, 0, 1, 2, 0, 1, 2] and owners.prefill.tolist() == [2, 2, 1]
    finished = rebuild([extend((0, 1), (0, 2)), decode(2), extend((0, 4)), decode(3, 4)])
    assert finished.request.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([extend((0, 2), (0, 2)), decode(2)], "the decode token at position 2 may belong to several requests"),
        ([decode(4)], "decode tokens at position 4 continue no request of this recording"),
        ([extend((0, 2), (0, 3)), decode(3, 2)], "in an order that no list of requests gives"),
        ([extend((0, 2)), extend((2, 2))], "from position 2 may continue a chunked prompt or follow a cached prefix"),
        ([extend((0, 2)), decode(2), decode(4)], "decode tokens at position 4 continue no request"),
    ],
)
def test_rebuild_never_guesses(passes: list[Pass], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        rebuild(passes)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_logical_count_files(shared: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((shared / "traces" / "sglang_logical_count").glob("*.json"))):
        made = import_logical_count(path, tmp_path / str(number), phase=path.stem.split("_")[0])
        truth = np.array(json.loads(path.read_text())["logical_count"])
        np.testing.assert_array_equal(made.counts, truth[3:])
        assert made.layer_ids == tuple(range(3, 61)) and made.phase in ("prefill", "decode")


def test_logical_count_cut_off(shared: Path, tmp_path: Path) -> None:
    whole = (shared / "traces" / "sglang_logical_count" / "prefill_in512.json").read_bytes()
    path, out = tmp_path / "x.json", tmp_path / "c"
    refused_when_cut(whole.rstrip(), path, out, lambda: import_logical_count(path, out), step=9973)


def test_logical_count_with_steps(tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", {"logical_count": [[[1, 2], [0, 0]], [[3, 4], [0, 0]]]})
    assert import_logical_count(path, tmp_path / "c").counts.tolist() == [[4, 6]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "logical_count is missing"),
        ({"logical_count": []}, "is not a table of counts"),
        ({"logical_count": [[1, 2], [3]]}, "is not a table of counts"),
        ({"logical_count": [["a"]]}, "is not a table of counts"),
        ({"logical_count": [[1, -2]]}, "layer row 0, expert 1: -2 is not a count"),
        ({"logical_count": [[1.5, 2]]}, "expert 0: 1.5 is not a count"),
        ({"logical_count": [[1e300, 2]]}, r"expert 0: 1e\+300 is not a count"),
        ({"logical_count": [[float("nan"), 2]]}, "expert 0: nan is not a count"),
        ({"logical_count": [[0, 0]]}, "no pick was counted"),
        ({"logical_count": [[[5, 5]], [[-1, 1]]]}, "holds a negative count"),
        ({"logical_count": [[[2**63, 5]], [[2**63, 1]]]}, "expert 0: .* is not a count"),
    ],
)
def test_bad_logical_counts(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_logical_count(save(tmp_path / "x.json", value), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_tensorrt_llm_statistics(engines: Path, tmp_path: Path) -> None:
    made = import_tensorrt_llm(engines / "trtllm_stats", tmp_path / "c")
    totals = np.zeros((2, 4), np.int64)
    for rank in range(2):
        data = (engines / "trtllm_stats" / f"rank{rank}.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        for key, item in json.loads(data[8 : 8 + size]).items():
            begin, end = item["data_offsets"]
            totals[int(key.split("_")[1]) - 1] += np.frombuffer(data[8 + size :][begin:end], "<i8")
    np.testing.assert_array_equal(made.counts, totals)
    assert (made.layer_ids, made.top_k, made.source["iterations"]) == ((1, 2), 2, [100, 101])


@pytest.mark.parametrize("name", ["meta_info.json", "rank0.safetensors", "rank1.safetensors"])
def test_tensorrt_llm_statistics_cut_off(engines: Path, tmp_path: Path, name: str) -> None:
    folder, out = tmp_path / "in", tmp_path / "c"
    folder.mkdir()
    for source in (engines / "trtllm_stats").iterdir():
        shutil.copyfile(source, folder / source.name)
    refused_when_cut(
        (engines / "trtllm_stats" / name).read_bytes(), folder / name, out, lambda: import_tensorrt_llm(folder, out)
    )
    (folder / name).unlink()
    if name != "rank1.safetensors":  # the files do not say how many ranks there were
        with pytest.raises(FormatError, match=r"rank0|meta_info"):
            import_tensorrt_llm(folder, out)


def tensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def span(*offsets: int, dtype: str = "I64", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([1], b"", "is not a valid .safetensors file"),
        ({"1_1": span(0, 16, dtype="F64")}, bytes(16), "'1_1' is not a vector of int32 or int64"),
        ({"1_1": span(0, 16, shape=(2, 1))}, bytes(16), "is not a vector"),
        ({"1_1": span(0, 24)}, bytes(24), "is not a valid .safetensors file"),
        ({"1_1": span(-16, 0)}, bytes(16), "is not a valid .safetensors file"),
        ({"1_1": span(8, 24)}, bytes(24), "is not a valid .safetensors file"),
        ({"1_1": span(0, 16), "1_2": span(0, 16)}, bytes(16), "is not a valid .safetensors file"),
        ({"1_1": span(0, 16)}, bytes(17), "is not a valid .safetensors file"),
        ({"1": span(0, 16)}, bytes(16), "key '1' is not iteration_layer"),
        ({"1_1": span(0, 8, shape=(1,))}, bytes(8), "1_1: 1 counts for 2 experts"),
        ({"1_1": span(0, 16)}, b"\xff" * 16, "a count is negative or too large"),
        ({}, b"", "holds no counts"),
        (
            {"1_1": span(0, 16), "1_2": span(16, 32), "2_1": span(32, 48)},
            bytes(48),
            "an iteration lacks a layer that another one has",
        ),
    ],
)
def test_bad_tensorrt_llm_ranks(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save(folder / "meta_info.json", {"num_experts": 2, "num_experts_per_token": 1})
    tensors(folder / "rank0.safetensors", header, data)
    with pytest.raises(FormatError, match=message):
        import_tensorrt_llm(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def profile() -> CountsProfile:
    totals = np.array([[0, 0, 0], [1, 2, 3], [4, 0, 2]])
    return make_counts(totals, where="here", source={"import": "test"}, name="tiny", top_k=2, phase="decode")


def test_a_counts_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    made = write_counts(profile(), tmp_path / "c")
    again = read_counts(tmp_path / "c")
    np.testing.assert_array_equal(again.counts, [[1, 2, 3], [4, 0, 2]])
    assert (again.name, again.top_k, again.phase, again.layer_ids) == ("tiny", 2, "decode", (1, 2))
    assert again.counts.dtype == np.uint64 and again.checksum == made.checksum and again.path == tmp_path / "c"
    assert again.source["notes"] == ["layers without a pick, left out as dense: 0"]
    with pytest.raises(OutputError, match="already exists"):
        write_counts(profile(), tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "moeplan-trace"}, "is not a moeplan-counts file"),
        ({"version": 2}, "version 2 is not 1; use a newer moeplan"),
        ({"model": None}, "model is None, not an object"),
        ({"stage": "noon"}, "phase 'noon' is not one of prefill, decode, mixed, unknown"),
        ({"checksum": "0"}, "checksum differs from counts.json"),
        ({"model": {"layer_ids": [1, 2], "num_layers": 2, "num_experts": 4}}, "are not of the shape in counts.json"),
        ({"model": {"layer_ids": [2, 1], "num_layers": 2, "num_experts": 3}}, "do not rise"),
        ({"model": {"layer_ids": "12", "num_layers": 2, "num_experts": 3}}, "layer_ids is 12, not a list"),
        ({"model": {"layer_ids": [1, 2], "num_layers": 2, "num_experts": 3, "top_k": 4}}, "top-4 of 3 experts"),
    ],
)
def test_bad_counts_profiles(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_counts(profile(), tmp_path / "c")
    place = tmp_path / "c" / "counts.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    with pytest.raises(FormatError, match=message):
        read_counts(tmp_path / "c")


def test_a_counts_profile_cut_off(tmp_path: Path) -> None:
    write_counts(profile(), tmp_path / "c")
    for name in ("counts.json", "counts.npy"):
        whole = (tmp_path / "c" / name).read_bytes()
        for cut in range(len(whole.rstrip()) if name.endswith("json") else len(whole)):
            (tmp_path / "c" / name).write_bytes(whole[:cut])
            with pytest.raises(FormatError, match=rf"{name}|checksum"):
                read_counts(tmp_path / "c")
        (tmp_path / "c" / name).write_bytes(whole)
    read_counts(tmp_path / "c")


# --- command line -----------------------------------------------------------------------------------------------------


def test_a_recorder_dump_on_the_command_line(engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the recorder writes torch files")
    assert run(["import", "sglang-recorder", str(dump(engines, "per_pass")), "-o", str(tmp_path / "c")]) == 0
    assert "a counts profile, not a trace" in capsys.readouterr().out
    assert run(["import", "sglang-recorder", str(dump(engines, "per_token")), "-o", str(tmp_path / "t")]) == 2
    assert "--counts" in capsys.readouterr().err
