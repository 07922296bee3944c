"""Check a placement's layers against the model's: which have experts, and how many there are."""

from __future__ import annotations

import itertools

from moeplan.engines.placement import EnginePlacement
from moeplan.errors import UsageError
from moeplan.model.spec import ModelSpec

__all__ = ["check_axis", "left_out"]


def left_out(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers missing from a sequence with a regular step, e.g. 45 from 41, 43, 47."""
    steps = [b - a for a, b in itertools.pairwise(layers)]
    if not steps:
        return ()
    usual = max(set(steps), key=lambda step: (steps.count(step), -step))
    gaps = ((a, b) for a, b in itertools.pairwise(layers) if (b - a) > usual and (b - a) % usual == 0)
    return tuple(layer for a, b in gaps for layer in range(a + usual, b, usual))


def check_axis(
    placement: EnginePlacement, model: ModelSpec, engine: str, where: str, *, from_config: bool = True
) -> int | None:
    """Check a placement's layers against the model's; returns the number of hidden layers, if known.

    Args:
        from_config: whether the model is from a config.json, or from flags and the source; for messages.

    Raises:
        UsageError: other experts or layers than the config's; for SGLang, the number of hidden layers is not known.
    """
    layers, experts = placement.layer_ids, placement.num_experts
    says = "the config" if from_config else "the flags"
    same = (
        "give the config.json of the same model"
        if from_config
        else "give the model's own --num-layers and --dense-layers"
    )
    if model.num_experts is not None and model.num_experts != experts:
        raise UsageError(
            f"the plan is for {experts} experts, the config for {model.num_experts}",
            where=where,
            hint="give the config.json of the same model",
        )
    if model.layers is not None and layers[-1] >= model.layers:
        raise UsageError(
            f"the plan places layer {layers[-1]}, but by {says} there are {model.layers} hidden layers, "
            f"0 to {model.layers - 1}",
            where=where,
            hint=same,
        )
    if model.moe_layers is not None:
        for layer in sorted(set(model.moe_layers) - set(layers)):
            raise UsageError(
                f"the plan places no experts in layer {layer}, which has experts by {says}",
                where=where,
                hint="plan on a trace of all layers, without --without-layers"
                + ("" if from_config else f", or {same}"),
            )
        for layer in sorted(set(layers) - set(model.moe_layers)):
            raise UsageError(
                f"the plan places experts in layer {layer}, which has none by {says}",
                where=where,
                hint=same,
            )
    if engine != "sglang":
        return model.layers
    if model.layers is None:
        raise UsageError(
            "SGLang's file has a row for every hidden layer, and the plan knows only those with experts",
            where=where,
            hint="give --config config.json, or --num-layers",
        )
    if model.moe_layers is None and len(layers) < model.layers:
        raise UsageError(
            f"the plan has {len(layers)} of {model.layers} layers, and {says} "
            f"do{'es' if from_config else ''} not say which have experts",
            where=where,
            hint="give --dense-layers, e.g. 0,1,2",
        )
    return model.layers
