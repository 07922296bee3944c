"""From what was measured in every fold to the table of figures, with design's keys and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeplan import __version__
from moeplan.cluster import Dispatch, message_bytes
from moeplan.planning.problem import GUARD
from moeplan.planning.requests import RequestSet
from moeplan.planning.strategies.paper import PaperParams
from moeplan.replay.measure import RequestFigures, StepFigures
from moeplan.replay.statistics import (
    Figure,
    block_weights,
    change,
    figure_of_ratio,
    less_than,
    load_ratio,
    noise_floor,
)

if TYPE_CHECKING:
    from moeplan.replay.comparison import Row, Setup

__all__ = ["GUARD", "Comparison", "Measured", "TableRow", "tabulate"]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

#: A layer is pointed out when one expert takes more than this share of its picks.
DOMINATED = 0.5
#: Keys by which one row can beat another: smaller is better in all of them.
BEATEN_BY = (
    "remote_share", "remote_nodes_per_token", "padded_ratio", "gpu_load_ratio", "gpu_load_total", "modelled_step_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What one row gave in one fold. test: int64 [n] into the request set; steps: None where groups are unequal."""

    test: Int64Array
    requests: RequestFigures
    steps: StepFigures | None
    seconds: float
    equal_groups: bool


@dataclass(frozen=True)
class TableRow:
    """One row: figures by key, and whether they count.

    Attributes:
        guarded: equal groups, and node_load_ratio at most 1.05 x linear's.
        gpu_load: float64 [P], each layer's GPU loads over the test part relative to their mean, sorted falling, then
            averaged over layers and folds (for the figure of load by GPU).
        beats: for each key, the rows that this one beats by a paired interval.
    """

    name: str
    strategy: str
    signature: str
    equal_groups: bool
    guarded: bool
    figures: dict[str, Figure]
    versus_linear: dict[str, dict[str, Any] | None]
    gpu_load: FloatArray
    beats: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the figures by key, then what marks the row."""
        out: dict[str, Any] = {}
        for key, figure in self.figures.items():
            out[key] = figure.to_dict()
            if self.versus_linear.get(key):
                out[key]["vs_linear"] = self.versus_linear[key]
        marks = {"signature": self.signature, "equal_groups": self.equal_groups, "guarded": self.guarded}
        return out | marks | {"beats": self.beats, "gpu_load_sorted": [round(float(v), 6) for v in self.gpu_load]}


@dataclass(frozen=True)
class Comparison:
    """The whole table.

    Attributes:
        head: the set-up, as plain values.
        notes: what a reader must know before any figure; method: what the figures rest on. One line each.
    """

    head: dict[str, Any]
    notes: tuple[str, ...]
    method: tuple[str, ...]
    rows: tuple[TableRow, ...]

    def row(self, name: str) -> TableRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: head, notes, strategies by name."""
        said = {"notes": list(self.notes), "method": list(self.method)}
        return self.head | said | {"strategies": {row.name: row.to_dict() for row in self.rows}}


def tabulate(
    requests: RequestSet,
    setup: Setup,
    rows: list[Row],
    measured: dict[str, list[Measured]],
    block: Int64Array,
    live: int,
    notes: tuple[str, ...],
) -> Comparison:
    """Sum over folds, bootstrap, compare with `linear`, mark the guarded rows."""
    rng = np.random.default_rng([setup.seed, 3])
    weights = block_weights(block, setup.draws, rng)
    steps = setup.steps * setup.folds
    step_weights = _step_weights(steps, setup.draws, rng)
    timed = setup.folds * min(setup.timing.steps, setup.steps) if setup.timing else 1
    timed_weights = _step_weights(timed, setup.draws, np.random.default_rng([setup.seed, 4]))  # others stay as they are
    unit = "requests" if setup.block == 1 else "blocks"
    floors = _floors(requests, setup, live, measured["linear"], rng)
    tools = _Tools(requests, setup, weights, step_weights, unit, floors, timed_weights)
    figures = {row.name: tools.figures(row, measured[row.name], measured["linear"]) for row in rows}
    baseline = figures["linear"]
    allowed = GUARD * (baseline["node_load_ratio"].value or np.inf)
    table = []
    for row in rows:
        own = figures[row.name]
        equal = measured[row.name][0].equal_groups
        node_load = own["node_load_ratio"].value
        _break_even(own, baseline, requests.column == "decode")
        table.append(
            TableRow(
                row.name, row.strategy, row.signature, equal,
                equal and node_load is not None and node_load <= allowed,
                own,
                {key: change(own[key], baseline[key]) for key in own if key != "fit_seconds"},
                np.mean([_sorted_load(m.requests.load) for m in measured[row.name]], axis=0),
                {key: [other for other in figures if less_than(own[key], figures[other][key])] for key in BEATEN_BY},
            )
        )  # fmt: skip
    head = _head(requests, setup, measured["linear"], live)
    return Comparison(
        head,
        (*requests.notes, *_byte_notes(requests, setup), *_time_notes(requests, setup, live), *_layer_notes(requests)),
        (*_method(requests, setup, live, unit), *notes),
        tuple(table),
    )


def _step_weights(steps: int, draws: int, rng: np.random.Generator) -> FloatArray:
    """float64 [draws, steps]: how often each step is drawn."""
    return rng.multinomial(steps, np.full(steps, 1.0 / steps), size=draws).astype(np.float64)


@dataclass(frozen=True)
class _Tools:
    """What the figures of all rows share."""

    requests: RequestSet
    setup: Setup
    weights: FloatArray
    step_weights: FloatArray
    unit: str
    floors: dict[str, float]
    timed_weights: FloatArray

    def figures(self, row: Row, folds: list[Measured], linear: list[Measured]) -> dict[str, Figure]:
        shape, setup = self.requests.shape, self.setup
        layers = shape.num_layers
        picks, rows = self._spread(folds, "picks"), self._spread(folds, "rows")
        hidden = setup.hidden or shape.hidden
        size = None if hidden is None else message_bytes(setup.dispatch, hidden, shape.top_k).both
        unknown = Figure(None)

        def ratio(name: str, bottom: FloatArray, scale: float = 1.0) -> Figure:
            return figure_of_ratio(self._spread(folds, name), bottom, self.weights, self.unit, scale)

        out = {
            "remote_share": ratio("remote", picks),
            "remote_nodes_per_token": ratio("nodes", rows, 1.0 / layers),
            "inter_node_bytes_per_token": ratio("inter", rows, size) if size else unknown,
            "intra_node_bytes_per_token": ratio("intra", rows, size) if size else unknown,
            "padded_ratio": self._padded(folds, linear, "node_padded"),
            "padded_rank_ratio": self._padded(folds, linear, "rank_padded"),
            "gpu_load_total": self._load_total(folds, 1, "gpu_load_total"),
            "node_load_total": self._load_total(folds, setup.cluster.gpus_per_node, "node_load_total"),
            "gpu_load_ratio": self._of_steps(folds, "gpu_load", "gpu_load_ratio"),
            "node_load_ratio": self._of_steps(folds, "node_load", "node_load_ratio"),
            "experts_per_gpu": self._of_steps(folds, "experts"),
            "modelled_step_ms": self._of_steps(folds, "step_ms"),
            "modelled_idle_share": self._of_steps(folds, "idle_share"),
        }
        return out | self._sizes(folds) | self._memory() | self._handover(row, folds) | {
            "fit_seconds": Figure(float(np.mean([m.seconds for m in folds]))),
        }  # fmt: skip

    def _spread(self, folds: list[Measured], name: str) -> FloatArray:
        """float64 [F, n] over all usable requests, 0 where a request was not in the fold's test part."""
        out = np.zeros((len(folds), len(self.requests)))
        for i, fold in enumerate(folds):
            out[i, fold.test] = getattr(fold.requests, name)
        return out

    def _padded(self, folds: list[Measured], linear: list[Measured], name: str) -> Figure:
        if folds[0].steps is None:
            return Figure(None)
        top = np.array([getattr(m.steps, name) for m in folds])
        bottom = np.array([getattr(m.steps, name) for m in linear])
        if bottom.sum() <= 0:
            return Figure(None)
        draws = (self.step_weights @ top.ravel()) / (self.step_weights @ bottom.ravel())
        per_fold = tuple(float(v) for v in top.sum(axis=1) / bottom.sum(axis=1))
        return Figure(float(top.sum() / bottom.sum()), draws, per_fold, "steps")

    def _of_steps(self, folds: list[Measured], name: str, floor: str = "") -> Figure:
        """Mean over steps: all of them, or those that were timed."""
        if folds[0].steps is None or getattr(folds[0].steps, name) is None:
            return Figure(None)
        values = np.array([getattr(m.steps, name) for m in folds])
        weights = self.timed_weights if name in ("step_ms", "idle_share") else self.step_weights
        draws = (weights @ values.ravel()) / values.size
        extra = (("noise_floor", self.floors[floor]),) if floor else ()
        return Figure(float(values.mean()), draws, tuple(float(v) for v in values.mean(axis=1)), "steps", extra)

    def _load_total(self, folds: list[Measured], merge: int, floor: str) -> Figure:
        """Max / mean of the loads of units of `merge` GPUs; value and draws are means over folds."""
        values, draws = [], np.zeros(len(self.weights))
        for fold in folds:
            load = fold.requests.load
            load = load.reshape(*load.shape[:2], -1, merge).sum(axis=3)
            values.append(float(load_ratio(load.sum(axis=0, dtype=np.float64))))
            flat = load.reshape(len(load), -1)
            drawn = self.weights[:, fold.test].astype(np.float32) @ flat
            draws += load_ratio(drawn.reshape(len(drawn), *load.shape[1:])) / len(folds)
        return Figure(float(np.mean(values)), draws, tuple(values), self.unit, (("noise_floor", self.floors[floor]),))

    def _sizes(self, folds: list[Measured]) -> dict[str, Figure]:
        groups = self.setup.cluster.num_groups
        size, token, least = [], [], []
        for fold in folds:
            counts = np.bincount(fold.requests.group, minlength=groups)
            tokens = np.bincount(fold.requests.group, weights=fold.requests.rows, minlength=groups)
            size.append(float(counts.max() / counts.mean()))
            token.append(float(tokens.max() / tokens.mean()))
            least.append(float(-(-len(fold.test) // groups) / counts.mean()))
        smallest = (("smallest_possible", float(np.mean(least))),)
        return {
            "group_size_ratio": Figure(float(np.mean(size)), None, tuple(size), extra=smallest),
            "group_token_ratio": Figure(float(np.mean(token)), None, tuple(token)),
        }

    def _memory(self) -> dict[str, Figure]:
        shape, setup = self.requests.shape, self.setup
        gpus = setup.cluster.num_gpus
        weight, lost = None, None
        if shape.expert_bytes is not None:
            weight = (shape.num_experts + setup.redundant) / gpus * shape.num_layers * shape.expert_bytes / 1e9
            if shape.kv_bytes_per_token is not None:
                displaced = setup.redundant / gpus * shape.num_layers * shape.expert_bytes
                lost = displaced * setup.cluster.gpus_per_group / shape.kv_bytes_per_token
        return {"expert_weight_gb_per_gpu": Figure(weight), "kv_tokens_lost": Figure(lost)}

    def _handover(self, row: Row, folds: list[Measured]) -> dict[str, Figure]:
        """Only a group chosen after the real prefill makes the KV cache move."""
        per_token = self.requests.shape.kv_bytes_per_token
        if row.signature != "prefill" or self.requests.stands_in is not None or per_token is None:
            return {"kv_handover_bytes_per_request": Figure(None)}
        moved, one = np.zeros((len(folds), len(self.requests))), np.zeros((len(folds), len(self.requests)))
        for i, fold in enumerate(folds):
            moved[i, fold.test] = self.requests.prefill_rows[fold.test] * float(per_token)
            one[i, fold.test] = 1.0
        return {"kv_handover_bytes_per_request": figure_of_ratio(moved, one, self.weights, self.unit)}


def _break_even(own: dict[str, Figure], linear: dict[str, Figure], decode_only: bool) -> None:
    """Beside the KV hand-over: the decode length at which the bytes saved make up for it (None: never)."""
    moved, sent = own["kv_handover_bytes_per_request"], own["inter_node_bytes_per_token"]
    if moved.value is None or sent.value is None or not decode_only:
        return
    saved = (linear["inter_node_bytes_per_token"].value or 0.0) - sent.value
    extra = (("break_even_decode_tokens", moved.value / saved if saved > 0 else None),)
    own["kv_handover_bytes_per_request"] = Figure(moved.value, moved.draws, moved.folds, moved.unit, extra)


def _sorted_load(load: npt.NDArray[np.float32]) -> FloatArray:
    total = load.sum(axis=0, dtype=np.float64)
    relative = total / np.maximum(total.mean(axis=1, keepdims=True), 1e-12)
    return np.asarray(-np.sort(-relative, axis=1).mean(axis=0), np.float64)


def _floors(
    requests: RequestSet, setup: Setup, live: int, linear: list[Measured], rng: np.random.Generator
) -> dict[str, float]:
    """Noise floors: as many independent picks as a step, or the test part, has in one layer."""
    cluster, layers = setup.cluster, requests.shape.num_layers
    step = cluster.num_groups * live * requests.shape.top_k
    total = float(np.mean([m.requests.picks.sum() for m in linear])) / layers
    return {
        "gpu_load_ratio": noise_floor(step, cluster.num_gpus, rng),
        "node_load_ratio": noise_floor(step, cluster.nodes, rng),
        "gpu_load_total": noise_floor(total, cluster.num_gpus, rng),
        "node_load_total": noise_floor(total, cluster.nodes, rng),
    }


def _method(requests: RequestSet, setup: Setup, live: int, unit: str) -> list[str]:
    cluster, timing = setup.cluster, setup.timing
    return [
        f"per request: all {requests.column} rows of the measured requests; intervals bootstrap over {unit}",
        f"per step: {setup.steps} steps a fold, {live} live requests in each of {cluster.num_groups} groups; intervals "
        f"bootstrap over steps",
        *([timing.method(cluster, setup.steps, live, requests.column)] if timing else []),
        "signatures not shown: prompt-tokens (a trace holds no token ids), previous-turn (it holds no conversations)",
        f"guard ok: equal groups, and node load at most {GUARD:g} x linear's; other rows do not count",
    ]


def _time_notes(requests: RequestSet, setup: Setup, live: int) -> list[str]:
    if setup.timing is None:
        return []
    return setup.timing.notes(setup.cluster, requests.shape.num_layers, setup.redundant, live)


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


def _byte_notes(requests: RequestSet, setup: Setup) -> list[str]:
    notes = []
    hidden = setup.hidden or requests.shape.hidden
    if hidden is None:
        notes.append("bytes are not given: the trace does not say the model's hidden size (--hidden)")
    elif note := message_bytes(setup.dispatch, hidden, requests.shape.top_k).note:
        notes.append(note)
    if setup.dispatch is Dispatch.ALLGATHER:
        notes.append("allgather sends every token to every GPU: no plan changes its bytes, only its load")
    return notes


def _head(requests: RequestSet, setup: Setup, linear: list[Measured], live: int) -> dict[str, Any]:
    cluster = setup.cluster
    return {
        "moeplan": __version__,
        "model": requests.shape.to_dict(),
        "column": requests.column,
        "signature_stands_in": requests.stands_in,
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
            "redundant": setup.redundant,
            "dispatch": setup.dispatch.value,
            "replica_rule": setup.rule.value,
            "fit": setup.fit if any(len(m.test) < len(requests) for m in linear) else None,
            "folds": setup.folds,
            "seed": setup.seed,
            "block": setup.block,
            "steps": setup.steps,
            "live_per_group": live,
            "bootstrap_draws": setup.draws,
            "clusters": next((s.clusters for s in setup.strategies if isinstance(s, PaperParams)), None),
            "hidden": setup.hidden or requests.shape.hidden,
            "timing": setup.timing.to_dict(cluster, setup.steps) if setup.timing else None,
        },
    }
