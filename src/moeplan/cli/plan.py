"""`moeplan plan`: fit a plan on a whole trace and write it; or tell whether a stored one has gone stale."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.cli import options as o
from moeplan.cli.common import (
    JsonOption,
    WithoutLayers,
    claim_stdout,
    echo,
    emit_json,
    given,
    parse_layers,
    progress,
)
from moeplan.errors import OutputError, PlanError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from moeplan.cluster import Cluster, Dispatch
    from moeplan.planning import Plan, RequestSet
    from moeplan.replay import Setup
    from moeplan.replay.drift import DriftReport
    from moeplan.replay.timing import Timing

    Array = npt.NDArray[Any]

#: Flags that go with --drift; the plan says the rest.
_WITH_DRIFT = {"start", "drift", "signature_tokens", "block", "without_layers", "seed", "json"}
#: Flags that go with --from and --max-moves.
_WITH_FROM = (_WITH_DRIFT - {"drift"}) | {
    "trace",
    "output",
    "guard",
    "objective",
    "max_moves",
    "hardware",
    "model",
    "context_tokens",
}
_EXPECTED = ("remote_share", "remote_nodes_per_token", "gpu_load_ratio", "node_load_ratio", "experts_per_gpu")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command(
        help="Fit a plan on all usable requests of a trace. With --from PLAN --drift TRACE: tell whether a plan has "
        "gone stale on new traffic (exit status 0: still good, 1: stale). With TRACE --from PLAN --max-moves M: "
        "improve a plan by few moves."
    )
    def plan(
        context: typer.Context,
        trace: Annotated[str | None, typer.Argument(metavar="TRACE", help="A moeplan trace (a directory).")] = None,
        output: Annotated[
            str | None, typer.Option("-o", "--output", metavar="PLAN", help="The plan's directory.")
        ] = None,
        start: Annotated[str | None, typer.Option("--from", metavar="PLAN", help="A plan made before.")] = None,
        drift: Annotated[
            str | None, typer.Option("--drift", metavar="TRACE", help="New traffic to hold the plan of --from to.")
        ] = None,
        nodes: o.Nodes = 8,
        gpus_per_node: o.GpusPerNode = 8,
        redundant: o.Redundant = 0,
        strategy: Annotated[str, typer.Option("--strategy", metavar="NAME", help="How to plan.")] = "moeplan",
        home: o.Home_ = o.HomeChoice.node,
        dispatch: o.Dispatch_ = o.DispatchChoice.pick,
        replica_rule: o.Rule = o.RuleChoice.nearest_static,
        signature_tokens: o.SignatureTokens = None,
        clusters: o.Clusters = None,
        guard: Annotated[
            float, typer.Option("--guard", metavar="X", help="Most node load, in multiples of linear's; inf: any.")
        ] = 1.05,
        objective: Annotated[
            str,
            typer.Option("--objective", metavar="O", help="bytes, balance (load first) or time (needs --hardware)."),
        ] = "bytes",
        hardware: o.Hardware_ = None,
        model: o.Model = None,
        context_tokens: o.Context = None,
        max_moves: Annotated[
            int | None,
            typer.Option("--max-moves", metavar="M", help="With --from: move at most M expert copies of each layer."),
        ] = None,
        block: o.Block = 1,
        without_layers: WithoutLayers = "",
        seed: o.Seed = 0,
        json: JsonOption = None,
    ) -> None:
        claim_stdout(json)
        if drift is not None:
            if start is None:
                raise UsageError("--drift needs a plan", hint="moeplan plan --from PLAN --drift TRACE")
            _only_with(context, _WITH_DRIFT, "--drift")
            _drift(start, drift, signature_tokens, block, parse_layers(without_layers), seed, json)
        if trace is None or output is None:
            missing = "TRACE" if trace is None else "-o PLAN"
            raise UsageError(f"{missing} is missing", hint="moeplan plan TRACE -o PLAN, or --from PLAN --drift TRACE")
        if (start is None) != (max_moves is None):
            raise UsageError(
                "--from and --max-moves go together", hint="moeplan plan TRACE --from PLAN --max-moves 8 -o NEW"
            )
        if start is not None:
            _only_with(context, _WITH_FROM, "--from")
        if Path(output).exists():
            raise OutputError("already exists", where=output, hint="choose another place, or remove it")
        import dataclasses

        import numpy as np

        from moeplan.cluster import check_slots
        from moeplan.io.files import check_folder
        from moeplan.planning import MoveLimit, read_requests, solve
        from moeplan.planning.store import load_plan
        from moeplan.planning.strategies.moeplan import MoeplanParams
        from moeplan.planning.strategies.paper import PaperParams
        from moeplan.replay import Setup
        from moeplan.replay.comparison import check_shape, fit_problem
        from moeplan.trace import open_trace

        check_folder(output)
        old = None if start is None else load_plan(start)
        if old is None:
            cluster, mode, rule = o.cluster_of(nodes, gpus_per_node, home, dispatch, replica_rule)
        else:
            cluster, mode, rule, redundant = old.cluster, old.dispatch, old.replica_rule, old.redundant
            if signature_tokens is None:
                signature_tokens = old.signature.tokens
            objective, guard = _inherited(context, old, start or "", objective, guard)
        for name in ("objective", "guard"):
            if old is None and strategy != "moeplan" and given(context, name):
                raise UsageError(f"--{name} is for the strategy moeplan", hint=f"leave it out with {strategy}")
        opened = open_trace(trace, without_layers=parse_layers(without_layers))
        timing = o.timing_of(opened.shape, cluster, mode, hardware, model, context_tokens)
        cost = None if timing is None else partial(_step_ms, timing, cluster, mode)
        params = (MoeplanParams(guard, objective, cost), PaperParams(clusters), PaperParams(clusters, equal=False))
        chosen = {each.name: each for each in params}.get(strategy, strategy)
        limit = None if old is None else MoveLimit(old.placement.slots, max_moves or 0)
        setup = Setup(
            cluster, (chosen,), redundant, rule, mode, fit=0.75, folds=1, seed=seed, block=block, steps=100,
            draws=200, timing=timing,
        )  # fmt: skip
        check_slots(opened.shape.num_experts, redundant, cluster)  # before a large trace is read
        if old is not None and start is not None:
            check_shape(opened.shape, old.model, start)
        with progress("plan") as report:
            requests = read_requests(opened, signature_tokens=signature_tokens, rows=False)
            problem = fit_problem(requests, setup, np.arange(len(requests)))
            report(1, 3, "solving")
            result = solve(problem, chosen, seed, limit)
            report(2, 3, "expected figures on an unseen quarter")
            expected = None if old is not None else _expected(requests, setup, strategy)
        origin = dataclasses.replace(
            result.provenance, trace_checksum=opened.checksum, synthetic=opened.synthetic
        )  # fmt: skip
        result = dataclasses.replace(result, signature=requests.known, provenance=origin, expected=expected)
        result.save(output)
        echo(
            f"{opened.label}: {strategy} on {len(requests)} {opened.request_noun} in {origin.fit_seconds:.2f} s"
            f" -> {output}"
        )
        for note in (*requests.notes, *origin.notes):
            echo(f"  - {note}")
        if not result.equal_groups:
            echo("  - its groups are unequal in size: such a plan is for comparison and does not count")
        moved = None if old is None else result.moves_from(old)
        if moved is not None:
            size = "" if moved.bytes is None else f", {_size(moved.bytes)} of weights"
            echo(
                f"moved against {start}: {moved.replicas} of {moved.slots} expert copies{size}; at most "
                f"{moved.most_in_a_layer} in a layer"
            )
            if moved.replicas:
                echo(f"what it brings: moeplan replay TRACE --plan {output}, beside the same of {start}")
            else:
                echo("nothing to gain by so few moves: the placement is the same, the groups' router is new")
        elif expected is None:
            why = "too few requests to hold a quarter back" if requests.sums is None else "they take token rows"
            echo(f"  - expected figures are not given: {why}")
        else:
            echo("expected on unseen requests (fitted on three quarters, measured on the last):")
            for key in _EXPECTED:
                if expected[key]["value"] is None:
                    echo(f"  {key:24s} - (per-step figures need groups of equal size)")
                    continue
                versus = expected[key].get("vs_linear")
                change = f"  ({100 * versus['value']:+.1f} % against linear)" if versus else ""
                echo(f"  {key:24s} {expected[key]['value']:.3f}{change}")
        emit_json(
            json,
            {
                "plan": output,
                "strategy": strategy,
                "fit_seconds": origin.fit_seconds,
                "expected": expected,
                "moved": moved and vars(moved),
            },
        )


def _inherited(context: typer.Context, old: Plan, where: str, objective: str, guard: float) -> tuple[str, float]:
    """What an older plan was made for goes on, unless the command line says otherwise."""
    from moeplan.replay.drift import params_of

    if old.params.get("objective") == "time":
        if not given(context, "objective") and not given(context, "hardware"):
            raise UsageError(
                "the plan was made with --objective time", where=where,
                hint="give --hardware and --model again, or --objective bytes",
            )  # fmt: skip
        before = params_of(old, "bytes")
        objective = objective if given(context, "objective") else "time"
    else:
        before = params_of(old)
        objective = objective if given(context, "objective") else before.objective
    guard = guard if given(context, "guard") else before.guard
    return objective, guard


def _expected(requests: RequestSet, setup: Setup, strategy: str) -> dict[str, Any] | None:
    """The strategy's figures on a held-out quarter; None where the trace is too small for one, or has no rows."""
    from moeplan.replay import compare

    if requests.sums is not None:
        return None
    try:
        row = compare(requests, setup).row(strategy).to_dict()
    except PlanError:
        return None
    return {key: row[key] for key in _EXPECTED}


def _step_ms(timing: Timing, cluster: Cluster, mode: Dispatch, links: Array, picks: Array, touched: Array) -> float:
    """One step's milliseconds, for `--objective time`."""
    from moeplan.replay.timing import step_times

    times = step_times(
        cluster, mode, timing.spec, timing.machine, links[None], picks[None], touched[None], context=timing.context
    )  # fmt: skip
    return float(times.ms[0])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _only_with(context: typer.Context, known: set[str], what: str) -> None:
    """Refuse flags that the stored plan answers already."""
    for name in context.params:
        if name not in known and given(context, name):
            flag = "TRACE" if name == "trace" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} does not go with {what}", hint="leave it out: the plan says how it was made")


def _drift(
    start: str, new: str, signature_tokens: int | None, block: int, without_layers: tuple[int, ...], seed: int,
    json: str | None,
) -> None:  # fmt: skip
    """Hold a stored plan to new traffic; ends with exit status 0 (still good) or 1 (stale)."""
    from moeplan.planning import read_requests
    from moeplan.planning.store import load_plan
    from moeplan.replay import drift
    from moeplan.replay.comparison import check_shape
    from moeplan.trace import open_trace

    stored = load_plan(start)
    setup = drift.drift_setup(stored, seed=seed, block=block)
    opened = open_trace(new, without_layers=without_layers)
    check_shape(opened.shape, stored.shape, start)
    tokens = stored.signature.tokens if signature_tokens is None else signature_tokens
    with progress("drift") as report:
        requests = read_requests(opened, signature_tokens=tokens)
        found = drift.drift(requests, stored, setup, report)
    seen = stored.provenance.trace_checksum == opened.checksum
    _say_drift(found, stored, opened.label, new, start)
    for note in requests.notes:
        echo(f"  - {note}")
    if requests.known != stored.signature:
        echo(f"  - signatures rest on the {requests.known}; the plan was fitted on the {stored.signature}")
    if seen:
        echo("  - the plan was fitted on this very trace, test parts included: it looks better here than it is")
    facts = {"trace": opened.label, "synthetic": opened.synthetic, "plan": start, "fitted_on_this_trace": seen}
    emit_json(json, facts | found.to_dict())
    raise typer.Exit(1 if found.stale else 0)


def _say_drift(found: DriftReport, stored: Plan, label: str, new: str, plan: str) -> None:
    from moeplan.planning.problem import GUARD
    from moeplan.replay.drift import FRESH, OLD, OLD_RANDOM, anew

    count, setup = found.table.head["requests"], found.table.head["setup"]
    by = "" if anew(stored) == stored.strategy else f" (planned anew by {anew(stored)})"
    echo(
        f"{label}: {count['fit'][0]} requests to plan anew on, {count['test'][0]} others to measure on, "
        f"{setup['folds']} folds; {stored.strategy}{by} on {setup['nodes']} nodes x "
        f"{setup['gpus_per_node']} GPUs, {setup['redundant']} redundant slots, dispatch per {setup['dispatch']}"
    )
    echo(f"{'':30s} {found.key + ' [95 %]':>30s}  node load  GPU load")
    names = {"linear": "linear, random groups", OLD_RANDOM: f"{OLD}, random groups", OLD: OLD, FRESH: FRESH}
    for name, row in names.items():
        figures = found.table.row(name).figures
        low, high = figures[found.key].interval() or (0.0, 0.0)
        echo(
            f"{row:30s} {figures[found.key].value:13.3f} [{low:.3f}, {high:.3f}]"
            f"  {figures['node_load_ratio'].value:9.2f}  {figures['gpu_load_ratio'].value:8.2f}"
        )
    if found.change is not None:
        (a, b), (c, d) = found.change["ci95"], found.change["ci95_of_planning"]
        echo(
            f"planning anew changes {found.key} by {100 * found.change['value']:+.1f} %: [{100 * a:+.1f}, "
            f"{100 * b:+.1f}] over requests, [{100 * c:+.1f}, {100 * d:+.1f}] from plan to plan"
        )
    low, high = found.load
    too = ", which fresh plans break too" if low > GUARD and not found.overloaded else ""
    echo(f"node load is {found.node_load(OLD):.2f} x linear's [{low:.2f}, {high:.2f}]; the guard is {GUARD:g}{too}")
    why = [f"planning anew lowers {found.key} beyond noise"] * found.helps
    why += ["it breaks the guard on node load, and a plan made anew does not"] * found.overloaded
    if why:
        echo(f"stale: {', and '.join(why)}")
        echo(f"next: moeplan plan {new} --from {plan} --max-moves M -o NEW, or plan anew without --from")
    else:
        echo("still good: what planning anew would change is no more than noise")
