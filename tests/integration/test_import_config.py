"""What a model's config.json and flags say together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.engine_files import save
from moeplan.errors import FormatError, UsageError
from moeplan.model.config import described


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
    spec = described(tmp_path / "c.json")
    assert (spec.num_experts, spec.moe_layers, spec.top_k, spec.hidden) == (experts, moe, 2, 64)


def test_a_multimodal_config_keeps_its_numbers_inside(tmp_path: Path) -> None:
    inner = {"num_hidden_layers": 4, "num_local_experts": 16, "num_experts_per_tok": 1, "moe_layers": [1, 3]}
    spec = described(save(tmp_path / "c.json", {"hidden_size": 1, "text_config": inner}))
    assert (spec.num_experts, spec.top_k, spec.moe_layers) == (16, 1, (1, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "is not a model's configuration"),
        ({"num_experts": 8, "num_local_experts": 4}, "num_experts and num_local_experts differ"),
        ({"num_experts": "8"}, "num_experts is 8, not a whole number"),
        ({"num_hidden_layers": 2, "moe_layer_freq": [1]}, "moe_layer_freq is not 2 zeros and ones"),
        ({"num_hidden_layers": 2, "mlp_only_layers": [7]}, "mlp_only_layers is not a list of different layers in 0..1"),
    ],
)
def test_bad_configs(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        described(save(tmp_path / "c.json", config))


def test_flags_and_config_may_not_differ(tmp_path: Path) -> None:
    config = save(tmp_path / "c.json", {"num_experts": 8, "num_hidden_layers": 4, "first_k_dense_replace": 1})
    with pytest.raises(UsageError, match=r"--num-experts 16, but .* says 8; leave one of the two out"):
        described(config, num_experts=16)
    with pytest.raises(UsageError, match="--dense-layers contradicts"):
        described(config, dense_layers=[2])
    with pytest.raises(UsageError, match=r"--top-k 0 is outside"):
        described(config, top_k=0)
    assert described(config, dense_layers=[0]).moe_layers == (1, 2, 3)
