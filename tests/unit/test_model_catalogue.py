"""The catalogue of models: names, counts of parameters against published ones, and entries in its own form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.errors import FormatError, UsageError
from moeplan.model.catalogue import load_model, model_names, model_notes
from moeplan.model.parameters import layer_parameters, parameters

#: Published active counts with too few digits to tell 1 %: 17 B, 2.4 B, 3.3 B, ... are met to their last digit instead,
#: rounded or cut off.
COARSE = {
    "Llama-4-Scout", "Llama-4-Maverick", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "Qwen3.5-397B-A17B", "OLMoE-1B-7B",
    "MiniMax-M2.5",
}  # fmt: skip
HYPOTHETICAL = {"GPT-4-1.8T", "SuperLLM-10T", "MoE-100T", "MoE-300T"}


@pytest.mark.parametrize("name", model_names())
def test_published_counts(name: str) -> None:
    """Within 1 %, or to the last digit where the published figure has too few of them."""
    counts, notes = parameters(load_model(name)), model_notes(name)
    assert notes["sources"]["dimensions"]
    if name in HYPOTHETICAL:
        assert "HYPOTHETICAL" in notes["note"]
        return
    published = notes["published"]
    assert counts.total + published.get("also_counted", 0) == pytest.approx(published["total"], rel=0.01)
    assert counts.mtp == pytest.approx(published.get("mtp", counts.mtp), rel=0.01)
    if "active" not in published:
        assert load_model(name).moe is None and counts.active == counts.total
        return
    active, said = getattr(counts, published["active_counts"]), published["active"]
    if name in COARSE:
        digit = 1e9 if said >= 1e10 else 1e8  # of the last digit that is given
        assert abs(active - said) <= digit / 2 or active // digit * digit == said
        assert abs(active - said) / said < 0.025
    else:
        assert active == pytest.approx(said, rel=0.01)
    assert set(published) <= set(notes["sources"]) | {"active_counts"}


def test_only_coarse_counts_are_let_off(capsys: pytest.CaptureFixture[str]) -> None:
    """Those held to their last digit are those, and only those, that the catalogue page lists with their reasons."""
    page = (ROOT / "docs" / "reference" / "catalogue.md").read_text(encoding="utf-8")
    code, shown = page.split("$ python - <<'END'\n")[1].split("```")[0].split("END\n")
    exec(code, {})
    assert capsys.readouterr().out == shown
    assert {line.split(":")[0] for line in shown.splitlines()} == COARSE


def test_every_part_of_a_known_model() -> None:
    """gpt-oss-120b's card (arXiv 2508.10925, table 1) counts by part: MLP 114.71 B, attention 0.96 B, 1.16 B twice."""
    counts = parameters(load_model("gpt-oss-120b"))
    assert counts.experts + counts.router == pytest.approx(114.71e9, rel=0.001)
    assert counts.attention == pytest.approx(0.96e9, rel=0.01)
    assert counts.embedding + counts.head == pytest.approx(1.16e9, rel=0.01)


def test_hypothetical_sizes() -> None:
    sizes = {name: parameters(load_model(name)).total for name in HYPOTHETICAL}
    assert sizes["GPT-4-1.8T"] == pytest.approx(1.8e12, rel=0.03)
    assert sizes["SuperLLM-10T"] == pytest.approx(10e12, rel=0.06)
    assert sizes["MoE-100T"] == pytest.approx(100e12, rel=0.01)
    assert sizes["MoE-300T"] == pytest.approx(300e12, rel=0.01)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("deepseek-v3", "DeepSeek-V3"), ("DeepSeek_V3", "DeepSeek-V3"), ("deepseek-ai/DeepSeek-R1", "DeepSeek-R1"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"), ("nvidia/Llama-3.1-8B-Instruct-FP8", "Llama-3.1-8B"),
        ("Llama-3-70B", "Llama-3.1-70B"), ("moonshotai/Kimi-K2.5", "Kimi-K2.5"), ("gpt-4", "GPT-4-1.8T"),
        ("MiniMaxAI/MiniMax-M2.5", "MiniMax-M2.5"), ("Kimi-K2-Instruct", "Kimi-K2"),
    ],
)  # fmt: skip
def test_names(said: str, name: str) -> None:
    assert load_model(said).name == name


def test_names_mean_one_model_each() -> None:
    raw = json.loads((Path(str(load_model.__code__.co_filename)).parent / "data" / "models.json").read_text())
    spelt = [word.lower() for name, entry in raw.items() for word in (name, *entry["aliases"])]
    assert len(spelt) == len(set(spelt))


def test_unknown_model_names_the_near_ones() -> None:
    with pytest.raises(UsageError, match=r'unknown model "Qwen3-235B"; near it: Qwen3-235B-A22B.*config\.json'):
        load_model("Qwen3-235B")


def test_tensor_parallel_shares() -> None:
    """Shares add up to the whole, but for what every rank holds."""
    spec = load_model("Llama-3.1-70B")
    whole, part = layer_parameters(spec), layer_parameters(spec, 8)
    assert (part[:, 0] * 8 == whole[:, 0]).all() and (part[:, 1] * 8 == whole[:, 1]).all()
    down = 7168 * (1536 + 512 + 64)  # MLA's down-projections, on every rank
    mla, mla8 = layer_parameters(load_model("DeepSeek-V3"))[0, 0], layer_parameters(load_model("DeepSeek-V3"), 8)[0, 0]
    assert (mla8 - down) * 8 == mla - down
    one_kv_head = 2 * 8192 * 128
    assert layer_parameters(spec, 16)[0, 0] - one_kv_head == (whole[0, 0] - 8 * one_kv_head) / 16


def test_own_entry(tmp_path: Path) -> None:
    raw = json.loads((Path(str(load_model.__code__.co_filename)).parent / "data" / "models.json").read_text())
    for name in ("DeepSeek-V3", "gpt-oss-20b", "Qwen3.5-397B-A17B", "GPT-3-175B"):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(raw[name]))
        assert dataclasses.replace(load_model(path), name=name) == load_model(name)
    entry = raw["DeepSeek-V3"]
    for change, said in (
        ({"layer": 3}, "unknown key layer"),
        ({"attention": {**entry["attention"], "kind": "mamba"}}, "attention.kind is mamba, not one of mha, gqa, mla"),
        ({"attention": {**entry["attention"], "kv_lora_rank": None}}, "attention.kv_lora_rank is None, not a whole"),
        ({"attention": {"kind": "mla", "heads": 8, "v_head_dim": 9}}, "attention: kv_lora_rank is missing"),
        ({"attention": {"kind": "gqa", "heads": 8, "head_dim": 9}}, "attention: kv_heads is missing"),
        ({"attention": {**entry["attention"], "kind": "mha", "head_dim": 9}}, "is a dimension of mla"),
        ({"moe": {**entry["moe"], "top_k": 257}}, "moe.top_k is 257, not a whole number <= 256"),
        ({"moe": {"experts": 8, "width": 9}}, "moe.top_k is missing"),
        ({"moe": {**entry["moe"], "layers": [61]}}, "moe.layers is not a list of different layers in 0..60"),
        ({"moe": {**entry["moe"], "layers": {"first": 3, "last": 9}}}, "unknown key moe.layers.last"),
        ({"dense_width": 0}, "add dense_width"),
        ({"full_layers": [0, 1]}, "no window is given"),
        ({"checkpoint": {"weights": "fp7"}}, "weights is fp7, not one of"),
    ):
        path.write_text(json.dumps(entry | change))
        with pytest.raises(FormatError) as caught:
            load_model(path)
        assert said in caught.value.line() and str(path) in caught.value.line()
