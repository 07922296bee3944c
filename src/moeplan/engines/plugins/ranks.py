"""All ranks of a server do the same, or all let it be.

Every rank of an engine computes the new map for itself and moves weights by it: ranks that differ, because a node has
another copy of the plan, or because the variable is not set there, would serve wrong experts without a word. So ranks
first agree, over the key-value store that torch.distributed has anyway, and what is computed is computed by one.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from moeplan.types import Int32Array

__all__ = ["PATIENCE", "Ranks"]

#: Seconds that ranks wait for one another, once. Engines sum the load over all ranks just before: they come together.
PATIENCE = 60.0
PAUSE = 0.005


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
        store: shared by all; None where there is one rank only.
        rank, size: of torch.distributed's default group.
    """

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        #: Whether they agreed; None before they were asked.
        self.agreed: bool | None = None
        self._told = 0

    @classmethod
    def here(cls) -> Ranks:
        """Of this process."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(None, 0, 1)
        store = dist.PrefixStore("moeplan", dist.distributed_c10d._get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size())

    def agree(self, name: str, patience: float = PATIENCE) -> bool:
        """Whether all ranks came here with the same `name`. Asked once; the answer is the same on all of them.

        Who first sees that all are there, or first loses patience, decides for all: `compare_set` lets one win.
        """
        if self.agreed is None:
            self.agreed = self.store is None or self._decide(self.store, name, patience)
        return self.agreed

    def _decide(self, store: Store, name: str, patience: float) -> bool:
        name = f"with/{name}"
        store.add(name, 1)
        store.add("here", 1)
        end = time.monotonic() + patience
        while not store.check(["decided"]):
            if store.add("here", 0) == self.size:
                store.compare_set("decided", "", "yes" if store.add(name, 0) == self.size else "no")
            elif time.monotonic() > end:
                store.compare_set("decided", "", "no")
            else:
                time.sleep(PAUSE)
        return store.get("decided") == b"yes"

    def tell(self, rows: Int32Array | None) -> Int32Array | None:
        """What rank 0 has, on all ranks, to be called by all of them in the same order: int32 [L, S] or None.

        Waits as a broadcast does: rank 0 is known to come.
        """
        if self.store is None:
            return rows
        key, old = f"map/{self._told}", f"map/{self._told - 2}"
        self._told += 1
        if self.rank == 0:
            shape = b"" if rows is None else np.array(rows.shape, np.int32).tobytes()
            self.store.set(key, shape + (b"" if rows is None else rows.astype(np.int32).tobytes()))
            self.store.delete_key(old)  # all have read it: engines sum the load over all ranks before each map
            return rows
        while not self.store.check([key]):
            time.sleep(PAUSE)
        data = np.frombuffer(self.store.get(key), np.int32)
        return data[2:].reshape(data[:2]).copy() if len(data) else None
