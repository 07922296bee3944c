"""From what was measured in every fold to the table: figures, changes against `linear`, marks, and what to know.

Keys and meanings of figures are those of docs/reference/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moeplan import __version__
from moeplan.arrays import Float32Array, FloatArray
from moeplan.cluster import Dispatch, message_bytes
from moeplan.planning.expected_load import load_ratio
from moeplan.planning.prediction import PREDICTED, predictable
from moeplan.planning.problem import GUARD
from moeplan.planning.requests import RequestSet
from moeplan.replay.evaluator import EvaluationRun, Measured, Row
from moeplan.replay.statistics import (
    MeasuredValue,
    block_weights,
    change,
    figure_of_ratio,
    noise_floor,
    significantly_below,
)
from moeplan.replay.table import Comparison, TableRow

__all__ = ["RowFigures", "tabulate"]

#: A layer is pointed out when one expert takes more than this share of its picks.
DOMINATED = 0.5
#: Keys by which one row can beat another: smaller is better in all of them.
BEATEN_BY = (
    "remote_share",
    "remote_nodes_per_token",
    "padded_ratio",
    "gpu_load_ratio",
    "gpu_load_total",
    "modelled_step_ms",
)


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
                within_guard=folds[0].equal_groups and node_load is not None and node_load <= allowed,
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
        *_not_shown(run.requests),
        f"guard ok: equal groups, and node load at most {GUARD:g} x linear's; other rows are not eligible",
    ]


def _not_shown(requests: RequestSet) -> list[str]:
    """Predicted signatures that the trace has nothing for."""
    reasons = {"prompt-tokens": "no prompts are kept", "previous-turn": "no sessions of several turns are kept"}
    missing = [f"{name} ({reasons[name]})" for name in PREDICTED if name not in predictable(requests)]
    return [f"signatures not shown: {', '.join(missing)}"] if missing else []


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
            "total": len(trace.requests) if trace else len(requests),
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
            "fit": settings.fit_share if any(len(m.test) < len(requests) for m in linear) else None,
            "folds": len(run.parts),
            "seed": settings.seed,
            "block": settings.block,
            "steps": settings.steps,
            "live_per_group": run.live,
            "bootstrap_draws": settings.bootstrap_draws,
            "clusters": clusters,
            "hidden": hidden,
            "timing": settings.timing.to_dict(cluster, settings.steps) if settings.timing else None,
        },
    }


# ---- the figures of one row


@dataclass(frozen=True)
class RowFigures:
    """What the figures of all rows share: bootstrap draws, and the noise floors of load ratios.

    Attributes:
        run: the common ground. linear: the baseline, fold by fold.
        weights: float64 [draws, n], how often each request is drawn; step_weights, timed_weights: of steps.
        floors: noise floors by key.
    """

    run: EvaluationRun
    linear: list[Measured]
    weights: FloatArray
    step_weights: FloatArray
    timed_weights: FloatArray
    floors: dict[str, float]

    @classmethod
    def draw(cls, run: EvaluationRun, linear: list[Measured]) -> RowFigures:
        """With seeded bootstrap draws, the same for all rows."""
        settings, folds = run.settings, len(run.parts)
        rng = np.random.default_rng([settings.seed, 3])
        weights = block_weights(run.block, settings.bootstrap_draws, rng)
        step_weights = _step_weights(settings.steps * folds, settings.bootstrap_draws, rng)
        timed = folds * min(settings.timing.steps, settings.steps) if settings.timing else 1
        timed_weights = _step_weights(timed, settings.bootstrap_draws, np.random.default_rng([settings.seed, 4]))
        return cls(run, linear, weights, step_weights, timed_weights, _floors(run, linear, rng))

    @property
    def unit(self) -> str:
        """What the bootstrap over requests draws."""
        return "requests" if self.run.settings.block == 1 else "blocks"

    @cached_property
    def hidden(self) -> int | None:
        """Width of a token's hidden state; None where it is not known."""
        return self.run.settings.hidden or self.run.requests.shape.hidden

    def of(self, row: Row, folds: list[Measured]) -> dict[str, MeasuredValue]:
        """Every figure of a row by key."""
        shape, task = self.run.requests.shape, self.run.task
        picks, rows = self._spread(folds, "picks"), self._spread(folds, "rows")
        size = None if self.hidden is None else message_bytes(task.dispatch, self.hidden, shape.top_k).both
        unknown = MeasuredValue(None)

        def ratio(name: str, bottom: FloatArray, scale: float = 1.0) -> MeasuredValue:
            return figure_of_ratio(self._spread(folds, name), bottom, self.weights, self.unit, scale)

        return {
            "remote_share": ratio("remote", picks),
            "remote_nodes_per_token": ratio("nodes", rows, 1.0 / shape.num_layers),
            "inter_node_bytes_per_token": ratio("inter", rows, size) if size else unknown,
            "intra_node_bytes_per_token": ratio("intra", rows, size) if size else unknown,
            "padded_ratio": self._padded(folds, "node_padded"),
            "padded_rank_ratio": self._padded(folds, "rank_padded"),
            "gpu_load_total": self._load_total(folds, 1, "gpu_load_total"),
            "node_load_total": self._load_total(folds, task.cluster.gpus_per_node, "node_load_total"),
            "gpu_load_ratio": self._of_steps(folds, "gpu_load", "gpu_load_ratio"),
            "node_load_ratio": self._of_steps(folds, "node_load", "node_load_ratio"),
            "experts_per_gpu": self._of_steps(folds, "experts"),
            "modelled_step_ms": self._of_steps(folds, "step_ms"),
            "modelled_idle_share": self._of_steps(folds, "idle_share"),
            **self._sizes(folds),
            **self._memory(),
            "kv_handover_bytes_per_request": self._handover(row, folds),
            "fit_seconds": MeasuredValue(float(np.mean([m.seconds for m in folds]))),
        }

    def _spread(self, folds: list[Measured], name: str) -> FloatArray:
        """float64 [F, n] over all usable requests, 0 where a request was not in the fold's held-out part."""
        out = np.zeros((len(folds), len(self.run.requests)))
        for i, fold in enumerate(folds):
            out[i, fold.test] = getattr(fold.requests, name)
        return out

    def _padded(self, folds: list[Measured], name: str) -> MeasuredValue:
        if folds[0].steps is None:
            return MeasuredValue(None)
        top = np.array([getattr(m.steps, name) for m in folds])
        bottom = np.array([getattr(m.steps, name) for m in self.linear])
        if bottom.sum() <= 0:
            return MeasuredValue(None)
        draws = (self.step_weights @ top.ravel()) / (self.step_weights @ bottom.ravel())
        per_fold = tuple(float(v) for v in top.sum(axis=1) / bottom.sum(axis=1))
        return MeasuredValue(float(top.sum() / bottom.sum()), draws, per_fold, "steps")

    def _of_steps(self, folds: list[Measured], name: str, floor: str = "") -> MeasuredValue:
        """Mean over steps: all of them, or those that were timed."""
        if folds[0].steps is None or getattr(folds[0].steps, name) is None:
            return MeasuredValue(None)
        values = np.array([getattr(m.steps, name) for m in folds])
        weights = self.timed_weights if name in ("step_ms", "idle_share") else self.step_weights
        draws = (weights @ values.ravel()) / values.size
        extra = (("noise_floor", self.floors[floor]),) if floor else ()
        return MeasuredValue(float(values.mean()), draws, tuple(float(v) for v in values.mean(axis=1)), "steps", extra)

    def _load_total(self, folds: list[Measured], merge: int, floor: str) -> MeasuredValue:
        """Max / mean of the loads of units of `merge` GPUs; value and draws are means over folds."""
        values, draws = [], np.zeros(len(self.weights))
        for fold in folds:
            load = fold.requests.load
            load = load.reshape(*load.shape[:2], -1, merge).sum(axis=3)
            values.append(float(load_ratio(load.sum(axis=0, dtype=np.float64)).mean()))
            flat = load.reshape(len(load), -1)
            drawn = self.weights[:, fold.test].astype(np.float32) @ flat
            draws += load_ratio(drawn.reshape(len(drawn), *load.shape[1:])).mean(axis=-1) / len(folds)
        return MeasuredValue(
            float(np.mean(values)), draws, tuple(values), self.unit, (("noise_floor", self.floors[floor]),)
        )

    def _sizes(self, folds: list[Measured]) -> dict[str, MeasuredValue]:
        groups = self.run.task.cluster.num_groups
        size, token, least = [], [], []
        for fold in folds:
            counts = np.bincount(fold.requests.group, minlength=groups)
            tokens = np.bincount(fold.requests.group, weights=fold.requests.rows, minlength=groups)
            size.append(float(counts.max() / counts.mean()))
            token.append(float(tokens.max() / tokens.mean()))
            least.append(float(-(-len(fold.test) // groups) / counts.mean()))
        smallest = (("smallest_possible", float(np.mean(least))),)
        return {
            "group_size_ratio": MeasuredValue(float(np.mean(size)), None, tuple(size), extra=smallest),
            "group_token_ratio": MeasuredValue(float(np.mean(token)), None, tuple(token)),
        }

    def _memory(self) -> dict[str, MeasuredValue]:
        shape, task = self.run.requests.shape, self.run.task
        gpus = task.cluster.num_gpus
        weight, lost = None, None
        if shape.expert_bytes is not None:
            weight = (shape.num_experts + task.redundant) / gpus * shape.num_layers * shape.expert_bytes / 1e9
            if shape.kv_bytes_per_token is not None:
                displaced = task.redundant / gpus * shape.num_layers * shape.expert_bytes
                lost = displaced * task.cluster.gpus_per_group / shape.kv_bytes_per_token
        return {"expert_weight_gb_per_gpu": MeasuredValue(weight), "kv_tokens_lost": MeasuredValue(lost)}

    def _handover(self, row: Row, folds: list[Measured]) -> MeasuredValue:
        """Only a group chosen after the real prefill makes the KV cache move."""
        requests = self.run.requests
        per_token = requests.shape.kv_bytes_per_token
        if row.signature != "prefill" or requests.known.tokens is not None or per_token is None:
            return MeasuredValue(None)
        start, stop = requests.spans.signature
        held_out = np.zeros((len(folds), len(requests)))
        for i, fold in enumerate(folds):
            held_out[i, fold.test] = 1.0
        return figure_of_ratio(held_out * (stop - start) * float(per_token), held_out, self.weights, self.unit)


def add_break_even(own: dict[str, MeasuredValue], linear: dict[str, MeasuredValue]) -> None:
    """Beside the KV hand-over: the decode length at which the bytes saved make up for it (None: never)."""
    moved, sent = own["kv_handover_bytes_per_request"], own["inter_node_bytes_per_token"]
    if moved.value is None or sent.value is None:
        return
    saved = (linear["inter_node_bytes_per_token"].value or 0.0) - sent.value
    extra = (("break_even_decode_tokens", moved.value / saved if saved > 0 else None),)
    own["kv_handover_bytes_per_request"] = MeasuredValue(moved.value, moved.draws, moved.folds, moved.unit, extra)


def sorted_load(load: Float32Array) -> FloatArray:
    """float64 [P]: each layer's GPU loads relative to their mean, sorted falling, then averaged over layers."""
    total = load.sum(axis=0, dtype=np.float64)
    relative = total / np.maximum(total.mean(axis=1, keepdims=True), 1e-12)
    return np.asarray(-np.sort(-relative, axis=1).mean(axis=0), np.float64)


def _step_weights(steps: int, draws: int, rng: np.random.Generator) -> FloatArray:
    """float64 [draws, steps]: how often each step is drawn."""
    return rng.multinomial(steps, np.full(steps, 1.0 / steps), size=draws).astype(np.float64)


def _floors(run: EvaluationRun, linear: list[Measured], rng: np.random.Generator) -> dict[str, float]:
    """Noise floors: as many independent picks as a step, or the held-out part, has in one layer."""
    cluster, shape = run.task.cluster, run.requests.shape
    total = float(np.mean([m.requests.picks.sum() for m in linear])) / shape.num_layers
    rows = float(np.mean([m.requests.rows.sum() for m in linear]))
    step = cluster.num_groups * run.live * (total / rows)  # a token may have fewer picks than the model's k
    return {
        "gpu_load_ratio": noise_floor(step, cluster.num_gpus, rng),
        "node_load_ratio": noise_floor(step, cluster.nodes, rng),
        "gpu_load_total": noise_floor(total, cluster.num_gpus, rng),
        "node_load_total": noise_floor(total, cluster.nodes, rng),
    }
