"""The balancer of both plug-ins: returns the plan's map, a rebalanced map, or none when the engine asks for one.

Names: L MoE layers, E experts, S slots.
"""

from __future__ import annotations

from logging import Logger

import numpy as np
import numpy.typing as npt

from moeplan.engines.plugins.ranks import Ranks
from moeplan.engines.plugins.settings import PluginSettings, describe
from moeplan.types import Int32Array

__all__ = ["Balancer"]


class Balancer:
    """Answers the rebalance calls of one engine process.

    Args:
        settings: from the environment.
        engine: its name in the log.
        log: the engine's logger; each line is prefixed with `moeplan:`.
        nearest: the engine prefers a replica on its own node.
        ranks: of this server; by default those of torch.distributed, looked up on first use.
    """

    def __init__(
        self, settings: PluginSettings, engine: str, log: Logger, *, nearest: bool, ranks: Ranks | None = None
    ) -> None:
        self.settings, self.engine, self.log, self.nearest = settings, engine, log, nearest
        self._ranks = ranks
        self._logged: set[str] = set()

    @property
    def ranks(self) -> Ranks:
        """Of this server."""
        self._ranks = self._ranks or Ranks.of_process()
        return self._ranks

    def log_error(self, line: str) -> None:
        """Log an error, once in this process."""
        if line not in self._logged:
            self._logged.add(line)
            self.log.error("moeplan: %s", line)

    def agreed(self, needed: int) -> bool:
        """Whether all ranks have this plan and mode; decided at the first call, before the server serves.

        Args:
            needed: ranks that share the experts.
        """
        first = self.ranks.agreed is None
        agreed = self.ranks.agree(self.settings.fingerprint) and self.ranks.size >= needed
        if first and self.ranks.rank == 0:
            if not agreed:
                self.log_error(
                    f"{self.settings.summary} is not applied: not all {needed} ranks have the same plan and mode; set "
                    f"{self.settings.prefix}_PLAN, and {self.settings.prefix}_MODE, to the same on every node"
                )
            elif self.settings.placement is not None and self.settings.mode == "online":
                self._warm_up()
        return agreed

    def _warm_up(self) -> None:
        from moeplan.engines.plugins import online

        try:
            online.warm_up()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.log_error(f"online planning failed, falling back to {self.engine}'s own balancer ({describe(error)})")

    def rows(
        self, load: npt.NDArray[np.number], slots: int, nodes: int, ranks: int, old: npt.NDArray[np.integer] | None
    ) -> Int32Array | None:
        """The new map, int32 [L, S], the same on all ranks; None (use the engine's own) if the plan does not fit.

        Args:
            load: [L, E], picks of each expert over all ranks.
            slots: S. nodes, ranks: of the server.
            old: [L, S], the current map, if it is known.
        """
        plan = self.settings.placement
        if plan is None:
            self.log_error(f"{self.settings.summary} is not applied: {self.settings.problem}")
        if not self.agreed(ranks) or plan is None:  # every rank takes part: others may have the plan and wait
            return None
        actual = (*load.shape, slots, ranks)
        if actual != (len(plan.layer_ids), plan.num_experts, plan.num_slots, plan.ep_size):
            words = "{} layers x {} experts in {} slots on {} ranks"
            self.log_error(
                f"{self.settings.summary} does not fit a model of {words.format(*actual)}: {self.engine}'s own "
                "balancer is used (expected for a draft model; else plan for this server)"
            )
            return None
        if nodes != plan.nodes:
            what = f"{self.engine} counts {nodes} nodes: replicas may be on other nodes than planned"
            self.log_error(f"{self.settings.summary}, but {what}")
        if self.settings.mode == "plan":
            self._log_changes(plan.physical_to_logical, old)
            return plan.physical_to_logical
        return self.ranks.broadcast(self._rebalance(load, old) if self.ranks.rank == 0 else None)

    def _rebalance(self, load: npt.NDArray[np.number], old: npt.NDArray[np.integer] | None) -> Int32Array | None:
        """On rank 0, for all ranks; None where it fails."""
        from moeplan.engines.plugins import online

        assert self.settings.placement is not None
        plan = self.settings.placement.placement
        if duplicate := online.find_duplicate(plan):
            self.log_error(f"{duplicate}, which online planning does not support; use a plan of another strategy")
            return None
        try:
            before = None if old is None else old.astype(np.int32)
            rows = online.rebalance(plan, load, before, nearest=self.nearest)
        except Exception as error:
            self._failed(error)
            return None
        self._log_changes(rows, old)
        return rows

    def _log_changes(self, rows: Int32Array, old: npt.NDArray[np.integer] | None) -> None:
        if self.ranks.rank == 0 and old is not None and rows.shape == old.shape:
            changed = int((rows != old).sum())
            name, size = self.settings.fingerprint, rows.size
            self.log.info("moeplan: map %s given to %s: %d of %d slots change", name, self.engine, changed, size)
