"""The definitions of `moeplan.cluster`: sizes, sources, replica rules, and messages against a naive loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan._kernels.messages import STEP_VALUES, summarise_step, summarise_step_reference
from moeplan.cluster import (
    Cluster,
    Deployment,
    Dispatch,
    ReplicaRule,
    check_slots,
    message_bytes,
    request_messages,
    routes,
    step_messages,
    token_messages,
)
from moeplan.errors import PlanError, UsageError
from moeplan.types import Placement

KNUTH = 2654435769


def test_message_sizes_are_deepep_s() -> None:
    """DeepEP dd758caf at hidden 7168, top-8."""
    low = message_bytes(Dispatch.PICK, 7168, 8)
    assert (low.dispatch, low.combine, low.note) == (7408, 14336, "")
    for mode in (Dispatch.GPU, Dispatch.NODE):
        normal = message_bytes(mode, 7168, 8)
        assert (normal.dispatch, normal.combine, normal.note) == (7472, 14384, "")


def test_hidden_is_padded_and_said() -> None:
    low = message_bytes(Dispatch.PICK, 2880, 4)
    assert low.width == 3072 and "3072" in low.note
    normal = message_bytes(Dispatch.NODE, 2880, 4)
    assert normal.width == 2944 and "2944" in normal.note
    assert "8192" in message_bytes(Dispatch.PICK, 12288, 8).note


def test_sources_and_homes() -> None:
    by_node = Cluster(2, 4)
    assert by_node.source_gpus(1, 8).tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert by_node.source_gpus(0, 3).tolist() == [0, 1, 2]
    by_gpu = Cluster(2, 4, Deployment.GPUS)
    assert by_gpu.num_groups == 8 and by_gpu.source_gpus(5, 3).tolist() == [5, 5, 5]
    assert by_gpu.group_node([0, 3, 4, 7]).tolist() == [0, 0, 1, 1]


def test_slots_that_do_not_divide_name_what_does() -> None:
    with pytest.raises(PlanError) as error:
        check_slots(32, 0, Cluster(8, 8))
    assert "--redundant 32" in error.value.line() and "--gpus-per-node 4" in error.value.line()
    with pytest.raises(PlanError) as error:
        check_slots(96, 0, Cluster(7, 1))
    assert "--redundant 2" in error.value.line()
    assert check_slots(96, 2, Cluster(7, 1)) == 14
    with pytest.raises(UsageError):
        check_slots(32, -1, Cluster(8, 4))
    with pytest.raises(PlanError):
        check_slots(4, 12, Cluster(2, 1))


def test_messages_of_a_token_by_hand() -> None:
    cluster = Cluster(2, 2)  # GPUs 0 1 | 2 3
    serving = [0, 1, 3, 3]
    assert token_messages(Dispatch.PICK, cluster, 0, serving) == [(0, 1), (0, 3), (0, 3)]
    assert token_messages(Dispatch.GPU, cluster, 0, serving) == [(0, 1), (0, 3)]
    # by node: over to GPU 2 (the source's own index), then on to 3
    assert token_messages(Dispatch.NODE, cluster, 0, serving) == [(0, 1), (0, 2), (2, 3)]
    assert token_messages(Dispatch.NODE, cluster, 1, serving) == [(1, 0), (1, 3)]
    everyone = [(0, 1), (0, 2), (2, 3)]
    assert token_messages(Dispatch.ALLGATHER, cluster, 0, serving) == everyone
    assert token_messages(Dispatch.ALLGATHER, cluster, 0, [0, 0, 0, 0]) == everyone


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per_gpu = draw(st.integers(1, 4))
    slots = nodes * per_node * per_gpu
    experts = draw(st.integers(2, max(slots, 2)))
    if slots < experts:
        per_gpu, slots = experts, nodes * per_node * experts
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    layers = draw(st.integers(1, 3))
    rows = [
        rng.permutation(np.concatenate((np.arange(experts), rng.integers(0, experts, slots - experts))))
        for _ in range(layers)
    ]
    return Placement(np.array(rows), experts, nodes, per_node)


def draw_picks(rng: np.random.Generator, place: Placement, tokens: int, most: int) -> np.ndarray:
    """uint8 [tokens, L, k], k at most `most`; of half of the draws a third of the picks is missing."""
    k = int(rng.integers(1, min(most, place.num_experts) + 1))
    picks = rng.permuted(np.tile(np.arange(place.num_experts), (tokens, place.num_layers, 1)), axis=2)[:, :, :k]
    if rng.random() < 0.5:
        picks[rng.random(picks.shape) < 1 / 3] = place.num_experts
    return np.ascontiguousarray(picks.astype(np.uint8))


def serving_gpu(
    place: Placement, cluster: Cluster, rule: ReplicaRule, table, layer: int, source: int, e: int, row: int
):
    """The definition, read slot by slot; only where a deal decides is the table asked (and checked to be allowed)."""
    slots = [p for p in range(place.num_slots) if place.slots[layer, p] == e]
    gpu = [p // place.slots_per_gpu for p in slots]
    if rule is ReplicaRule.HASH:
        return gpu[(row * KNUTH) % 2**32 % len(gpu)]
    if source in gpu:
        return source
    near = [g for g in gpu if g // cluster.gpus_per_node == source // cluster.gpus_per_node]
    if near and rule is ReplicaRule.NEAREST_STATIC:
        return near[0]
    dealt = int(table[layer, source, e]) // place.slots_per_gpu
    assert dealt in (near or gpu)
    return dealt


@settings(max_examples=60, deadline=None)
@given(placements(), st.sampled_from(list(ReplicaRule)), st.sampled_from(list(Deployment)), st.integers(0, 10_000))
def test_even_deal(place: Placement, rule: ReplicaRule, home: Deployment, seed: int) -> None:
    """Among sources that need one, no replica is dealt twice more often than another."""
    cluster = Cluster(place.nodes, place.gpus_per_node, home)
    who = routes(place, cluster, rule, seed)
    if who.slot is None:
        return
    gpu_of = np.arange(place.num_slots) // place.slots_per_gpu
    for layer, e in itertools.product(range(place.num_layers), range(place.num_experts)):
        slots = np.flatnonzero(place.slots[layer] == e)
        nodes = gpu_of[slots] // place.gpus_per_node
        far = [s for s in range(cluster.num_gpus) if s // place.gpus_per_node not in nodes]
        if far:
            dealt = [int((who.slot[layer, far, e] == p).sum()) for p in slots]
            assert max(dealt) - min(dealt) <= 1
        if rule is ReplicaRule.NEAREST_EVEN:
            for node in set(nodes.tolist()):
                near = slots[nodes == node]
                members = range(node * place.gpus_per_node, (node + 1) * place.gpus_per_node)
                asking = [s for s in members if s not in gpu_of[slots]]
                dealt = [int((who.slot[layer, asking, e] == p).sum()) for p in near]
                assert not asking or max(dealt) - min(dealt) <= 1


@settings(max_examples=120, deadline=None)
@given(
    placements(),
    st.sampled_from(list(ReplicaRule)),
    st.sampled_from(list(Deployment)),
    st.sampled_from(list(Dispatch)),
    st.integers(0, 10_000),
)
def test_steps_equal_a_naive_triple_loop(
    place: Placement, rule: ReplicaRule, home: Deployment, mode: Dispatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cluster = Cluster(place.nodes, place.gpus_per_node, home)
    who = routes(place, cluster, rule, seed)
    experts = draw_picks(rng, place, 20, 4)
    live = int(rng.integers(1, 6))
    rows = rng.integers(0, 20, live * cluster.num_groups)
    sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
    indices = np.tile(np.arange(live), cluster.num_groups)
    links, picks, touched = step_messages(who, mode, experts, rows, sources, indices)

    want_links, want_picks = np.zeros_like(links), np.zeros_like(picks)
    served: dict[tuple[int, int], set[int]] = {}
    for layer in range(place.num_layers):
        for row, source, index in zip(rows, sources, indices, strict=True):
            serving = []
            for e in experts[row, layer][experts[row, layer] < place.num_experts]:
                gpu = serving_gpu(place, cluster, rule, who.slot, layer, int(source), int(e), int(index))
                serving.append(gpu)
                want_picks[layer, gpu] += 1
                served.setdefault((layer, gpu), set()).add(int(e))
            for a, b in token_messages(mode, cluster, int(source), serving):
                want_links[layer, a, b] += 1
    assert (links == want_links).all() and (picks == want_picks).all()
    figures = np.zeros(STEP_VALUES)
    summarise_step(links, picks, touched, place.gpus_per_node, figures)
    assert figures == pytest.approx(summarise_step_reference(links, picks, touched, place.gpus_per_node))
    assert all(touched[layer, gpu] == len(served.get((layer, gpu), ())) for layer, gpu in np.ndindex(touched.shape))


@settings(max_examples=120, deadline=None)
@given(
    placements(),
    st.sampled_from(list(ReplicaRule)),
    st.sampled_from(list(Deployment)),
    st.sampled_from(list(Dispatch)),
    st.integers(0, 10_000),
)
def test_requests_equal_a_naive_triple_loop(
    place: Placement, rule: ReplicaRule, home: Deployment, mode: Dispatch, seed: int
) -> None:
    """Expectations: every source GPU of the home, and every residue of the hash, equally likely."""
    rng = np.random.default_rng(seed)
    cluster = Cluster(place.nodes, place.gpus_per_node, home)
    who = routes(place, cluster, rule, seed)
    experts = draw_picks(rng, place, 6, 3)
    starts, stops = np.array([0, 2]), np.array([2, 6])
    group = rng.integers(0, cluster.num_groups, 2)
    got = request_messages(who, mode, experts, starts, stops, group)

    for i in range(2):
        first = int(cluster.first_gpu(group[i]))
        sources = range(first, first + cluster.gpus_per_group)
        want = np.zeros(3)
        for row, layer in itertools.product(range(starts[i], stops[i]), range(place.num_layers)):
            picked = [int(e) for e in experts[row, layer] if e < place.num_experts]
            residues = [0]
            if rule is ReplicaRule.HASH:
                residues = list(range(math.lcm(*(int(place.replica_count[layer, e]) for e in picked))))
            for source, residue in itertools.product(sources, residues):
                if rule is ReplicaRule.HASH:
                    serving = [int(who.replica_gpu[layer, e, residue % place.replica_count[layer, e]]) for e in picked]
                else:
                    serving = [serving_gpu(place, cluster, rule, who.slot, layer, source, e, 0) for e in picked]
                sent = token_messages(mode, cluster, source, serving)
                node = [g // cluster.gpus_per_node for g in range(cluster.num_gpus)]
                inter = sum(node[a] != node[b] for a, b in sent)
                reached = {node[g] for g in serving} - {node[source]}
                want += np.array([inter, len(sent) - inter, len(reached)]) / (len(sources) * len(residues))
        assert got[i] == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(placements(), st.sampled_from(list(ReplicaRule)), st.sampled_from(list(Deployment)))
def test_shares_add_up(place: Placement, rule: ReplicaRule, home: Deployment) -> None:
    cluster = Cluster(place.nodes, place.gpus_per_node, home)
    who = routes(place, cluster, rule)
    for layer in range(place.num_layers):
        share = who.share(layer)
        assert share.sum(axis=2) == pytest.approx(1.0)
        node = share.reshape(cluster.num_groups, place.num_experts, cluster.nodes, -1).sum(axis=3)
        own = node[np.arange(cluster.num_groups), :, cluster.group_node(np.arange(cluster.num_groups))]
        assert own == pytest.approx(who.local_share[:, layer])


def test_a_placement_refuses_what_it_must() -> None:
    with pytest.raises(PlanError, match="no slot"):
        Placement(np.array([[0, 0, 1, 1]]), 3, 2, 1)
    with pytest.raises(PlanError, match="outside"):
        Placement(np.array([[0, -1, 1, 2]]), 3, 2, 1)
    with pytest.raises(PlanError, match="divide"):
        Placement(np.array([[0, 1, 2]]), 3, 2, 1)
