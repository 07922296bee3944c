"""Which layers have experts, and how many layers there are: from the model's config and the plan, never guessed."""

from __future__ import annotations

import itertools
from pathlib import Path

from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import Known
from moeplan.errors import MoeplanError, UsageError
from moeplan.model.facts import ModelFacts

__all__ = ["check_axis", "known_of", "left_out"]


def known_of(
    facts: ModelFacts, config: Path | None, *, ep_size: int | None = None, nodes: int | None = None,
    redundant: int | None = None,
) -> Known:  # fmt: skip
    """What config and flags say.

    Families whose config has no rule (every layer of Mixtral has experts, and nothing says so) are those that the
    model catalogue knows by their model_type; for others the MoE layers stay unknown.
    """
    moe = facts.moe_layers
    if moe is None and config is not None:
        from moeplan.model.spec import model

        try:
            spec = model(str(config))
            moe = spec.moe.layers if spec.moe is not None else None
        except MoeplanError:
            moe = None
    return Known(facts.num_experts, facts.num_layers, moe, ep_size, nodes, redundant)


def left_out(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers that a rising row of them skips, e.g. 45 of 41, 43, 47: those between that keep the usual step."""
    steps = [b - a for a, b in itertools.pairwise(layers)]
    if not steps:
        return ()
    usual = max(set(steps), key=lambda step: (steps.count(step), -step))
    gaps = ((a, b) for a, b in itertools.pairwise(layers) if (b - a) > usual and (b - a) % usual == 0)
    return tuple(layer for a, b in gaps for layer in range(a + usual, b, usual))


def check_axis(
    placement: EnginePlacement, known: Known, engine: str, where: str, *, from_config: bool = True
) -> int | None:
    """Hold a placement's layers to the model's; the number of hidden layers, if it is known.

    Args:
        from_config: whether a config.json says what is known, or flags and the source itself; for the messages.

    Raises:
        UsageError: other experts or layers than the config's; for SGLang, a number of hidden layers that nothing says.
    """
    layers, experts = placement.layer_ids, placement.num_experts
    says = "the config" if from_config else "the flags"
    same = (
        "give the config.json of the same model"
        if from_config
        else "give the model's own --num-layers and --dense-layers"
    )
    if known.num_experts is not None and known.num_experts != experts:
        raise UsageError(
            f"the plan is for {experts} experts, the config for {known.num_experts}",
            where=where,
            hint="give the config.json of the same model",
        )
    if known.num_layers is not None and layers[-1] >= known.num_layers:
        raise UsageError(
            f"the plan places layer {layers[-1]}, but by {says} there are {known.num_layers} hidden layers, "
            f"0 to {known.num_layers - 1}",
            where=where,
            hint=same,
        )
    if known.moe_layers is not None:
        for layer in sorted(set(known.moe_layers) - set(layers)):
            raise UsageError(
                f"the plan places no experts in layer {layer}, which has experts by {says}",
                where=where,
                hint="plan on a trace of all layers, without --without-layers"
                + ("" if from_config else f", or {same}"),
            )
        for layer in sorted(set(layers) - set(known.moe_layers)):
            raise UsageError(
                f"the plan places experts in layer {layer}, which has none by {says}",
                where=where,
                hint=same,
            )
    if engine != "sglang":
        return known.num_layers
    if known.num_layers is None:
        raise UsageError(
            "SGLang's file has a row for every hidden layer, and the plan knows only those with experts",
            where=where,
            hint="give --config config.json, or --num-layers",
        )
    if known.moe_layers is None and len(layers) < known.num_layers:
        raise UsageError(
            f"the plan has {len(layers)} of {known.num_layers} layers, and {says} "
            f"do{'es' if from_config else ''} not say which have experts",
            where=where,
            hint="give --dense-layers, e.g. 0,1,2",
        )
    return known.num_layers
