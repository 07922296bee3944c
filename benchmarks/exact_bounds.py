"""How good can a plan be at best? Exact optima and bounds on small instances, by HiGHS through SciPy.

Heuristics are held to these: `benchmarks/bounds.py` prints how far they stay behind. Counts are of the requests that
are given (in sample), homes are nodes, and a copy at home serves its node's picks, as under both nearest rules.

Names: L layers, N nodes, E experts, n requests; `room` is (E + R) / N, the slots of a node in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moeplan.errors import PlanError
from moeplan.types import Placement

__all__ = [
    "Bound",
    "best_joint",
    "best_nodes",
    "best_placement",
    "best_under_cap",
    "nodes_holding",
    "use_by_node",
]

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Numbers = npt.ArrayLike

_OPTIMAL, _INFEASIBLE = 0, 2  # `milp`'s status


@dataclass(frozen=True)
class Bound:
    """What no plan can beat, and the plan that comes nearest.

    Attributes:
        value: picks at home at most (`best_nodes`: remote nodes at least); infinite where time was too short for any.
        found: what the best plan found has; None where there is none, or the programme is a relaxation.
        proved: `found` is the optimum.
        gap: HiGHS's relative gap between its best solution and its bound when it stopped; infinite without a solution.
        held: bool [L, N, E], which node holds which expert in the plan found.
        group: int64 [n], the node of each request, where groups were free.
    """

    value: float
    found: float | None
    proved: bool
    gap: float
    held: BoolArray | None = None
    group: Int64Array | None = None


def nodes_holding(placement: Placement) -> BoolArray:
    """bool [L, N, E]: whether a node holds a copy."""
    layers, slots = placement.slots.shape
    held = np.zeros((layers, placement.nodes, placement.num_experts), np.bool_)
    node = np.arange(slots) // (slots // placement.nodes)
    held[np.arange(layers)[:, None], node[None], placement.slots] = True
    return held


def use_by_node(use: npt.NDArray[np.number], group: Int64Array, nodes: int) -> FloatArray:
    """float64 [L, N, E]: picks by the requests at each node, from use [n, L, E]."""
    out = np.zeros((use.shape[1], nodes, use.shape[2]))
    np.add.at(out.transpose(1, 0, 2), group, use.astype(np.float64))
    return out


def best_placement(use: FloatArray, room: int) -> Bound:
    """Most picks at home of one layer, for given groups, whatever the load.

    A transportation problem (nodes give `room` copies each, experts take one or more, two never on a node): its
    vertices are whole, so the linear programme is exact.

    Args:
        use: float64 [N, E], picks of each expert by the requests at each node.

    Raises:
        PlanError: the slots do not suffice, or a node has more than there are experts.
    """
    nodes, experts = use.shape
    _check_room(nodes, experts, room)
    programme = _Programme()
    held = programme.variables(use.shape, gain=use)
    _hold(programme, held[None], room)
    return _placed(programme, held[None], use[None], 60.0, exact=True)


def best_under_cap(use: FloatArray, room: int, cap: float, *, whole: bool = True, time_limit: float = 60.0) -> Bound:
    """Most picks at home for given groups while the busiest node stays within a cap.

    The cap is on the mean over layers of the busiest node's picks over the mean node's, as `node_load_total` has it.
    Without copies an expert's picks are all served where it is, and the mixed-integer programme is exact. With copies,
    those of a node without one may be shared among the copies in any way that keeps the cap: the replica rules share
    evenly, so this is a relaxation, and its value a bound that need not be reached.

    Args:
        use: float64 [L, N, E], picks of each expert by the requests at each node.
        cap: at least 1.
        whole: False lets copies be split, for a weaker bound at the price of a linear programme.
        time_limit: seconds.

    Raises:
        PlanError: no placement keeps the cap, or the slots do not suffice.
    """
    layers, nodes, experts = use.shape
    _check_room(nodes, experts, room)
    programme = _Programme()
    held = programme.variables(use.shape, gain=use, whole=whole)
    total = use.sum(axis=1, keepdims=True)
    if room * nodes == experts:
        _hold(programme, held, room)
        served, weight = held, np.broadcast_to(total, use.shape)
    else:
        _hold(programme, held, room, least=0)  # a slot may hold a second copy, as EPLB's sometimes do
        away = programme.variables(use.shape, most=np.inf)  # picks that come from nodes without a copy
        # Only a copy serves; what leaves the nodes without one arrives at some copy.
        programme.limit([(away, 1.0), (held, use - total)], high=0.0, over=())
        programme.limit([(away, 1.0), (held, use)], low=total[:, 0], high=total[:, 0], over=(1,))
        served, weight = np.concatenate([held, away], axis=2), np.concatenate([use, np.ones_like(use)], axis=2)
    busiest = programme.variables((layers, 1), most=np.inf)  # in multiples of the mean
    mean = total.sum(axis=(1, 2)) / nodes
    programme.limit(
        [(served, weight), (np.broadcast_to(busiest[:, :, None], (layers, nodes, 1)), -mean[:, None, None])],
        high=0.0, over=(2,),
    )  # fmt: skip
    programme.limit([(busiest, 1.0)], high=cap * layers, over=(0, 1))
    return _placed(programme, held, use, time_limit, exact=whole and room * nodes == experts)


def best_joint(use: npt.NDArray[np.number], nodes: int, room: int, *, time_limit: float = 60.0) -> Bound:
    """Most picks at home when the requests' equal groups, one to a node, are free too.

    The product "request i is at node d, and d holds e" gets a variable of its own. Once groups are whole the rest is
    `best_placement`, so only they need be integers. Two families of cuts (each side's sum, multiplied by the
    other side) make the linear relaxation tight enough to be of use; nodes are alike, so request i goes to a node whose
    predecessor has an earlier request.

    Args:
        use: [n, L, E], picks of each request.
        time_limit: seconds. 16 requests in 3 groups with one layer of 32 experts are solved in 30.

    Raises:
        PlanError: the slots do not suffice, or there are more nodes than requests.
    """
    n, layers, experts = use.shape
    _check_room(nodes, experts, room)
    if n < nodes:
        raise PlanError(f"{nodes} groups for {n} requests")
    least, most = n // nodes, -(-n // nodes)
    programme = _Programme()
    member = programme.variables((n, nodes), whole=True)
    held = programme.variables((layers, nodes, experts))
    _hold(programme, held, room)
    programme.limit([(member, 1.0)], low=1.0, high=1.0, over=(1,))
    programme.limit([(member, 1.0)], low=least, high=most, over=(0,))
    for i in range(n):
        programme.fix(member[i, i + 1 :], 0.0)
        for d in range(1, min(i, nodes - 1) + 1):
            programme.limit([(member[None, i, d], 1.0), (member[:i, d - 1], -1.0)], high=0.0, over=(0,))

    request, layer, expert = np.nonzero(use)
    both = programme.variables((len(request), nodes), gain=use[request, layer, expert][:, None].astype(np.float64))
    at, there = member[request], held[layer, :, expert]
    programme.limit([(both, 1.0), (at, -1.0)], high=0.0, over=())
    programme.limit([(both, 1.0), (there, -1.0)], high=0.0, over=())
    for i, k in np.unique(np.stack([request, layer]), axis=1).T:  # a node holds no more than `room` of i's experts
        programme.limit([(both[(request == i) & (layer == k)], 1.0), (member[None, i], -room)], high=0.0, over=(0,))
    for k, e in np.unique(np.stack([layer, expert]), axis=1).T:  # and no more than its requests find e there
        programme.limit([(both[(layer == k) & (expert == e)], 1.0), (held[k, None, :, e], -most)], high=0.0, over=(0,))

    solved = programme.solve(time_limit)
    if solved.x is None:
        return Bound(solved.bound, None, False, np.inf)
    group = np.asarray(solved.x[member].argmax(axis=1), np.int64)
    placed = [best_placement(layer_use, room) for layer_use in use_by_node(use, group, nodes)]
    found = sum(bound.value for bound in placed)
    held_there = np.concatenate([bound.held for bound in placed if bound.held is not None])
    return Bound(found if solved.proved else solved.bound, found, solved.proved, solved.gap, held_there, group)


def best_nodes(
    rows: npt.NDArray[np.integer], home: Int64Array, nodes: int, experts: int, *, time_limit: float = 60.0
) -> Bound:
    """Fewest distinct other nodes that token rows of one layer reach, for given homes, without copies.

    Args:
        rows: integers [T, k], the experts of each token; home: int64 [T], its node.
        time_limit: seconds. On 3 nodes with 12 experts, 200 rows are solved in 10; on 4 nodes with 32, 60 rows in 20.

    Raises:
        PlanError: the experts do not divide over the nodes.
    """
    room = experts // nodes
    if room * nodes != experts:
        raise PlanError(f"{experts} experts do not divide over {nodes} nodes")
    kinds, times = np.unique(np.column_stack([home, np.sort(rows, axis=1)]), axis=0, return_counts=True)
    at, picks = kinds[:, 0], kinds[:, 1:]
    programme = _Programme()
    held = programme.variables((1, nodes, experts), whole=True)
    _hold(programme, held, room)
    cost = np.repeat(times[:, None].astype(np.float64), nodes, axis=1)
    cost[np.arange(len(at)), at] = 0.0
    reached = programme.variables(cost.shape, gain=-cost)
    picked = held[0].T[picks].transpose(0, 2, 1)  # [T, N, k]
    for j in range(picks.shape[1]):
        programme.limit([(reached, -1.0), (picked[:, :, j], 1.0)], high=0.0, over=())
    # A node holds `room` of a token's distinct experts at most: cuts, where a token has more than that.
    programme.limit([(reached, 1.0)], low=np.ceil([len(set(row)) / room for row in picks.tolist()]), over=(1,))
    solved = programme.solve(time_limit)
    value = float(np.ceil(-solved.bound - 1e-6)) if np.isfinite(solved.bound) else 0.0  # a whole number, as are counts
    if solved.x is None:
        return Bound(value, None, False, np.inf)
    where = solved.x[held] > 0.5
    serving = np.sort(where[0].argmax(axis=0)[picks], axis=1)  # [T, k], the node of each pick
    first = np.diff(serving, axis=1, prepend=-1) > 0
    found = float(times @ (first & (serving != at[:, None])).sum(axis=1))
    return Bound(found if solved.proved else value, found, solved.proved, solved.gap, where)


def _check_room(nodes: int, experts: int, room: int) -> None:
    if room * nodes < experts or room > experts:
        raise PlanError(f"{room} slots a node on {nodes} nodes for {experts} experts")


def _hold(programme: _Programme, held: Int64Array, room: int, *, least: int | None = None) -> None:
    """Each node holds `room` experts in each layer (or `least` and up), each expert is held somewhere."""
    spare = room * held.shape[1] > held.shape[2]
    programme.limit([(held, 1.0)], low=room if least is None else least, high=room, over=(2,))
    programme.limit([(held, 1.0)], low=1.0, high=np.inf if spare else 1.0, over=(1,))


def _placed(programme: _Programme, held: Int64Array, use: FloatArray, time_limit: float, *, exact: bool) -> Bound:
    """Solve, and read the placement off."""
    solved = programme.solve(time_limit)
    if solved.x is None or not exact:
        return Bound(solved.bound, None, False, solved.gap)
    where = solved.x[held] > 0.5
    found = float(use[where].sum())
    return Bound(found if solved.proved else solved.bound, found, solved.proved, solved.gap, where)


@dataclass(frozen=True)
class _Solved:
    x: FloatArray | None
    bound: float  # on what can be gained
    proved: bool
    gap: float


class _Programme:
    """A mixed-integer programme, built up by blocks of variables and of limits on sums; gains are raised."""

    def __init__(self) -> None:
        self._gain: list[FloatArray] = []
        self._most: list[FloatArray] = []
        self._whole: list[npt.NDArray[np.int64]] = []
        self._size = 0
        self._terms: list[tuple[Int64Array, Int64Array, FloatArray]] = []  # row, column, weight
        self._low: list[FloatArray] = []
        self._high: list[FloatArray] = []
        self._rows = 0
        self._fixed: list[tuple[Int64Array, float]] = []

    def variables(
        self, shape: tuple[int, ...], *, gain: Numbers = 0.0, most: float = 1.0, whole: bool = False
    ) -> Int64Array:
        """Numbers int64 [shape] of new variables, each in 0 .. `most`."""
        count = int(np.prod(shape))
        self._gain.append(np.broadcast_to(np.asarray(gain, np.float64), shape).ravel())
        self._most.append(np.full(count, most))
        self._whole.append(np.full(count, int(whole), np.int64))
        self._size += count
        return np.arange(self._size - count, self._size).reshape(shape)

    def fix(self, columns: Int64Array, value: float) -> None:
        self._fixed.append((columns, value))

    def limit(
        self, terms: list[tuple[Int64Array, Numbers]], *, low: Numbers = -np.inf, high: Numbers = np.inf,
        over: tuple[int, ...],
    ) -> None:  # fmt: skip
        """low <= sum over the axes `over` of weight x variable, all terms together <= high, for each other index."""
        kept = [length for axis, length in enumerate(terms[0][0].shape) if axis not in over]
        count = int(np.prod(kept)) if kept else 1
        for columns, weight in terms:
            whole = np.broadcast_to(np.asarray(weight, np.float64), columns.shape)
            sideways = np.moveaxis(columns, over, range(-len(over), 0)).reshape(count, -1)
            weights = np.moveaxis(whole, over, range(-len(over), 0)).reshape(count, -1)
            row = np.repeat(np.arange(self._rows, self._rows + count), sideways.shape[1])
            self._terms.append((row, sideways.ravel(), weights.ravel()))
        self._low.append(np.broadcast_to(np.asarray(low, np.float64), kept).ravel())
        self._high.append(np.broadcast_to(np.asarray(high, np.float64), kept).ravel())
        self._rows += count

    def solve(self, time_limit: float) -> _Solved:
        """Run HiGHS.

        Raises:
            PlanError: nothing keeps all limits.
        """
        least, most = np.zeros(self._size), np.concatenate(self._most)
        for columns, value in self._fixed:
            least[columns] = most[columns] = value
        row, column, weight = (np.concatenate([term[i] for term in self._terms]) for i in range(3))
        matrix = coo_array((weight, (row, column)), shape=(self._rows, self._size)).tocsr()
        limits = LinearConstraint(matrix, np.concatenate(self._low), np.concatenate(self._high))
        whole = np.concatenate(self._whole)

        def run(integrality: npt.NDArray[np.int64]) -> Any:
            return milp(
                -np.concatenate(self._gain), integrality=integrality, bounds=Bounds(least, most), constraints=limits,
                options={"time_limit": time_limit, "mip_rel_gap": 1e-9},
            )  # fmt: skip

        result = run(whole)
        if result.status == _INFEASIBLE:
            raise PlanError("no placement keeps these limits", hint="allow more load, or more slots")
        proved, bound, gap = result.status == _OPTIMAL, result.get("mip_dual_bound"), result.get("mip_gap")
        if not whole.any():
            bound, gap = (result.fun, 0.0) if proved else (-np.inf, np.inf)
        elif bound is None or not np.isfinite(bound):  # stopped before the root was done
            relaxed = run(np.zeros_like(whole))
            bound = relaxed.fun if relaxed.status == _OPTIMAL else -np.inf
        if result.x is None:
            return _Solved(None, -float(bound), False, np.inf)
        return _Solved(np.asarray(result.x), -float(bound), proved, float(gap))
