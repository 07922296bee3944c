"""From what was measured in every fold to the table: figures, changes against `linear`, marks, and what to know."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan import __version__
from moeplan.cluster import Dispatch, message_bytes
from moeplan.planning.problem import GUARD
from moeplan.planning.requests import RequestSet
from moeplan.replay.evaluator import Measured
from moeplan.replay.figures import RowFigures, add_break_even, sorted_load
from moeplan.replay.run import EvaluationRun, Row
from moeplan.replay.statistics import change, significantly_below
from moeplan.replay.table import Comparison, TableRow

__all__ = ["tabulate"]

#: A layer is pointed out when one expert takes more than this share of its picks.
DOMINATED = 0.5
#: Keys by which one row can beat another: smaller is better in all of them.
BEATEN_BY = (
    "remote_share", "remote_nodes_per_token", "padded_ratio", "gpu_load_ratio", "gpu_load_total", "modelled_step_ms",
)  # fmt: skip


def tabulate(
    run: EvaluationRun,
    rows: list[Row],
    measured: dict[str, list[Measured]],
    notes: tuple[str, ...],
    clusters: int | None = None,
) -> Comparison:
    """Sum over folds, bootstrap, compare with `linear`, mark the guarded rows.

    Args:
        measured: of each row by name, fold by fold. notes: of the strategies.
        clusters: K, where the strategy `paper` was given one.
    """
    linear = measured["linear"]
    row_figures = RowFigures.draw(run, linear)
    figures = {row.name: row_figures.of(row, measured[row.name]) for row in rows}
    baseline = figures["linear"]
    allowed = GUARD * (baseline["node_load_ratio"].value or np.inf)
    table = []
    for row in rows:
        own, folds = figures[row.name], measured[row.name]
        node_load = own["node_load_ratio"].value
        if run.requests.column == "decode":
            add_break_even(own, baseline)
        table.append(
            TableRow(
                name=row.name,
                strategy=row.strategy,
                signature=row.signature,
                equal_groups=folds[0].equal_groups,
                guarded=folds[0].equal_groups and node_load is not None and node_load <= allowed,
                figures=own,
                versus_linear={key: change(own[key], baseline[key]) for key in own if key != "fit_seconds"},
                gpu_load=np.mean([sorted_load(m.requests.load) for m in folds], axis=0),
                beats={
                    key: [other for other in figures if significantly_below(own[key], figures[other][key])]
                    for key in BEATEN_BY
                },
            )
        )
    return Comparison(
        _head(run, linear, row_figures.hidden, clusters),
        (*run.requests.notes, *_byte_notes(run, row_figures.hidden), *_time_notes(run), *_layer_notes(run.requests)),
        (*_method(run, row_figures.unit), *notes),
        tuple(table),
    )


def _method(run: EvaluationRun, unit: str) -> list[str]:
    cluster, settings, column = run.task.cluster, run.settings, run.requests.column
    timing = settings.timing
    return [
        f"per request: all {column} rows of the measured requests; intervals bootstrap over {unit}",
        f"per step: {settings.steps} steps a fold, {run.live} live requests in each of {cluster.num_groups} groups; "
        "intervals bootstrap over steps",
        *([timing.method(cluster, settings.steps, run.live, column)] if timing else []),
        "signatures not shown: prompt-tokens (a trace holds no token ids), previous-turn (it holds no conversations)",
        f"guard ok: equal groups, and node load at most {GUARD:g} x linear's; other rows are not eligible",
    ]


def _time_notes(run: EvaluationRun) -> list[str]:
    task, timing = run.task, run.settings.timing
    if timing is None:
        return []
    return timing.notes(task.cluster, run.requests.shape.num_layers, task.redundant, run.live)


def _layer_notes(requests: RequestSet) -> list[str]:
    """Layers where one expert takes most picks: no plan can help them, and they weigh on every mean."""
    load = requests.measured.sum(axis=0, dtype=np.float64)
    share = load.max(axis=1) / np.maximum(load.sum(axis=1), 1.0)
    return [
        f"layer {requests.shape.layer_ids[i]}: expert {int(load[i].argmax())} takes {100 * share[i]:.1f} % of all "
        f"picks; leave the layer out of every figure with --without-layers {requests.shape.layer_ids[i]}"
        for i in np.flatnonzero(share > DOMINATED)
        if requests.shape.num_experts > 2 * requests.shape.top_k
    ]


def _byte_notes(run: EvaluationRun, hidden: int | None) -> list[str]:
    notes, dispatch = [], run.task.dispatch
    if hidden is None:
        notes.append("bytes are not given: the trace does not say the model's hidden size (--hidden)")
    elif note := message_bytes(dispatch, hidden, run.requests.shape.top_k).note:
        notes.append(note)
    if dispatch is Dispatch.ALLGATHER:
        notes.append("allgather sends every token to every GPU: no plan changes its bytes, only its load")
    return notes


def _head(run: EvaluationRun, linear: list[Measured], hidden: int | None, clusters: int | None) -> dict[str, Any]:
    requests, task, settings, cluster = run.requests, run.task, run.settings, run.task.cluster
    trace = requests.trace
    return {
        "trace": trace.label if trace else requests.shape.name,
        "synthetic": trace.synthetic if trace else False,
        "moeplan": __version__,
        "model": requests.shape.to_dict(),
        "column": requests.column,
        "signature_stands_in": requests.known.stands_in,
        "requests": {
            "total": requests.total,
            "usable": len(requests),
            "fit": [len(requests) - len(m.test) for m in linear],
            "test": [len(m.test) for m in linear],
        },
        "setup": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "deployment": cluster.deployment.value,
            "redundant": task.redundant,
            "dispatch": task.dispatch.value,
            "replica_rule": task.replica_rule.value,
            "fit": settings.fit if any(len(m.test) < len(requests) for m in linear) else None,
            "folds": len(run.parts),
            "seed": settings.seed,
            "block": settings.block,
            "steps": settings.steps,
            "live_per_group": run.live,
            "bootstrap_draws": settings.draws,
            "clusters": clusters,
            "hidden": hidden,
            "timing": settings.timing.to_dict(cluster, settings.steps) if settings.timing else None,
        },
    }
