"""Prediction from prompts through compare, plan, evaluate and a stored plan."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

import moeplan as mp
from moeplan.errors import FormatError
from moeplan.planning.predictor import MAX_BYTES
from moeplan.replay.settings import EvaluationSettings
from moeplan.trace import Trace, TraceWriter, open_trace
from moeplan.trace.prompts import PromptFeatures, PromptPolicy
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

REAL = Path(__file__).parents[3] / "shared" / "traces"
LAYERS, EXPERTS, TOPICS, TURNS = 3, 16, 4, 3
SETTINGS = EvaluationSettings(folds=1, steps=10)
CLUSTER = mp.Cluster(4, 1)
SECRET = bytes(range(32))


def write(path: Path, policy: PromptPolicy | None, sessions: bool = False, seed: int = 0) -> Trace:
    """200 requests of four topics; the topic decides the experts, and is seen in the prompt and in the session."""
    rng = np.random.default_rng(seed)
    share = np.random.default_rng(99).dirichlet(np.full(EXPERTS, 0.2), (TOPICS, LAYERS))
    shape = ModelShape(name="tiny", num_layers=LAYERS, num_experts=EXPERTS, top_k=2)
    with TraceWriter(path, shape, source={}, retention=RetentionPolicy(prompts=policy)) as writer:
        for number in range(200):
            topic = (number // TURNS if sessions else number) % TOPICS
            noise = rng.gumbel(size=(30, LAYERS, EXPERTS)) + np.log(share[topic] + 1e-3)
            prompt = np.concatenate((rng.integers(0, 30, 9), 100 + 40 * topic + rng.integers(0, 40, 6)))
            features = None if policy is None else PromptFeatures.of_ids([prompt])
            turn = {"session": number // TURNS, "turn": number % TURNS} if sessions else {}
            writer.add(np.argsort(-noise, axis=2)[:, :, :2], prefill=2, prompt=features, **turn)
    return open_trace(path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write(tmp_path_factory.mktemp("ids") / "t", PromptPolicy("ids"))


@pytest.fixture(scope="module")
def plan(kept: Trace) -> mp.Plan:
    return mp.plan(kept, CLUSTER, redundant=4)


def remote(table: mp.Comparison, row: str) -> float:
    value = table.row(row).figures["remote_share"].value
    assert value is not None
    return value


def test_compare_shows_what_the_trace_has(kept: Trace, tmp_path: Path) -> None:
    table = mp.compare(kept, CLUSTER, ("moeplan",), settings=SETTINGS)
    assert remote(table, "moeplan/prompt-tokens") < 0.9 * remote(table, "moeplan/none")
    assert table.row("moeplan/prompt-tokens").signature == "prompt-tokens"
    names = [row.name for row in table.rows]
    assert "moeplan/previous-turn" not in names
    assert any("previous-turn (no sessions" in line and "prompt-tokens" not in line for line in table.method)
    plain = mp.compare(write(tmp_path / "none", None), CLUSTER, ("moeplan",), settings=SETTINGS)
    assert not any("prompt-tokens" in row.name for row in plain.rows)


@pytest.mark.parametrize("policy", [None, PromptPolicy("hashed", SECRET)])
def test_previous_turns(tmp_path: Path, policy: PromptPolicy | None) -> None:
    trace = write(tmp_path / "t", policy, sessions=True)
    table = mp.compare(trace, CLUSTER, ("moeplan",), settings=SETTINGS)
    assert remote(table, "moeplan/previous-turn") < 0.95 * remote(table, "moeplan/none")
    if policy is not None:
        assert remote(table, "moeplan/previous-turn") < remote(table, "moeplan/prompt-tokens") + 0.01
    made = mp.plan(trace, CLUSTER)
    evaluated = mp.evaluate(made, write(tmp_path / "new", policy, sessions=True, seed=5), SETTINGS)
    assert remote(evaluated.table, "moeplan/previous-turn") < remote(evaluated.table, "moeplan/none")


def test_a_stored_plan_predicts_the_same(kept: Trace, plan: mp.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    files = list((tmp_path / "plan").glob("prompt_*.npy"))
    assert len(files) == 8
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    again = mp.load_plan(tmp_path / "plan")
    assert plan.prediction is not None
    assert again.prediction is not None
    assert kept.prompts is not None
    first, second = (each.prediction.predictor.expected_use(kept.prompts) for each in (plan, again) if each.prediction)
    np.testing.assert_array_equal(first, second)
    new = write(tmp_path / "new", PromptPolicy("ids"), seed=5)
    one, two = (mp.evaluate(each, new, SETTINGS) for each in (plan, again))
    for row in ("moeplan", "moeplan/none", "moeplan/prompt-tokens"):
        assert remote(one.table, row) == remote(two.table, row)
    assert remote(one.table, "moeplan/prompt-tokens") < 0.9 * remote(one.table, "moeplan/none")


def test_a_plan_reads_only_prompts_like_those_it_was_fitted_on(plan: mp.Plan, tmp_path: Path) -> None:
    hashed = write(tmp_path / "hashed", PromptPolicy("hashed", SECRET))
    assert "moeplan/prompt-tokens" not in [row.name for row in mp.evaluate(plan, hashed, SETTINGS).table.rows]
    other = mp.plan(hashed, CLUSTER)
    elsewhere = write(tmp_path / "elsewhere", PromptPolicy("hashed", bytes(32)))
    rows = {trace.path.name: mp.evaluate(other, trace, SETTINGS).table.rows for trace in (hashed, elsewhere)}
    assert ["moeplan/prompt-tokens" in [row.name for row in each] for each in rows.values()] == [True, False]


def test_a_damaged_prediction_is_refused(plan: mp.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    head = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert head["requires"] == []  # a reader that knows nothing of it can use the rest
    for name, change in {
        "kind": lambda d: d["prediction"].update(kind="words"),
        "domains": lambda d: d["prediction"].update(domains=["a", "b", "c"]),
        "earlier_strength": lambda d: d["prediction"].update(earlier_strength=0),
        "array": lambda d: d["arrays"].pop("prompt_mean"),
    }.items():
        damaged = json.loads(json.dumps(head))
        change(damaged)
        shutil.copytree(tmp_path / "plan", tmp_path / name)
        (tmp_path / name / "plan.json").write_text(json.dumps(damaged))
        with pytest.raises(FormatError):
            mp.load_plan(tmp_path / name)
    without = {key: value for key, value in head.items() if key != "prediction"}
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(without))
    assert mp.load_plan(tmp_path / "plan").prediction is None


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real traces are not here")
def test_targets_on_a_real_trace(tmp_path: Path) -> None:
    import prediction  # benchmarks/

    trace = prediction.real_trace("gpt-oss-20b", tmp_path)
    for redundant, least in ((0, 0.75), (8, 0.85)):
        shares = prediction.shares_of_prefill(trace, redundant, folds=4)
        assert shares["prompt-tokens"] >= least
