"""What both plug-ins do when their engine asks for a new map: the plan's rows, rows planned anew, or none.

Names: L MoE layers, E experts, S slots.
"""

from __future__ import annotations

from logging import Logger

import numpy as np
import numpy.typing as npt

from moeplan.engines.plugins.ranks import Ranks
from moeplan.engines.plugins.settings import PluginSettings, kind
from moeplan.types import Int32Array

__all__ = ["Balancer"]


class Balancer:
    """The plan of one engine process.

    Args:
        wanted: what the environment asks for.
        engine: its name in the log.
        log: where lines go, each prefixed with `moeplan:`.
        nearest: the engine prefers a copy on the own node.
        ranks: of this server; found when first needed, if not given.
    """

    def __init__(
        self, wanted: PluginSettings, engine: str, log: Logger, *, nearest: bool, ranks: Ranks | None = None
    ) -> None:
        self.wanted, self.engine, self.log, self.nearest = wanted, engine, log, nearest
        self._ranks = ranks
        self._said: set[str] = set()

    @property
    def ranks(self) -> Ranks:
        """Of this server."""
        self._ranks = self._ranks or Ranks.here()
        return self._ranks

    def say(self, line: str) -> None:
        """An error, once in this process."""
        if line not in self._said:
            self._said.add(line)
            self.log.error("moeplan: %s", line)

    def agreed(self, needed: int) -> bool:
        """Whether all ranks have this plan and mode: asked at the first call, which is before the server serves.

        Args:
            needed: ranks that share the experts.
        """
        first = self.ranks.agreed is None
        agreed = self.ranks.agree(self.wanted.name) and self.ranks.size >= needed
        if first and self.ranks.rank == 0:
            if not agreed:
                self.say(
                    f"{self.wanted.words} is not applied: not all {needed} ranks have the same plan and mode; set "
                    f"{self.wanted.prefix}_PLAN, and {self.wanted.prefix}_MODE, to the same on every node"
                )
            elif self.wanted.placement is not None and self.wanted.mode == "online":
                self._warm_up()
        return agreed

    def _warm_up(self) -> None:
        from moeplan.engines.plugins import online

        try:
            online.warm_up()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.say(f"planning online failed, {self.engine}'s own balancer goes on ({kind(error)})")

    def rows(
        self, load: npt.NDArray[np.number], slots: int, nodes: int, ranks: int, old: npt.NDArray[np.integer] | None
    ) -> Int32Array | None:
        """int32 [L, S], the same on all ranks; None, for the engine's own balancer, if the plan is not for this call.

        Args:
            load: [L, E], picks of each expert over all ranks.
            slots: S. nodes, ranks: of the server.
            old: [L, S], the map in place, if it is known.
        """
        of = self.wanted.placement
        if of is None:
            self.say(f"{self.wanted.words} is not applied: {self.wanted.problem}")
        if not self.agreed(ranks) or of is None:  # asked by all: others may have the plan, and wait
            return None
        found, wants = (*load.shape, slots, ranks), (len(of.layer_ids), of.num_experts, of.num_slots, of.ep_size)
        if found != wants:
            words = "{} layers x {} experts in {} slots on {} ranks"
            self.say(
                f"{self.wanted.words} does not fit a model of {words.format(*found)}: its experts are left to "
                f"{self.engine} (right for a draft model; else plan for this server)"
            )
            return None
        if nodes != of.nodes:
            self.say(f"{self.wanted.words}, but {self.engine} counts {nodes} nodes: copies may not be where meant")
        if self.wanted.mode == "plan":
            self._tell(of.physical_to_logical, old)
            return of.physical_to_logical
        return self.ranks.tell(self._anew(load, old) if self.ranks.rank == 0 else None)

    def _anew(self, load: npt.NDArray[np.number], old: npt.NDArray[np.integer] | None) -> Int32Array | None:
        """On rank 0, for all; None where something fails."""
        from moeplan.engines.plugins import online

        assert self.wanted.placement is not None
        plan = self.wanted.placement.placement
        if fault := online.twins(plan):
            self.say(f"{fault}, from which online planning cannot start; use a plan of another strategy")
            return None
        try:
            before = None if old is None else old.astype(np.int32)
            rows = online.rebalance(plan, load, before, nearest=self.nearest)
        except Exception as error:
            self._failed(error)
            return None
        self._tell(rows, old)
        return rows

    def _tell(self, rows: Int32Array, old: npt.NDArray[np.integer] | None) -> None:
        if self.ranks.rank == 0 and old is not None and rows.shape == old.shape:
            changed = int((rows != old).sum())
            name, size = self.wanted.name, rows.size
            self.log.info("moeplan: map %s given to %s: %d of %d slots change", name, self.engine, changed, size)
