"""How many requests a split needs, and the steps that are replayed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.cluster import Cluster
from moeplan.errors import PlanError
from moeplan.trace.steps import draw_rows

__all__ = ["Draws", "draw_steps", "least_requests", "live_requests"]

Int64Array = npt.NDArray[np.int64]

#: Most requests live in one group at a step, as in the published set-up (8 x 128).
MAX_LIVE = 128


def live_requests(test_sizes: list[int], cluster: Cluster, hint: str | None = None) -> int:
    """B: requests live in each group at a step, the same for every fold and strategy of a run.

    min(128, smallest group - 2), where the smallest of D equal groups of n held-out requests has floor(n / D).

    Args:
        hint: what to do about too few; None: use a trace with more.

    Raises:
        PlanError: too few held-out requests for the groups.
    """
    groups, least, need = cluster.num_groups, min(test_sizes), _least_in_group(cluster)
    smallest = least // groups
    if smallest < need:
        raise PlanError(
            f"{least} held-out requests in {groups} groups are {smallest} a group, but replaying steps needs {need}",
            hint=hint or f"use a trace with {need * groups} usable requests or more",
        )
    return min(MAX_LIVE, smallest - 2)


def least_requests(cluster: Cluster, fit: float) -> int:
    """Usable requests that a comparison takes at least: one a group to fit on, and enough to replay steps."""
    groups = cluster.num_groups
    parts = groups / fit, _least_in_group(cluster) * groups / (1.0 - fit)
    return math.ceil(round(max(parts), 6))  # 12 / (1 - 0.8) is a little more than 60


def _least_in_group(cluster: Cluster) -> int:
    """Two more than are live, and some choice where every GPU is a group."""
    return 8 if cluster.gpus_per_group == 1 and cluster.gpus_per_node > 1 else 3


@dataclass(frozen=True)
class Draws:
    """What chance decides about the steps of one fold, the same for every strategy.

    Attributes:
        key: float32 [S, n], row: int64 [S, n]: who is live, and at which row (`moeplan.trace.steps`).
        order: float32 [S, n], the order of live requests within their group's micro-batch, at random.
    """

    key: npt.NDArray[np.float32]
    row: Int64Array
    order: npt.NDArray[np.float32]


def draw_steps(span: Int64Array, steps: int, rng: np.random.Generator) -> Draws:
    """Keys and positions for `steps` steps over requests with rows span[0] .. span[1] - 1."""
    key, row = draw_rows(span, steps, rng)
    return Draws(key.astype(np.float32, copy=False), row, rng.random(row.shape, dtype=np.float32))
