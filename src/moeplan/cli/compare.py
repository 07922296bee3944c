"""`moeplan compare`: the table of strategies on held-out requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import echo, emit_json, progress
from moeplan.cli.text.plans import show_comparison
from moeplan.errors import UsageError

__all__ = ["compare"]


@Parameter(name="*", group=o.MEASURING)
@dataclass(frozen=True)
class SplitFlags:
    """How requests are split."""

    fit: float = 0.5
    """Share of the requests that plans are fitted on."""
    folds: o.Int = 4
    """Number of random splits into fit and held-out requests, averaged over."""


@Parameter(name="*", group=o.CLUSTER)
@dataclass(frozen=True)
class InstanceFlags:
    """With --deployment instances."""

    instances: o.Int = 8
    """Independent instances, each with the whole model (--deployment instances)."""
    batch: o.Int = 8
    """Requests that decode together, on each data-parallel rank or instance (--deployment instances)."""


STRATEGIES = "random,linear,eplb,affinity,paper,moeplan"
Strategies: TypeAlias = Annotated[
    str,
    Parameter(
        metavar="A,B,..",
        help="Strategies, separated by commas: moeplan, eplb, eplb-global, eplb-hierarchical, affinity, paper, "
        "paper-unbalanced, linear, random.",
    ),
]


def compare(
    trace: o.TraceIn,
    /,
    *,
    strategies: Strategies = STRATEGIES,
    cluster: o.ClusterFlags = o.ClusterFlags(),
    instances: InstanceFlags = InstanceFlags(),
    paper: o.PaperFlags = o.PaperFlags(),
    requests: o.TraceFlags = o.TraceFlags(),
    measure: o.MeasureFlags = o.MeasureFlags(),
    split: SplitFlags = SplitFlags(),
    times: o.TimingFlags = o.TimingFlags(),
    seed: o.Seed = 0,
    output: o.PageOut = None,
    json: o.Json = None,
) -> None:
    """Compare strategies on held-out requests.

    Each group (a node, or a GPU with --deployment gpus) needs at least 3 held-out requests: 48 requests for 8 nodes.
    """
    if cluster.deployment == "instances":
        _not_for_instances(replace(cluster, deployment="nodes"), strategies, paper, times, output)
        return _instances(trace, instances, requests, measure, split, seed, json)
    _only_for_instances(instances)
    from moeplan.replay.compare import compare_task
    from moeplan.report.compare_page import compare_html
    from moeplan.report.page import write_page

    task, chosen = cluster.task(), paper.strategies(strategies)
    opened, start = requests.open(trace), time.perf_counter()
    task.check(opened.shape.num_experts)  # before a large trace is read
    settings = measure.settings(times.timing(opened.shape, task), seed, fit_share=split.fit, folds=split.folds)
    with progress("compare") as tick:
        table = compare_task(requests.read(opened, phase=measure.phase), task, chosen, settings, tick)
    show_comparison(table, opened, time.perf_counter() - start)
    emit_json(json, table.to_dict())
    if output is not None:
        write_page(output, compare_html(table, opened))
    echo(f"wrote {output}" if output else "a page with figures: add -o compare.html")


def _not_for_instances(
    cluster: o.ClusterFlags, strategies: str, paper: o.PaperFlags, times: o.TimingFlags, output: Path | None
) -> None:
    """Refuse flags that say nothing about independent instances."""
    given = {
        "--nodes, --gpus-per-node, --redundant, --dispatch or --replica-rule": cluster != o.ClusterFlags(),
        "--strategies": strategies != STRATEGIES,
        "--clusters": paper != o.PaperFlags(),
        "--hardware, --model or --context": times != o.TimingFlags(),
        "--output": output is not None,
    }
    if wrong := [flag for flag, here in given.items() if here]:
        raise UsageError(f"--deployment instances does not take {'; '.join(wrong)}", hint="leave them out")


def _only_for_instances(flags: InstanceFlags) -> None:
    if flags != InstanceFlags():
        raise UsageError("--instances and --batch go with --deployment instances", hint="add it, or leave them out")


def _instances(
    trace: Path,
    flags: InstanceFlags,
    requests: o.TraceFlags,
    measure: o.MeasureFlags,
    split: SplitFlags,
    seed: int,
    json: Path | None,
) -> None:
    """Independent instances: nothing is placed, requests are grouped and ordered."""
    from moeplan.replay.instances import InstanceTask, compare_instances

    settings = measure.settings(None, seed, fit_share=split.fit, folds=split.folds)
    task = InstanceTask(flags.instances, flags.batch)
    with progress("compare") as tick:
        table = compare_instances(requests.read(requests.open(trace), phase=measure.phase), task, settings, tick)
    for line in repr(table).splitlines():
        echo(line)
    emit_json(json, table.to_dict())
