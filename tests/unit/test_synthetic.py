"""The synthetic generator: the kernel is its reference, seeds repeat, and presets find their targets again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeplan._kernels.counting import count_ranges
from moeplan._kernels.sampling import alias_tables, mix64, sample_picks, sample_picks_reference
from moeplan.cli.app import run
from moeplan.errors import OutputError, UsageError
from moeplan.synthetic.generator import WorkloadSettings, draw_workload, generate, generate_rows
from moeplan.synthetic.presets import PRESETS, Preset
from moeplan.trace import Requests, Rows, open_trace
from moeplan.types import ModelShape

FloatArray = npt.NDArray[np.float64]


def draw(sampler: Any, experts: int, groups: int, per_token: int, k: int, spread: float, rows: int = 40) -> Any:
    rng = np.random.default_rng(experts + k)
    weights = np.exp(spread * rng.standard_normal((3, 2, experts)))
    aliases = np.empty(weights.shape, np.uint32)
    alias_tables(weights.reshape(-1, experts), groups, aliases.reshape(-1, experts))
    masses = weights.reshape(3, 2, groups, -1).sum(axis=3)
    out = np.zeros((rows, 2, k), np.uint8)
    keys = mix64(np.arange(rows, dtype=np.uint64))
    sampler(keys, np.arange(rows) % 3, mix64(np.array([7, 8], np.uint64)), aliases, masses, per_token, out)
    return out, weights


@pytest.mark.parametrize(
    ("experts", "groups", "per_token", "k", "spread"),
    [
        (8, 1, 1, 1, 1.0),
        (32, 1, 1, 4, 1.0),
        (256, 8, 4, 8, 1.0),
        (256, 8, 8, 8, 1.0),
        (6, 1, 1, 6, 12.0),  # all experts, most of them next to never drawn: the tries run out
        (12, 3, 2, 8, 12.0),
    ],
)
def test_the_kernel_is_its_reference(experts: int, groups: int, per_token: int, k: int, spread: float) -> None:
    fast, _ = draw(sample_picks, experts, groups, per_token, k, spread)
    plain, _ = draw(sample_picks_reference, experts, groups, per_token, k, spread)
    np.testing.assert_array_equal(fast, plain)
    ordered = np.sort(fast, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all() and fast.max() < experts
    assert max(len(set(row // (experts // groups))) for row in fast.reshape(-1, k)) <= per_token


def test_picks_follow_their_weights() -> None:
    picks, weights = draw(sample_picks, 32, 4, 4, 1, 1.5, rows=300_000)
    for table in range(3):
        share = np.bincount(picks[table::3, 0, 0], minlength=32) / 100_000
        np.testing.assert_allclose(share, weights[table, 0] / weights[table, 0].sum(), atol=0.006)


def test_mix64_is_splitmix64() -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)  # the first output of splitmix64 seeded with 0 is published everywhere
    assert int(mix64(np.array([golden]))[0]) == 0xE220A8397B1DCDAF


# --- what the presets are tuned to ----------------------------------------------------------------------------------


def correlation(a: FloatArray, b: FloatArray) -> FloatArray:
    """Pearson along the last axis."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def counts(shape: ModelShape, rows: Rows, phase: str, keys: npt.NDArray[np.int64]) -> FloatArray:
    """[keys, L, E] picks of one phase."""
    out = np.zeros((int(keys.max()) + 1, shape.num_layers, shape.num_experts), np.uint32)
    count_ranges(rows.experts, *rows.phase_ranges(phase), keys, out)
    return out.astype(np.float64)


def measure(preset: Preset, shape: ModelShape, requests: Requests, rows: Rows) -> dict[str, float]:
    prefill, decode = (counts(shape, rows, phase, requests.domain) for phase in ("prefill", "decode"))
    total = decode.sum(axis=0)
    family = [dict(preset.domains)[name] for name in requests.domains]
    similar: dict[bool, list[float]] = {True: [], False: []}
    for a in range(len(family)):
        for b in range(a):
            similar[family[a] == family[b]].append(float(correlation(decode[a], decode[b]).mean()))
    return {
        "imbalance": float((total.max(axis=1) / total.mean(axis=1)).mean()),
        "correlation": float(correlation(prefill.sum(axis=0), total).mean()),
        "related": float(np.mean(similar[True])),
        "unrelated": float(np.mean(similar[False])),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_find_their_targets_again(name: str) -> None:
    preset = PRESETS[name]
    found = measure(preset, *generate_rows(preset, WorkloadSettings(requests=2000, prefill=8, decode=8, seed=5)))
    assert found["imbalance"] == pytest.approx(preset.targets.imbalance, rel=0.06)
    assert found["correlation"] == pytest.approx(preset.targets.correlation, abs=0.03)
    assert found["related"] == pytest.approx(preset.targets.related, abs=0.06)
    assert found["unrelated"] == pytest.approx(preset.targets.unrelated, abs=0.06)
    assert found["related"] > found["unrelated"] + 0.15


def test_a_request_keeps_its_character() -> None:
    """A request's own prefill tells its decode better than another request's of the same domain, or of another."""
    shape, requests, rows = generate_rows(
        "deepseek-v3", WorkloadSettings(requests=140, prefill=100, decode=100, layers=8)
    )
    each = np.arange(140)
    prefill, decode = (counts(shape, rows, phase, each) for phase in ("prefill", "decode"))
    same = np.empty(140, np.int64)
    for d in range(len(requests.domains)):
        members = np.flatnonzero(requests.domain == d)
        same[members] = np.roll(members, 1)
    own, kin, other = (
        np.nanmean(correlation(prefill[which], decode))
        for which in (each, same, np.random.default_rng(0).permutation(140))
    )
    assert 0.45 < own < 0.8 and own > kin + 0.1 and kin > other + 0.1


def test_picks_of_a_token_go_together() -> None:
    """Two picks of one token share a topic: pairs repeat more often than independent picks would make them."""
    shape, _, rows = generate_rows("demo", WorkloadSettings(layers=1))
    together = np.zeros((shape.num_experts, shape.num_experts))
    for a in range(shape.top_k):
        for b in range(shape.top_k):
            if a != b:
                np.add.at(together, (rows.experts[:, 0, a], rows.experts[:, 0, b]), 1)
    share = together.sum(axis=1) / together.sum()
    alone = np.outer(share, share)
    np.fill_diagonal(alone, 0)
    assert np.abs(together / together.sum() - alone / alone.sum()).sum() > 0.2


# --- seeds, sizes, layers -------------------------------------------------------------------------------------------


def test_routing_groups_are_respected() -> None:
    _, _, rows = generate_rows("deepseek-v3", WorkloadSettings(requests=20, prefill=10, decode=10, layers=5))
    groups = np.sort(rows.experts // 32, axis=2)
    assert (1 + (np.diff(groups, axis=2) > 0).sum(axis=2)).max() <= 4


def test_the_same_seed_is_the_same_trace(tmp_path: Path) -> None:
    first = generate("demo", tmp_path / "a", WorkloadSettings(requests=50, seed=3))
    again = generate("demo", tmp_path / "b", WorkloadSettings(requests=50, seed=3))
    other = generate("demo", tmp_path / "c", WorkloadSettings(requests=50, seed=4))
    assert first.checksum == again.checksum != other.checksum
    assert first.synthetic and first.label == "demo (synthetic)" and first.source["seed"] == 3
    shape, requests, rows = generate_rows("demo", WorkloadSettings(requests=50, seed=3))
    np.testing.assert_array_equal(rows.experts, first.load().experts)
    assert shape == first.shape and requests.domains == first.requests.domains
    np.testing.assert_array_equal(requests.domain, first.requests.domain)


def test_some_layers_are_those_of_the_whole() -> None:
    whole = generate_rows("llama-4-maverick", WorkloadSettings(requests=10))[2].experts
    shape, _, rows = generate_rows("llama-4-maverick", WorkloadSettings(requests=10, layers=[45, 3]))
    assert shape.layer_ids == (3, 45) and shape.hidden == 5120
    np.testing.assert_array_equal(rows.experts, whole[:, [1, 22]])
    np.testing.assert_array_equal(
        generate_rows("llama-4-maverick", WorkloadSettings(requests=10, layers=2))[2].experts, whole[:, :2]
    )


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate_rows("demo", WorkloadSettings(requests=40))[2].experts
    monkeypatch.setattr("moeplan.synthetic.generator.CHUNK_PICKS", 5000)
    np.testing.assert_array_equal(generate_rows("demo", WorkloadSettings(requests=40))[2].experts, whole)


def test_lengths() -> None:
    table = draw_workload("demo", WorkloadSettings(requests=4000, prefill=40, decode=60)).requests
    assert table.prefill.mean() == pytest.approx(40, rel=0.03) and table.decode.mean() == pytest.approx(60, rel=0.03)
    assert table.prefill.min() >= 1 and table.decode.min() >= 8 and table.decode.max() <= 240
    assert table.prefill.std() == pytest.approx(20, rel=0.1)
    exact = draw_workload("demo", WorkloadSettings(requests=9, prefill=0, decode=5, exact=True)).requests
    assert exact.rows.tolist() == [5] * 9 and exact.prefill.tolist() == [0] * 9
    assert np.bincount(table.domain).tolist() == [1000] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "0 requests is outside 1.."),
        ({"prefill": 0, "decode": 0}, "0 tokens is outside"),
        ({"decode": -1}, "-1 decode tokens is outside"),
        ({"seed": -1}, "-1 as seed is outside"),
        ({"layers": 9}, "9 layers is outside 1..8"),
        ({"layers": [8]}, "demo has no MoE layer 8; its MoE layers are 0-7"),
        ({"layers": []}, "no layer is left"),
    ],
)
def test_sizes_that_make_no_trace(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate("demo", tmp_path / "t", WorkloadSettings(**options))
    assert not (tmp_path / "t").exists()


def test_existing_output_and_unknown_preset(tmp_path: Path) -> None:
    generate("demo", tmp_path / "t", WorkloadSettings(requests=3))
    with pytest.raises(OutputError, match="already exists"):
        generate("demo", tmp_path / "t", WorkloadSettings(requests=3))
    with pytest.raises(UsageError, match="no preset 'gpt'; choose from demo, deepseek-v3"):
        generate("gpt", tmp_path / "u")


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    monkeypatch.setattr("moeplan.synthetic.generator.CHUNK_PICKS", 20_000)
    with pytest.raises(KeyboardInterrupt):
        generate("demo", tmp_path / "t", WorkloadSettings(requests=60), progress=stop)
    trace = open_trace(tmp_path / "t")
    assert not trace.complete and trace.synthetic and 20 <= len(trace.requests) < 60


def test_shapes_are_the_published_ones() -> None:
    v3, maverick, qwen = (PRESETS[name].shape for name in ("deepseek-v3", "llama-4-maverick", "qwen3-235b"))
    assert (v3.num_layers, v3.num_experts, v3.top_k, v3.layer_ids[0], v3.layer_ids[-1]) == (58, 256, 8, 3, 60)
    assert (maverick.num_layers, maverick.num_experts, maverick.top_k, maverick.layer_ids[-1]) == (24, 128, 1, 47)
    assert (qwen.num_layers, qwen.num_experts, qwen.top_k) == (94, 128, 8)
    assert (v3.expert_bytes, v3.kv_bytes_per_token) == (44_040_192, 70_272)
    assert (maverick.expert_bytes, maverick.kv_bytes_per_token) == (125_829_120, 196_608)
    assert (qwen.expert_bytes, qwen.kv_bytes_per_token) == (18_874_368, 192_512)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--requests", "5", "--prefill", "4", "--decode", "9", "--exact"]
    out = str(tmp_path / "t")
    assert run(["generate", "deepseek-v3", "-o", out, "--layer-ids", "42", *size, "--json", "-"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["synthetic"], facts["layers"], facts["tokens"], facts["decode_tokens"]) == (True, 1, 65, 45)
    assert "deepseek-v3 (synthetic): 1 layer x 256 experts, top-8" in captured.err
    for wrong in (["--layers", "2", "--layer-ids", "42"], ["--layer-ids", "x"], ["--layers", "99"]):
        assert run(["generate", "deepseek-v3", "-o", str(tmp_path / "u"), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
