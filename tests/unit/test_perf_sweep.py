"""Sweeps: which layouts are possible, which set-ups no other beats, and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.cli.app import run
from moeplan.errors import PlanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.perf.hardware import load_hardware
from moeplan.perf.layouts import TILE, LayoutChoice, can_overlap, node_parts, parallels
from moeplan.perf.memory import MemoryModel, Precision, check_parallel
from moeplan.perf.serving import cost
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.perf.sweep import Point, SweepSettings, best_within, pareto, sweep

H100, H200 = load_hardware("H100"), load_hardware("H200")
DEEPSEEK, LLAMA = load_model("DeepSeek-V3"), load_model("Llama-3.1-70B")


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["DeepSeek-V3", "Llama-3.1-70B", "Mixtral-8x7B", "gpt-oss-120b", "Qwen3-30B-A3B"]),
    gpus=st.sampled_from([1, 2, 4, 6, 8, 16, 24, 32, 72, 96, 512]),
    per_node=st.sampled_from([4, 8, 72]),
)
def test_every_layout_is_possible(name: str, gpus: int, per_node: int) -> None:
    """All accelerators are used, the engine's rules hold, nothing is listed twice, and a step can be timed."""
    spec = load_model(name)
    try:
        found = parallels(spec, gpus, per_node)
    except PlanError:
        return
    assert len(found) == len(set(found))
    precision = Precision.of_checkpoint(spec, "bf16")
    for parallel in found:
        check_parallel(spec, parallel)
        assert parallel.gpus == gpus
        assert parallel.tp <= per_node or parallel.tp % per_node == 0
        if spec.moe:
            assert spec.moe.width / parallel.moe_tp >= TILE and parallel.redundant <= spec.moe.experts
    for parallel in found[::7]:
        layout = StepModel(spec, H100, parallel, precision, StepOptions(gpus_per_node=per_node))
        assert float(layout.decode(4, 1000).seconds) > 0
        assert float(layout.prefill(1, 1000).seconds) > 0


def test_the_layouts_that_are_served() -> None:
    """DeepSeek's own decode layout, with its 32 redundant slots, and tensor parallelism of a dense model are there."""
    assert any((p.dp, p.ep, p.redundant) == (72, 72, 32) for p in parallels(DEEPSEEK, 72, 8))
    assert {(p.tp, p.pp) for p in parallels(LLAMA, 8, 8) if p.dp == 1} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert {p.ep for p in parallels(DEEPSEEK, 8, 8) if p.tp == 8} == {1, 8}
    assert [p.tp for p in parallels(LLAMA, 8, 8, LayoutChoice(tp=(2,), pp=(1,)))] == [2]
    assert node_parts(72) == [1, 2, 4, 8, 16, 32, 64, 72] and node_parts(8) == [1, 2, 4, 8] and node_parts(1) == [1]


@pytest.mark.parametrize(
    ("gpus", "choice", "text"),
    [
        (8, LayoutChoice(tp=(3,)), "tp 3 x pp 1 does not divide 8 GPUs"),
        (8, LayoutChoice(pp=(81,)), "pp 81 does not divide 8 GPUs"),
        (16, LayoutChoice(tp=(16,), ep=(3,)), "ep 3 does not divide tp x dp = 16"),
    ],
)
def test_a_layout_that_cannot_be_is_named(gpus: int, choice: LayoutChoice, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        parallels(DEEPSEEK, gpus, 8, choice)


def test_points_are_estimates() -> None:
    """Each set-up's figures are those of its step, and what does not fit is counted, not shown."""
    precision = Precision.of_checkpoint(DEEPSEEK)
    batches, counts = (1, 16, 256), (8, 16)
    found = sweep(DEEPSEEK, H200, SweepSettings(gpus=counts, batches=batches, layouts=LayoutChoice(pp=(1,))))
    layouts = [p for gpus in counts for p in parallels(DEEPSEEK, gpus, 8, LayoutChoice(pp=(1,)))]
    assert len(found.points) + found.unfit == len(layouts) * len(batches)
    for p in found.points:
        assert p.batch <= MemoryModel(DEEPSEEK, H200, p.step_model.parallel, precision).largest_batch(4096)
        step = p.step_model.decode(p.batch, 4096)
        assert p.tpot_s == float(step.seconds)
        assert p.per_gpu_s == pytest.approx(p.batch * p.step_model.parallel.dp / p.tpot_s / p.step_model.parallel.gpus)
        assert (p.usd, p.kwh) == pytest.approx(cost(H200, p.per_gpu_s))
        assert sum(step.bound_shares().values()) == pytest.approx(1) and p.bound == next(iter(step.bound_shares()))


def test_overlap_is_tried_where_it_can_be() -> None:
    found = sweep(DEEPSEEK, H200, SweepSettings(gpus=(16,), batches=(1, 64), overlap=True))
    both = [p for p in found.points if p.step_model.options.overlap]
    assert both and all(can_overlap(p.step_model) and p.batch == 64 for p in both)
    assert sweep(LLAMA, H200, SweepSettings(gpus=(8,), batches=(1,), contexts=(9,), overlap=True)).points


def test_prices_can_be_given() -> None:
    once = SweepSettings(gpus=(8,), batches=(8,), contexts=(1000,))
    one, other = (sweep(LLAMA, H200.priced(u, w), once).points[0] for u, w in ((1.0, 100.0), (2.0, 300.0)))
    assert other.usd == pytest.approx(2 * one.usd) and other.kwh == pytest.approx(3 * one.kwh)


def test_too_many_set_ups_are_refused() -> None:
    with pytest.raises(UsageError, match="set-ups are more than"):
        sweep(LLAMA, H200, SweepSettings(gpus=(8,), batches=tuple(range(1, 4000)), contexts=tuple(range(1, 90))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_pareto_against_all_pairs(pairs: list[tuple[int, int]]) -> None:
    layout = StepModel(LLAMA, H100, parallels(LLAMA, 8, 8)[0], Precision.of_checkpoint(LLAMA))
    points = [Point(layout, 1, 1, t, y, "memory", 0.0, 0.0) for t, y in pairs]
    front = pareto(points)
    beaten = {
        (t, y) for t, y in pairs for u, z in pairs if u <= t and z >= y and (u, z) != (t, y)
    }  # at least as good on both, and better on one
    assert [(p.tpot_s, p.per_gpu_s) for p in front] == sorted(set(pairs) - beaten)
    best = best_within(points, 5)
    assert (best is None) == all(t > 5 for t, _ in pairs)
    assert best is None or best.per_gpu_s == max(y for t, y in pairs if t <= 5)


@pytest.mark.slow
def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "sweep.html", tmp_path / "sweep.json"
    flags = ["--hardware", "H100,H200", "--nodes", "1,2", "--batch", "1,64", "--context", "1000,4096", "--overlap"]
    assert run(["sweep", "--model", "gpt-oss-20b", *flags, "-o", str(page), "--json", str(data)]) == 0
    text, facts = capsys.readouterr().out, json.loads(data.read_text())
    assert "routing: uniform" in text and text.count("Pareto front at") == 2 and "within 50 ms" in text
    assert facts["set_ups"] == len(facts["points"]) and facts["model"] == "gpt-oss-20b"
    front = [p for p in facts["points"] if p["pareto"] and p["context"] == 4096]
    assert front and max(front, key=lambda p: p["tokens_per_s_per_gpu"]) == max(front, key=lambda p: p["tpot_ms"])
    html = page.read_text()
    assert html.count("<figure>") >= 8 and "TPOT against the skew of expert load" in html and "http:" not in html


@pytest.mark.slow
def test_a_dense_model_has_no_skew(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    assert run(["sweep", "--model", "Llama-3.1-8B", "--hardware", "H100", "--batch", "1,8", "-o", str(page)]) == 0
    assert "skew" not in page.read_text() and "uniform" not in page.read_text()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--hardware", "H1000"], 'unknown hardware "H1000"'),
        (["--hardware", "H100", "--batch", "0,1"], '--batch "0,1" is not a list of numbers'),
        (["--hardware", "H100", "--gpus", "x"], '--gpus "x" is not a list'),
        (["--hardware", "H100", "--tp", "7"], "tp 7"),
        (["--hardware", "H100", "--gpus", "1"], "fits none of the"),
        (["--hardware", "H100,H200", "--watts", "5"], "a power is of one kind of hardware"),
        (["--hardware", "H100", "--usd-per-hour", "-1"], "a price of -1 is negative"),
        (["--hardware", "H100", "--tpot", "0"], "tpot 0 is not above 0"),
        (["--hardware", "H100", "--gpus-per-node", "0"], "gpus_per_node must be at least 1"),
        (["--hardware", "H100", "--weights-dtype", "fp5"], 'unknown dtype "fp5"'),
        (["--hardware", "H100", "-o", "/nowhere/x.html"], "/nowhere"),
    ],
)
def test_bad_input_gets_one_line(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "--model", "DeepSeek-V3", *flags]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
