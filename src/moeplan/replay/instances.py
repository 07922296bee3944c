"""`compare_instances`: independent instances that each hold the whole model; what grouping and ordering requests saves.

Only the choice of the instance differs, so there is no placement. Held-out requests are put into groups of equal size
by what is known of them, and each decode step reads the distinct experts of the requests that are live in a group. The
same requests, as a queue of one instance, are put in order. Both are compared with chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.arrays import FloatArray, Int64Array, NumberArray
from moeplan.errors import PlanError, UsageError
from moeplan.planning.assignment import random_groups
from moeplan.planning.expected_use import UseForecast, shares
from moeplan.planning.instances import sharing_groups, sharing_points
from moeplan.planning.order import overlap, sharing_order
from moeplan.planning.prediction import Prediction, predictable
from moeplan.planning.requests import RequestSet, blocks, read_requests, split
from moeplan.progress import Progress, silent
from moeplan.replay.distinct import count_distinct_steps
from moeplan.replay.evaluator import fold_rng
from moeplan.replay.queue import queue_experts, random_queue_experts
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.statistics import MeasuredValue, change, figure_of_ratio
from moeplan.trace import Trace
from moeplan.trace.steps import draw_rows, live_members

__all__ = ["InstanceComparison", "InstanceRow", "InstanceTask", "compare_instances"]

#: Random groupings and orders that chance is the mean of.
_CHANCE = 4


@dataclass(frozen=True)
class InstanceTask:
    """Independent instances.

    Attributes:
        instances: D. batch: B, requests that decode together on each; no more than a group has.
        most_tokens: answers of a queue are cut off there; None: they are not.

    Raises:
        UsageError: a value out of range.
    """

    instances: int = 8
    batch: int = 8
    most_tokens: int | None = 200

    def __post_init__(self) -> None:
        for name, value, least in (("--instances", self.instances, 2), ("--batch", self.batch, 2)):
            if not least <= value <= 4096:
                raise UsageError(f"{name} {value} is outside {least}..4096")


@dataclass(frozen=True)
class InstanceRow:
    """One way to group and order requests.

    Attributes:
        signature: what is known of a request: none, domain, prompt-tokens, previous-turn, prefill or oracle.
        experts_per_step: with a group on each instance. ordered: with all requests as a queue of one instance.
    """

    signature: str
    experts_per_step: MeasuredValue
    ordered: MeasuredValue


@dataclass(frozen=True, repr=False)
class InstanceComparison:
    """Distinct experts that a decode step reads, by how requests are grouped and ordered.

    Attributes:
        task: as given. live: requests of a group that are live in a step. rows: `none`, by chance, is the first.
        notes: what to know.
    """

    task: InstanceTask
    live: int
    rows: tuple[InstanceRow, ...]
    notes: tuple[str, ...]

    def row(self, signature: str) -> InstanceRow:
        """A row by its signature."""
        return next(row for row in self.rows if row.signature == signature)

    def __repr__(self) -> str:
        head = f"{self.task.instances} instances, {self.live} requests in a step: distinct experts of a layer"
        lines = [head, f"{'known':14} {'grouped':>9} {'change [95 %]':>24} {'ordered':>9} {'change':>9}"]
        base = self.rows[0]
        for row in self.rows:
            of_groups, of_order = change(row.experts_per_step, base.experts_per_step), change(row.ordered, base.ordered)
            cells = ["", ""]
            if row is not base and of_groups and of_order:
                low, high = of_groups["ci95"]
                cells = [f"{of_groups['value']:+.1%} [{low:+.1%}, {high:+.1%}]", f"{of_order['value']:+.1%}"]
            values = row.experts_per_step.value, row.ordered.value
            lines.append(f"{row.signature:14} {values[0]:9.2f} {cells[0]:>24} {values[1]:9.2f} {cells[1]:>9}")
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; changes are against random groups and orders."""
        base = self.rows[0]
        rows = [
            {
                "signature": row.signature,
                "experts_per_step": row.experts_per_step.to_dict(),
                "change": change(row.experts_per_step, base.experts_per_step),
                "ordered": row.ordered.to_dict(),
                "ordered_change": change(row.ordered, base.ordered),
            }
            for row in self.rows
        ]
        return {
            "instances": self.task.instances,
            "batch": self.task.batch,
            "live": self.live,
            "most_tokens": self.task.most_tokens,
            "rows": rows,
            "notes": list(self.notes),
        }


def compare_instances(
    requests: Trace | RequestSet,
    task: InstanceTask = InstanceTask(),
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    progress: Progress = silent,
) -> InstanceComparison:
    """Group and order held-out requests for independent instances by all that is known of them.

    Whatever is fitted is fitted on the other requests, several times over.

    Raises:
        PlanError: too few requests for the instances.

    Examples:
        >>> import moeplan
        >>> settings = moeplan.EvaluationSettings(folds=1, steps=50)
        >>> table = compare_instances(moeplan.open_trace("embedded"), InstanceTask(4, 8), settings)
        >>> value = [table.row(name).experts_per_step.value for name in ("none", "prefill", "oracle")]
        >>> value[0] > value[1] > value[2]
        True
    """
    if isinstance(requests, Trace):
        requests = read_requests(requests)
    block = blocks(requests.index, settings.block)
    parts = [
        split(requests.domain, block, settings.fit_share, fold_rng(settings.seed, fold, 0))
        for fold in range(settings.folds)
    ]
    least = min(int((~fit).sum()) for fit in parts)
    live = min(task.batch, least // task.instances)
    if live < 2:
        raise PlanError(f"{least} held-out requests for {task.instances} instances", hint="use fewer --instances")
    grouped: dict[str, list[FloatArray]] = {}
    ordered: dict[str, list[float]] = {}
    for fold, fit in enumerate(parts):
        measured = _Fold(requests, np.flatnonzero(fit), np.flatnonzero(~fit), task, live, settings, fold)
        for signature, use in measured.known():
            progress(fold, settings.folds, signature)
            grouped.setdefault(signature, []).append(measured.grouped(use))
            ordered.setdefault(signature, []).append(measured.ordered(use))
    weights = np.random.default_rng([settings.seed, 0x17]).multinomial(
        settings.steps, np.full(settings.steps, 1.0 / settings.steps), size=settings.bootstrap_draws
    )
    rows = []
    for signature, steps in grouped.items():
        top = np.array(steps)
        value = figure_of_ratio(top, np.ones_like(top), weights.astype(np.float64), "steps")
        queue = ordered[signature]
        rows.append(InstanceRow(signature, value, MeasuredValue(float(np.mean(queue)), None, tuple(queue))))
    return InstanceComparison(task, live, tuple(rows), _notes(requests, task, live))


def _notes(requests: RequestSet, task: InstanceTask, live: int) -> tuple[str, ...]:
    few = f"groups have {live} requests, so steps have {live} in place of {task.batch}"
    return (*requests.notes, *([few] if live < task.batch else []))


@dataclass(frozen=True)
class _Fold:
    """One split: fit and test are int64 positions."""

    requests: RequestSet
    fit: Int64Array
    test: Int64Array
    task: InstanceTask
    live: int
    settings: EvaluationSettings
    fold: int

    def known(self) -> Iterator[tuple[str, NumberArray | None]]:
        """Each signature with the expected use of the held-out requests, [n, L, E]; None: nothing is known."""
        requests, fit, test = self.requests, self.fit, self.test
        yield "none", None
        if len(np.unique(requests.domain)) > 1:
            use, domain = shares(requests.use[fit]), requests.domain
            out = np.repeat(use.mean(axis=0)[None], len(test), axis=0)
            for label in np.intersect1d(domain[fit], domain[test]):
                out[domain[test] == label] = use[domain[fit] == label].mean(axis=0)
            yield "domain", out
        given = predictable(requests)
        if given:
            prediction = Prediction.fit(requests, fit, self.settings.seed)
            for signature in given:
                yield signature, prediction.expected_use(requests, test, signature)
        forecast = UseForecast(requests.signature[fit], requests.use[fit], self.settings.seed)
        yield "prefill", forecast.expected_use(requests.signature[test])
        yield "oracle", shares(requests.measured[test])

    def grouped(self, use: NumberArray | None) -> FloatArray:
        """float64 [S]: distinct experts of a layer in a step, mean over groups and layers."""
        count, settings = self.task.instances, self.settings
        key, row = draw_rows(
            self.requests.spans.measured[:, self.test], settings.steps, fold_rng(settings.seed, self.fold, 2)
        )
        if use is None:
            rng = fold_rng(settings.seed, self.fold, 1)
            chosen = [random_groups(len(self.test), count, rng) for _ in range(_CHANCE)]
        else:
            points = sharing_points(use, self.requests.shape.top_k, self.live)
            chosen = [sharing_groups(points, count, settings.seed)]
        total = np.zeros(settings.steps)
        for group in chosen:
            for number in range(count):
                members = live_members(key, np.flatnonzero(group == number), self.live)
                rows = np.take_along_axis(row, members, axis=1)
                found = count_distinct_steps(self.requests.experts, rows, self.requests.shape.num_experts)
                total += found.mean(axis=1) / (count * len(chosen))
        return total

    def ordered(self, use: NumberArray | None) -> float:
        """`experts_per_step` of the held-out requests as a queue of one instance."""
        requests, task, seed = self.requests, self.task, self.settings.seed
        span = requests.spans.measured[:, self.test].T
        how = task.batch, requests.shape.num_experts, task.most_tokens
        if use is None:
            return random_queue_experts(requests.experts, span, *how, orders=_CHANCE, seed=seed)
        tokens = np.diff(requests.spans.measured[:, self.fit], axis=0)[0]
        tokens = tokens if task.most_tokens is None else np.minimum(tokens, task.most_tokens)
        points = sharing_points(use, requests.shape.top_k, task.batch)
        return queue_experts(
            requests.experts, span[sharing_order(points, overlap(task.batch, tokens), seed=seed)], *how
        )
