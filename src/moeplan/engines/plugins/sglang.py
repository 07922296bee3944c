"""The SGLang plug-in: entry point `moeplan` of the group `sglang.srt.plugins`.

MOEPLAN_SGLANG_PLAN names a plan; MOEPLAN_SGLANG_MODE is `plan` (the default) or `online`. Two functions of SGLang are
wrapped (`srt/plugins/hook_registry.py`, AROUND): `compute_initial_expert_location_metadata`, so that experts are loaded
by the plan, and `rebalance_experts`, which its balancer (`srt/eplb/eplb_manager.py`) calls while it serves. After any
error, SGLang's own functions are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeplan.engines.plugins.settings import PluginSettings, describe, start

if TYPE_CHECKING:
    from moeplan.engines.plugins.balancer import Balancer
    from moeplan.types import Int32Array

__all__ = ["PREFIX", "TESTED", "register"]

PREFIX = "MOEPLAN_SGLANG"
TESTED = ("0.5.23",)
LOCATION = "sglang.srt.eplb.expert_location.compute_initial_expert_location_metadata"
REBALANCE = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
log = logging.getLogger("moeplan.sglang")


def register() -> None:
    """Entry point, called in each process of SGLang; does nothing unless a plan is named. Never raises."""
    start("SGLang", ("sglang",), TESTED, PREFIX, log, _install)


def _install(settings: PluginSettings) -> None:
    """Register the wrappers of two functions; SGLang applies them when all plug-ins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from moeplan.engines.plugins.balancer import Balancer

    hooks = Hooks(Balancer(settings, "SGLang", log, nearest=True))
    HookRegistry.register(LOCATION, hooks.initial_location, HookType.AROUND)
    HookRegistry.register(REBALANCE, hooks.rebalance, HookType.AROUND)


class Hooks:
    """The two wrappers of one process."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer, self.settings = balancer, balancer.settings
        self.disabled = False  # the server's settings do not allow the plan

    def initial_location(self, original: Callable[..., Any], model_config: Any, moe_ep_rank: int) -> Any:
        """The expert location by which weights are loaded."""
        try:
            ours = self._initial_location(model_config, moe_ep_rank)
        except Exception as error:
            self.balancer.log_error(f"{self.settings.summary} is not applied: the plug-in failed ({describe(error)})")
            ours = None
        return original(model_config=model_config, moe_ep_rank=moe_ep_rank) if ours is None else ours

    def _initial_location(self, model_config: Any, moe_ep_rank: int) -> Any:
        from sglang.srt.eplb.expert_location import ExpertLocationMetadata, ModelConfigForExpertLocation
        from sglang.srt.runtime_context import get_device, get_exec, get_parallel

        moe, parallel, plan = get_exec().moe, get_parallel(), self.settings.placement
        ranks = parallel.ep_size
        own = str(moe.init_expert_location) != "trivial"
        known = ModelConfigForExpertLocation.from_model_config(model_config)
        if plan is None:
            self.balancer.log_error(f"{self.settings.summary} is not applied: {self.settings.problem}")
            if moe.enable_eplb:
                self.balancer.agreed(ranks)  # others may have it and wait
            return None
        reason = ""
        if not moe.enable_eplb:
            flags = f"--enable-eplb --ep-num-redundant-experts {plan.redundant}"
            reason = f"the balancer is off; start with {flags}, or give moeplan's file to --init-expert-location alone"
        reason = reason or self._find_obstacle(
            known, moe.ep_num_redundant_experts, ranks, parallel.elastic_ep_initial_size
        )
        if reason:
            self.disabled = True
            self._log_on_rank_0(f"is not applied: {reason}")
            return None
        if moe.ep_dispatch_algorithm != "static":
            self._log_on_rank_0(
                f"expects replicas near their tokens, but --ep-dispatch-algorithm is {moe.ep_dispatch_algorithm}; "
                "start with static, which needs an --moe-a2a-backend"
            )
        if not self.balancer.agreed(ranks):
            return None
        if own:
            self._log_on_rank_0("is applied at the first rebalance: --init-expert-location is used until then")
            return None
        table, replicas, _ = self._tensors(known.num_layers, plan.physical_to_logical)
        # Not init_by_mapping: it first reduces each rank's list of replicas to the nearest, so that the ranks' seeded
        # choices among distant replicas are no longer consistent: some get tokens of several ranks, others none.
        made = ExpertLocationMetadata._init_raw(
            ep_size=ranks,
            physical_to_logical_map=table.to(get_device().device),
            logical_to_all_physical_map=replicas.to(get_device().device),
            moe_ep_rank=moe_ep_rank,
        )
        if self.balancer.ranks.rank == 0:
            then = "then unchanged" if self.settings.mode == "plan" else "then improved at each rebalance (online)"
            layers = f"{len(plan.layer_ids)} of {known.num_layers} layers (linear order in the others)"
            log.info("moeplan: %s: applied from the start, in %s, %s", self.settings.summary, layers, then)
        return made

    def _find_obstacle(self, known: Any, redundant: int, ranks: int, elastic: int | None) -> str:
        """Why a server with these settings cannot apply the plan, and a fix; empty if it can."""
        plan = self.settings.placement
        assert plan is not None
        if known is None:
            return "SGLang cannot place this model's experts (it has no get_model_config_for_expert_location)"
        if known.num_logical_experts != plan.num_experts:
            return f"the model has {known.num_logical_experts} experts, not {plan.num_experts}; plan for this model"
        if plan.layer_ids[-1] >= known.num_layers:
            return f"the model has {known.num_layers} layers, no layer {plan.layer_ids[-1]}; plan for this model"
        if elastic is not None:
            return "a plan is for a fixed number of ranks, which elastic EP changes"
        if ranks != plan.ep_size:
            return f"--ep-size is {ranks} and the plan is for {plan.ep_size} GPUs; set that, or plan for {ranks}"
        if redundant != plan.redundant:
            return f"--ep-num-redundant-experts is {redundant} and the plan has {plan.redundant}; set it to that"
        return ""

    def _log_on_rank_0(self, what: str) -> None:
        if self.balancer.ranks.rank == 0:
            self.balancer.log_error(f"{self.settings.summary} {what}")

    def _tensors(self, num_layers: int, rows: Int32Array) -> tuple[Any, Any, Any]:
        """SGLang's three tables for all hidden layers, int64: experts by slot [layers, S], slots by expert [layers, E,
        max replicas], padded with -1, and replicas [layers, E]. Layers without a plan have experts in linear order."""
        import numpy as np
        import torch

        from moeplan.types import Placement

        plan = self.settings.placement
        assert plan is not None
        table = np.tile(np.arange(plan.num_slots) % plan.num_experts, (num_layers, 1))
        table[list(plan.layer_ids)] = rows
        whole = Placement(table.astype(np.int32), plan.num_experts, plan.nodes, plan.ep_size // plan.nodes)
        count, replicas = (array.astype(np.int64) for array in (whole.replica_count, whole.replica_slots))
        return torch.from_numpy(table), torch.from_numpy(replicas), torch.from_numpy(count)

    def rebalance(
        self,
        original: Callable[..., Any],
        tokens_per_expert: Any,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Any:
        """The map for the load [steps, hidden layers, E] of the last passes."""
        try:
            ours = self._rebalance(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_nodes)
        except Exception as error:
            self.balancer.log_error(f"the plug-in failed, falling back to SGLang's own balancer ({describe(error)})")
            ours = None
        if ours is not None:
            return ours
        return original(
            tokens_per_expert=tokens_per_expert,
            num_physical_experts=num_physical_experts,
            num_local_physical_experts=num_local_physical_experts,
            num_groups=num_groups,
            num_nodes=num_nodes,
            algorithm=algorithm,
        )

    def _rebalance(self, tokens: Any, slots: int, local: int, nodes: int) -> Any:
        import numpy as np
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        plan = self.settings.placement
        load = tokens.sum(dim=0).cpu().numpy()
        if plan is None or self.disabled or plan.layer_ids[-1] >= len(load):
            self.balancer.agreed(slots // local)  # other ranks may have the plan and wait
            return None
        current = get_global_expert_location_metadata()
        old = None if current is None else current.physical_to_logical_map_cpu.numpy()
        uncovered = np.setdiff1d(np.arange(len(load)), plan.layer_ids)
        if load[uncovered].any():
            layer = int(uncovered[load[uncovered].any(axis=1)][0])
            self.balancer.log_error(f"{self.settings.summary} places no experts in layer {layer}, which has some")
            return None
        at = list(plan.layer_ids)
        rows = self.balancer.rows(load[at], slots, nodes, slots // local, None if old is None else old[at])
        if rows is None:
            return None
        return self._tensors(len(load), rows)
