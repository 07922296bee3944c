"""The figures of one row, from every fold; keys and meanings are those of docs/reference/metrics.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan.arrays import Float32Array, FloatArray
from moeplan.cluster import message_bytes
from moeplan.replay.evaluator import Measured
from moeplan.replay.run import EvaluationRun, Row
from moeplan.replay.statistics import Figure, block_weights, figure_of_ratio, mean_load_ratio, noise_floor

__all__ = ["RowFigures", "add_break_even", "sorted_load"]


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
        weights = block_weights(run.block, settings.draws, rng)
        step_weights = _step_weights(settings.steps * folds, settings.draws, rng)
        timed = folds * min(settings.timing.steps, settings.steps) if settings.timing else 1
        timed_weights = _step_weights(timed, settings.draws, np.random.default_rng([settings.seed, 4]))
        return cls(run, linear, weights, step_weights, timed_weights, _floors(run, linear, rng))

    @property
    def unit(self) -> str:
        """What the bootstrap over requests draws."""
        return "requests" if self.run.settings.block == 1 else "blocks"

    @cached_property
    def hidden(self) -> int | None:
        """Width of a token's hidden state; None where it is not known."""
        return self.run.settings.hidden or self.run.requests.shape.hidden

    def of(self, row: Row, folds: list[Measured]) -> dict[str, Figure]:
        """Every figure of a row by key."""
        shape, task = self.run.requests.shape, self.run.task
        picks, rows = self._spread(folds, "picks"), self._spread(folds, "rows")
        size = None if self.hidden is None else message_bytes(task.dispatch, self.hidden, shape.top_k).both
        unknown = Figure(None)

        def ratio(name: str, bottom: FloatArray, scale: float = 1.0) -> Figure:
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
            "fit_seconds": Figure(float(np.mean([m.seconds for m in folds]))),
        }

    def _spread(self, folds: list[Measured], name: str) -> FloatArray:
        """float64 [F, n] over all usable requests, 0 where a request was not in the fold's held-out part."""
        out = np.zeros((len(folds), len(self.run.requests)))
        for i, fold in enumerate(folds):
            out[i, fold.test] = getattr(fold.requests, name)
        return out

    def _padded(self, folds: list[Measured], name: str) -> Figure:
        if folds[0].steps is None:
            return Figure(None)
        top = np.array([getattr(m.steps, name) for m in folds])
        bottom = np.array([getattr(m.steps, name) for m in self.linear])
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
            values.append(float(mean_load_ratio(load.sum(axis=0, dtype=np.float64))))
            flat = load.reshape(len(load), -1)
            drawn = self.weights[:, fold.test].astype(np.float32) @ flat
            draws += mean_load_ratio(drawn.reshape(len(drawn), *load.shape[1:])) / len(folds)
        return Figure(float(np.mean(values)), draws, tuple(values), self.unit, (("noise_floor", self.floors[floor]),))

    def _sizes(self, folds: list[Measured]) -> dict[str, Figure]:
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
            "group_size_ratio": Figure(float(np.mean(size)), None, tuple(size), extra=smallest),
            "group_token_ratio": Figure(float(np.mean(token)), None, tuple(token)),
        }

    def _memory(self) -> dict[str, Figure]:
        shape, task = self.run.requests.shape, self.run.task
        gpus = task.cluster.num_gpus
        weight, lost = None, None
        if shape.expert_bytes is not None:
            weight = (shape.num_experts + task.redundant) / gpus * shape.num_layers * shape.expert_bytes / 1e9
            if shape.kv_bytes_per_token is not None:
                displaced = task.redundant / gpus * shape.num_layers * shape.expert_bytes
                lost = displaced * task.cluster.gpus_per_group / shape.kv_bytes_per_token
        return {"expert_weight_gb_per_gpu": Figure(weight), "kv_tokens_lost": Figure(lost)}

    def _handover(self, row: Row, folds: list[Measured]) -> Figure:
        """Only a group chosen after the real prefill makes the KV cache move."""
        requests = self.run.requests
        per_token = requests.shape.kv_bytes_per_token
        if row.signature != "prefill" or requests.known.tokens is not None or per_token is None:
            return Figure(None)
        moved, one = np.zeros((len(folds), len(requests))), np.zeros((len(folds), len(requests)))
        for i, fold in enumerate(folds):
            moved[i, fold.test] = requests.prefill_rows[fold.test] * float(per_token)
            one[i, fold.test] = 1.0
        return figure_of_ratio(moved, one, self.weights, self.unit)


def add_break_even(own: dict[str, Figure], linear: dict[str, Figure]) -> None:
    """Beside the KV hand-over: the decode length at which the bytes saved make up for it (None: never)."""
    moved, sent = own["kv_handover_bytes_per_request"], own["inter_node_bytes_per_token"]
    if moved.value is None or sent.value is None:
        return
    saved = (linear["inter_node_bytes_per_token"].value or 0.0) - sent.value
    extra = (("break_even_decode_tokens", moved.value / saved if saved > 0 else None),)
    own["kv_handover_bytes_per_request"] = Figure(moved.value, moved.draws, moved.folds, moved.unit, extra)


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
