"""What a Transformers config.json, or flags, say of a model that a recording leaves out.

Engines send picks without the number of experts, SGLang even without a shape. Nothing is guessed: what neither the
config nor a flag says stays None, and the importer that needs it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeplan import embedded
from moeplan.errors import FormatError, UsageError
from moeplan.io.files import read_json
from moeplan.model.overrides import ModelExtras
from moeplan.types import MAX_EXPERTS, MAX_K, MAX_LAYERS

__all__ = ["ModelFacts", "model_facts"]

MAX_CONFIG_BYTES = 4 * 1024 * 1024

#: The names that Transformers 5.23 configurations use for one thing; all that are present must agree.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")


@dataclass(frozen=True)
class ModelFacts:
    """A model as its config and the flags describe it; None where neither does.

    Attributes:
        num_experts: E, routed experts per layer.
        num_layers: all hidden layers, dense ones included (engines send rows for all of them).
        top_k: k.
        moe_layers: indices of the MoE layers, rising; None where the config leaves it open.
        hidden: width of a token's hidden state.
        routing_groups: groups of experts that the router first chooses among.
    """

    num_experts: int | None = None
    num_layers: int | None = None
    top_k: int | None = None
    moe_layers: tuple[int, ...] | None = None
    hidden: int | None = None
    routing_groups: int | None = None

    def need_experts(self, where: str) -> int:
        """E, or an error that says how to give it."""
        if self.num_experts is None:
            raise UsageError(
                "the recording does not say how many experts a layer has",
                where=where,
                hint="give --num-experts, e.g. 128, or --config config.json",
            )
        return self.num_experts

    def add_to(self, extras: ModelExtras) -> ModelExtras:
        """The flags' extras, with what only the config knows; a flag goes before the config."""
        groups = self.routing_groups if extras.routing_groups == 1 and self.routing_groups else extras.routing_groups
        return replace(extras, hidden=self.hidden if extras.hidden is None else extras.hidden, routing_groups=groups)


def model_facts(
    config: Path | None = None,
    *,
    num_experts: int | None = None,
    num_layers: int | None = None,
    top_k: int | None = None,
    dense_layers: Sequence[int] | None = None,
) -> ModelFacts:
    """Config and flags together.

    Args:
        config: a model's config.json, or the folder that holds it, or the word `embedded`.
        num_experts, num_layers, top_k: flags, which must not contradict the config.
        dense_layers: hidden layers without experts; needs `num_layers` only when the recording does not say it.

    Raises:
        FormatError: a config that is no JSON object, or holds values out of range or in contradiction.
        UsageError: a flag that contradicts the config.
    """
    if config is not None:
        config = embedded.named(config, embedded.MODEL)
        config = config / "config.json" if config.is_dir() else config
    facts = ModelFacts() if config is None else _read_config(config)
    changes: dict[str, Any] = {}
    for key, flag, value, top in (
        ("num_experts", "--num-experts", num_experts, MAX_EXPERTS),
        ("num_layers", "--num-layers", num_layers, MAX_LAYERS),
        ("top_k", "--top-k", top_k, MAX_K),
    ):
        if value is None:
            continue
        if not 1 <= value <= top:
            raise UsageError(f"{flag} {value} is outside 1..{top}")
        known = getattr(facts, key)
        if known is not None and known != value:
            raise UsageError(f"{flag} {value}, but {config} says {known}", hint="leave one of the two out")
        changes[key] = value
    facts = replace(facts, **changes)
    if dense_layers is not None and facts.num_layers is not None:
        moe = tuple(i for i in range(facts.num_layers) if i not in set(dense_layers))
        if facts.moe_layers is not None and facts.moe_layers != moe:
            raise UsageError(f"--dense-layers contradicts {config}", hint="leave one of the two out")
        facts = replace(facts, moe_layers=moe)
    return facts


def _read_config(path: Path) -> ModelFacts:
    data = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(data, dict):
        raise FormatError("is not a model's configuration (a JSON object)", where=str(path))
    inner = data.get("text_config")
    if isinstance(inner, dict) and not any(key in data for key in EXPERTS):
        data = inner  # multimodal models keep the language model's numbers here (Llama-4)
    num_layers = _number(data, ("num_hidden_layers",), MAX_LAYERS, path)
    return ModelFacts(
        num_experts=_number(data, EXPERTS, MAX_EXPERTS, path),
        num_layers=num_layers,
        top_k=_number(data, TOP_K, MAX_K, path),
        moe_layers=None if num_layers is None else _moe_layers(data, num_layers, path),
        hidden=_number(data, ("hidden_size",), 1 << 24, path),
        routing_groups=_number(data, ("n_group",), MAX_EXPERTS, path),
    )


def _number(data: dict[str, Any], keys: Sequence[str], top: int, path: Path, *, low: int = 1) -> int | None:
    """The one value of keys that mean the same; None if none is there."""
    found = {key: data[key] for key in keys if data.get(key) is not None}
    for key, value in found.items():
        if type(value) is not int or not low <= value <= top:
            raise FormatError(f"{key} is {str(value)[:40]}, not a whole number in {low}..{top}", where=str(path))
    if len(set(found.values())) > 1:
        raise FormatError(f"{' and '.join(found)} differ", where=str(path), hint="give a config.json of one model")
    return next(iter(found.values()), None)


def _moe_layers(data: dict[str, Any], num_layers: int, path: Path) -> tuple[int, ...] | None:
    """The MoE layers, where every rule that the config holds gives the same ones; None without a rule.

    Rules as the engines and Transformers 5.23 apply them: DeepSeek (first_k_dense_replace, moe_layer_freq), Qwen-MoE
    (mlp_only_layers, decoder_sparse_step), Llama-4 (moe_layers, interleave_moe_layer_step).
    """
    rules: list[Callable[[int], bool]] = []
    frequency = data.get("moe_layer_freq")
    if isinstance(frequency, list):
        if len(frequency) != num_layers or any(item not in (0, 1) for item in frequency):
            raise FormatError(f"moe_layer_freq is not {num_layers} zeros and ones", where=str(path))
        flags = [bool(item) for item in frequency]
        rules.append(lambda i: flags[i])
    elif frequency is not None or data.get("first_k_dense_replace") is not None:
        first = _number(data, ("first_k_dense_replace",), num_layers, path, low=0) or 0
        every = _number(data, ("moe_layer_freq",), MAX_LAYERS, path) or 1
        rules.append(lambda i: i >= first and i % every == 0)
    if data.get("decoder_sparse_step") is not None or data.get("mlp_only_layers") is not None:
        sparse = _number(data, ("decoder_sparse_step",), MAX_LAYERS, path) or 1
        dense = _layer_list(data, "mlp_only_layers", num_layers, path)
        rules.append(lambda i: i not in dense and (i + 1) % sparse == 0)
    if data.get("moe_layers") is not None:
        listed = _layer_list(data, "moe_layers", num_layers, path)
        rules.append(lambda i: i in listed)
    elif data.get("interleave_moe_layer_step") is not None:
        step = _number(data, ("interleave_moe_layer_step",), MAX_LAYERS, path) or 1
        rules.append(lambda i: (i + 1) % step == 0)
    answers = {tuple(i for i in range(num_layers) if rule(i)) for rule in rules}
    return answers.pop() if len(answers) == 1 else None


def _layer_list(data: dict[str, Any], key: str, num_layers: int, path: Path) -> frozenset[int]:
    value = data.get(key) or []
    if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < num_layers for i in value):
        raise FormatError(f"{key} is not a list of layers in 0..{num_layers - 1}", where=str(path))
    return frozenset(value)
