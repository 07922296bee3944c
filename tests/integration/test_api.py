"""The public surface, and that importing it costs next to nothing."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplan
from helpers import ROOT
from moeplan.cluster import Dispatch, ReplicaRule
from moeplan.planning.plan import PlanningTask
from moeplan.planning.problem import PlanningProblem, TokenRows

#: What moeplan alone makes; their fields are read, and may be of types that are not public.
RESULTS = ("CompleteSpec", "Comparison", "DriftReport", "Estimate", "Evaluation", "ExportReport", "Profile", "Report")
RESULTS += ("LoadedModel", "RequestSet", "Sizing", "Sweep", "Trace")
#: What a caller passes on, or never gives.
PASSED_ON = {"Constants", "Messages", "Overrides", "ServingFigures", "StepCounts"}
CLUSTER = moeplan.Cluster(2, 2)


def trace() -> moeplan.Trace:
    return moeplan.open_trace("embedded")


def test_public_names() -> None:
    page = (ROOT / "docs/reference/api.md").read_text()
    assert sorted(re.findall(r"^::: moeplan\.(\w+)$", page, re.MULTILINE)) == sorted(moeplan.__all__)
    assert len(moeplan.__all__) < 110 and set(moeplan.__all__) <= set(dir(moeplan))
    for name in moeplan.__all__:
        value = getattr(moeplan, name)
        assert value.__doc__ and value.__module__.startswith("moeplan."), name
    with pytest.raises(AttributeError):
        moeplan.no_such_name  # noqa: B018


def signatures() -> Iterator[tuple[str, str, str, Any]]:
    """Public name, parameter, its annotation, and where that is to be read: what users call, and what they make."""
    for name in moeplan.__all__:
        public = getattr(moeplan, name)
        classes = getattr(public, "__mro__", ()) if name not in RESULTS else ()
        classes = [found for found in classes if found.__module__.startswith("moeplan")]
        methods = [vars(c)[m] for c in classes for m in vars(c) if m == "__init__" or not m.startswith("_")]
        methods = [getattr(method, "__func__", method) for method in methods]
        for found in dict.fromkeys((*([] if name in RESULTS else [public]), *classes, *methods)):
            if inspect.isclass(found) or inspect.isfunction(found):
                for parameter, text in found.__annotations__.items():
                    if found is public or parameter != "return":
                        yield name, parameter, text, sys.modules[found.__module__]


def test_what_a_public_signature_names_is_public_and_easy_to_give() -> None:
    """Paths may be text, and so may enums; every other type of moeplan's has a public name."""
    public = {getattr(moeplan, name) for name in moeplan.__all__}
    text_too = {"Path", "Dispatch", "Deployment", "ReplicaRule"}
    wrong = set()
    for name, parameter, annotation, module in signatures():
        words = {node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)}
        if words & text_too and "str" not in words and inspect.isfunction(getattr(moeplan, name)):
            wrong.add(f"{name}: {parameter} does not take text")
        kinds = {word: getattr(module, word, None) for word in words}
        wrong |= {
            f"{name}: {parameter} is a {word}, which is not public"
            for word, kind in kinds.items()
            if word not in PASSED_ON
            if inspect.isclass(kind) and kind.__module__.startswith("moeplan.") and kind not in public
        }
    assert not wrong, "\n".join(sorted(wrong))


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["numba", "numpy", "matplotlib", "sklearn", "pyarrow", "scipy", "torch", "rich"]
    code = f"import sys, moeplan; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = code.replace("import sys, moeplan", "import sys, moeplan.cli.app")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("[]", "['rich']")


def test_an_enum_may_be_given_as_text() -> None:
    assert moeplan.Cluster(4, 4, "nodes").num_groups == 4  # type: ignore[arg-type]
    assert moeplan.Cluster(4, 4, "gpus").num_groups == 16  # type: ignore[arg-type]
    task = PlanningTask(CLUSTER, 0, "node", "hash")  # type: ignore[arg-type]
    assert task.dispatch is Dispatch.NODE and task.replica_rule is ReplicaRule.HASH
    use = np.ones((2, 1, 4), np.uint32)
    rows = TokenRows(np.zeros((0, 1, 2), np.uint8), *np.zeros((2, 2), np.int64))
    shape = moeplan.ModelShape("m", 1, 4, 2)
    problem = PlanningProblem(shape, CLUSTER, 0, use, use, rows, "hash", "node")  # type: ignore[arg-type]
    assert problem.dispatch is Dispatch.NODE and problem.replica_rule is ReplicaRule.HASH
    assert moeplan.EstimateSettings(dispatch="node").dispatch is Dispatch.NODE  # type: ignore[arg-type]
    counts = np.random.default_rng(0).integers(1, 1000, (3, 8))
    for rule in ReplicaRule:
        by_text, by_rule = (moeplan.balance(counts, CLUSTER, redundant=4, replica_rule=r) for r in (rule.value, rule))
        assert (by_text.slots == by_rule.slots).all()
    plan = moeplan.plan(trace(), CLUSTER, "linear", dispatch="node", replica_rule="hash")
    assert plan.dispatch is Dispatch.NODE and plan.replica_rule is ReplicaRule.HASH


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: moeplan.Cluster(4, 4, "moon"), "Deployment 'moon' is unknown; use nodes, gpus"),
        (lambda: moeplan.plan(trace(), CLUSTER, dispatch="x"), "use pick, gpu, node, allgather"),
        (lambda: moeplan.balance([[1, 2]], CLUSTER, replica_rule="x"), "use nearest-static, nearest-even, hash"),
        (lambda: moeplan.balance([[1, 2]], (1, 2)), "give moeplan.Cluster"),
        (lambda: moeplan.plan("embedded", CLUSTER), "give moeplan.open_trace"),
        (lambda: moeplan.plan(trace(), (2, 2)), "give moeplan.Cluster"),
        (lambda: moeplan.compare("embedded", CLUSTER), "give moeplan.open_trace"),
        (lambda: moeplan.profile_trace("embedded"), "give moeplan.open_trace"),
        (lambda: moeplan.evaluate("plan", trace()), "give moeplan.load_plan"),
        (lambda: moeplan.detect_drift("plan", trace()), "give moeplan.load_plan"),
        (lambda: moeplan.rebalance("plan", trace(), max_moves=1), "give moeplan.load_plan"),
        (lambda: moeplan.estimate_plan("plan", trace(), "H100"), "give moeplan.load_plan"),
    ],
)
def test_an_argument_of_another_kind_is_refused_with_what_to_give(call: Callable[[], object], hint: str) -> None:
    with pytest.raises(moeplan.MoeplanError, match=hint):
        call()


def test_one_strategy_need_not_be_in_a_list() -> None:
    settings = moeplan.EvaluationSettings(folds=1, steps=2, bootstrap_draws=10)
    assert moeplan.compare(trace(), CLUSTER, "random", settings=settings).row("random").within_guard is not None


def test_a_plan_of_some_requests_is_evaluated_on_the_others(tmp_path: Path) -> None:
    requests = moeplan.read_requests(trace())
    fit, held_out = requests.split(fit=0.75, seed=3)
    assert len(fit) + len(held_out) == len(requests) and not np.isin(fit.index, held_out.index).any()
    assert np.bincount(fit.domain) / np.bincount(requests.domain) == pytest.approx(0.75, abs=0.02)
    assert (fit.use == requests.use[np.isin(requests.index, fit.index)]).all()
    some = requests.select([5, 3, 3])
    assert (some.index == requests.index[[3, 5]]).all() and some.measured is some.use
    moeplan.plan(fit, CLUSTER, "linear").save(tmp_path / "plan")
    plan, settings = moeplan.load_plan(tmp_path / "plan"), moeplan.EvaluationSettings(steps=2, bootstrap_draws=10)
    seen = [moeplan.evaluate(plan, given, settings).fitted_on_this_trace for given in (held_out, fit, trace())]
    assert seen == [False, True, True]
    for wrong in ([], [len(requests)], [-1], [[0]], [0.5], [True]):
        with pytest.raises(moeplan.MoeplanError):
            requests.select(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({getattr(moeplan, name).__module__ for name in moeplan.__all__}))
def test_the_examples_of_docstrings_run(module: str, tmp_path: Path) -> None:
    found = doctest.testmod(importlib.import_module(module), extraglobs={"path": tmp_path / "trace"})
    assert found.failed == 0
