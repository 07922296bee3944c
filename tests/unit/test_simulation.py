"""Simulated serving: the compiled loops against a plain reference, arrivals, settings, results."""

from __future__ import annotations

import numpy as np
import pytest

import moeplan as mp
from helpers.serving import Instance, Job, run_one
from moeplan._kernels.serving import Limits
from moeplan.api import fit
from moeplan.errors import UsageError
from moeplan.gateway.fleet import Fleet, Request
from moeplan.gateway.policies import LeastLoaded
from moeplan.model.catalogue import load_model
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.step_model import StepModel
from moeplan.planning.plan import PlanningTask
from moeplan.replay.distinct import count_distinct
from moeplan.simulation.clock import Span, step_clock, unit_clock
from moeplan.simulation.engine import Engine
from moeplan.simulation.loop import serve
from moeplan.simulation.result import PolicyFigures
from moeplan.simulation.settings import SimulationSettings
from moeplan.simulation.stream import Stream, bursty_gaps, poisson_gaps, recorded_times


def stream(count: int, rng: np.random.Generator, gap: float = 3.0) -> Stream:
    return Stream(
        np.arange(count),
        np.cumsum(rng.exponential(gap, count)),
        rng.integers(1, 40, count),
        rng.integers(1, 30, count),
        np.full(count, -1),
    )


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("slots", "budget", "cache"), [(4, 16, 10**6), (6, 8, 90), (3, 64, 70)])
def test_batching_is_that_of_the_reference(slots: int, budget: int, cache: int, mixed: bool) -> None:
    for seed in range(3):
        s = stream(40, np.random.default_rng(seed))
        engine = Engine(s, 1, Limits(slots, budget, cache, mixed), unit_clock(4, 1))
        events = serve(s, engine, LeastLoaded(Fleet(1)), [Request(i) for i in range(len(s))])
        jobs = [Job(int(p), int(a)) for p, a in zip(s.prompt, s.answer, strict=True)]
        run_one(list(zip(s.time.tolist(), jobs, strict=True)), Instance(slots, budget, cache, mixed), 1.0)
        np.testing.assert_allclose(events.first, [job.first for job in jobs])
        np.testing.assert_allclose(events.end, [job.end for job in jobs])
        np.testing.assert_array_equal(events.preempted, [job.preempted for job in jobs])
    if cache < 100:
        assert events.preempted.sum() > 0


def test_steps_read_the_experts_of_their_own_requests() -> None:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 16, (60, 3, 2)).astype(np.uint8)
    s = Stream(np.arange(2), np.zeros(2), np.array([1, 1]), np.array([30, 30]), np.array([0, 30]))
    engine = Engine(s, 1, Limits(2, 64, 10**6, True), unit_clock(16, 2), experts, 16)
    for r in range(2):
        engine.submit(r, 0, 0.0)
    while any(engine.advance(np.inf)[1:]):
        pass
    _, tokens, distinct = engine.lanes.sums[0, :3]
    assert tokens == 58
    # the first request's prompt runs alone; the second's shares a step with the first one's first decoded token
    alone = count_distinct(experts, np.array([0]), 16).mean() + count_distinct(experts, np.array([58]), 16).mean()
    both = [count_distinct(experts, np.array([i + 1, 30 + i]), 16).mean() * 2 for i in range(28)]
    assert distinct == pytest.approx(sum(both) + alone)


def test_clock_gives_the_step_models_times() -> None:
    spec = load_model("gpt-oss-20b")
    model = StepModel(spec, load_hardware("H100"), ParallelLayout(), Precision.of_checkpoint(spec))
    clock = step_clock(model, Span(32, 4096, 2048), 24)
    uniform = step_clock(model, Span(32, 4096, 2048))
    moe = float(model.decode(8, 1024).exposed("experts"))
    whole = float(model.decode(8, 1024).seconds)
    at = int(np.flatnonzero(uniform.batch == 8)[0]), int(np.flatnonzero(uniform.context == 1024)[0])
    assert uniform.decode[at] == pytest.approx(whole)
    assert clock.decode[at] == pytest.approx(whole - moe)
    distinct = 32 * (1 - (1 - 4 / 32) ** 8)
    layer = np.interp(distinct, np.arange(33), clock.experts[int(np.flatnonzero(clock.picks == 32)[0])])
    assert layer * 24 == pytest.approx(moe, rel=0.02)


def test_arrivals_have_their_rate_and_spread() -> None:
    rng = np.random.default_rng(0)
    even, bursty = poisson_gaps(40_000, 5.0, rng), bursty_gaps(40_000, 5.0, rng)
    assert 1 / even.mean() == pytest.approx(5.0, rel=0.03) and 1 / bursty.mean() == pytest.approx(5.0, rel=0.05)
    assert bursty.var() / even.var() == pytest.approx(4.0, rel=0.15)
    order, time = recorded_times(np.array([12.0, 10.0, 13.0]))
    assert order.tolist() == [1, 0, 2] and time.tolist() == [0.0, 2.0, 3.0]
    with pytest.raises(UsageError, match="does not say when"):
        recorded_times(np.array([1.0, np.nan]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policies": ("best",)}, "no policy"),
        ({"live": 4.0, "rate": 1.0}, "both say"),
        ({"load": 0.8}, "--slots"),
        ({"instances": 0}, "--instances"),
        ({"live": -1.0}, "--live"),
        ({"arrivals": "closed", "rate": 2.0}, "closed"),
        ({"tpot_ms": 0.0}, "--tpot"),
    ],
)
def test_settings_refuse_what_cannot_be(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SimulationSettings(**wrong)  # type: ignore[arg-type]


def test_figures_are_paired_over_runs() -> None:
    base = PolicyFigures("least-loaded", {"a": np.array([10.0, 20.0, 30.0])})
    row = PolicyFigures("experts", {"a": np.array([9.0, 18.0, 27.0])})
    change = row.change(base, "a")
    assert change is not None and change["value"] == pytest.approx(-0.1)
    assert change["ci95"] == pytest.approx([-0.1, -0.1])
    assert PolicyFigures("x", {"a": np.array([1.0])}).interval("a") is None


def test_simulate_reads_fewer_experts_than_least_loaded() -> None:
    trace = mp.open_trace("embedded")
    settings = SimulationSettings(("experts", "oracle"), instances=4, live=5, requests=240, seeds=2)
    result = mp.simulate(trace, settings)
    base = result.row("least-loaded")
    for name in ("experts", "oracle"):
        change = result.row(name).change(base, "experts_per_step")
        assert change is not None and change["value"] < -0.01
    again = mp.simulate(trace, settings)
    assert again.to_dict() == result.to_dict()
    assert "experts" in repr(result) and "unit of time" in " ".join(result.notes)
    assert list(result.to_pandas().index) == ["least-loaded", "experts", "oracle"]
    assert result.plot().axes
    with pytest.raises(UsageError, match="not simulated"):
        result.row("random")


def test_times_with_hardware_and_a_plan() -> None:
    trace = mp.open_trace("embedded")
    settings = SimulationSettings(("experts",), instances=2, slots=4, load=0.8, requests=140, seeds=1, tpot_ms=50.0)
    result = mp.simulate(trace, settings, hardware="H100", model="embedded")
    assert {"tpot_p99_ms", "ttft_p99_ms", "goodput_per_s"} <= set(result.keys)
    assert "not validated on a GPU" in result.verdict()


def test_groups_of_a_plan_serve_more_at_home() -> None:
    requests = mp.read_requests(mp.open_trace("embedded"))
    plan = fit(requests, PlanningTask(mp.Cluster(2, 2)), "paper")
    nodes = mp.simulate(requests, SimulationSettings(("experts",), live=8, requests=200, seeds=1), plan=plan)
    share = nodes.row("experts").mean("remote_share"), nodes.row("least-loaded").mean("remote_share")
    assert share[0] is not None and share[1] is not None and share[0] < share[1] - 0.01
    assert "optimistic" not in " ".join(nodes.notes) or nodes.head["deployment"] == "nodes"


def test_what_no_instance_can_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="cache"):
        mp.simulate(mp.open_trace("embedded"), SimulationSettings(cache_tokens=20, requests=100))
