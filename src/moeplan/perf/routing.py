"""What the routing of one step gave each GPU: the same type from a replay, or from uniform routing.

L: MoE layers, or 1 where all are alike; P: GPUs that share the experts (the expert-parallel group).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Dispatch
from moeplan.model.spec import CompleteMoe
from moeplan.perf.collectives import Messages, messages_between, uniform_messages

__all__ = ["ExpertRanks", "Routing", "counted_routing", "routing_from_counts", "uniform_routing"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExpertRanks:
    """The GPUs that share the experts.

    Attributes:
        gpus, nodes: how many, and the nodes that they fill. redundant: extra slots per layer.
        dispatch: how tokens travel; None: they do not.
    """

    gpus: int
    nodes: int = 1
    redundant: int = 0
    dispatch: Dispatch | None = None


@dataclass(frozen=True)
class Routing:
    """Picks, distinct experts and messages of one step.

    Attributes:
        picks: [..., L, P], (token, pick) pairs that each GPU serves.
        experts: [..., L, P], distinct experts among them: weights that it reads.
        messages: each GPU's, in the dispatch direction; None where tokens do not travel one by one (all-gather, or
            one data-parallel rank).
        slots: expert slots on a GPU.
        source: `replay`, `uniform`, or `balanced` (uniform, and every GPU the same load).
    """

    picks: Array
    experts: Array
    messages: Messages | None
    slots: float
    source: str

    @property
    def load_ratio(self) -> float:
        """Picks of the busiest GPU over the mean, mean over layers."""
        return float((self.picks.max(axis=-1) / np.maximum(self.picks.mean(axis=-1), 1e-12)).mean())

    def part(self, share: float) -> Routing:
        """Of one equal part of the step: an expert that the whole misses with chance q, the part misses with
        q ** share."""
        if share == 1:
            return self
        missed = np.clip(1 - self.experts / self.slots, 0.0, 1.0)
        experts = np.minimum(self.slots * (1 - missed**share), self.picks * share)
        m = self.messages
        if m is not None:
            m = Messages(*(x * share for x in (m.sent_up, m.received_up, m.sent_out, m.received_out)))
        return Routing(self.picks * share, experts, m, self.slots, self.source)


def counted_routing(
    picks: npt.ArrayLike, experts: npt.ArrayLike, links: npt.ArrayLike | None, *, gpus_per_node: int, slots: float
) -> Routing:
    """From the arrays of a replayed step (`moeplan.cluster.step_messages`).

    Args:
        picks, experts: [..., L, P]. links: [..., L, P, P], messages from GPU to GPU, or None.
    """
    messages = None if links is None else messages_between(links, gpus_per_node)
    return Routing(np.asarray(picks, np.float64), np.asarray(experts, np.float64), messages, float(slots), "replay")


def uniform_routing(
    moe: CompleteMoe,
    tokens: float,
    ranks: ExpertRanks,
    *,
    own_tokens: float | None = None,
    balanced: bool = False,
    skew: float = 1.0,
) -> Routing:
    """Every expert as likely as any other; the GPUs' loads differ only by random imbalance.

    A GPU's picks are a sum of `tokens` independent draws; the P loads of a step are put at the normal quantiles of
    (i - 0.375) / (P + 0.25) (Blom 1958), so that their mean is exact and the largest is the expected maximum: the
    noise floor. A larger `skew` puts the busiest GPU at `skew` x the mean; the others share the rest evenly.

    Args:
        tokens: of the step, over all GPUs that share the experts. Redundant slots are taken to halve experts evenly.
        own_tokens: tokens that one GPU sends (default: tokens / gpus).
        balanced: every GPU serves the same.
    """
    gpus = ranks.gpus
    held = (moe.experts + ranks.redundant) / gpus
    share = 1 / gpus
    mean = tokens * moe.top_k * share
    spread = _quantiles(gpus) * np.sqrt(_variance(moe, tokens, share))
    if balanced or gpus == 1:
        spread = np.zeros(gpus)
    picks = np.clip(mean + spread, 0.0, tokens * min(moe.top_k, held))
    if skew * mean > picks.max() and gpus > 1:
        picks = np.append(np.full(gpus - 1, mean * (gpus - skew) / (gpus - 1)), skew * mean)
    miss = np.clip(1 - moe.top_k / (moe.experts + ranks.redundant), 0.0, 1.0)
    ratio = picks / mean if mean > 0 else np.ones(gpus)
    experts = np.minimum(held * (1 - miss ** (tokens * ratio)), picks)
    messages = _messages(moe, ranks, tokens / gpus if own_tokens is None else own_tokens, ratio[None])
    source = "balanced" if balanced else "uniform"
    return Routing(picks[None], experts[None], messages, held, source if skew <= 1 else f"skewed x{skew:g}")


def _variance(moe: CompleteMoe, tokens: float, share: float) -> float:
    """Of a GPU's picks: each token draws k of E experts without replacement, a share of which the GPU holds."""
    without = (moe.experts - moe.top_k) / max(moe.experts - 1, 1)
    return tokens * moe.top_k * share * (1 - share) * without


@lru_cache(maxsize=256)
def _quantiles(count: int) -> Array:
    """Expected order statistics of `count` standard normal draws, rising, float64 [count]."""
    normal = NormalDist()
    out = np.array([normal.inv_cdf((i + 0.625) / (count + 0.25)) for i in range(count)])
    out.setflags(write=False)
    return out


def routing_from_counts(
    moe: CompleteMoe,
    load: npt.ArrayLike,
    slots: npt.ArrayLike,
    tokens: float,
    ranks: ExpertRanks,
    *,
    slots_per_gpu: npt.ArrayLike | None = None,
    steps: int = 32,
    seed: int = 0,
) -> Routing:
    """Steps drawn from how often each expert is picked, and where its replicas lie: when counts are all that is known.

    Tokens are drawn independently of one another, which evens out what requests of one kind do together; a replay of
    a trace does not.

    Args:
        load: [L, E], picks of each expert, in any unit. slots: int [L, S], the expert of each slot; replicas share
            alike. Redundant slots are counted here, not in `ranks`.
        tokens: of one step, over all GPUs. slots_per_gpu: int [P], where GPUs hold unlike numbers of slots.
        steps: drawn; the arrays' first axis.
    """
    load, slots, gpus = np.asarray(load, np.float64), np.asarray(slots, np.int64), ranks.gpus
    layers, count = slots.shape
    held = np.full(gpus, count // gpus) if slots_per_gpu is None else np.asarray(slots_per_gpu)
    replicas = np.zeros_like(load)
    for layer in range(layers):
        replicas[layer] = np.bincount(slots[layer], minlength=load.shape[1])
    chance = np.minimum(load / load.sum(axis=1, keepdims=True) * moe.top_k, 1.0) / replicas  # of a token, per replica
    per_slot = np.take_along_axis(chance, slots, axis=1)
    starts = np.concatenate([[0], np.cumsum(held)[:-1]])

    def by_gpu(values: Array) -> Array:
        return np.asarray(np.add.reduceat(values, starts, axis=1), np.float64)

    mean, spread = tokens * by_gpu(per_slot), np.sqrt(tokens * by_gpu(per_slot * (1 - per_slot)))
    normal = np.random.default_rng(seed).standard_normal((steps, layers, gpus))
    picks = np.maximum(mean + spread * normal, 0.0)
    experts = np.minimum(by_gpu(1 - (1 - per_slot) ** tokens), np.maximum(picks, 0.0))
    messages = _messages(moe, ranks, tokens / gpus, picks / (tokens * moe.top_k / gpus))
    return Routing(picks, experts, messages, count / gpus, "recorded counts")


def _messages(moe: CompleteMoe, ranks: ExpertRanks, tokens: float, ratio: Array) -> Messages | None:
    """Each GPU sends alike and receives in proportion to its load; tokens reach each node alike."""
    dispatch, nodes = ranks.dispatch, ranks.nodes
    if dispatch is None or dispatch is Dispatch.ALLGATHER:
        return None
    reach = moe.groups_kept if moe.groups > 1 and moe.groups % nodes == 0 else 0
    per_gpu = uniform_messages(dispatch, nodes, ranks.gpus // nodes, tokens, moe.top_k, moe.experts, max_nodes=reach)
    same = np.ones_like(ratio)
    out = ratio if dispatch is not Dispatch.NODE else same
    return Messages(
        per_gpu.sent_up * same, per_gpu.received_up * ratio, per_gpu.sent_out * same, per_gpu.received_out * out
    )
