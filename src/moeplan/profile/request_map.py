"""A map of requests in two dimensions: similar expert use, small distance (arXiv 2604.23150: t-SNE by stage)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.profile.common import FloatArray, Skipped
from moeplan.profile.counts import Counts

__all__ = ["RequestMap", "request_map"]

MAX_REQUESTS, MIN_REQUESTS, COMPONENTS, PERPLEXITY, ITERATIONS = 400, 10, 50, 30.0, 600


@dataclass(frozen=True)
class RequestMap:
    """Coordinates of each request.

    Attributes:
        requests: int64 [m], request numbers; of: how many have rows of the stage.
        domain: int64 [m]; domains: the labels.
        xy: float64 [m, 2], t-SNE coordinates; only neighbourhoods have a meaning.
        same_neighbour: share of requests whose nearest neighbour, by cosine before any reduction, is of their domain.
        same_by_chance: that share if neighbours were drawn at random.
        nearest, typical: mean cosine between a request and its nearest neighbour, and between any two requests.
    """

    requests: npt.NDArray[np.int64]
    of: int
    domain: npt.NDArray[np.int64]
    domains: tuple[str, ...]
    xy: FloatArray
    same_neighbour: float
    same_by_chance: float
    nearest: float
    typical: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "of": self.of,
            "domain": self.domain,
            "domains": self.domains,
            "x": self.xy[:, 0],
            "y": self.xy[:, 1],
            "same_domain_neighbour": self.same_neighbour,
            "same_domain_by_chance": self.same_by_chance,
            "cosine_nearest": self.nearest,
            "cosine_typical": self.typical,
        }


def request_map(counts: Counts, stage: int, kept: npt.NDArray[np.intp], *, seed: int = 0) -> RequestMap | Skipped:
    """t-SNE of the requests' L2-normalised counts [L x E] in one stage, at most 400 of them, after PCA to 50.

    Args:
        counts: of the whole trace.
        stage: `PREFILL` or `DECODE`.
        kept: layer rows to use.
        seed: of the choice of requests, PCA and t-SNE.
    """
    has_rows = counts.stages.lengths(stage) > 0
    rows = np.flatnonzero(has_rows[counts.sample])
    if len(rows) < MIN_REQUESTS:
        what = counts.stages.label(stage)
        return Skipped(f"{what}: a map needs {MIN_REQUESTS} requests with such rows, the trace has {len(rows)}")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng = np.random.default_rng([seed, 6, stage])
    if len(rows) > MAX_REQUESTS:
        rows = np.sort(rng.choice(rows, MAX_REQUESTS, replace=False))
    use = counts.by_request[stage][rows][:, kept].reshape(len(rows), -1).astype(np.float32)
    use /= np.linalg.norm(use, axis=1, keepdims=True)
    domain = counts.domain[counts.sample[rows]]
    cosine = use @ use.T
    np.fill_diagonal(cosine, -np.inf)
    size = np.bincount(domain)
    components = min(COMPONENTS, len(rows) - 1, use.shape[1])
    reduced = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(use)
    if reduced.std() < 1e-9:
        return Skipped(f"{counts.stages.label(stage)}: all requests use the experts equally")
    xy = TSNE(
        2, max_iter=ITERATIONS, perplexity=min(PERPLEXITY, (len(rows) - 1) / 3), init="pca", random_state=seed, n_jobs=1
    ).fit_transform(reduced)
    return RequestMap(
        requests=counts.sample[rows],
        of=int(has_rows.sum()),
        domain=domain,
        domains=counts.domains,
        xy=np.asarray(xy, np.float64),
        same_neighbour=float((domain[cosine.argmax(axis=1)] == domain).mean()),
        same_by_chance=float(((size[domain] - 1) / (len(rows) - 1)).mean()),
        nearest=float(cosine.max(axis=1).mean()),
        typical=float(cosine[~np.eye(len(rows), dtype=np.bool_)].mean()),
    )
