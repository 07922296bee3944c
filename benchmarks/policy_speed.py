"""How long the policy takes to choose: 58 layers x 256 experts, 8 groups, live requests coming and going.

Times are of the processor, so that what else runs on the machine does not count.

OMP_NUM_THREADS=1 python benchmarks/policy_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplan.gateway.fleet import Fleet, Request
from moeplan.gateway.policies import ExpertPolicy, Waiting

LAYERS, EXPERTS, TOP_K, GROUPS, LIVE, ROUNDS = 58, 256, 8, 8, 16, 4000


def main() -> None:
    rng = np.random.default_rng(0)
    uses = rng.gamma(0.3, size=(64, LAYERS, EXPERTS)).astype(np.float32)
    uses /= uses.sum(axis=2, keepdims=True)
    policy = ExpertPolicy(Fleet(GROUPS, TOP_K, slots=LIVE))
    times: dict[str, list[float]] = {"choose": [], "finish": [], "pick_next": []}

    def timed(what: str, call: Callable[..., Any], *args: object) -> Any:
        start = time.thread_time()
        out = call(*args)
        times[what].append(time.thread_time() - start)
        return out

    live: list[object] = []
    waiting: list[Waiting] = []
    for i in range(ROUNDS):
        request = Request(i, uses[i % len(uses)], prompt_tokens=100)
        if i % 2 or len(live) < GROUPS * LIVE - 1:  # a free slot at once
            timed("choose", policy.choose, request, i * 1e-3)
        else:  # a free slot takes one of 16 that wait
            while len(waiting) < 16:
                waiting.append(Waiting(Request(-i * 16 - len(waiting), uses[int(rng.integers(len(uses)))]), 100))
            index, _ = timed("pick_next", policy.pick_next, waiting, i * 1e-3)
            request = waiting.pop(index).request
        policy.first_token(request.id, i * 1e-3)
        live.append(request.id)
        if len(live) == GROUPS * LIVE:
            timed("finish", policy.finish, live.pop(int(rng.integers(len(live)))), i * 1e-3)
    for what, seconds in times.items():
        median, p99 = 1e6 * np.quantile(seconds[len(seconds) // 10 :], (0.5, 0.99))
        print(f"{what:10s} {len(seconds):6d} calls   median {median:6.0f} us   p99 {p99:6.0f} us")


if __name__ == "__main__":
    main()
