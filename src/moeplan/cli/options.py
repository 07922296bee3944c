"""Flags that `plan`, `compare` and `replay` share, and what becomes of them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule
    from moeplan.replay.timing import Timing
    from moeplan.types import ModelShape


class DispatchChoice(StrEnum):
    """The dispatch modes, named here so that the command line's help needs no array library."""

    pick = "pick"
    gpu = "gpu"
    node = "node"
    allgather = "allgather"


class HomeChoice(StrEnum):
    """Where attention runs."""

    node = "node"
    gpu = "gpu"


class RuleChoice(StrEnum):
    """Replica rules."""

    nearest_static = "nearest-static"
    nearest_even = "nearest-even"
    hash = "hash"


class PhaseChoice(StrEnum):
    """Rows that a plan is measured on."""

    decode = "decode"
    prefill = "prefill"
    mixed = "mixed"


TraceArgument = Annotated[str, typer.Argument(metavar="TRACE", help="A moeplan trace (a directory).")]
Nodes = Annotated[int, typer.Option("--nodes", metavar="N", help="Nodes of the cluster.")]
GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", metavar="G", help="GPUs in each node.")]
Redundant = Annotated[int, typer.Option("--redundant", metavar="R", help="Extra expert slots per layer, in total.")]
Home_ = Annotated[HomeChoice, typer.Option("--home", help="Attention sharded in a node, or on one GPU.")]
Dispatch_ = Annotated[DispatchChoice, typer.Option("--dispatch", help="What one message is.")]
Rule = Annotated[RuleChoice, typer.Option("--replica-rule", help="Which copy serves: SGLang's rules, or vLLM's hash.")]
SignatureTokens = Annotated[
    int | None,
    typer.Option("--signature-tokens", metavar="N", help="Let the first N tokens stand in for the prefill."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="S", help="Seed of everything that chance decides.")]
Hidden = Annotated[
    int | None, typer.Option("--hidden", metavar="H", help="The model's hidden size, if the trace does not say.")
]
Clusters = Annotated[
    int | None, typer.Option("--clusters", metavar="K", help="K of `paper`; else picked on the fit part.")
]
Phase = Annotated[PhaseChoice, typer.Option("--phase", help="Rows to measure on; plans are always fitted on decode.")]
Block = Annotated[int, typer.Option("--block", metavar="N", help="Keep N neighbouring requests together in splits.")]
Hardware_ = Annotated[str | None, typer.Option("--hardware", help="Also model step times, on these GPUs, e.g. H100.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="With --hardware: a name of the catalogue, or a config.json [default: the trace's]."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="With --hardware: tokens that each request holds [default: 4096]."),
]


def timing_of(
    shape: ModelShape, cluster: Cluster, mode: Dispatch, hardware: str | None, model: str | None, context: int | None
) -> Timing | None:
    """What to time steps with, checked; None without `--hardware`."""
    if hardware is None:
        if model is not None or context is not None:
            flag = "--context" if model is None else "--model"
            raise UsageError(f"{flag} is for step times", hint="give --hardware too, e.g. --hardware H100")
        return None
    from moeplan.replay import timing

    return timing.timing_of(shape, cluster, mode, hardware, model, timing.CONTEXT if context is None else context)


def deployment_of(home: HomeChoice | None) -> Deployment:
    """The flag as the library's own value."""
    from moeplan.cluster import Deployment

    return Deployment.GPUS if home is HomeChoice.gpu else Deployment.NODES


def cluster_of(
    nodes: int, gpus_per_node: int, home: HomeChoice, dispatch: DispatchChoice, rule: RuleChoice
) -> tuple[Cluster, Dispatch, ReplicaRule]:
    """The flags as the library's own values."""
    from moeplan.cluster import Cluster, Dispatch, ReplicaRule

    if nodes < 1 or gpus_per_node < 1:
        raise UsageError(f"--nodes {nodes} x --gpus-per-node {gpus_per_node}: both must be at least 1")
    return Cluster(nodes, gpus_per_node, deployment_of(home)), Dispatch(dispatch.value), ReplicaRule(rule.value)
