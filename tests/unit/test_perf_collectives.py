"""Collective times: messages against `cluster.token_messages`, the busiest link, limits, measured DeepEP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.cluster import Cluster, Dispatch, message_bytes, token_messages
from moeplan.errors import UsageError
from moeplan.perf.collectives import (
    Messages,
    all_reduce,
    expert_exchange,
    messages_between,
    send,
    uniform_messages,
)
from moeplan.perf.constants import load_constants
from moeplan.perf.hardware import load_hardware
from moeplan.perf.operators import Device, Time

H100 = Device(load_hardware("H100"))


def bound(time: Time) -> object:
    """What would take longest alone, of each time."""
    longest = np.argmax(np.stack(np.broadcast_arrays(*time.parts.values())), axis=0)
    return np.array(list(time.parts))[longest].tolist()


@pytest.mark.parametrize("mode", list(Dispatch))
@pytest.mark.parametrize("nodes", [1, 3])
def test_uniform_messages_are_the_mean_of_drawn_ones(mode: Dispatch, nodes: int) -> None:
    cluster, experts, k, tokens = Cluster(nodes, 4), 12 * nodes, 4, 4000
    rng = np.random.default_rng(0)
    pairs = np.zeros((cluster.num_gpus, cluster.num_gpus))
    for token in range(tokens):
        serving = rng.permutation(experts)[:k] // (experts // cluster.num_gpus)
        for start, end in token_messages(mode, cluster, token % cluster.num_gpus, serving.tolist()):
            pairs[start, end] += 1
    drawn = messages_between(pairs / tokens * cluster.num_gpus, 4)
    expected = uniform_messages(mode, nodes, 4, 1.0, k, experts)
    for name in ("sent_up", "received_up", "sent_out", "received_out"):
        np.testing.assert_allclose(getattr(drawn, name).mean(), getattr(expected, name)[0], rtol=0.03, atol=1e-9)


def test_levels_by_hand() -> None:
    pairs = np.array([[9, 1, 4, 0], [2, 9, 0, 0], [0, 0, 9, 0], [0, 3, 5, 9]], float)  # the diagonal is no message
    plain = messages_between(pairs, 2)
    np.testing.assert_array_equal(plain.sent_up, [1, 2, 0, 5])
    np.testing.assert_array_equal(plain.received_up, [2, 1, 5, 0])
    np.testing.assert_array_equal(plain.sent_out, [4, 0, 0, 3])
    np.testing.assert_array_equal(plain.received_out, [0, 3, 4, 0])
    assert (plain.busiest_up, plain.busiest_out) == (5, 4)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5000), min_size=16, max_size=16),
    mode=st.sampled_from(list(Dispatch)),
    way=st.sampled_from(["dispatch", "combine"]),
)
def test_the_busiest_link_decides(counts: list[int], mode: Dispatch, way: str) -> None:
    messages = messages_between(np.array(counts, float).reshape(4, 4), 2)
    time = expert_exchange(H100, mode, messages, 7168, 8, 2, way)  # type: ignore[arg-type]
    size = getattr(message_bytes(mode, 7168, 8), way)
    assert time.seconds >= messages.busiest_out * size / 50e9
    assert time.seconds >= messages.busiest_up * size / 450e9
    assert time.seconds <= sum(time.parts.values()) * 1.001


def test_arrays_of_layers_give_arrays_of_times() -> None:
    tokens = np.array([1, 128, 4096])
    time = expert_exchange(
        H100, Dispatch.PICK, uniform_messages(Dispatch.PICK, 4, 8, tokens, 8, 256), 7168, 8, 4, "dispatch"
    )
    assert np.asarray(time.seconds).shape == (3,)
    assert bound(time) == ["latency", "scale_out", "scale_out"]


def test_more_units_copy_faster_until_the_link_is_full() -> None:
    messages = uniform_messages(Dispatch.NODE, 4, 8, 16384, 8, 256)
    seconds = expert_exchange(
        H100, Dispatch.NODE, messages, 7168, 8, 4, "dispatch", units=np.array([4, 8, 24, 32])
    ).seconds
    assert seconds[0] > 1.8 * seconds[1] and seconds[2] < 1.1 * seconds[3]


def test_group_limited_routing_reaches_fewer_nodes() -> None:
    free, limited = (uniform_messages(Dispatch.NODE, 8, 8, 1.0, 8, 256, max_nodes=m) for m in (0, 4))
    assert limited.sent_out[0] < 4 < free.sent_out[0]


def test_all_reduce_takes_the_quicker_way() -> None:
    fit = load_constants().collective
    assert all_reduce(H100, 1e6, 1).seconds == 0
    assert bound(all_reduce(H100, 16e3, 8)) == "latency"
    large = 1e9
    assert all_reduce(H100, large, 8).seconds == pytest.approx(
        2 * 7 / 8 * large / (450e9 * fit.scale_up), rel=0.01
    )  # ring
    once = fit.launch_s + 6e-7 + 7 * 1e3 / (450e9 * fit.scale_up)
    assert all_reduce(H100, 1e3, 8).seconds == pytest.approx(once)
    assert bound(all_reduce(H100, large, 16)) in ("scale_up", "scale_out")
    assert all_reduce(H100, large, 16).seconds > all_reduce(H100, large, 8).seconds
    np.testing.assert_allclose(
        all_reduce(H100, np.array([1e3, large]), 8).seconds,
        [all_reduce(H100, 1e3, 8).seconds, all_reduce(H100, large, 8).seconds],
    )
    with pytest.raises(UsageError, match="all-reduce over 12 GPUs does not fill nodes of 8; use a multiple of 8"):
        all_reduce(H100, 1.0, 12)


def test_send_is_slower_between_nodes() -> None:
    assert send(H100, 1e8).seconds > send(H100, 1e8, between_nodes=False).seconds
    assert send(H100, 1e8).seconds >= 1e8 / 50e9


def test_directions_are_two() -> None:
    none = Messages(*(np.zeros(1),) * 4)
    with pytest.raises(UsageError, match="direction back is unknown; use dispatch or combine"):
        expert_exchange(H100, Dispatch.PICK, none, 7168, 8, 2, "back")  # type: ignore[arg-type]
    empty = expert_exchange(H100, Dispatch.PICK, none, 7168, 8, 2, "dispatch")
    assert bound(empty) == "latency" and empty.seconds > 0


@pytest.mark.parametrize("way", ["dispatch", "combine"])
def test_measured_deepep_is_met(shared: Path, way: str) -> None:
    """The check part: rows that no fit saw."""
    import time_tables

    for make, median, worst in ((time_tables.low_latency_table, 0.08, 0.20), (time_tables.normal_table, 0.15, 1.0)):
        table = make(way)
        rows = table.rows
        bar = (rows["num_token"] >= 8) & (rows["num_token"] <= 256) & (rows["node_num"] >= 2)
        if make is time_tables.normal_table:
            bar = rows["num_token"] >= 512
        error = abs(table.errors(load_constants())[bar & ~table.fitted])
        assert np.median(error) <= median and error.max() <= worst
