"""Agreement of all ranks of a server: either all apply the plan, or none does.

Every rank of an engine computes the new map for itself and moves weights by it: if ranks differ, because a node has
another version of the plan, or because the variable is not set there, they silently serve wrong experts. So ranks first
agree, over the key-value store of torch.distributed, and one rank computes each new map for all.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from moeplan.types import Int32Array

__all__ = ["TIMEOUT", "Ranks"]

#: Seconds that ranks wait for one another, once. Engines sum the load over all ranks just before, so ranks are in step.
TIMEOUT = 60.0
POLL_INTERVAL = 0.005


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used."""

    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class Ranks:
    """The ranks of one server, seen from one of them.

    Args:
        store: shared by all; None if there is only one rank.
        rank, size: of torch.distributed's default group.
    """

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        #: The decision; None before it is made.
        self.agreed: bool | None = None
        self._broadcasts = 0

    @classmethod
    def of_process(cls) -> Ranks:
        """The ranks of the server that this process belongs to."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(None, 0, 1)
        store = dist.PrefixStore("moeplan", dist.distributed_c10d._get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size())

    def agree(self, name: str, timeout: float = TIMEOUT) -> bool:
        """Whether all ranks call this with the same `name`. Decided once; the result is the same on all of them.

        The first rank that sees all ranks, or that times out, decides for all: only the first `compare_set` succeeds.
        """
        if self.agreed is None:
            self.agreed = self.store is None or self._decide(self.store, name, timeout)
        return self.agreed

    def _decide(self, store: Store, name: str, timeout: float) -> bool:
        name = f"with/{name}"
        store.add(name, 1)
        store.add("here", 1)
        end = time.monotonic() + timeout
        while not store.check(["decided"]):
            if store.add("here", 0) == self.size:
                store.compare_set("decided", "", "yes" if store.add(name, 0) == self.size else "no")
            elif time.monotonic() > end:
                store.compare_set("decided", "", "no")
            else:
                time.sleep(POLL_INTERVAL)
        return store.get("decided") == b"yes"

    def broadcast(self, rows: Int32Array | None) -> Int32Array | None:
        """The rows of rank 0, int32 [L, S] or None, on all ranks. All call it in the same order.

        Waits for rank 0 without a timeout.
        """
        if self.store is None:
            return rows
        key, old = f"map/{self._broadcasts}", f"map/{self._broadcasts - 2}"
        self._broadcasts += 1
        if self.rank == 0:
            shape = b"" if rows is None else np.array(rows.shape, np.int32).tobytes()
            self.store.set(key, shape + (b"" if rows is None else rows.astype(np.int32).tobytes()))
            self.store.delete_key(old)  # all have read it: engines sum the load over all ranks before each map
            return rows
        while not self.store.check([key]):
            time.sleep(POLL_INTERVAL)
        data = np.frombuffer(self.store.get(key), np.int32)
        return data[2:].reshape(data[:2]).copy() if len(data) else None
