"""Policies: what a fleet knows, where requests go, who is sent next."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan._kernels.fleet import enter, enter_reference
from moeplan.errors import UsageError
from moeplan.gateway.fleet import REFRESH, Fleet, Request
from moeplan.gateway.policies import POLICIES, ExpertPolicy, ExpertSettings, Waiting, make_policy

L, E, K = 3, 16, 2


def use(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Expected use of one of four kinds of requests, each with its own experts."""
    weights = np.full((L, E), 0.02)
    weights[:, 4 * kind : 4 * kind + 4] = 1.0
    weights *= rng.uniform(0.5, 1.5, weights.shape)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def request(i: int, rng: np.random.Generator, kind: int | None = None) -> Request:
    return Request(i, use(int(rng.integers(4)) if kind is None else kind, rng), prompt_tokens=10.0)


def test_added_experts_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    fleet, members = Fleet(2, K), [request(i, rng) for i in range(REFRESH * 2 + 5)]
    for i, member in enumerate(members):
        fleet.join(member, i % 2, float(i))
        if i >= 6:
            fleet.leave(members[i - 6].id, float(i))
    new = request(-1, rng)
    p = np.minimum(K * new.expected_use, 0.95)  # type: ignore[operator]
    for group in range(2):
        missed = np.ones((L, E))
        for i in range(len(members) - 6, len(members)):
            if i % 2 == group:
                missed *= 1 - np.minimum(K * members[i].expected_use, 0.95)  # type: ignore[operator]
        assert fleet.added(new)[group] == pytest.approx((p * missed).sum(), rel=1e-3)
    assert fleet.live.tolist() == [3, 3] and fleet.tokens.tolist() == [30.0, 30.0]


def test_a_fleet_refuses_what_it_does_not_know() -> None:
    fleet = Fleet(2)
    fleet.join(Request("a"), 0, 0.0)
    with pytest.raises(UsageError, match="live already"):
        fleet.join(Request("a"), 1, 0.0)
    with pytest.raises(UsageError, match="is live"):
        fleet.leave("b", 0.0)
    with pytest.raises(UsageError, match="no policy"):
        make_policy("best", fleet)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_slots_and_repeats_by_seed(name: str) -> None:
    def run() -> list[int | None]:
        rng = np.random.default_rng(1)
        policy, sent = make_policy(name, Fleet(4, K, slots=3), seed=5), []
        for i in range(60):
            sent.append(policy.choose(request(i, rng), float(i)))
            assert policy.fleet.live.max() <= 3
            if i >= 12:
                assert sent[-1] is None or policy.fleet.live.sum() <= 12
            if i % 2:
                live = sorted(policy.fleet._members)
                policy.finish(live[0], float(i))
        return sent

    assert run() == run()


@pytest.mark.parametrize("name", POLICIES)
def test_closed_groups_get_nothing_and_none_means_wait(name: str) -> None:
    rng = np.random.default_rng(2)
    policy = make_policy(name, Fleet(3, K, slots=2), seed=0)
    policy.fleet.open[1] = False
    sent = [policy.choose(request(i, rng), 0.0) for i in range(5)]
    assert sent.count(None) == 1 and 1 not in sent
    assert policy.pick_next([Waiting(request(9, rng))], 0.0) is None
    assert policy.pick_next([], 0.0) is None


def test_requests_of_one_kind_meet_and_loads_stay_even() -> None:
    rng = np.random.default_rng(3)
    policy = ExpertPolicy(Fleet(4, K), seed=0)
    kinds: dict[int, int] = {}
    same = seen = 0
    loads = []
    for i in range(800):
        kind = int(rng.integers(4))
        group = policy.choose(request(i, rng, kind), i * 0.05)
        assert group is not None
        policy.first_token(i, i * 0.05)
        kinds[i] = kind
        if i > 100:
            others = [kinds[j] for j, m in policy.fleet._members.items() if m.group == group and j != i]
            same, seen = same + others.count(kind), seen + len(others)
            loads.append(policy.fleet.live.max() / policy.fleet.live.mean())
        if i >= 32:
            policy.finish(int(rng.choice([j for j in policy.fleet._members if j != i])), i * 0.05)
    assert same / seen > 0.4, "a quarter by chance"
    assert np.mean(loads) < 1.2 and (policy.fleet.loads(40.0)[0] / policy.fleet.loads(40.0)[0].mean()).max() < 1.15


def test_nobody_waits_longer_than_stated() -> None:
    rng = np.random.default_rng(4)
    settings = ExpertSettings(extra_wait=0.25)
    policy = ExpertPolicy(Fleet(2, K, slots=1), seed=0, settings=settings)
    for i in range(2):
        policy.choose(request(-1 - i, rng), 0.0)
    waiting = [Waiting(request(i, rng), i) for i in range(60)]
    order, passed = [], dict.fromkeys(range(60), 0)
    while waiting:
        policy.finish(next(iter(policy.fleet._members)), 0.0)
        found = policy.pick_next(waiting, 0.0)
        assert found is not None
        for item in waiting[: found[0]]:
            passed[item.request.id] += 1  # type: ignore[index]
        assert found[0] < settings.look_ahead
        order.append(waiting.pop(found[0]).request.id)
    assert order[:17] == list(range(17)), "a short queue is served in order"
    assert all(passed[i] <= max(0.25 * (i - 16), 0) + 1 for i in range(60)) and max(passed.values()) > 1


def test_scores_and_prefixes_weigh_in() -> None:
    fleet = Fleet(3, K)
    policy = ExpertPolicy(fleet, seed=0)
    for i, best in enumerate((1, 0, 2)):
        policy.choose(Request(i, scores=np.eye(3)[best]), 0.0)
        policy.finish(i, 0.0)
    assert policy.choose(Request(3, scores=np.array([0.1, 0.9, 0.2])), 0.0) == 1
    sticky = ExpertPolicy(Fleet(3, K), seed=0, settings=ExpertSettings(prefix_weight=5.0))
    first = sticky.choose(Request(0, session="s"), 0.0)
    sticky.choose(Request(1), 0.0)
    sticky.choose(Request(2), 0.0)
    assert sticky.choose(Request(3, session="s"), 0.0) == first


def test_the_loop_of_a_fleet_is_that_of_its_reference() -> None:
    rng = np.random.default_rng(5)
    arrays = [rng.uniform(0.1, 0.9, 50).astype(np.float32) for _ in range(4)]
    arrays[1] = arrays[1].astype(np.float64)  # type: ignore[assignment]
    others = [array.copy() for array in arrays]
    chance = rng.uniform(0.0, 0.9, 50).astype(np.float32)
    for leaving in (False, True):
        enter(chance, leaving, (0.1, 0.2, 1.0), *arrays)
        enter_reference(chance, leaving, (0.1, 0.2, 1.0), *others)
        for array, other in zip(arrays, others, strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-5)
