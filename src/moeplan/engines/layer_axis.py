"""Check a placement's layers against the model's: which have experts, and how many there are."""

from __future__ import annotations

import itertools

from moeplan.engines.placement import EnginePlacement
from moeplan.errors import UsageError
from moeplan.model.spec import GIVE_MODEL, ModelSpec
from moeplan.types import Placement

__all__ = ["check_axis", "left_out", "place_rows"]


def left_out(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers missing from a sequence with a regular step, e.g. 45 from 41, 43, 47."""
    steps = [b - a for a, b in itertools.pairwise(layers)]
    if not steps:
        return ()
    usual = max(set(steps), key=lambda step: (steps.count(step), -step))
    gaps = ((a, b) for a, b in itertools.pairwise(layers) if (b - a) > usual and (b - a) % usual == 0)
    return tuple(layer for a, b in gaps for layer in range(a + usual, b, usual))


def place_rows(source: Placement, model: ModelSpec) -> EnginePlacement:
    """A placement whose rows are the model's MoE layers, or all of its hidden layers.

    Raises:
        UsageError: another number of rows.
    """
    rows, moe = source.num_layers, model.moe_layers
    if moe is None or rows == len(moe):
        return EnginePlacement.of(source, moe or tuple(range(rows)))
    if rows != model.layers:
        what = f"the placement has {rows} rows, the model given {len(moe)} MoE layers of {model.layers} hidden layers"
        raise UsageError(what, hint="give a row for each MoE layer")
    return EnginePlacement.of(source, tuple(range(rows))).rows_of(moe, "")


def check_axis(placement: EnginePlacement, model: ModelSpec, engine: str, where: str) -> int | None:
    """Check a placement's layers against the model's; returns the number of hidden layers, if known.

    Raises:
        UsageError: other experts or layers than the model's; for SGLang, the number of hidden layers is not known.
    """
    layers, experts = placement.layer_ids, placement.num_experts
    moe = layers if model.moe_layers is None else model.moe_layers

    def refuse(wrong: object, what: str, hint: str = "give the model that the plan was made for") -> None:
        if wrong:
            raise UsageError(what, where=where, hint=hint)

    refuse(
        model.num_experts not in (None, experts),
        f"the plan is for {experts} experts, the model given has {model.num_experts}",
    )
    refuse(
        model.layers is not None and layers[-1] >= model.layers,
        f"the plan places layer {layers[-1]}, but the model given has {model.layers} hidden layers, from 0",
    )
    missing, surplus = sorted(set(moe) - set(layers)), sorted(set(layers) - set(moe))
    refuse(
        missing,
        f"the plan places no experts in layer {min(missing, default=0)}, which has experts in the model given",
        "plan on a trace of all layers, without --without-layers, or give the model that the plan was made for",
    )
    refuse(surplus, f"the plan places experts in layer {min(surplus, default=0)}, which has none in the model given")
    if engine == "sglang":
        what = "SGLang's file has a row for every hidden layer, and the plan knows only those with experts"
        refuse(model.layers is None, what, GIVE_MODEL)
        what = f"the plan has {len(layers)} of {model.layers} layers, and the model does not say which have experts"
        refuse(model.moe_layers is None and len(layers) < (model.layers or 0), what, GIVE_MODEL)
    return model.layers
