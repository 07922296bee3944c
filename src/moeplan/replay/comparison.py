"""`compare`: strategies on unseen requests. Fit on one part, measure on the other, several times over."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster, Dispatch, ReplicaRule, check_slots
from moeplan.errors import PlanError, UsageError
from moeplan.planning import Plan, Problem, RequestSet, Strategy, solve
from moeplan.planning.assignment import equal_groups, random_groups
from moeplan.planning.router import ClusterRouter, LocalityRouter
from moeplan.planning.strategies import find
from moeplan.progress import Progress
from moeplan.replay.measure import measure_requests, measure_steps
from moeplan.replay.split import Draws, blocks, draw_steps, least_requests, live_requests, split
from moeplan.replay.table import Comparison, Measured, tabulate
from moeplan.replay.timing import Timing
from moeplan.trace.format import layer_spans
from moeplan.types import ModelShape

__all__ = ["Row", "Setup", "check_shape", "compare", "replay", "rows_of", "strategy_names"]

Int64Array = npt.NDArray[np.int64]

#: Strategies that are also shown with their placement's own signature routing, so that a gain splits into two.
_ALSO_ROUTED = ("linear", "eplb")


@dataclass(frozen=True)
class Setup:
    """Everything that a comparison depends on beside the requests.

    Attributes:
        fit: share of the requests that plans may see; folds: repeated splits; block: neighbours kept together.
        steps: steps replayed per fold; draws: bootstrap draws.
        home: is the cluster's. hidden: overrides the trace's.
        timing: how to time steps; None: the modelled keys are null.
    """

    cluster: Cluster
    strategies: tuple[str | Strategy, ...]
    redundant: int = 0
    rule: ReplicaRule = ReplicaRule.NEAREST_STATIC
    dispatch: Dispatch = Dispatch.PICK
    fit: float = 0.5
    folds: int = 4
    seed: int = 0
    block: int = 1
    steps: int = 500
    draws: int = 1000
    hidden: int | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        for label, value, top in (("--folds", self.folds, 100), ("--steps", self.steps, 100_000)):
            if not 1 <= value <= top:
                raise UsageError(f"{label} {value} is outside 1..{top}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative")
        if self.hidden is not None and self.hidden < 1:
            raise UsageError(f"--hidden {self.hidden} is not positive")
        for strategy in self.strategies:
            find(strategy)


def strategy_names(text: str) -> tuple[str, ...]:
    """'a,b' as names.

    Raises:
        UsageError: no name in it.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("--strategies names none", hint="e.g. linear,eplb,paper")
    return names


@dataclass(frozen=True)
class Row:
    """One row of the table: a strategy's placement, and the signature that new requests are grouped by.

    Attributes:
        name: the strategy, with `/signature` where it is not the strategy's own way.
        signature: none (random equal groups), domain, prefill (or what stands in for it), or oracle.
    """

    name: str
    strategy: str
    signature: str


def rows_of(strategies: tuple[str | Strategy, ...], requests: RequestSet) -> list[Row]:
    """The rows to show: each strategy in its own way, then the variants that split a gain into its parts.

    A strategy that groups requests comes with every signature kind that the trace allows; the others with random equal
    groups, and `linear` and `eplb` also with signature routing. `linear` is always there: it is the baseline.
    """
    several = len(np.unique(requests.domain)) > 1
    rows: list[Row] = []
    for name, strategy in _by_name(("linear", *strategies)).items():
        if strategy.routed:
            kinds = ["none", *(["domain"] if several else []), "oracle"]
            rows.append(Row(name, name, "prefill"))
            if strategy.equal_groups:
                rows += [Row(f"{name}/{kind}", name, kind) for kind in kinds]
        else:
            rows.append(Row(name, name, "none"))
            if name in _ALSO_ROUTED:
                rows.append(Row(f"{name}/prefill", name, "prefill"))
    return rows


def _by_name(strategies: tuple[str | Strategy, ...]) -> dict[str, Strategy]:
    """The strategies by name; of several with one name, the last."""
    return {strategy.name: strategy for strategy in map(find, strategies)}


def compare(requests: RequestSet, setup: Setup, progress: Progress | None = None) -> Comparison:
    """Fit every strategy on each fold's fit part and measure it on the rest.

    Raises:
        PlanError: slots that do not divide, more groups than requests, too few test requests a group.
        UsageError: a model to time that is not the trace's.
    """
    cluster = setup.cluster
    check_slots(requests.shape.num_experts, setup.redundant, cluster)
    _check_timing(requests, setup)
    block = blocks(requests.index, setup.block)
    folds = folds_of(requests, setup, block)
    ways = ["fewer nodes", *["--deployment nodes"] * (cluster.gpus_per_group < cluster.gpus_per_node), "another --fit"]
    ways += ["a smaller --block"] * (setup.block > 1)
    more = f"use {', '.join(ways)}, or a trace with {least_requests(cluster, setup.fit)} usable requests"
    least = min(len(fit) for fit, _ in folds)
    if least < cluster.num_groups:
        raise PlanError(f"{cluster.num_groups} groups for {least} fit requests", hint=more)
    live = live_requests([len(test) for _, test in folds], cluster, more)
    chosen = _by_name(("linear", *setup.strategies))
    rows = rows_of(setup.strategies, requests)
    measured: dict[str, list[Measured]] = {row.name: [] for row in rows}
    notes: dict[str, dict[str, None]] = {}
    done, total = 0, len(rows) * setup.folds
    for fold, (fit, test) in enumerate(folds):
        problem = fit_problem(requests, setup, fit)
        draws = draw_steps(requests.measured_span[test], setup.steps, rng_of(setup, fold, 2))
        solved: dict[str, Plan] = {}
        for row in rows:
            if progress:
                progress(done, total, f"fold {fold + 1}, {row.name}")
            if row.strategy not in solved:
                solved[row.strategy] = solve(problem, chosen[row.strategy], setup.seed + fold)
                for note in solved[row.strategy].provenance.notes:
                    notes.setdefault(note, {})[str(fold + 1)] = None
            result = solved[row.strategy]
            group = group_test(requests, fit, test, result, row.signature, rng_of(setup, fold, 1))
            measured[row.name].append(measure(requests, setup, row, test, group, draws, live, result))
            done += 1
    said = (
        f"{note} (fold{'s' * (len(at) > 1)} {', '.join(at)})" if len(at) < setup.folds else note
        for note, at in notes.items()
    )
    return tabulate(requests, setup, rows, measured, block, live, tuple(said))


def measure(
    requests: RequestSet, setup: Setup, row: Row, test: Int64Array, group: Int64Array, draws: Draws, live: int,
    result: Plan,
) -> Measured:  # fmt: skip
    """One row in one fold: per request, and (where groups are equal) per step."""
    equal = result.equal_groups or row.signature == "none"  # random groups are always equal
    figures = measure_requests(requests, test, group, result.routes, setup.dispatch)
    steps = None
    if equal:
        steps = measure_steps(requests, draws, group, live, result.routes, setup.dispatch, setup.timing)
    return Measured(test, figures, steps, result.provenance.fit_seconds, equal)


def replay(requests: RequestSet, result: Plan, setup: Setup) -> Comparison:
    """One finished plan on all usable requests of a trace, beside `linear` on the same slots.

    Raises:
        PlanError: too few requests for the groups. UsageError: a model to time that is not the trace's.
    """
    _check_timing(requests, setup)
    everyone = np.arange(len(requests))
    block = blocks(requests.index, setup.block)
    live = live_requests([len(requests)], setup.cluster)
    setup = dataclasses.replace(setup, folds=1)
    draws = draw_steps(requests.measured_span, setup.steps, rng_of(setup, 0, 2))
    linear = solve(fit_problem(requests, setup, everyone), "linear", setup.seed)
    name = result.strategy if result.strategy != "linear" else "plan"
    rows = [
        Row("linear", "linear", "none"),
        Row(name, result.strategy, "prefill"),
        Row(f"{name}/none", result.strategy, "none"),
    ]
    measured = {}
    for row, of in zip(rows, (linear, result, result), strict=True):
        group = group_test(requests, everyone, everyone, of, row.signature, rng_of(setup, 0, 1))
        measured[row.name] = [measure(requests, setup, row, everyone, group, draws, live, of)]
    return tabulate(requests, setup, rows, measured, block, live, ())


def check_shape(trace: ModelShape, plan: ModelShape, where: str) -> None:
    """A plan fits traces of its own model only.

    Args:
        where: what an error names, the plan.

    Raises:
        UsageError: experts, picks per token or layers differ.
    """
    for label, ours, theirs in (
        ("experts", trace.num_experts, plan.num_experts),
        ("picks per token", trace.top_k, plan.top_k),
        ("layers", trace.num_layers, plan.num_layers),
        ("layer ids", trace.layer_ids, plan.layer_ids),
    ):
        if ours != theirs:
            said = [layer_spans(value) if isinstance(value, tuple) else value for value in (ours, theirs)]
            raise UsageError(
                f"the trace and the plan differ in {label}: {said[0]} and {said[1]}",
                where=where,
                hint="use traffic of the same model, and --without-layers as in the plan",
            )


def _check_timing(requests: RequestSet, setup: Setup) -> None:
    if setup.timing is not None:
        setup.timing.check(requests.shape, setup.cluster, setup.dispatch)


def rng_of(setup: Setup, fold: int, purpose: int) -> np.random.Generator:
    """One stream of chance per fold and purpose, the same for every strategy: 0 splits, 1 random groups, 2 steps."""
    return np.random.default_rng([setup.seed, fold, purpose])


def folds_of(requests: RequestSet, setup: Setup, block: Int64Array) -> list[tuple[Int64Array, Int64Array]]:
    """(fit, test) of each fold, positions among the requests; one of them may be empty."""
    chosen = [split(requests.domain, block, setup.fit, rng_of(setup, fold, 0)) for fold in range(setup.folds)]
    return [(np.flatnonzero(fit), np.flatnonzero(~fit)) for fit in chosen]


def fit_problem(requests: RequestSet, setup: Setup, fit: Int64Array) -> Problem:
    """The problem of one fold: only what the fit requests did."""
    return Problem(
        requests.shape, setup.cluster, setup.redundant, requests.use[fit], requests.signature[fit],
        requests.stream(fit), setup.rule, setup.dispatch,
    )  # fmt: skip


def group_test(
    requests: RequestSet, fit: Int64Array, test: Int64Array, result: Plan, signature: str, rng: np.random.Generator
) -> Int64Array:
    """int64 [n_test]: the groups of unseen requests, by a signature kind; equal in size unless the strategy is not."""
    if signature == "none":
        return random_groups(len(test), result.routes.cluster.num_groups, rng)
    known: npt.NDArray[np.number]
    if signature == "prefill":
        known = requests.signature[test]
    elif signature == "oracle":  # nothing to foretell: what the placement holds of the decode itself
        return equal_groups(LocalityRouter.of(result.routes).scores(requests.measured[test]))
    else:
        known = _domain_signature(requests, fit, test)
    if not result.equal_groups and isinstance(result.router, ClusterRouter):
        return result.router.nearest_groups(known)
    return equal_groups(result.router.scores(known))


def _domain_signature(requests: RequestSet, fit: Int64Array, test: Int64Array) -> npt.NDArray[np.float32]:
    """float32 [n_test, L, E]: the mean use of the fit requests of the same domain (of all, where it has none)."""
    use = requests.use[fit].astype(np.float32)
    use /= np.maximum(use.sum(axis=(1, 2), keepdims=True), 1.0)
    out = np.repeat(use.mean(axis=0)[None], len(test), axis=0)
    for domain in np.intersect1d(requests.domain[fit], requests.domain[test]):
        out[requests.domain[test] == domain] = use[requests.domain[fit] == domain].mean(axis=0)
    return out * np.float32(1e4)  # scores divide by the sum; keep it well above 1
