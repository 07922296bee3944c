"""One description of a model: what its user adds, what a recording says, and what must be known for the time model."""

from __future__ import annotations

import dataclasses

import pytest

import moeplan as mp
from moeplan.errors import FormatError, MoeplanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.config import described
from moeplan.model.spec import Attention, CompleteSpec, ModelSpec, Moe


def test_the_public_names() -> None:
    assert mp.load_model is load_model and mp.ModelSpec is ModelSpec


def test_a_user_completes_and_replaces() -> None:
    spec = ModelSpec().override(num_experts=8, num_layers=4, top_k=2, dense_layers=[0], hidden=64, expert_groups=2)
    assert (spec.num_experts, spec.layers, spec.top_k, spec.moe_layers, spec.hidden) == (8, 4, 2, (1, 2, 3), 64)
    assert spec.override(name="mine", hidden=32, expert_groups=1).moe_shape() == mp.ModelShape(
        "mine", 3, 8, 2, (1, 2, 3), hidden=32, routing_groups=2
    )
    assert spec.override() == spec and ModelSpec().override() == ModelSpec()
    assert ModelSpec().override(dense_layers=[0]).moe_layers is None  # of how many layers?


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts": 9}, "--num-experts 9, but .*DeepSeek-V3 says 256"),
        ({"num_layers": 0}, r"--num-layers 0 is outside 1\.\.4096"),
        ({"dense_layers": [0]}, "--dense-layers contradicts"),
        ({"moe_layers": [1]}, "contradicts"),
    ],
)
def test_what_is_known_is_not_contradicted(given: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model("DeepSeek-V3").override(**given)  # type: ignore[arg-type]


def test_the_shape_of_a_recording() -> None:
    spec = load_model("DeepSeek-V3")
    shape = spec.moe_shape()
    assert (shape.name, shape.num_layers, shape.num_experts, shape.routing_groups) == ("DeepSeek-V3", 58, 256, 8)
    assert shape.expert_bytes is None  # of which dtype?
    recorded = ModelSpec().moe_shape(name="r", num_experts=8, top_k=2, layer_ids=[4, 7])
    assert (recorded.name, recorded.layer_ids) == ("r", (4, 7))
    for given, message in (
        ({"layer_ids": [0]}, "how many experts a layer has; give --num-experts, e.g. 128, or the model's config.json"),
        ({"num_experts": 8, "layer_ids": [0]}, "how many experts a token picks; give --top-k"),
        ({"num_experts": 8, "top_k": 2}, "which layers have experts; give --num-layers and --dense-layers"),
    ):
        with pytest.raises(UsageError, match=f"file: the source does not say {message}"):
            ModelSpec().moe_shape(where="file", **given)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="file: top-9 of 8 experts is impossible"):
        ModelSpec().moe_shape(num_experts=8, top_k=9, layer_ids=[0], where="file")


def test_all_dimensions_or_the_names_of_those_that_lack() -> None:
    spec = load_model("gpt-oss-20b")
    assert isinstance(spec, CompleteSpec) and load_model(spec.override(name="mine")).name == "mine"
    partial = dataclasses.replace(spec.override(), vocab=None, moe=Moe(experts=8))
    with pytest.raises(FormatError, match=r"does not say vocab, moe\.layers, moe\.top_k, moe\.width"):
        partial.complete()
    with pytest.raises(FormatError, match="64 heads do not divide into 5 KV heads"):
        dataclasses.replace(spec, attention=Attention("gqa", 64, 5, 64)).complete()
    with pytest.raises(MoeplanError, match="does not say layers, hidden, vocab, attention, full_layers"):
        load_model(ModelSpec())


def test_a_config_that_does_not_say_all_tells_why(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("m") / "config.json"
    file.write_text('{"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 2}')
    spec = described(file, name="mine")
    assert (spec.name, spec.num_experts, spec.moe_layers) == ("mine", 8, (0, 1))
    with pytest.raises(FormatError, match=r"config\.json: num_experts_per_tok is missing; add it"):
        spec.complete()


def test_the_embedded_model() -> None:
    assert load_model("embedded").name == "embedded" and load_model("embedded").num_experts == 32
