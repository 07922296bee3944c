"""From a request's signature to its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from moeplan.arrays import BoolArray, Float32Array, FloatArray, Int64Array, NumberArray
from moeplan.cluster import Routes

__all__ = ["ClusterRouter", "LinearRouter", "LocalityRouter", "Router"]


class Router(Protocol):
    """Scores groups for requests; the caller makes the groups equal, or takes the best of each.

    Attributes:
        kind: what plan.json calls it. arrays: what a stored plan keeps of it, by file name.
    """

    kind: ClassVar[str]

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]: ...

    def scores(self, signatures: NumberArray) -> FloatArray:
        """float64 [n, D] from signatures [n, L, E]: the higher, the better the group suits the request."""
        ...


@dataclass(frozen=True)
class LocalityRouter:
    """The best group is the one whose node holds most of the signature.

    Attributes:
        local: float64 [D, L, E], share of a group's picks of an expert that its own node serves.
    """

    kind: ClassVar[str] = "locality"
    local: FloatArray

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Nothing: it follows from the placement."""
        return {}

    @classmethod
    def of(cls, routes: Routes) -> LocalityRouter:
        """The locality request router of a placement."""
        return cls(routes.local_share)

    def scores(self, signatures: NumberArray) -> FloatArray:
        """Expected share of the signature's picks that stay on the group's node."""
        n, groups = len(signatures), len(self.local)
        flat = signatures.reshape(n, -1).astype(np.float32)
        total = np.maximum(flat.sum(axis=1, keepdims=True), 1.0)
        return np.asarray((flat @ self.local.reshape(groups, -1).astype(np.float32).T) / total, np.float64)


@dataclass(frozen=True)
class ClusterRouter:
    """The published request router: the cluster whose centroid is nearest, then that cluster's groups.

    Nearest by angle: a signature is shorter and noisier than the decode that made the centroids, so the distances
    between them depend on its length as much as on its direction.

    Attributes:
        centroids: float32 [K, L * E], of L2-normalised counts, each of length 1.
        serves: bool [K, D], which groups a cluster was mapped to.
    """

    kind: ClassVar[str] = "clusters"
    centroids: Float32Array
    serves: BoolArray

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Both."""
        return {"centroids": self.centroids, "serves": self.serves}

    def similarity(self, signatures: NumberArray) -> FloatArray:
        """float64 [n, K]: the cosine between the signature and each centroid."""
        return np.asarray(normalised(signatures) @ self.centroids.T, np.float64)

    def scores(self, signatures: NumberArray) -> FloatArray:
        """The similarity of the most similar of each group's clusters."""
        similarity = self.similarity(signatures)[:, :, None]
        return np.asarray(np.where(self.serves[None], similarity, -np.inf).max(axis=1), np.float64)

    def nearest_groups(self, signatures: NumberArray) -> Int64Array:
        """int64 [n]: the nearest cluster's group, so groups are unequal; several groups of a cluster take turns."""
        cluster = self.similarity(signatures).argmax(axis=1)
        group = np.zeros(len(cluster), np.int64)
        for k in np.unique(cluster):
            members, groups = np.flatnonzero(cluster == k), np.flatnonzero(self.serves[k])
            group[members] = groups[np.arange(len(members)) % len(groups)]
        return group


@dataclass(frozen=True)
class LinearRouter:
    """A learnt linear score of the signature; see `moeplan.planning.forecast`.

    Attributes:
        weights: float32 [D, L * E], on the signature as `by_layer` gives it. intercept: float64 [D].
    """

    kind: ClassVar[str] = "linear"
    weights: Float32Array
    intercept: FloatArray

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Both."""
        return {"weights": self.weights, "intercept": self.intercept}

    def scores(self, signatures: NumberArray) -> FloatArray:
        """Expected share of the request's decode that each group's node serves."""
        return np.asarray(by_layer(signatures) @ self.weights.T + self.intercept, np.float64)


def by_layer(counts: NumberArray) -> Float32Array:
    """float32 [n, L * E]: each request's counts as shares of a layer's picks, over L (all layers weigh the same)."""
    layers = counts.astype(np.float32)
    layers /= np.maximum(layers.sum(axis=2, keepdims=True) * layers.shape[1], 1e-12)
    return layers.reshape(len(counts), -1)


def normalised(counts: NumberArray) -> Float32Array:
    """float32 [n, L * E]: each request's counts as a vector of length 1 (zero stays zero)."""
    flat = counts.reshape(len(counts), -1).astype(np.float32)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12), np.float32)
