"""How far `moeplan` stays behind the best plan there is: in-sample, on what HiGHS can solve or bound.

Placement: the embedded trace whole, 8 nodes, for the plan's own groups; every layer is solved exactly. Joint and
node mode: cuts of it (few requests, one or two layers) and generated counts, small enough for the exact optimum. The
requests' own decode is their signature here, so what is measured is the search, not the forecast; `moeplan` plans for
requests like these, not for these, and so leaves some of what is gained by fitting them alone. The guard is off where
the bound knows none.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from exact_bounds import (
    Bound,
    best_joint,
    best_nodes,
    best_placement,
    best_under_cap,
    nodes_holding,
    use_by_node,
)
from moeplan import open_trace
from moeplan.cluster import Cluster, Dispatch, request_messages
from moeplan.planning import Plan, PlanningProblem, PlanningTask, RequestSet, read_requests, solve
from moeplan.planning.assignment import equal_groups
from moeplan.planning.problem import GUARD, TokenRows
from moeplan.planning.strategies.moeplan import MoeplanStrategy
from moeplan.types import ModelShape

SECONDS = 60.0  # for each programme
Int64Array = npt.NDArray[np.int64]


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs."""
    requests = read_requests(open_trace("embedded"))
    lines = []
    for redundant in (0, 8, 16):
        lines += _placement(requests, redundant)
    for n, nodes, layers, redundant in ((12, 2, 2, 0), (12, 2, 2, 4), (16, 2, 2, 0), (15, 3, 1, 1), (15, 3, 1, 4)):
        name = f"joint, embedded: {n} requests, {nodes} nodes, {layers} layer{'s' * (layers > 1)}, R {redundant}"
        lines.append((name, _joint([_cut(requests, n, nodes, layers, redundant, seed) for seed in range(3)])))
    for n, nodes, experts, redundant in ((8, 2, 8, 0), (12, 2, 12, 2), (12, 3, 12, 0), (16, 2, 12, 0)):
        name = f"joint, generated: {n} requests, {nodes} nodes, {experts} experts, R {redundant}"
        lines.append((name, _joint([_generated(n, nodes, experts, redundant, seed) for seed in range(5)])))
    for n, nodes, experts, rows in ((12, 2, 12, 8), (12, 3, 12, 8)):
        name = f"remote nodes, generated: {n * rows} rows, {nodes} nodes, {experts} experts"
        lines.append((name, _nodes([_generated(n, nodes, experts, 0, seed, rows=rows) for seed in range(5)])))
    return lines


def _placement(requests: RequestSet, redundant: int) -> list[tuple[str, str]]:
    """Every layer of the whole trace: without a look at load, and within the plan's own load."""
    lines, stream = [], requests.problem(PlanningTask(Cluster(8, 1), redundant)).rows
    for guard in (np.inf, GUARD):
        problem = PlanningProblem(requests.shape, Cluster(8, 1), redundant, requests.use, requests.use, stream)
        use, held, _ = _planned(problem, solve(problem, MoeplanStrategy(guard)))
        found, room = float(use[held].sum()), problem.num_slots // 8
        if np.isinf(guard):
            bound = [best_placement(layer, room) for layer in use]
            text = _gap([(found, sum(b.value for b in bound), all(b.proved for b in bound))], float(use.sum()))
            lines.append((f"placement, embedded: 8 nodes, R {redundant}, unguarded", text))
        else:
            load = _load_ratio(use, held)
            limit = best_under_cap(use, room, load, whole=False)
            text = _gap([(found, limit.value, False)], float(use.sum()))
            lines.append((f"placement, embedded: 8 nodes, R {redundant}, guarded, load {load:.2f}", text))
    return lines


def _joint(problems: list[PlanningProblem]) -> str:
    """Groups and placement together, against the exact optimum."""
    pairs, total = [], 0.0
    for problem in problems:
        use, held, _ = _planned(problem, solve(problem, MoeplanStrategy(guard=np.inf)))
        best = best_joint(problem.use, problem.cluster.nodes, held.sum(axis=2).max(), time_limit=SECONDS)
        pairs.append((float(use[held].sum()), best.value, best.proved))
        total += float(use.sum())
    return _gap(pairs, total)


def _nodes(problems: list[PlanningProblem]) -> str:
    """Distinct remote nodes, for the plan's own groups."""
    pairs, total = [], 0
    for problem in problems:
        problem = dataclasses.replace(problem, dispatch=Dispatch.NODE)
        result, stream = solve(problem, MoeplanStrategy(guard=np.inf)), problem.rows
        _, _, group = _planned(problem, result)
        rows = stream.experts, stream.starts, stream.stops
        reached = request_messages(result.routes, Dispatch.NODE, *rows, group)[:, 2]
        home = np.repeat(group, stream.stops - stream.starts)
        best: Bound = best_nodes(
            stream.experts[:, 0], home, problem.cluster.nodes, problem.shape.num_experts, time_limit=SECONDS
        )
        pairs.append((float(reached.sum()), best.value, best.proved))
        total += len(home)
    found, least = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return (
        f"{found / total:.3f} a token, at least {least / total:.3f}: {100 * (found / least - 1):.1f} % above "
        f"{_whether(pairs)}"
    )


def _gap(pairs: list[tuple[float, float, bool]], picks: float) -> str:
    found, most = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return (
        f"{100 * found / picks:.1f} % at home, at most {100 * most / picks:.1f} %: {100 * (1 - found / most):.1f} % "
        f"below {_whether(pairs)}"
    )


def _whether(pairs: list[tuple[float, float, bool]]) -> str:
    proved = sum(pair[2] for pair in pairs)
    if proved == len(pairs):
        return "the optimum"
    return f"a bound ({proved} of {len(pairs)} proved)" if len(pairs) > 1 else "a bound"


def _planned(
    problem: PlanningProblem, result: Plan
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], Int64Array]:
    """Use by node [L, N, E] in the best groups for this placement, what nodes hold [L, N, E], and the groups [n]."""
    share = result.routes.local_share.reshape(problem.cluster.num_groups, -1)
    group = equal_groups(problem.use.reshape(len(problem.use), -1) @ share.T)  # picks at home, in all
    return use_by_node(problem.use, group, problem.cluster.nodes), nodes_holding(result.placement), group


def _load_ratio(use: npt.NDArray[np.float64], held: npt.NDArray[np.bool_]) -> float:
    """Busiest node over the mean, mean over layers; picks without a copy at home are shared evenly."""
    away = (use * ~held).sum(axis=1, keepdims=True)
    load = (held * (use + away / held.sum(axis=1, keepdims=True))).sum(axis=2)
    return float((load.max(axis=1) / load.mean(axis=1)).mean())


def _cut(requests: RequestSet, n: int, nodes: int, layers: int, redundant: int, seed: int) -> PlanningProblem:
    """n requests of the embedded trace and its first layers."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(requests))[:n])
    shape = dataclasses.replace(requests.shape, num_layers=layers, layer_ids=requests.shape.layer_ids[:layers])
    stream, use = requests.problem(PlanningTask(Cluster(nodes, 1)), chosen).rows, requests.use[chosen, :layers]
    return PlanningProblem(
        shape, Cluster(nodes, 1), redundant, use, use,
        TokenRows(np.ascontiguousarray(stream.experts[:, :layers]), stream.starts, stream.stops),
    )  # fmt: skip


def _generated(n: int, nodes: int, experts: int, redundant: int, seed: int, *, rows: int = 24) -> PlanningProblem:
    """Requests with a taste of their own for experts, three picks a token, one layer."""
    rng = np.random.default_rng([seed, n, nodes, experts])
    taste = rng.normal(size=(n, 1, experts)) + 0.5 * rng.normal(size=(1, 1, experts))
    picks = np.argsort(-(taste + rng.gumbel(size=(n, rows, experts))), axis=2)[:, :, :3].astype(np.uint8)
    use = np.stack([np.bincount(row.ravel(), minlength=experts) for row in picks]).astype(np.uint32)[:, None]
    starts = np.arange(n) * rows
    return PlanningProblem(
        ModelShape("generated", 1, experts, 3), Cluster(nodes, 1), redundant, use, use,
        TokenRows(picks.reshape(-1, 1, 3), starts, starts + rows),
    )  # fmt: skip


if __name__ == "__main__":
    for label, text in bench():
        print(f"{label:62s} {text}", flush=True)
