"""Time of each collective over a two-level network: links inside a node or rack, and links between those.

A GPU sends and receives on both levels at once; the busiest link decides. What a message is, and its bytes, is
`moeplan.cluster`'s: `pick` is DeepEP's low-latency kernel, `node` its normal kernel, `gpu` the normal kernel inside one
node (or DeepEP V2's direct one), `allgather` an all-gather and reduce-scatter.

P: GPUs. Ring and one-shot all-reduce: Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Dispatch, message_bytes
from moeplan.errors import UsageError
from moeplan.perf.constants import DeepEPFit
from moeplan.perf.operators import Device, Number, Time, overlap

__all__ = ["UNITS_GIVEN", "Messages", "all_reduce", "expert_exchange", "messages_between", "send", "uniform_messages"]

Array = npt.NDArray[np.float64]
#: Units (SMs) that DeepEP's normal kernels are given by default: csrc `Config`, and SGLang's `deepep_config`.
UNITS_GIVEN = 20


@dataclass(frozen=True)
class Messages:
    """Messages of each GPU at one layer in one direction, [..., P] each, or only the busiest GPU's, [..., 1].

    `sent_up`, `received_up` stay inside a node; `sent_out`, `received_out` cross nodes.
    """

    sent_up: Array
    received_up: Array
    sent_out: Array
    received_out: Array

    @property
    def busiest_up(self) -> Array:
        return np.asarray(np.maximum(self.sent_up, self.received_up).max(axis=-1), np.float64)

    @property
    def busiest_out(self) -> Array:
        return np.asarray(np.maximum(self.sent_out, self.received_out).max(axis=-1), np.float64)

    @property
    def busiest_handled(self) -> Array:
        """What one GPU sends on either level, forwarding included: the copying that its units do."""
        sent, received = self.sent_up + self.sent_out, self.received_up + self.received_out
        return np.asarray(np.maximum(sent, received).max(axis=-1), np.float64)


def messages_between(pairs: npt.ArrayLike, gpus_per_node: int) -> Messages:
    """From messages [..., P, P], from GPU to GPU."""
    counts = np.asarray(pairs)
    own = np.diagonal(counts, axis1=-2, axis2=-1)
    sent_up, received_up = -own.astype(np.float64), -own.astype(np.float64)
    for first in range(0, counts.shape[-1], gpus_per_node):
        node = slice(first, first + gpus_per_node)
        inside = counts[..., node, node]
        sent_up[..., node] += inside.sum(axis=-1)
        received_up[..., node] += inside.sum(axis=-2)
    sent, received = counts.sum(axis=-1) - own, counts.sum(axis=-2) - own
    return Messages(sent_up, received_up, sent - sent_up, received - received_up)


def uniform_messages(
    dispatch: Dispatch, nodes: int, gpus_per_node: int, tokens: Number, top_k: int, num_experts: int, max_nodes: int = 0
) -> Messages:
    """Expected messages of a GPU that has `tokens` tokens, when every expert is as likely as any other.

    Args:
        max_nodes: nodes that one token's experts may lie on (group-limited routing); 0 for all.
    """
    tokens = np.asarray(tokens, np.float64)[..., None]
    gpus = nodes * gpus_per_node
    reach = min(max_nodes, nodes) if max_nodes else nodes
    if dispatch is Dispatch.PICK:
        up, out = top_k * (gpus_per_node - 1) / gpus, top_k * (1 - 1 / nodes)
    else:
        on_gpu = _hit(num_experts * reach / nodes, num_experts / gpus, top_k) * reach / nodes
        on_node = _hit(num_experts * reach / nodes, num_experts / nodes, top_k) * reach / nodes
        if dispatch is Dispatch.ALLGATHER:
            on_gpu = on_node = 1.0
        if dispatch is Dispatch.GPU:
            up, out = (gpus_per_node - 1) * on_gpu, (gpus - gpus_per_node) * on_gpu
        else:
            up, out = nodes * (gpus_per_node - 1) * on_gpu, (nodes - 1) * on_node
    return Messages(tokens * up, tokens * up, tokens * out, tokens * out)


def _hit(experts: float, held: float, picks: int) -> float:
    """Chance that at least one of `picks` distinct experts is among the `held` ones."""
    index = np.arange(picks)
    return float(1 - np.prod(np.clip((experts - held - index) / (experts - index), 0, 1)))


def expert_exchange(
    device: Device,
    dispatch: Dispatch,
    messages: Messages,
    hidden: int,
    top_k: int,
    nodes: int,
    direction: Literal["dispatch", "combine"],
    *,
    units: Number = UNITS_GIVEN,
) -> Time:
    """Dispatch, or combine, of one layer.

    Args:
        messages: counted in the dispatch direction; combine sends them back.
        nodes: nodes (of `hardware.scale_up_size` GPUs or fewer) that take part.
        units: units given to the normal kernels; the low-latency kernel takes what it needs.

    Raises:
        UsageError: a direction other than these two.
    """
    if direction not in ("dispatch", "combine"):
        raise UsageError(f"direction {direction} is unknown", hint="use dispatch or combine")
    size = getattr(message_bytes(dispatch, hidden, top_k), direction)
    family = "low_latency" if dispatch is Dispatch.PICK else "normal"
    hardware, fit = device.hardware, cast(DeepEPFit, getattr(device.constants, f"{family}_{direction}"))
    up = size * messages.busiest_up / (hardware.scale_up.bytes_per_s * fit.scale_up)
    out = size * messages.busiest_out / (hardware.scale_out.bytes_per_s * fit.scale_out)
    link = hardware.scale_out if nodes > 1 else hardware.scale_up
    steps = fit.hops + fit.doubling * np.log2(max(nodes, 2) / 2)
    latency = fit.launch_s + link.latency_s * steps
    copying = np.zeros_like(up)
    if fit.unit_bytes_per_s:
        copying = size * messages.busiest_handled / (np.asarray(units, np.float64) * fit.unit_bytes_per_s)
    moved = overlap(overlap(up, out, fit.overlap), copying, fit.overlap)
    parts: dict[str, Number] = {"scale_up": up, "scale_out": out, "copying": copying, "latency": latency + 0 * up}
    return Time(np.asarray(latency + moved, np.float64)[()], parts)


def all_reduce(device: Device, data_bytes: Number, gpus: int) -> Time:
    """Sum of `data_bytes` over `gpus` GPUs, as in tensor parallelism.

    Inside a node the quicker of one-shot (everybody reads everything) and ring; over several, reduce-scatter inside,
    ring between the nodes, all-gather inside.

    Raises:
        UsageError: more GPUs than one node has, but not a multiple of them.
    """
    hardware, fit = device.hardware, device.constants.collective
    data = np.asarray(data_bytes, np.float64)
    inside = min(gpus, hardware.scale_up_size)
    if gpus % inside:
        raise UsageError(
            f"an all-reduce over {gpus} GPUs does not fill nodes of {inside}", hint=f"use a multiple of {inside}"
        )
    nodes = gpus // inside
    if gpus == 1:
        return Time(np.zeros_like(data)[()], {"scale_up": 0 * data, "scale_out": 0 * data, "latency": 0 * data})
    near, far = hardware.scale_up, hardware.scale_out
    rate_up, rate_out = near.bytes_per_s * fit.scale_up, far.bytes_per_s * fit.scale_out
    once = (inside - 1) * data / rate_up, near.latency_s + 0 * data
    ring = 2 * (inside - 1) / inside * data / rate_up, 2 * (inside - 1) * near.latency_s + 0 * data
    shorter = (sum(once) < sum(ring)) & (nodes == 1)
    up = np.where(shorter, once[0], ring[0])
    out = 2 * (nodes - 1) / nodes * data / inside / rate_out
    latency = fit.launch_s + np.where(shorter, once[1], ring[1]) + 2 * (nodes - 1) * far.latency_s
    return Time((up + out + latency)[()], {"scale_up": up, "scale_out": out, "latency": latency})


def send(device: Device, data_bytes: Number, *, between_nodes: bool = True) -> Time:
    """From one GPU to another, as between stages of a pipeline or from prefill to decode."""
    hardware, fit = device.hardware, device.constants.collective
    data = np.asarray(data_bytes, np.float64)
    level, share = (hardware.scale_out, fit.scale_out) if between_nodes else (hardware.scale_up, fit.scale_up)
    moved, latency = data / (level.bytes_per_s * share), fit.launch_s + level.latency_s + 0 * data
    return Time((moved + latency)[()], {"scale_out" if between_nodes else "scale_up": moved, "latency": latency})
