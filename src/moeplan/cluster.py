"""The cluster, and the definition of what a message is and what it costs.

Placement, replay, the real run and the time model all call this module; none of them counts a message by itself.

Sources: DeepEP at commit dd758caf (2026-07-14): `csrc/kernels/legacy/internode_ll.cu` line 180 (low latency),
`csrc/kernels/legacy/internode.cu` lines 47-51 and 525 and 1758 (normal kernels), `csrc/kernels/legacy/launch.cuh` line
113 (widths that the low-latency kernel is compiled for). Replica rules: SGLang 0.5.23 `expert_location.py`; vLLM 0.30.0
and 0.33.0 `fused_moe/router/base_router.py`.

Names: N nodes, G GPUs per node, P = N x G GPUs, D groups, L layers, E experts, k picks per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan._kernels import messages as _messages
from moeplan.arrays import BoolArray, ExpertArray, FloatArray, Int16Array, Int32Array, Int64Array
from moeplan.errors import PlanError, UsageError, expect
from moeplan.types import Placement


class Choice(StrEnum):
    """Named values; wherever one is asked for, its text will do."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise UsageError(f"{cls.__name__} {str(value)[:40]!r} is unknown", hint=f"use {', '.join(cls)}")


class Dispatch(Choice):
    """What one message carries on the way from a token to its experts; see `token_messages`.

    Attributes:
        PICK: one pick of a token. DeepEP low-latency kernels: SGLang `--deepep-mode low_latency`, vLLM
            `deepep_low_latency`.
        GPU: a token, once for each GPU that serves it. Direct all-to-all: vLLM `deepep_v2`.
        NODE: a token, once for each node that serves it, and forwarded there. DeepEP normal kernels: SGLang
            `--deepep-mode normal`, vLLM `deepep_high_throughput`.
        ALLGATHER: every token goes to every GPU. vLLM `allgather_reducescatter`, SGLang `--moe-a2a-backend none`.
    """

    PICK = "pick"
    GPU = "gpu"
    NODE = "node"
    ALLGATHER = "allgather"

    @property
    def code(self) -> int:
        return list(Dispatch).index(self)


class Deployment(Choice):
    """What a group of requests runs its attention on: one data-parallel rank of attention per group.

    Attributes:
        NODES: a whole node, with tensor parallelism inside it. SGLang: `--attn-dp-size` is the number of nodes.
        GPUS: one GPU (data-parallel attention). SGLang: `--attn-dp-size` is the number of GPUs.
    """

    NODES = "nodes"
    GPUS = "gpus"


class ReplicaRule(Choice):
    """Which replica of an expert serves a pick; see `routes`.

    Attributes:
        NEAREST_STATIC: the one on the same GPU, else on the same node, else a fixed one. SGLang on several nodes.
        NEAREST_EVEN: the same, but GPUs of a node share its replicas evenly. SGLang on one node.
        HASH: by a hash of the token's row, wherever the replica is. vLLM; with the same expectation, TensorRT-LLM
            (round robin) and vLLM-Ascend (by rank).
    """

    NEAREST_STATIC = "nearest-static"
    NEAREST_EVEN = "nearest-even"
    HASH = "hash"


@dataclass(frozen=True)
class Cluster:
    """N nodes of G GPUs, and what a group of requests is.

    Attributes:
        nodes, gpus_per_node: N and G.
        deployment: one group per node, or one per GPU.

    Raises:
        UsageError: no node, no GPU, or more GPUs than moeplan handles.

    Examples:
        >>> import moeplan
        >>> moeplan.Cluster(nodes=4, gpus_per_node=8).num_groups
        4
    """

    nodes: int
    gpus_per_node: int
    deployment: Deployment = Deployment.NODES

    def __post_init__(self) -> None:
        object.__setattr__(self, "deployment", Deployment(self.deployment))
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise UsageError(f"a cluster of {self.nodes} nodes x {self.gpus_per_node} GPUs is impossible")
        if self.num_gpus > 16384:
            raise UsageError(f"{self.num_gpus} GPUs are more than moeplan handles", hint="use at most 16384")

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def num_groups(self) -> int:
        """D: one group per node, or per GPU."""
        return self.nodes if self.deployment is Deployment.NODES else self.num_gpus

    @property
    def gpus_per_group(self) -> int:
        """GPUs that a group's requests run their attention on."""
        return self.num_gpus // self.num_groups

    def first_gpu(self, group: npt.ArrayLike) -> Int64Array:
        """The first GPU of each group."""
        return np.asarray(group, np.int64) * self.gpus_per_group

    def group_node(self, group: npt.ArrayLike) -> Int64Array:
        """The node of each group."""
        return self.first_gpu(group) // self.gpus_per_node

    def source_gpus(self, group: int, rows: int) -> Int64Array:
        """Source GPU of row i of `rows` in a step: floor(i x G / rows) of the group's node, or the group's GPU."""
        return self.first_gpu(group) + np.arange(rows, dtype=np.int64) * self.gpus_per_group // max(rows, 1)


def check_slots(num_experts: int, redundant: int, cluster: Cluster) -> int:
    """Slots per GPU; refuses, naming the nearest counts that work, when slots do not divide over the GPUs.

    Raises:
        PlanError: (E + R) does not divide by nodes x GPUs, or a GPU would need two replicas of one expert.
    """
    expect(cluster, Cluster, "moeplan.Cluster(nodes, gpus_per_node)")
    if redundant < 0:
        raise UsageError(f"--redundant {redundant} is negative", hint="give 0 or more extra slots per layer")
    slots, gpus = num_experts + redundant, cluster.num_gpus
    if slots > num_experts * gpus:  # looked at first: what follows takes as long as the number is large
        raise PlanError(
            f"{redundant} redundant slots are more than all {gpus} GPUs holding all {num_experts} experts would take",
            hint=f"use --redundant {num_experts * (gpus - 1)} or less",
        )
    if slots % gpus:
        below = redundant - slots % gpus
        above = redundant + gpus - slots % gpus
        counts = [str(r) for r in (below, above) if r >= 0]
        fits = [g for g in range(1, min(slots, 16384) // cluster.nodes + 1) if slots % (cluster.nodes * g) == 0]
        near = sorted(fits, key=lambda g: (abs(g - cluster.gpus_per_node), g))[:2]
        hint = f"use --redundant {' or '.join(counts)}"
        if near:
            hint += f", or --gpus-per-node {' or '.join(str(g) for g in near)}"
        raise PlanError(
            f"{num_experts} experts + {redundant} redundant = {slots} slots do not divide over {cluster.nodes} nodes x "
            f"{cluster.gpus_per_node} GPUs = {gpus}",
            hint=hint,
        )
    return slots // gpus


# --------------------------------------------------------------------------------------------------------------------
# Messages


def token_messages(dispatch: Dispatch, cluster: Cluster, source: int, serving: list[int]) -> list[tuple[int, int]]:
    """The dispatch messages of one token at one layer, as (from GPU, to GPU); combine sends the same ones back.

    Args:
        source: the token's source GPU.
        serving: the GPU that serves each of its k picks.

    `pick` sends one message per pick, `gpu` one per distinct GPU. `node` sends one per distinct other node, to the GPU
    of the source's own index there, which hands it on to each distinct serving GPU of that node; inside its own node
    the source sends to each distinct GPU itself. `allgather` sends everything to everyone along the same two hops,
    whatever the picks: no plan changes its bytes. A message whose source is its destination costs nothing and
    is absent.
    """
    dispatch, per_node = Dispatch(dispatch), cluster.gpus_per_node
    rail = source % per_node
    if dispatch is Dispatch.PICK:
        return [(source, gpu) for gpu in serving if gpu != source]
    if dispatch is Dispatch.GPU:
        return [(source, gpu) for gpu in sorted(set(serving)) if gpu != source]
    reached = set(range(cluster.num_gpus)) if dispatch is Dispatch.ALLGATHER else set(serving)
    messages: list[tuple[int, int]] = []
    for node in sorted({gpu // per_node for gpu in reached}):
        entry = source if node == source // per_node else node * per_node + rail
        if entry != source:
            messages.append((source, entry))
        messages += [(entry, gpu) for gpu in sorted(reached) if gpu // per_node == node and gpu != entry]
    return messages


#: Hidden sizes that DeepEP's low-latency kernel is compiled for (launch.cuh line 113).
LOW_LATENCY_WIDTHS = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)


@dataclass(frozen=True)
class MessageBytes:
    """Size of one message.

    Attributes:
        dispatch, combine: bytes there and back.
        width: the hidden size after padding to what the kernel supports.
        note: what was padded, and why, in one line; empty when nothing was.
    """

    dispatch: int
    combine: int
    width: int
    note: str = ""

    @property
    def both(self) -> int:
        return self.dispatch + self.combine


def message_bytes(dispatch: Dispatch, hidden: int, top_k: int) -> MessageBytes:
    """Bytes of one message: fp8 dispatch with a float32 scale per 128 values, bf16 combine.

    `pick` (low latency): 16 + h + 4h/128 there, 2h back. `gpu` and `node` (normal kernels): h + 4h/128 + 8 + 8k there
    (k int32 indices and k float32 weights), 2h + 8 + 4k back, each rounded up to 16. `allgather` (vLLM's
    all-gather and reduce-scatter): one bf16 row, 2h, each way.
    """
    dispatch = Dispatch(dispatch)
    if dispatch is Dispatch.ALLGATHER:
        return MessageBytes(2 * hidden, 2 * hidden, hidden)
    if dispatch is Dispatch.PICK:
        width = next((w for w in LOW_LATENCY_WIDTHS if w >= hidden), -(-hidden // 512) * 512)
        note = f"hidden {hidden} padded to {width}, a width that DeepEP's low-latency kernel supports"
        if width > LOW_LATENCY_WIDTHS[-1]:
            note = f"hidden {hidden} counted as {width}: DeepEP's low-latency kernel supports no more than 8192"
        elif width == hidden:
            note = ""
        return MessageBytes(16 + width + width // 128 * 4, 2 * width, width, note)
    width = -(-hidden // 128) * 128
    note = "" if width == hidden else f"hidden {hidden} padded to {width}, a whole number of 128-value fp8 scales"
    return MessageBytes(
        _align16(width + width // 128 * 4 + 8 + 8 * top_k), _align16(2 * width + 8 + 4 * top_k), width, note
    )


def _align16(size: int) -> int:
    return -(-size // 16) * 16


# --------------------------------------------------------------------------------------------------------------------
# Replicas


@dataclass(frozen=True)
class Routes:
    """A replica rule applied to a placement: which slot serves each pick.

    Attributes:
        slot: int32 [L, P, E], the slot that serves expert e for a token whose source is GPU s; None under `hash`, where
            row i takes replica (i x 2654435769 mod 2**32) mod count.
    """

    placement: Placement
    cluster: Cluster
    rule: ReplicaRule
    slot: Int32Array | None

    @cached_property
    def gpu(self) -> Int16Array:
        """int16 [L, P, E], the serving GPU; under `hash` a dummy of one expert."""
        if self.slot is None:
            return np.zeros((self.placement.num_layers, self.cluster.num_gpus, 1), np.int16)
        return (self.slot // self.placement.slots_per_gpu).astype(np.int16)

    @cached_property
    def replica_gpu(self) -> Int16Array:
        """int16 [L, E, X], the GPU of each replica, -1 where there is none."""
        slots = self.placement.replica_slots
        return np.where(slots < 0, -1, slots // self.placement.slots_per_gpu).astype(np.int16)

    @cached_property
    def uniform(self) -> BoolArray:
        """bool [L, P]: at each group's first GPU, whether the rule is the same for all GPUs of the group."""
        layers = self.placement.num_layers
        by_group = self.gpu.reshape(layers, self.cluster.num_groups, self.cluster.gpus_per_group, -1)
        same = (by_group == by_group[:, :, :1]).all(axis=(2, 3))
        return np.repeat(same, self.cluster.gpus_per_group, axis=1)

    def share(self, layer: int) -> FloatArray:
        """float64 [D, E, P]: the expected share of a group's picks of an expert that each GPU serves."""
        groups, gpus = self.cluster.num_groups, self.cluster.num_gpus
        experts = self.placement.num_experts
        if self.slot is None:
            one = np.zeros((experts, gpus))
            expert, replica = np.nonzero(self.replica_gpu[layer] >= 0)
            weight = 1.0 / self.placement.replica_count[layer][expert]
            np.add.at(one, (expert, self.replica_gpu[layer][expert, replica]), weight)
            return np.broadcast_to(one, (groups, experts, gpus))
        out = np.zeros((groups, experts, gpus))
        source = np.arange(gpus)
        group = source // self.cluster.gpus_per_group
        index = (group[:, None], np.arange(experts)[None, :], self.gpu[layer].astype(np.int64))
        np.add.at(out, index, 1.0 / self.cluster.gpus_per_group)
        return out

    @cached_property
    def local_share(self) -> FloatArray:
        """float64 [D, L, E]: the expected share of a group's picks of an expert that its own node serves."""
        cluster, placement = self.cluster, self.placement
        out = np.zeros((cluster.num_groups, placement.num_layers, placement.num_experts))
        node = cluster.group_node(np.arange(cluster.num_groups))
        if self.slot is None:
            replica_node = np.where(self.replica_gpu < 0, -1, self.replica_gpu // cluster.gpus_per_node)
            for group in range(cluster.num_groups):
                out[group] = (replica_node == node[group]).sum(axis=2) / placement.replica_count
            return out
        own = np.arange(cluster.num_gpus) // cluster.gpus_per_node
        local = self.gpu // cluster.gpus_per_node == own[None, :, None]
        by_group = local.reshape(placement.num_layers, cluster.num_groups, cluster.gpus_per_group, -1)
        return np.asarray(by_group.mean(axis=2).transpose(1, 0, 2), np.float64)


def routes(placement: Placement, cluster: Cluster, rule: ReplicaRule, seed: int = 0) -> Routes:
    """Apply a replica rule.

    `nearest-static`: the lowest slot on the own GPU, else the lowest slot on the own node, else one replica fixed per
    (source GPU, layer, expert) by a seeded even assignment. `nearest-even`: the same, but the own node's replicas are
    assigned evenly to those of its GPUs that have none themselves. `hash`: by row, whatever the place.

    An even assignment of S sources to c replicas: a seeded order of the sources, then the replicas round robin from a
    seeded start, so that no replica gets two sources more than another.
    """
    rule = ReplicaRule(rule)
    if rule is ReplicaRule.HASH:
        return Routes(placement, cluster, rule, None)
    slots, count = placement.replica_slots, placement.replica_count  # [L, E, X], [L, E]
    gpus, per_node = cluster.num_gpus, cluster.gpus_per_node
    if placement.redundant == 0:
        table = np.repeat(slots[:, None, :, 0], gpus, axis=1)
        return Routes(placement, cluster, rule, np.ascontiguousarray(table))
    replica_gpu = np.where(slots < 0, -gpus, slots // placement.slots_per_gpu)
    on_gpu = np.asarray(replica_gpu[None] == np.arange(gpus)[:, None, None, None])  # [P, L, E, X]
    has_own, own = np.asarray(on_gpu.any(axis=3)), on_gpu.argmax(axis=3)
    on_node: BoolArray = np.asarray(on_gpu.reshape(cluster.nodes, per_node, *slots.shape).any(axis=1))  # [N, L, E, X]
    near_any = np.asarray(on_node.any(axis=3))
    rng = np.random.default_rng([seed, 0x5EED])
    needs_far = ~np.repeat(near_any, per_node, axis=0)
    replica = _even_deal(needs_far, count, rng)
    for node in range(cluster.nodes):
        members = slice(node * per_node, (node + 1) * per_node)
        near = on_node[node]
        if rule is ReplicaRule.NEAREST_EVEN:
            turn = _even_deal(~has_own[members] & near_any[node], np.maximum(near.sum(axis=2), 1), rng)
            order = np.argsort(~near, axis=2, kind="stable")  # own-node replicas first, rising
            chosen = np.take_along_axis(order[None].repeat(per_node, 0), turn[..., None], axis=3)[..., 0]
        else:
            chosen = np.broadcast_to(near.argmax(axis=2), has_own[members].shape)
        replica[members] = np.where(near_any[node], chosen, replica[members])
    replica = np.where(has_own, own, replica)
    table = np.take_along_axis(slots[None].repeat(gpus, 0), replica[..., None], axis=3)[..., 0]
    return Routes(placement, cluster, rule, np.ascontiguousarray(table.transpose(1, 0, 2)))


def _even_deal(needs: BoolArray, count: Int32Array, rng: np.random.Generator) -> Int64Array:
    """int64, shaped as needs [S, L, E]: the replica (0 .. count - 1) assigned to each source that needs one."""
    key = np.where(needs, rng.random(needs.shape, dtype=np.float32), 2.0)
    turn = np.argsort(np.argsort(key, axis=0, kind="stable"), axis=0, kind="stable")
    start = rng.integers(0, 1 << 30, count.shape)
    return np.asarray((turn + start) % count, np.int64)


# --------------------------------------------------------------------------------------------------------------------
# Messages of whole steps and requests (numba; `token_messages` and `Routes` are their definition)


class StepCounts(NamedTuple):
    """What a decode step does; several steps stand one after another in front.

    Attributes:
        links: int32 [L, P, P], dispatch messages from GPU to GPU.
        picks: int32 [L, P], picks that each GPU serves. touched: int32 [L, P], distinct experts that serve them.
    """

    links: Int32Array
    picks: Int32Array
    touched: Int32Array

    @classmethod
    def empty(cls, *shape: int) -> StepCounts:
        """Arrays to count into; the shape ends with L, P."""
        return cls(np.empty((*shape, shape[-1]), np.int32), np.empty(shape, np.int32), np.empty(shape, np.int32))


def step_messages(
    routes: Routes,
    dispatch: Dispatch,
    experts: ExpertArray,
    rows: Int64Array,
    sources: Int64Array,
    indices: Int64Array,
    out: StepCounts | None = None,
) -> StepCounts:
    """One decode step of the live rows, by the rule itself.

    Args:
        experts: unsigned [T, L, k]; rows: int64 [m] into it; sources: int64 [m], source GPUs; indices: int64 [m], a
            row's index within its group's micro-batch (what the `hash` rule hashes).
        out: arrays to reuse.
    """
    if out is None:
        out = StepCounts.empty(routes.placement.num_layers, routes.cluster.num_gpus)
    rule = routes.gpu, routes.replica_gpu, routes.placement.replica_count, routes.slot is None
    _messages.step_messages(experts, rows, sources, indices, *rule, routes.cluster.gpus_per_node, dispatch.code, *out)
    return out


def request_messages(
    routes: Routes, dispatch: Dispatch, experts: ExpertArray, starts: Int64Array, stops: Int64Array, groups: Int64Array
) -> FloatArray:
    """Expected messages of whole requests, summed over rows and layers.

    Args:
        experts: unsigned [T, L, k]; starts, stops: int64 [n], each request's rows; groups: int64 [n].

    Returns:
        float64 [n, 3]: messages between nodes, messages inside nodes, distinct other nodes reached.
    """
    out = np.zeros((len(starts), 3))
    cluster = routes.cluster
    sources = cluster.first_gpu(groups), cluster.gpus_per_group
    rule = routes.gpu, routes.uniform, routes.replica_gpu, routes.placement.replica_count, routes.slot is None
    _messages.request_messages(experts, starts, stops, *sources, *rule, cluster.gpus_per_node, dispatch.code, out)
    return out
