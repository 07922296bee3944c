"""Equal-size assignment of n requests to D groups: a transportation problem solved exactly in integers.

Every group gets floor(n / D) or ceil(n / D) requests and the sum of costs is least. The method is successive shortest
paths on a graph of D groups and one hub, never on a square n x n matrix: prices found by a few rounds of bidding put
every request in a group of least reduced cost, and each augmentation then moves one unit of excess along a shortest
path. The reference that tests hold it to is `scipy.optimize.linear_sum_assignment` on the expanded square matrix.
"""

from __future__ import annotations

import numpy as np

from moeplan._kernels.compiled import compiled
from moeplan.arrays import Int64Array

_FAR = np.int64(1) << 62


@compiled
def _cheapest(cost: Int64Array, prices: Int64Array, group: Int64Array) -> None:
    for r in range(cost.shape[0]):
        best = 0
        for d in range(1, cost.shape[1]):
            if cost[r, d] + prices[d] < cost[r, best] + prices[best]:
                best = d
        group[r] = best


@compiled
def _refresh(cost: Int64Array, members: Int64Array, count: int, a: int, move: Int64Array, mover: Int64Array) -> None:
    """move[a, b]: the least cost of moving one member of group a to group b, and who it is."""
    for b in range(cost.shape[1]):
        move[a, b], mover[a, b] = _FAR, -1
    for i in range(count):
        r = members[a, i]
        for b in range(cost.shape[1]):
            delta = cost[r, b] - cost[r, a]
            if b != a and delta < move[a, b]:
                move[a, b], mover[a, b] = delta, r


@compiled
def transport(cost: Int64Array, rounds: int) -> Int64Array:
    """Least-cost groups of floor(n / D) or ceil(n / D) requests.

    Args:
        cost: int64 [n, D]; magnitudes below 2**40, so that sums of path costs cannot overflow.
        rounds: rounds of bidding for the starting prices (they change the time, never the cost).

    Returns:
        int64 [n], the group of each request.
    """
    n, groups = cost.shape
    group = np.zeros(n, np.int64)
    if groups == 1:
        return group
    floor, extra = n // groups, n % groups
    prices = np.zeros(groups, np.int64)
    spread = np.int64(0)
    for r in range(n):
        for d in range(groups):
            spread = max(spread, abs(cost[r, d] - cost[r, 0]))
    size = np.zeros(groups, np.int64)
    step = spread // 4 + 1
    for _ in range(rounds):  # bidding: raise the price of overfull groups, lower that of others
        _cheapest(cost, prices, group)
        size[:] = 0
        for r in range(n):
            size[group[r]] += 1
        for d in range(groups):
            prices[d] += step * (size[d] - floor) // max(floor, 1)
        step = step * 9 // 10 + 1
    _cheapest(cost, prices, group)

    # A group may hold one request over floor by holding one of the hub's `extra` units: the highest prices first.
    holds = np.zeros(groups, np.bool_)
    for _ in range(extra):
        highest = -1
        for d in range(groups):
            if not holds[d] and (highest < 0 or prices[d] > prices[highest]):
                highest = d
        holds[highest] = True

    members = np.zeros((groups, n), np.int64)
    where = np.zeros(n, np.int64)
    size[:] = 0
    for r in range(n):
        where[r] = size[group[r]]
        members[group[r], size[group[r]]] = r
        size[group[r]] += 1
    move = np.full((groups, groups), _FAR, np.int64)
    mover = np.full((groups, groups), np.int64(-1), np.int64)
    for a in range(groups):
        _refresh(cost, members, size[a], a, move, mover)

    distance = np.zeros(groups + 1, np.int64)
    parent = np.zeros(groups + 1, np.int64)
    hub = groups
    while True:
        # Bellman-Ford from every overfull group at once; edge costs may be negative, cycles never are.
        worst = False
        for d in range(groups):
            over = size[d] > floor + holds[d]
            distance[d] = 0 if over else _FAR
            parent[d] = -1
            worst = worst or over
        distance[hub], parent[hub] = _FAR, -1
        if not worst:
            break
        for _ in range(groups + 1):
            changed = False
            for a in range(groups):
                if distance[a] == _FAR:
                    continue
                for b in range(groups):
                    if move[a, b] != _FAR and distance[a] + move[a, b] < distance[b]:
                        distance[b], parent[b], changed = distance[a] + move[a, b], a, True
                if not holds[a] and distance[a] < distance[hub]:
                    distance[hub], parent[hub], changed = distance[a], a, True
            if distance[hub] != _FAR:
                for b in range(groups):
                    if holds[b] and distance[hub] < distance[b]:
                        distance[b], parent[b], changed = distance[hub], hub, True
            if not changed:
                break
        target = -1
        for d in range(groups):
            if size[d] < floor + holds[d] and distance[d] != _FAR and (target < 0 or distance[d] < distance[target]):
                target = d
        b = target
        while parent[b] != -1:  # walk back: every step moves one request, or one unit of the hub
            a = parent[b]
            if b == hub:
                holds[a] = True
            elif a == hub:
                holds[b] = False
            else:
                r = mover[a, b]
                last = members[a, size[a] - 1]
                members[a, where[r]] = last
                where[last] = where[r]
                size[a] -= 1
                members[b, size[b]] = r
                where[r] = size[b]
                size[b] += 1
                group[r] = b
            b = a
        # Only groups on the path changed.
        b = target
        while b != -1:
            if b != hub:
                _refresh(cost, members, size[b], b, move, mover)
            b = parent[b]
    return group
