"""Leakage: predict a request's type from its prefill counts in one layer (arXiv 2604.23150).

A multinomial logistic regression per layer on raw prefill counts, 80:20, classes of equal size. The control
is the same with shuffled training labels: its accuracy is what the method reaches without any information.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped, evenly_spaced
from moeplan.profile.counts import PREFILL, Counts

__all__ = ["Leakage", "leakage"]

MIN_CLASS, MAX_LAYERS, MAX_REQUESTS = 10, 32, 1_400
#: Small sets are split several times, so that the result does not depend on one split.
TESTED_AT_LEAST, MAX_SPLITS = 250, 5
ITERATIONS = 100


@dataclass(frozen=True)
class Leakage:
    """Accuracy of predicting the request type, per layer.

    Attributes:
        layers: int64 [l], layer rows measured (evenly spaced when there are many); layer_ids: the model's.
        accuracy, control: float64 [l], on held-out requests; with true and with shuffled training labels.
        chance: 1 / classes.
        classes: the domains; per_class: requests of each; left_out: domains with fewer than 10.
        splits: 80:20 splits per layer.
        all_layers: layers of the trace; rows: name of the rows counted.
    """

    layers: npt.NDArray[np.intp]
    layer_ids: tuple[int, ...]
    accuracy: FloatArray
    control: FloatArray
    chance: float
    classes: tuple[str, ...]
    per_class: int
    left_out: tuple[str, ...]
    splits: int
    all_layers: int
    rows: str

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        best = int(np.argmax(self.accuracy))
        mean, control = float(self.accuracy.mean()), float(self.control.mean())
        percent = [f"{100 * share:.0f} %" for share in (mean, self.accuracy[best], self.chance, control)]
        figures = (
            f"one layer's routing ({self.rows}) predicts the domain of held-out requests ({len(self.classes)} domains) "
            f"with {percent[0]} accuracy on average and {percent[1]} in the best layer ({self.layer_ids[best]}); "
            f"chance {percent[2]}, shuffled labels {percent[3]}"
        )
        error = 2 * np.sqrt(self.chance * (1 - self.chance) / max(1.0, 0.2 * self.per_class * len(self.classes)))
        if mean <= max(control, self.chance) + error:
            return f"No leak found: {figures}."
        return f"Leak found: {figures}. Expert loads reveal the domain of a request without its text."

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layer_ids,
            "accuracy": self.accuracy,
            "control_shuffled": self.control,
            "mean_accuracy": self.accuracy.mean(),
            "mean_control": self.control.mean(),
            "chance": self.chance,
            "classes": self.classes,
            "requests_per_class": self.per_class,
            "left_out": self.left_out,
            "splits": self.splits,
            "rows": self.rows,
            "meaning": self.meaning,
        }


def leakage(counts: Counts, kept: npt.NDArray[np.intp], *, seed: int = 0, progress: Any = None) -> Leakage | Skipped:
    """Request-type classification per layer, with its shuffled control.

    Args:
        counts: of the whole trace.
        kept: layer rows to choose from.
        seed: of the downsampling, the splits and the shuffles.
        progress: called with (layers done, layers, note).
    """
    members = counts.members(PREFILL)
    size = np.array([len(rows) for rows in members])
    classes = np.flatnonzero(size >= MIN_CLASS)
    left_out = tuple(counts.domains[d] for d in np.flatnonzero((size > 0) & (size < MIN_CLASS)))
    if len(classes) < 2:
        what = f"{counts.stages.prefill} rows"
        return Skipped(
            f"needs 2 domains with {MIN_CLASS} requests that have {what}; the trace has {len(classes)}"
            + ("" if counts.stages.lengths(PREFILL)[counts.sample].any() else " (no prefill; see --signature-tokens)")
        )
    rng = np.random.default_rng([seed, 5])
    per_class = int(min(size[classes].min(), max(MIN_CLASS, MAX_REQUESTS // len(classes))))
    rows = np.concatenate([rng.choice(members[d], per_class, replace=False) for d in classes])
    label = np.repeat(np.arange(len(classes)), per_class)
    held_out = max(1, round(0.2 * per_class))
    splits = int(np.clip(TESTED_AT_LEAST // (held_out * len(classes)), 1, MAX_SPLITS))
    folds = [_split(per_class, held_out, len(classes), rng) for _ in range(splits)]

    layers = evenly_spaced(kept, MAX_LAYERS)
    accuracy, control = np.zeros(len(layers)), np.zeros(len(layers))
    for i, layer in enumerate(layers):
        features = counts.by_request[PREFILL][rows, layer].astype(np.float64)
        # One scale for all features: the solver's step and penalty depend on the unit of the counts.
        features /= max(float(features.std()), 1e-9)
        for train, test in folds:
            accuracy[i] += _accuracy(features, label[train], label[test], train, test) / splits
            control[i] += _accuracy(features, rng.permutation(label[train]), label[test], train, test) / splits
        if progress:
            progress(i + 1, len(layers), "request types")
    return Leakage(
        layers=layers,
        layer_ids=tuple(counts.shape.layer_ids[i] for i in layers),
        accuracy=accuracy,
        control=control,
        chance=1 / len(classes),
        classes=tuple(counts.domains[d] for d in classes),
        per_class=per_class,
        left_out=left_out,
        splits=splits,
        all_layers=counts.shape.num_layers,
        rows=counts.stages.phrase(PREFILL),
    )


def _split(per_class: int, held_out: int, classes: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """(train, test) row numbers, `held_out` of every class in the test."""
    order = np.stack([rng.permutation(per_class) + c * per_class for c in range(classes)])
    return order[:, held_out:].ravel(), order[:, :held_out].ravel()


def _accuracy(features: FloatArray, train_label: Any, test_label: Any, train: Any, test: Any) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # accuracy converges long before the loss
        model = LogisticRegression(max_iter=ITERATIONS, tol=1e-3).fit(features[train], train_label)
    return float((model.predict(features[test]) == test_label).mean())
