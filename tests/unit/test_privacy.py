"""What stored rows leak: at chance where there is nothing to tell, near 1 where there is, exact by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.cli.app import run
from moeplan.errors import MoeplanError
from moeplan.importers.options import ImportOptions
from moeplan.importers.trace import import_trace
from moeplan.planning import PlanningProblem, read_requests, solve
from moeplan.planning.strategies.paper import PaperStrategy
from moeplan.profile import Skipped, profile_trace
from moeplan.profile.common import plain, wilson
from moeplan.profile.counts import DECODE, PREFILL, count
from moeplan.profile.privacy import LINE_UP, DomainInference, Privacy, Reidentification, identification_rate, privacy
from moeplan.report.profile_page import profile_html, sentences
from moeplan.trace import Trace, TraceWriter, open_trace
from moeplan.trace.retention import RetentionPolicy
from moeplan.types import ModelShape

LAYERS, EXPERTS, K = 3, 16, 2
SHAPE = ModelShape("toy", LAYERS, EXPERTS, K)


def draw(rng: np.random.Generator, weights: np.ndarray, rows: int) -> np.ndarray:
    """Rows [rows, L, k] of k distinct experts by Gumbel noise on log weights [L, E]."""
    score = np.log(weights)[None] + rng.gumbel(size=(rows, *weights.shape))
    return np.argsort(-score, axis=2)[:, :, :K]


def make(
    path: Path, *, domains: str = "aab", apart: bool = True, own: bool = True, requests: int = 90, seed: int = 0
) -> Trace:
    """Requests of 24 prefill and 24 decode rows.

    Args:
        domains: one letter per request, in turn.
        apart: domains have weights of their own; own: so has every request.
    """
    rng = np.random.default_rng(seed)
    common, personal = rng.gamma(2.0, size=(LAYERS, EXPERTS)) + 0.05, dict[str, np.ndarray]()
    with TraceWriter(path, SHAPE, source={}, synthetic=True) as writer:
        for i in range(requests):
            label = domains[i % len(domains)]
            weights = common
            if apart:
                weights = weights * personal.setdefault(label, rng.gamma(0.5, size=(LAYERS, EXPERTS)) + 0.05)
            if own:
                weights = weights * (rng.gamma(0.3, size=(LAYERS, EXPERTS)) + 0.02)
            writer.add(draw(rng, weights, 48), prefill=24, domain=label)
    return open_trace(path)


def measured(trace: Trace, seed: int = 0) -> Privacy:
    return privacy(count(trace), np.arange(LAYERS), trace.aggregate, seed=seed)


@pytest.mark.parametrize("domains", ["ab", "aaab", "abc"])
def test_kind_is_at_chance_where_domains_do_not_differ(tmp_path: Path, domains: str) -> None:
    inside = 0
    for seed in range(4):
        found = measured(make(tmp_path / str(seed), domains=domains, apart=False, seed=seed), seed)
        for kind in found.kind.values():
            assert isinstance(kind, DomainInference)
            assert kind.chance == pytest.approx(max(domains.count(d) for d in domains) / len(domains), abs=0.01)
            inside += kind.ci95[0] <= kind.chance <= kind.ci95[1]
    assert inside >= 7  # of 8 intervals of 95 %


def test_kind_is_told_where_domains_differ(tmp_path: Path) -> None:
    trace = make(tmp_path / "t", domains="aabc", own=False)
    found = measured(trace)
    for kind in found.kind.values():
        assert isinstance(kind, DomainInference)
        assert kind.accuracy > 0.97 and kind.ci95[0] > kind.chance and kind.domains == ("a", "b", "c")
    assert plain(measured(trace)) == plain(found)


def test_a_request_is_found_where_it_is_like_no_other(tmp_path: Path) -> None:
    link = measured(make(tmp_path / "own", domains="a")).link
    assert isinstance(link, Reidentification)
    assert link.aggregate.tolist() == [1, 2, 4, 8] and link.requests.tolist() == [90, 90, 88, 88]
    assert link.by_routing[0] > 0.9 and (np.diff(link.by_routing) < 0).all()  # summing hides the one in the many
    assert link.by_text[0] == 1


def test_requests_that_are_alike_are_found_by_chance(tmp_path: Path) -> None:
    links = [measured(make(tmp_path / str(seed), domains="a", own=False, seed=seed)).link for seed in range(6)]
    rates = np.array([link.by_routing for link in links if isinstance(link, Reidentification)])
    ends = np.array([link.routing_ci for link in links if isinstance(link, Reidentification)])
    assert rates.shape == (6, 4) and rates.mean(axis=0) == pytest.approx(np.full(4, 1 / LINE_UP), abs=0.03)
    assert ((ends[..., 0] <= 1 / LINE_UP) & (ends[..., 1] >= 1 / LINE_UP)).sum() >= 21  # of 24


def test_line_ups_by_hand() -> None:
    rng = np.random.default_rng(0)
    score, own = rng.integers(0, 4, (6, 12)).astype(float), rng.integers(0, 12, 6)  # many ties
    expected = np.zeros(6)
    for i, row in enumerate(score):
        others = [row[j] for j in range(12) if j != own[i]]
        shares = []
        for drawn in itertools.combinations(others, LINE_UP - 1):
            best = max(drawn)
            shares.append(0 if best > row[own[i]] else 1 / (1 + drawn.count(row[own[i]])))
        expected[i] = np.mean(shares)
    np.testing.assert_allclose(identification_rate(score, own), expected)
    np.testing.assert_allclose(identification_rate(np.zeros((1, 30)), np.array([3])), [1 / LINE_UP])


def test_wilson_by_hand() -> None:
    assert wilson(1.0, 10) == pytest.approx([1 / (1 + 1.96**2 / 10), 1])
    low, high = wilson(0.3, 50)
    for p in (low, high):  # the ends are the shares that a z of 1.96 just does not refuse
        assert abs(0.3 - p) == pytest.approx(1.96 * np.sqrt(p * (1 - p) / 50))


@pytest.mark.slow
def test_a_trace_of_sums_is_profiled_and_planned(tmp_path: Path) -> None:
    full = make(tmp_path / "full", domains="aab", own=False)
    sums = import_trace(full.path, tmp_path / "sums", ImportOptions(retention=RetentionPolicy(aggregate=4)))
    assert (len(sums.requests), sums.left_over) == (22, 2)
    whole, less = count(full), count(sums)
    np.testing.assert_array_equal(less.by_request[PREFILL][0], whole.by_request[PREFILL][[0, 1, 3, 4]].sum(axis=0))
    np.testing.assert_array_equal(less.by_request[DECODE][-1], whole.by_request[DECODE][[84, 85, 87, 88]].sum(axis=0))
    assert less.totals.sum() == 22 * 4 * 48 * LAYERS * K and less.totals[1].sum() == less.totals.sum()
    found = profile_trace(sums)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["trace"]["aggregate"] == 4 and data["privacy"]["requests_per_row"] == 4
    assert data["coactivation"] == data["distinct_experts"]
    assert data["coactivation"]["skipped"] == "the trace is aggregated and has no token rows"
    assert data["privacy"]["link"]["skipped"] == "no row has fewer than 4 requests"
    assert data["privacy"]["kind"]["decode"]["accuracy"] > 0.9
    assert "sum of 4 requests" in found.notices[1] and "sum of 4 requests" in profile_html(found)
    requests = read_requests(sums, rows=False)
    np.testing.assert_array_equal(requests.use, less.by_request[DECODE])
    np.testing.assert_array_equal(requests.signature, less.by_request[PREFILL])
    problem = problem_of(requests)
    assert solve(problem, PaperStrategy(clusters=2)).placement.slots.shape == (LAYERS, EXPERTS)
    assert solve(problem, "eplb").equal_groups
    with pytest.raises(MoeplanError, match="does not show what one token picks together"):
        solve(problem, "affinity")


def problem_of(requests: Any) -> PlanningProblem:
    from moeplan.cluster import Cluster
    from moeplan.planning import PlanningTask

    problem: PlanningProblem = requests.problem(PlanningTask(Cluster(2, 2)))
    return problem


@pytest.mark.slow
def test_commands_read_sums_or_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = make(tmp_path / "full", requests=40)
    import_trace(full.path, tmp_path / "sums", ImportOptions(retention=RetentionPolicy(aggregate=3)))
    trace, plan, where = str(tmp_path / "sums"), str(tmp_path / "plan"), ["--nodes", "2", "--gpus-per-node", "2"]
    assert run(["profile", trace, "-o", str(tmp_path / "page.html")]) == 0
    assert "Leakage of stored rows" in capsys.readouterr().out
    assert run(["plan", trace, *where, "--strategy", "eplb", "-o", plan]) == 0
    said = capsys.readouterr().out
    assert "eplb on 13 sums of 3 requests" in said and "they need token rows" in said
    assert run(["evaluate", str(tmp_path / "full"), "--plan", plan]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["compare", trace, *where], "comparing and replaying need the picks of each token; use the trace that"),
        (["evaluate", trace, "--plan", plan], "holds sums of 3 requests; comparing and replaying need the picks"),
        (["plan", trace, *where, "-o", plan + "2", "--signature-tokens", "4"], "--signature-tokens needs the picks"),
        (["profile", trace, "--signature-tokens", "4"], "--signature-tokens needs token rows"),
        (["plan", trace, *where, "-o", plan + "2", "--strategy", "affinity"], "does not show what one token picks"),
    ):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path(plan + "2").exists()


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    few = profile_trace(make(tmp_path / "few", domains="ab", requests=8))
    assert isinstance(few.privacy.link, Skipped) and isinstance(few.privacy.kind["decode"], Skipped)
    assert sentences(few)["Leakage of stored rows"].startswith("Not shown: it needs 2 domains with 5 rows")
    one = profile_trace(make(tmp_path / "one", domains="a", requests=12))
    assert isinstance(one.privacy.link, Reidentification) and one.privacy.link.aggregate.tolist() == [1]
    assert sentences(one)["Leakage of stored rows"].startswith("Among 10 rows of its domain, a request's row")


def test_maverick_before_and_after(shared: Path, tmp_path: Path) -> None:
    from moeplan.importers.arrays import import_arrays

    full = import_arrays(
        shared / "traces" / "maverick-mmlu.npz", tmp_path / "full", ImportOptions(without_layers=(45,))
    )
    before = privacy(count(full), np.arange(23))
    link = before.link
    assert isinstance(link, Reidentification)
    assert link.by_routing[0] > 0.9 and link.by_routing[3] < 0.6 and link.by_text[3] > 0.95  # docs/guides/profile.md
    after = measured_sums(
        import_trace(full.path, tmp_path / "sums", ImportOptions(retention=RetentionPolicy(aggregate=8)))
    )
    assert isinstance(after.link, Skipped)


def measured_sums(trace: Trace) -> Privacy:
    return privacy(count(trace), np.arange(trace.shape.num_layers), trace.aggregate)
