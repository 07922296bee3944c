"""An engine's placement as a plan, to store, evaluate and rebalance it."""

from __future__ import annotations

from pathlib import Path

from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule, check_slots, routes
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.placement_files import examine
from moeplan.engines.report import EpSettings, Report
from moeplan.errors import UsageError
from moeplan.model.spec import ModelSpec
from moeplan.planning.plan import DEPLOYED, Plan, Provenance
from moeplan.planning.router import LocalityRouter
from moeplan.types import ModelShape

__all__ = ["find_replica_rule", "import_placement", "plan_from_placement"]


def find_replica_rule(engine: str, nodes: int) -> ReplicaRule:
    """The replica rule by which moeplan models an engine.

    SGLang uses the replica on its own GPU, else the first on its own node if some replicas are on other nodes, else all
    evenly (0.5.23, `_find_nearest_expert`): on one node that is `nearest-even`. vLLM selects by a hash of the row.
    TensorRT-LLM (round robin) and vLLM-Ascend (by rank) ignore the distance too: `hash` has the same expectation,
    1 / replicas each.
    """
    if engine != "sglang":
        return ReplicaRule.HASH
    return ReplicaRule.NEAREST_STATIC if nodes > 1 else ReplicaRule.NEAREST_EVEN


def plan_from_placement(
    placement: EnginePlacement,
    model: ModelShape,
    engine: str,
    *,
    deployment: Deployment = Deployment.NODES,
    dispatch: Dispatch = Dispatch.PICK,
    where: str = "",
) -> Plan:
    """A placement as a plan, without fitting anything.

    Args:
        engine: how it selects among replicas. where: the file, for messages.

    Raises:
        UsageError, FormatError: the file is for other experts or layers.
    """
    place = placement.fit(model, where)
    cluster, rule = Cluster(place.nodes, place.gpus_per_node, deployment), find_replica_rule(engine, place.nodes)
    check_slots(model.num_experts, place.redundant, cluster)
    router = LocalityRouter.of(routes(place, cluster, rule))
    notes = (f"the placement of {where}; nothing was fitted",)
    return Plan(place, router, cluster, dispatch, rule, model, DEPLOYED, provenance=Provenance(notes=notes))


def import_placement(
    path: str | Path,
    engine: str,
    model: ModelSpec | None = None,
    layout: EpSettings | None = None,
    *,
    shape: ModelShape | None = None,
    deployment: Deployment | str = Deployment.NODES,
    dispatch: Dispatch | str = Dispatch.PICK,
) -> Plan:
    """An engine's placement file as a plan, to evaluate and rebalance it.

    Args:
        model: `load_model` of its name or config.json. layout: what the engine is started with.
        shape: of a trace, which says what `model` leaves open.

    Raises:
        FormatError: the file is invalid. UsageError: model or cluster are not known, or other than the file's.

    Examples:
        >>> served = moeplan.EpSettings(ep_size=32, nodes=4)  # doctest: +SKIP
        >>> plan = moeplan.import_placement(
        ...     "placement.json", "sglang", moeplan.load_model("deepseek-v3"), served
        ... )  # doctest: +SKIP
    """
    spec, path = model or ModelSpec(), Path(path)
    if shape is not None and spec.moe_layers is None:
        spec = spec.override(moe_layers=shape.layer_ids)
    report = examine(path, engine, spec, layout)
    if shape is None:
        _check_known(report, path)
    placement = report.require_placement()
    if shape is None:
        shape = spec.moe_shape(num_experts=placement.num_experts, layer_ids=placement.layer_ids, where=str(path))
    where, deployed, sent = str(path), Deployment(deployment), Dispatch(dispatch)
    return plan_from_placement(placement, shape, engine, deployment=deployed, dispatch=sent, where=where)


def _check_known(report: Report, path: Path) -> None:
    """Ask for all that is missing at once, where the file alone does not say its model."""
    if report.ok and None in (report.model.num_experts, report.model.moe_layers):
        layout = report.layout
        cluster = [flag for flag, at in (("--ep-size", layout.ep_size), ("--nodes", layout.nodes)) if not at]
        raise UsageError(
            "does not say all of its model",
            where=str(path),
            hint="give model (--config), or all of --num-experts, --num-layers, --dense-layers and --top-k"
            + (f"; and {' and '.join(cluster)}" if cluster else ""),
        )
