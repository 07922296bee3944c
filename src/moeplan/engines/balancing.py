"""A balanced placement for an engine where counts of picks are all that is known, and its modelled effect."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.cluster import Cluster, Dispatch, ReplicaRule
from moeplan.engines.from_placement import find_replica_rule
from moeplan.engines.parsing import load_json
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import Report
from moeplan.errors import FormatError, UsageError
from moeplan.importers.logical_count import read_logical_count
from moeplan.model.catalogue import load_model
from moeplan.model.spec import ModelSpec
from moeplan.perf.hardware import load_hardware
from moeplan.perf.routing import ExpertRanks, routing_from_counts
from moeplan.planning.balance import Candidate, candidates, gpu_load_ratio
from moeplan.replay.timing import CONTEXT, Timing
from moeplan.trace.counts import CountsProfile, read_counts

__all__ = ["LACKS", "Balanced", "balance_counts", "read_any_counts", "step_times"]

#: What counts cannot tell.
LACKS = (
    "counts have the load of experts, not which requests pick them: this placement balances load, and leaves "
    "traffic between nodes as it is",
    "a request-level trace (SGLang or vLLM with --enable-return-routed-experts, then moeplan import or record) would "
    "add request groups, replicas near the requests that pick them, and figures on held-out requests (remote_share, "
    "step times)",
)


@dataclass(frozen=True)
class Balanced:
    """Ways to balance counts, measured.

    Attributes:
        counts: what they were fitted on. cluster, replica_rule: where, and how the engine chooses among replicas.
        candidates: `linear` first, then the best, then the others.
        measured: load ratio of each on other counts; None where there are none.
        step: modelled decode step under linear and the best; None where no hardware was given.
    """

    counts: CountsProfile
    cluster: Cluster
    replica_rule: ReplicaRule
    candidates: tuple[Candidate, ...]
    measured: dict[str, float] | None = None
    step: dict[str, Any] | None = None

    @property
    def best(self) -> Candidate:
        """The way to write."""
        return self.candidates[1]

    @property
    def placement(self) -> EnginePlacement:
        """The best as an engine's placement."""
        return EnginePlacement.of(self.best.placement, self.counts.layer_ids)

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """A model, with the hidden layers of the counts' source where nothing else says them."""
        hidden = self.counts.source.get("hidden_layers")
        if spec.layers is not None or type(hidden) is not int:
            return spec
        spec = replace(spec, layers=hidden)
        return spec if spec.moe_layers else spec.override(moe_layers=self.counts.layer_ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "strategy": self.best.name,
            "replica_rule": self.replica_rule.value,
            "load_ratio": {way.name: way.ratio for way in self.candidates},
            "load_ratio_measured": self.measured,
            "modelled_step": self.step,
            "lacks": list(LACKS),
        }


def balance_counts(
    counts: CountsProfile,
    engine: str,
    cluster: Cluster,
    *,
    redundant: int = 0,
    expert_groups: int = 1,
    others: CountsProfile | None = None,
    others_name: str | None = None,
) -> Balanced:
    """Balance counts in every way for an engine, and measure each.

    Args:
        expert_groups: of the gate, n_group of config.json (DeepSeek-V3: 8).
        others, others_name: counts to measure on, and where they are from, for messages.

    Raises:
        PlanError: slots that do not divide over the GPUs. UsageError: `others` are of another model.
    """
    if others is not None and (others.counts.shape, others.layer_ids) != (counts.counts.shape, counts.layer_ids):
        raise UsageError("has other layers or experts", where=others_name, hint="measure on counts of the same model")
    rule = find_replica_rule(engine, cluster.nodes)
    found = candidates(
        counts.counts, cluster, redundant, rule, expert_groups=expert_groups, distinct=engine == "vllm-ascend"
    )
    measured = None
    if others is not None:
        measured = {way.name: gpu_load_ratio(others.counts, way.placement, cluster, rule) for way in found}
    return Balanced(counts, cluster, rule, tuple(found), measured)


def step_times(
    balanced: Balanced, hardware: str, model: str, *, context: int | None = None, batch: int = 128
) -> dict[str, Any]:
    """Modelled milliseconds of a decode step under `linear` and under the best, tokens drawn by the counts.

    Args:
        context: tokens that each request holds. batch: requests of each data-parallel rank (a node).

    Raises:
        UsageError: another model than the counts'.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} is not positive")
    spec, machine, cluster = load_model(model), load_hardware(hardware), balanced.cluster
    moe, tokens, counts = spec.moe, context or CONTEXT, balanced.counts.counts
    if moe is None or (len(moe.layers), moe.experts) != counts.shape:
        raise UsageError(
            f"{spec.name} does not have {len(counts)} MoE layers of {counts.shape[1]} experts",
            hint="give the counts' own --model",
        )
    ranks = ExpertRanks(cluster.num_gpus, cluster.nodes, dispatch=Dispatch.PICK)
    ms = {}
    for way in balanced.candidates[:2]:
        timed = Timing(spec, machine).step_model(cluster, Dispatch.PICK, way.placement.redundant)
        routing = routing_from_counts(moe, counts, way.placement.slots, batch * cluster.num_groups, ranks)
        step = timed.decode(batch, tokens, routing=routing)
        ms[way.name] = float(np.mean(step.seconds)) * 1e3
    return {"model": spec.name, "hardware": machine.name, "context": tokens, "batch": batch, "ms": ms}


def read_any_counts(source: Path) -> CountsProfile:
    """Counts from a JSON of SGLang's, or from a counts profile.

    Raises:
        FormatError: they are neither, or a placement.
    """
    if source.is_dir():
        return read_counts(source)
    try:
        return read_logical_count(source)
    except FormatError:
        if not _is_placement(source):
            raise
    raise FormatError(
        "is a placement, not counts", where=str(source), hint="moeplan import placement reads it, as a plan to export"
    )


def _is_placement(path: Path) -> bool:
    """Whether a file that holds no counts looks like an engine's placement."""
    if path.suffix in (".yaml", ".yml"):
        return True
    data = load_json(Report(path, ""))
    return isinstance(data, dict) and bool({"physical_to_logical_map", "layer_list"} & data.keys())
