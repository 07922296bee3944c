"""Times of replayed steps: the time model on counted arrays, the keys of a comparison, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.cli.app import run
from moeplan.cluster import Cluster, Deployment, Dispatch, StepCounts, step_messages
from moeplan.embedded import MODEL
from moeplan.errors import PlanError, UsageError
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.routing import counted_routing
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.planning import RequestSet, read_requests, solve
from moeplan.planning.assignment import random_groups
from moeplan.planning.plan import PlanningTask
from moeplan.planning.requests import Spans
from moeplan.replay import measure, timing
from moeplan.replay.compare import compare_task
from moeplan.replay.evaluate import evaluate
from moeplan.replay.evaluator import FoldEvaluator, Grouping
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.table import Comparison
from moeplan.replay.timing import StepTimes, Timing, cluster_parallel, find_timing
from moeplan.synthetic.generator import WorkloadSettings, generate
from moeplan.trace import open_trace
from moeplan.types import ModelShape

H100 = load_hardware("H100")
TINY = load_model(MODEL)  # 8 layers, 32 experts, top-4, 4 heads
SHAPE = ModelShape("embedded", 8, 32, 4, hidden=192)
KEYS = ("modelled_step_ms", "modelled_idle_share")


def _counted(cluster: Cluster, mode: Dispatch, spec: CompleteSpec, layers: int, steps: int = 3, live: int = 16) -> Any:
    """links, picks, touched of random steps under `linear`, and B."""
    assert spec.moe is not None
    rng = np.random.default_rng(0)
    tokens = np.argsort(rng.random((400, layers, spec.moe.experts)), axis=2)[:, :, : spec.moe.top_k].astype(np.uint8)
    shape = ModelShape("x", layers, spec.moe.experts, spec.moe.top_k)
    span = np.stack((np.arange(0, 400, 10), np.arange(10, 401, 10)))
    requests = RequestSet(shape, tokens, Spans(span, span, span), np.arange(40), np.zeros(40, np.int64))
    who = solve(requests.problem(PlanningTask(cluster)), "linear").routes
    sources = np.concatenate([cluster.source_gpus(d, live) for d in range(cluster.num_groups)])
    indices = np.tile(np.arange(live), cluster.num_groups)
    rows = rng.integers(0, 400, (steps, len(sources)))
    out = [step_messages(who, mode, tokens, r, sources, indices) for r in rows]
    return [np.stack(part) for part in zip(*out, strict=True)], live


def step_times(cluster: Cluster, mode: Dispatch, spec: CompleteSpec, *counts: Any, context: int = 4096) -> StepTimes:
    return Timing(spec, H100, context).times(cluster, mode, StepCounts(*counts))


@pytest.mark.parametrize("home", list(Deployment))
@pytest.mark.parametrize("mode", list(Dispatch))
def test_times_are_those_of_the_time_model(mode: Dispatch, home: Deployment) -> None:
    cluster = Cluster(2, 4, home)
    (links, picks, touched), live = _counted(cluster, mode, TINY, 8)
    found = step_times(cluster, mode, TINY, links, picks, touched, context=1000)
    parallel = ParallelLayout(tp=4, dp=2, ep=8) if home is Deployment.NODES else ParallelLayout(tp=1, dp=8, ep=8)
    routing = counted_routing(picks, touched, links, gpus_per_node=4, slots=4)
    step = StepModel(TINY, H100, parallel, Precision("bf16"), StepOptions(mode, gpus_per_node=4)).decode(
        live, 1000, routing=routing
    )
    assert found.ms == pytest.approx(1e3 * np.asarray(step.seconds)) and found.ms.shape == (3,)
    assert found.idle_share == pytest.approx(step.idle_share) and (found.idle_share > 0).all()
    assert (found.idle_share < 1).all()


def test_slots_do_not_matter_to_counted_steps() -> None:
    """`Timing.times` asks for no redundant slots: given counts, they are no part of the time."""
    cluster = Cluster(2, 4)
    (links, picks, touched), live = _counted(cluster, Dispatch.PICK, TINY, 8)
    found = step_times(cluster, Dispatch.PICK, TINY, links, picks, touched).ms
    routing = counted_routing(picks, touched, links, gpus_per_node=4, slots=7)
    options = StepOptions(Dispatch.PICK, gpus_per_node=4)
    model_ = StepModel(TINY, H100, cluster_parallel(cluster, TINY, 24), Precision("bf16"), options)
    step = model_.decode(live, 4096, routing=routing)
    assert found == pytest.approx(1e3 * np.asarray(step.seconds))


def test_the_mean_layer_stands_for_layers_not_recorded() -> None:
    cluster, mode = Cluster(2, 4), Dispatch.PICK
    arrays, _ = _counted(cluster, mode, TINY, 8)
    whole = step_times(cluster, mode, TINY, *arrays)
    part = step_times(cluster, mode, TINY, *(a[:, :3] for a in arrays))
    assert part.ms == pytest.approx(whole.ms, rel=0.02) and (part.ms != whole.ms).any()
    alike = [np.repeat(a[:, :1], 8, axis=1) for a in arrays]
    one, all_ = (
        step_times(cluster, mode, TINY, *a) for a in ([a[:, :1] for a in alike], alike)
    )  # fmt: skip
    assert one.ms == pytest.approx(all_.ms) and one.idle_share == pytest.approx(all_.idle_share)
    single = [step_times(cluster, mode, TINY, *(a[:, i : i + 1] for a in arrays)).ms for i in range(3)]
    assert part.ms == pytest.approx(np.mean(single, axis=0))


def test_more_messages_and_hotter_gpus_take_longer() -> None:
    cluster, mode, spec = Cluster(2, 4), Dispatch.PICK, load_model("gpt-oss-20b")
    (links, picks, touched), _ = _counted(cluster, mode, spec, 24, live=64)
    plain = step_times(cluster, mode, spec, links, picks, touched)
    far = links.copy()
    far[:, :, 0, 4:] *= 8
    sent = step_times(cluster, mode, spec, far, picks, touched)
    assert (sent.ms > plain.ms).all() and (sent.idle_share > plain.idle_share).all()
    hot = touched.copy()
    hot[:, :, 1:] = 1
    assert (step_times(cluster, mode, spec, links, picks, hot).idle_share > plain.idle_share).all()


def test_one_node_alone() -> None:
    """One data-parallel rank: tokens do not travel."""
    cluster = Cluster(1, 4)
    arrays, _ = _counted(cluster, Dispatch.PICK, TINY, 8)
    none = [np.zeros_like(arrays[0]), *arrays[1:]]
    times = [step_times(cluster, Dispatch.PICK, TINY, *a).ms for a in (arrays, none)]
    assert times[0] == pytest.approx(times[1])


def test_timing_knows_nothing_of_the_replay() -> None:
    """So that a strategy's own choice, a room below, can have it too."""
    tree = ast.parse(Path(timing.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {name.split(".")[1] for name in modules if name.startswith("moeplan.")}
    assert ours <= {"arrays", "cluster", "embedded", "errors", "model", "perf", "types"}


def test_the_benchmark_of_the_time_objective_times_as_compare_does() -> None:
    """benchmarks/time_objective.py at load 1 and today's links; faster links, or one fast network, take no longer."""
    import time_objective

    place = time_objective.Place("gpt-oss-20b", 2, 16)
    arrays, live = _counted(place.cluster, Dispatch.PICK, place.spec, 24)
    steps = time_objective.counted(place, *arrays)
    ms = {world.name: steps.ms(place, world, 1.0) for world in time_objective.WORLDS}
    assert steps.batch == live
    assert ms["today's links"] == pytest.approx(step_times(place.cluster, Dispatch.PICK, place.spec, *arrays).ms)
    assert (ms["links x 1/4"] > ms["today's links"]).all() and (ms["today's links"] > ms["links x 4"]).all()
    assert (ms["one domain"] < ms["today's links"]).all()
    assert (steps.ms(place, time_objective.WORLDS[1], 8.0) > ms["today's links"]).all()


# ---- in a comparison


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RequestSet:
    return read_requests(
        generate("demo", tmp_path_factory.mktemp("demo") / "t", WorkloadSettings(requests=160, seed=1))
    )


@pytest.fixture(scope="module")
def like_demo(demo: RequestSet) -> CompleteSpec:
    """A model of the demo trace's shape: Qwen3's, with its number of layers and experts."""
    qwen, shape = load_model("Qwen3-30B-A3B"), demo.shape
    assert qwen.moe is not None
    moe = dataclasses.replace(
        qwen.moe, layers=tuple(range(shape.num_layers)), experts=shape.num_experts, top_k=shape.top_k
    )
    return dataclasses.replace(
        qwen, name="like-demo", layers=shape.num_layers, full_layers=moe.layers, moe=moe, hidden=shape.hidden or 2048
    )


TASK = PlanningTask(Cluster(4, 2), 8)


@pytest.fixture(scope="module")
def timed(demo: RequestSet, like_demo: CompleteSpec) -> EvaluationSettings:
    return EvaluationSettings(folds=2, steps=30, bootstrap_draws=200, timing=Timing(like_demo, H100, steps=10))


def compared(demo: RequestSet, settings: EvaluationSettings, *strategies: str) -> Comparison:
    return compare_task(demo, TASK, strategies, settings)


def _rows(data: dict[str, Any]) -> dict[str, Any]:
    for row in data["strategies"].values():
        row.pop("fit_seconds")
    return dict(data["strategies"])


@pytest.mark.slow
def test_the_keys_and_that_nothing_else_changes(demo: RequestSet, timed: EvaluationSettings) -> None:
    strategies = ("linear", "eplb", "paper", "paper-unbalanced")
    table = compared(demo, timed, *strategies)
    again = compared(demo, timed, *strategies).to_dict()
    plain = compared(demo, dataclasses.replace(timed, timing=None), *strategies).to_dict()
    rows, untimed = _rows(table.to_dict()), _rows(plain)
    assert json.dumps(rows, allow_nan=False) == json.dumps(_rows(again), allow_nan=False)
    assert plain["setup"]["timing"] is None and not any("times:" in line for line in plain["method"])
    for name, row in rows.items():
        values = [row.pop(key) for key in KEYS]
        assert [untimed[name].pop(key) for key in KEYS] == [{"value": None, "ci95": None}] * 2
        beats = [each["beats"].pop("modelled_step_ms") for each in (row, untimed[name])]
        assert row == untimed[name] and beats[1] == []
        if name == "paper-unbalanced":
            assert [value["value"] for value in values] == [None, None]
            continue
        for value in values:
            assert value["ci95"][0] <= value["value"] <= value["ci95"][1] and value["bootstrap"] == "steps"
            assert value["sd_folds"] >= 0 and len(value["vs_linear"]["ci95"]) == 2
        ms, idle = values
        assert ms["value"] > 0 and 0 < idle["value"] < 1
        if name == "linear":
            assert ms["vs_linear"] == {"value": 0.0, "ci95": [0.0, 0.0]} and beats[0] == []
        assert ("linear" in beats[0]) == (ms["vs_linear"]["ci95"][1] < 0)
    head = table.head["setup"]["timing"]
    assert (head["model"], head["tp"], head["dp"], head["ep"], head["steps"]) == ("like-demo", 2, 4, 8, 10)
    assert sum(line.startswith("times: decode of like-demo on H100-SXM, dp 4 x tp 2") for line in table.method) == 1


def test_the_first_steps_are_timed_whatever_is_kept_at_once(
    demo: RequestSet, timed: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, everyone = TASK.cluster, np.arange(len(demo))
    plan = solve(demo.problem(TASK), "linear")
    grouping = Grouping(random_groups(len(demo), cluster.num_groups, np.random.default_rng(1)), True)
    fold = FoldEvaluator(demo, everyone, everyone, live=8, steps=12, seed=0, timing=timed.timing)
    some = fold.measure(plan, grouping).steps
    assert some is not None
    assert some.step_ms is not None and some.idle_share is not None and len(some.step_ms) == 10
    monkeypatch.setattr(measure, "KEPT", 3 * demo.shape.num_layers * cluster.num_gpus**2)
    parts = fold.measure(plan, grouping).steps
    assert parts is not None
    assert parts.step_ms == pytest.approx(some.step_ms) and parts.idle_share == pytest.approx(some.idle_share)
    untimed = dataclasses.replace(fold, timing=None).measure(plan, grouping).steps
    assert untimed is not None and untimed.step_ms is None


def test_fewer_layers_and_too_little_memory_are_said(
    demo: RequestSet, timed: EvaluationSettings, like_demo: CompleteSpec
) -> None:
    assert like_demo.moe is not None
    more = tuple(range(demo.shape.num_layers + 2))
    longer = dataclasses.replace(
        like_demo, layers=len(more), full_layers=more, moe=dataclasses.replace(like_demo.moe, layers=more)
    )
    settings = dataclasses.replace(timed, folds=1, timing=Timing(longer, H100, context=4_000_000))
    notes = compared(demo, settings, "linear").notes
    assert any(f"the trace gives {len(more) - 2} of like-demo's {len(more)} MoE layers" in note for note in notes)
    assert any("does not fit" in note for note in notes)
    assert not any("times" in note for note in compared(demo, timed).notes)


def test_replaying_a_plan_with_times(demo: RequestSet, timed: EvaluationSettings) -> None:
    table = evaluate(solve(demo.problem(TASK), "paper"), demo, timed).table
    assert all(row.figures[key].value is not None for row in table.rows for key in KEYS)


# ---- what is refused


@pytest.mark.parametrize(
    ("shape", "name", "cluster", "says"),
    [
        (SHAPE, "DeepSeek-V3", Cluster(2, 4), "differ in experts: 32 and 256"),
        (dataclasses.replace(SHAPE, top_k=2), "embedded", Cluster(2, 4), "differ in picks per token: 2 and 4"),
        (SHAPE, "gpt-oss-20b", Cluster(2, 4), "differ in hidden size: 192 and 2880"),
        (
            ModelShape("x", 9, 32, 4),
            "embedded",
            Cluster(2, 4),
            "the trace has 9 MoE layers, but embedded 8; give the --model",
        ),
        (SHAPE, "Qwen3-8B", Cluster(2, 4), "has no experts"),
        (ModelShape("my-model", 8, 32, 4), None, Cluster(2, 4), '"my-model" is not in the catalogue; give --model'),
        (SHAPE, "gpt-os", Cluster(2, 4), "near it: gpt-oss-20b"),
    ],
)
def test_models_that_are_not_the_trace_s(shape: ModelShape, name: str | None, cluster: Cluster, says: str) -> None:
    with pytest.raises(UsageError) as error:
        find_timing(shape, cluster, Dispatch.PICK, "H100", name)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_set_ups_that_cannot_be(demo: RequestSet, timed: EvaluationSettings) -> None:
    with pytest.raises(
        PlanError, match=r"--deployment nodes splits attention over 8 GPUs of a node, but tp 8 .* --deployment gpus"
    ):
        find_timing(SHAPE, Cluster(2, 8), Dispatch.PICK, "H100")
    assert find_timing(SHAPE, Cluster(2, 8, Deployment.GPUS), Dispatch.PICK, "H100").spec.name == "embedded"
    with pytest.raises(UsageError, match="--context 0"):
        find_timing(SHAPE, Cluster(2, 4), Dispatch.PICK, "H100", context=0)
    unknown = dataclasses.replace(TINY, checkpoint=None)
    with pytest.raises(UsageError, match="does not tell its weights' dtype"):
        Timing(unknown, H100).check(SHAPE, Cluster(2, 4), Dispatch.PICK)
    with pytest.raises(UsageError, match="differ in hidden size"):  # from Python too, before any work
        compared(demo, dataclasses.replace(timed, timing=Timing(TINY, H100)))


# ---- the command line


@pytest.mark.slow
def test_compare_and_replay_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--nodes", "4", "--gpus-per-node", "4"]
    few = ["--strategies", "eplb", "--folds", "1", "--steps", "12", "--hardware", "H100", "--context", "500"]
    assert (
        run(["compare", "embedded", *where, *few, "--json", str(tmp_path / "c"), "-o", str(tmp_path / "c.html")]) == 0
    )
    out = capsys.readouterr().out
    assert "step ms, change" in out and "modelled step time" in out and "requests of 500 tokens" in out
    data = json.loads((tmp_path / "c").read_text())
    assert data["setup"]["timing"]["model"] == "embedded" and data["setup"]["timing"]["steps"] == 12
    assert data["strategies"]["eplb"]["modelled_step_ms"]["value"] > 0
    assert "Time of a decode step" in (tmp_path / "c.html").read_text()
    assert run(["plan", "embedded", *where, "--strategy", "eplb", "-o", str(tmp_path / "p")]) == 0
    capsys.readouterr()
    assert run(["evaluate", "embedded", "--plan", str(tmp_path / "p"), "--steps", "5", *few[-4:], "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["strategies"]["eplb"]["modelled_idle_share"]["value"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "embedded"], "--model is for step times; give --hardware too"),
        (["--context", "9"], "--context is for step times; give --hardware too"),
        (["--hardware", "H1000"], "unknown hardware"),
        (["--hardware", "H100", "--model", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--hardware", "H100", "--model", "gpt-oss-120b"], "differ in experts: 32 and 128"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "embedded", "--nodes", "4", "--gpus-per-node", "4", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_real_trace_by_its_own_name(shared: Path, tmp_path: Path) -> None:
    """gpt-oss-20b calls itself by a name that the catalogue knows; more even GPUs wait less."""
    from moeplan.importers.arrays import import_arrays

    import_arrays(shared / "traces" / "gpt-oss-20b.npz", tmp_path / "t")
    trace = open_trace(tmp_path / "t")
    cluster = Cluster(8, 4)
    how = find_timing(trace.shape, cluster, Dispatch.PICK, "H100")
    assert how.spec.name == "gpt-oss-20b"
    settings = EvaluationSettings(folds=1, steps=40, bootstrap_draws=100, timing=how)
    requests = read_requests(trace, signature_tokens=48)
    table = compare_task(requests, PlanningTask(cluster, 32), ("eplb",), settings)
    assert "linear" in table.row("eplb").beats["modelled_step_ms"]
    change = table.row("eplb").versus_linear["modelled_idle_share"]
    assert change is not None and change["value"] < 0
