"""The plan: one value that carries all it was made for."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moeplan import __version__
from moeplan.cluster import Cluster, Dispatch, ReplicaRule, Routes, check_slots, routes
from moeplan.errors import OutputError, PlanError, UsageError
from moeplan.io.files import cannot_write
from moeplan.io.json import write_json
from moeplan.planning.router import Router
from moeplan.trace.prompts import PRIVATE
from moeplan.types import ModelShape, Placement

if TYPE_CHECKING:
    from moeplan.planning.prediction import Prediction

__all__ = ["DEPLOYED", "FORMAT", "VERSION", "Moves", "Plan", "PlanningTask", "Provenance", "Signature", "crc"]

FORMAT, VERSION = "moeplan-plan", 2
#: The strategy of a plan whose placement came from an engine's file.
DEPLOYED = "deployed"
#: What a signature may rest on, and how its tokens are called in output.
_UNITS = {"prefill": "prefill", "prompt": "prompt", "decode": "decode", "rows": "recorded"}


@dataclass(frozen=True)
class Signature:
    """What is known of a request before its group is chosen.

    Attributes:
        source: `prefill`, the routing of the whole prefill; else the first `tokens` tokens of the `prompt`, of the
            `decode`, or of all recorded `rows` stand in for it.
        tokens: how many of them; None with `prefill`.
    """

    source: Literal["prefill", "prompt", "decode", "rows"] = "prefill"
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.source not in _UNITS or (self.source == "prefill") != (self.tokens is None):
            raise UsageError(f"a signature of {self.tokens} {str(self.source)[:20]} tokens is invalid")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--signature-tokens {self.tokens} is not positive")

    def __str__(self) -> str:
        """How output names it: `prefill`, or `first 48 decode tokens`."""
        return self.source if self.tokens is None else f"first {self.tokens} {self.unit} tokens"

    @property
    def unit(self) -> str:
        """What its tokens are called: prefill, prompt, decode or recorded tokens."""
        return _UNITS[self.source]

    @property
    def stands_in(self) -> str | None:
        """What stands in for the prefill, in words; None where nothing does."""
        return None if self.tokens is None else str(self)


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from.

    Attributes:
        version: the version that made it.
        trace_checksum: identifies the rows that it was fitted on; empty where there were none.
        synthetic: those rows were generated.
        fit_index: numbers in that trace of the requests it was fitted on; empty: all usable ones.
        fit_requests, fit_seconds: how many requests it was fitted on, and the wall time.
        notes: choices made, one line each.
    """

    version: str = __version__
    trace_checksum: str = ""
    synthetic: bool = False
    fit_requests: int = 0
    fit_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    fit_index: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanningTask:
    """What plans are made for, and compared on.

    Attributes:
        cluster: where the model runs. redundant: R, extra slots per layer.
        dispatch: what a message is. replica_rule: which replica of an expert serves a token.
    """

    cluster: Cluster
    redundant: int = 0
    dispatch: Dispatch = Dispatch.PICK
    replica_rule: ReplicaRule = ReplicaRule.NEAREST_STATIC

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", Dispatch(self.dispatch))
        object.__setattr__(self, "replica_rule", ReplicaRule(self.replica_rule))

    def check(self, num_experts: int) -> None:
        """Refuse slots that do not divide over the GPUs.

        Raises:
            PlanError: with the nearest numbers that work.
        """
        check_slots(num_experts, self.redundant, self.cluster)


@dataclass(frozen=True)
class Moves:
    """What it takes to go from one plan to another.

    Attributes:
        replicas: replicas on a GPU that did not hold the expert before, of `slots` in all layers.
        most_in_a_layer: the most of them in one layer.
        bytes: of weights to send; None where the size of an expert is not known.
    """

    replicas: int
    slots: int
    most_in_a_layer: int
    bytes: int | None


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Where every expert lives, how requests find their group, and all that both were made for.

    `moeplan.plan` makes one, `moeplan.load_plan` reads one, and an engine's placement file becomes one
    (`moeplan.import_placement`). `moeplan.evaluate(plan, trace)` asks for nothing more.

    Attributes:
        placement: the expert in each slot, int32 [L, S].
        router: the request router, from a request's signature to its group.
        cluster, dispatch, replica_rule: where and how it is served.
        model: the model's shape. strategy: what made it; `deployed` where an engine's file did.
        params: what the strategy was given, as plain values (`guard`, `objective`).
        signature: what the request router sees. seed: the random seed.
        equal_groups: False for a strategy whose groups are unequal by nature; its figures are never within the guard.
        provenance: the version, the trace and the time behind it.
        prediction: of the use of experts from prompts and earlier answers; None where the trace kept neither.
        expected: figures on held-out requests by key, each with `value`, `ci95` and `vs_linear`; None where unknown.

    Raises:
        PlanError: the placement is for another cluster or model.

    Examples:
        >>> import moeplan
        >>> plan = moeplan.plan(moeplan.open_trace("embedded"), moeplan.Cluster(4, 2), "eplb")
        >>> plan.placement.slots.shape
        (8, 32)
    """

    placement: Placement
    router: Router
    cluster: Cluster
    dispatch: Dispatch
    replica_rule: ReplicaRule
    model: ModelShape
    strategy: str
    params: dict[str, Any] = field(default_factory=dict)
    signature: Signature = Signature()
    seed: int = 0
    equal_groups: bool = True
    provenance: Provenance = Provenance()
    expected: dict[str, Any] | None = None
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dispatch", Dispatch(self.dispatch))
        object.__setattr__(self, "replica_rule", ReplicaRule(self.replica_rule))
        place, cluster, model = self.placement, self.cluster, self.model
        if (place.nodes, place.gpus_per_node) != (cluster.nodes, cluster.gpus_per_node):
            raise PlanError(
                f"the placement is for {place.nodes} nodes x {place.gpus_per_node} GPUs, the cluster has "
                f"{cluster.nodes} x {cluster.gpus_per_node}"
            )
        if place.num_layers != model.num_layers:
            raise PlanError(f"{place.num_layers} layers of slots for {model.num_layers} layers")
        if place.num_experts != model.num_experts:
            raise PlanError(f"a placement of {place.num_experts} experts for a model of {model.num_experts}")

    def __repr__(self) -> str:
        place, cluster = self.placement, self.cluster
        fitted = f"fitted on {self.provenance.fit_requests} requests" if self.provenance.fit_requests else "not fitted"
        lines = [
            f"Plan by {self.strategy} for {self.model.name or 'a model'}: {place.num_layers} layers x "
            f"{place.num_experts} experts + {place.redundant} redundant",
            f"  {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs, {cluster.num_groups} groups; dispatch "
            f"{self.dispatch}, replicas {self.replica_rule}, signature {self.signature}; {fitted}",
        ]
        if self.expected is not None:
            values = {key: figure.get("value") for key, figure in self.expected.items()}
            known = [f"{key} {value:.3f}" for key, value in values.items() if isinstance(value, float)]
            lines.append(f"  expected on held-out requests: {', '.join(known) or 'unknown'}")
        return "\n".join(lines)

    @property
    def redundant(self) -> int:
        """R, extra slots per layer."""
        return self.placement.redundant

    @property
    def task(self) -> PlanningTask:
        """What the plan was made for."""
        return PlanningTask(self.cluster, self.redundant, self.dispatch, self.replica_rule)

    @cached_property
    def routes(self) -> Routes:
        """The replica rule applied to the placement: which replica serves whom."""
        return routes(self.placement, self.cluster, self.replica_rule, self.seed)

    def moves_from(self, old: Plan) -> Moves:
        """What has to be moved to get here from an older plan of the same model and cluster."""
        before, after = old.placement, self.placement
        held = [set(gpu.tolist()) for gpu in before.slots.reshape(-1, before.slots_per_gpu)]
        slots = after.slots.reshape(len(held), -1)
        fresh = [len(set(gpu.tolist()) - had) for gpu, had in zip(slots, held, strict=True)]
        by_layer = np.array(fresh).reshape(before.num_layers, -1).sum(axis=1)
        replicas, size = int(by_layer.sum()), old.model.expert_bytes
        return Moves(replicas, before.slots.size, int(by_layer.max()), None if size is None else round(replicas * size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: all but the arrays, as `plan.json` holds them."""
        cluster, origin = self.cluster, self.provenance
        return {
            "format": FORMAT,
            "version": VERSION,
            "requires": [],
            "moeplan": origin.version,
            "synthetic": origin.synthetic,
            "strategy": self.strategy,
            "params": self.params,
            "seed": self.seed,
            "model": self.model.to_dict(),
            "cluster": {
                "nodes": cluster.nodes,
                "gpus_per_node": cluster.gpus_per_node,
                "deployment": cluster.deployment.value,
            },
            "redundant": self.redundant,
            "replica_rule": self.replica_rule.value,
            "dispatch": self.dispatch.value,
            "signature": {"source": self.signature.source, "tokens": self.signature.tokens},
            "router": self.router.kind,
            "equal_groups": self.equal_groups,
            "fit_seconds": origin.fit_seconds,
            "fit_requests": origin.fit_requests,
            "trace_checksum": origin.trace_checksum,
            "notes": list(origin.notes),
            "expected": self.expected,
            **({} if self.prediction is None else {"prediction": self.prediction.to_dict()}),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as a directory of `plan.json` and `.npy` arrays, whole or not at all.

        Raises:
            OutputError: the place exists, or cannot be written.
        """
        path, temporary = Path(path), None
        if path.exists():
            raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
        arrays = {"slots": self.placement.slots, **self.router.arrays}
        if self.provenance.fit_index:
            arrays["fit_index"] = np.array(self.provenance.fit_index)
        private = {} if self.prediction is None else self.prediction.arrays()
        arrays |= private
        head = self.to_dict() | {"arrays": {name: crc(array) for name, array in arrays.items()}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            temporary.chmod(0o755)
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                if name in private:
                    (temporary / f"{name}.npy").chmod(PRIVATE)
            write_json(temporary / "plan.json", head)
            temporary.rename(path)
        except OSError as error:
            raise cannot_write(path, error) from None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def crc(array: npt.NDArray[Any]) -> int:
    """The checksum that plan.json keeps of each array."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
