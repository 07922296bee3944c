"""What requests do under a plan, row by row: expected picks, messages and loads.

Counting is `moeplan.cluster`'s alone; here it is only summed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeplan.arrays import Float32Array, FloatArray, Int64Array
from moeplan.cluster import request_messages
from moeplan.planning.plan import Plan
from moeplan.planning.requests import RequestSet

__all__ = ["RequestFigures", "measure_requests"]

WORKERS = 2


@dataclass(frozen=True)
class RequestFigures:
    """Sums over each request's rows and layers.

    Attributes:
        rows, picks, remote, inter, intra, nodes: float64 [n]: token rows; picks; picks served on another node than the
            group's; expected dispatch messages between nodes and inside nodes; distinct other nodes reached.
        load: float32 [n, L, P], picks that each GPU serves.
        group: int64 [n].
    """

    rows: FloatArray
    picks: FloatArray
    remote: FloatArray
    inter: FloatArray
    intra: FloatArray
    nodes: FloatArray
    load: Float32Array
    group: Int64Array


def measure_requests(requests: RequestSet, chosen: Int64Array, group: Int64Array, plan: Plan) -> RequestFigures:
    """Expected figures of the chosen requests, int64 [n], in their groups, int64 [n]."""
    counts, cluster = requests.measured[chosen], plan.cluster
    load = plan.routes.gpu_load(counts, group)
    by_node = load.reshape(len(chosen), load.shape[1], cluster.nodes, -1).sum(axis=(1, 3), dtype=np.float64)
    picks = counts.sum(axis=(1, 2), dtype=np.float64)
    local = by_node[np.arange(len(chosen)), cluster.group_node(group)]
    span = requests.measured_span[chosen]
    messages = np.zeros((len(chosen), 3))

    def work(part: Int64Array) -> None:
        starts, stops = np.ascontiguousarray(span[part, 0]), np.ascontiguousarray(span[part, 1])
        messages[part] = request_messages(plan.routes, plan.dispatch, requests.experts, starts, stops, group[part])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, np.array_split(np.arange(len(chosen)), WORKERS)))
    rows = (span[:, 1] - span[:, 0]).astype(np.float64)
    remote = np.maximum(picks - local, 0.0)
    return RequestFigures(rows, picks, remote, messages[:, 0], messages[:, 1], messages[:, 2], load, group)
