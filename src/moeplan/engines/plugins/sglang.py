"""The SGLang plug-in: entry point `moeplan` of the group `sglang.srt.plugins`.

MOEPLAN_SGLANG_PLAN names a plan; MOEPLAN_SGLANG_MODE is `plan` (the default) or `online`. Two functions of SGLang are
wrapped (`srt/plugins/hook_registry.py`, AROUND): `compute_initial_expert_location_metadata`, so that experts are loaded
where the plan has them, and `rebalance_experts`, which its balancer (`srt/eplb/eplb_manager.py`) calls while it serves.
What goes wrong is left to SGLang's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeplan.engines.plugins.settings import PluginSettings, asked, is_first_process, kind, not_tested

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
    """What SGLang calls in each of its processes; does nothing unless a plan is named. Never raises."""
    wanted = asked(PREFIX)
    if wanted is None:
        return
    try:
        reason = not_tested("SGLang", ("sglang",), TESTED)
        if not reason:
            _install(wanted)
    except Exception as error:
        reason = f"the plug-in does not fit this SGLang ({kind(error)})"
    if reason and is_first_process():
        log.error("moeplan: plan %s is not applied: %s", wanted.path, reason)


def _install(wanted: PluginSettings) -> None:
    """Have SGLang wrap its two functions, when all plug-ins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from moeplan.engines.plugins.balancer import Balancer

    hooks = Hooks(Balancer(wanted, "SGLang", log, nearest=True))
    HookRegistry.register(LOCATION, hooks.first, HookType.AROUND)
    HookRegistry.register(REBALANCE, hooks.rebalance, HookType.AROUND)


class Hooks:
    """The two wrappers of one process."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer, self.wanted = balancer, balancer.wanted
        self.out = False  # the server's settings rule the plan out

    def first(self, original: Callable[..., Any], model_config: Any, moe_ep_rank: int) -> Any:
        """The location that weights are loaded by."""
        try:
            ours = self._first(model_config, moe_ep_rank)
        except Exception as error:
            self.balancer.say(f"{self.wanted.words} is not applied: the plug-in failed ({kind(error)})")
            ours = None
        return original(model_config=model_config, moe_ep_rank=moe_ep_rank) if ours is None else ours

    def _first(self, model_config: Any, moe_ep_rank: int) -> Any:
        from sglang.srt.eplb.expert_location import ExpertLocationMetadata, ModelConfigForExpertLocation
        from sglang.srt.runtime_context import get_device, get_exec, get_parallel

        moe, parallel, of = get_exec().moe, get_parallel(), self.wanted.placement
        ranks = parallel.ep_size
        own = str(moe.init_expert_location) != "trivial"
        known = ModelConfigForExpertLocation.from_model_config(model_config)
        if of is None:
            self.balancer.say(f"{self.wanted.words} is not applied: {self.wanted.problem}")
            if moe.enable_eplb:
                self.balancer.agreed(ranks)  # others may have it, and wait
            return None
        reason = ""
        if not moe.enable_eplb:
            flags = f"--enable-eplb --ep-num-redundant-experts {of.redundant}"
            reason = f"the balancer is off; start with {flags}, or give moeplan's file to --init-expert-location alone"
        reason = reason or self._obstacle(known, moe.ep_num_redundant_experts, ranks, parallel.elastic_ep_initial_size)
        if reason:
            self.out = True
            self._tell_first(f"is not applied: {reason}")
            return None
        if moe.ep_dispatch_algorithm != "static":
            self._tell_first(
                f"wants copies taken near their tokens, but --ep-dispatch-algorithm is {moe.ep_dispatch_algorithm}; "
                "start with static, which needs an --moe-a2a-backend"
            )
        if not self.balancer.agreed(ranks):
            return None
        if own:
            self._tell_first(
                "begins after the first rebalance: --init-expert-location says where experts are till then"
            )
            return None
        table, copies, _ = self._tensors(known.num_layers, of.physical_to_logical)
        # Not init_by_mapping: it cuts each rank's list of copies to the nearest first, so that the ranks' seeded deals
        # of what is far no longer fit together: some copies get several ranks' tokens, others none.
        made = ExpertLocationMetadata._init_raw(
            ep_size=ranks,
            physical_to_logical_map=table.to(get_device().device),
            logical_to_all_physical_map=copies.to(get_device().device),
            moe_ep_rank=moe_ep_rank,
        )
        if self.balancer.ranks.rank == 0:
            then = "then as it is" if self.wanted.mode == "plan" else "then planned anew at each rebalance (online)"
            log.info(
                "moeplan: %s: applied from the start, in %d of %d layers (the others keep experts in order), %s",
                self.wanted.words, len(of.layer_ids), known.num_layers, then,
            )  # fmt: skip
        return made

    def _obstacle(self, known: Any, redundant: int, ranks: int, elastic: int | None) -> str:
        """Why a server with these settings cannot take the plan, and the mend; empty if it can."""
        of = self.wanted.placement
        assert of is not None
        if known is None:
            return "SGLang cannot place this model's experts (it has no get_model_config_for_expert_location)"
        if known.num_logical_experts != of.num_experts:
            return (
                f"the model has {known.num_logical_experts} experts and the plan {of.num_experts}; plan for this model"
            )
        if of.layer_ids[-1] >= known.num_layers:
            return f"the model has {known.num_layers} layers and the plan one {of.layer_ids[-1]}; plan for this model"
        if elastic is not None:
            return "with elastic EP ranks come and go, and a plan is for a fixed number"
        if ranks != of.ep_size:
            return (
                f"--ep-size is {ranks} and the plan is for {of.ep_size} GPUs; start with that many, or plan for {ranks}"
            )
        if redundant != of.redundant:
            return (
                f"--ep-num-redundant-experts is {redundant} and the plan has {of.redundant}; start with {of.redundant}"
            )
        return ""

    def _tell_first(self, what: str) -> None:
        if self.balancer.ranks.rank == 0:
            self.balancer.say(f"{self.wanted.words} {what}")

    def _tensors(self, num_layers: int, rows: Int32Array) -> tuple[Any, Any, Any]:
        """SGLang's three tables for all hidden layers, int64: experts by slot [layers, S], slots by expert [layers, E,
        most copies], -1 after the last, and copies [layers, E]. Layers that the plan lacks keep experts in order."""
        import numpy as np
        import torch

        from moeplan.types import Placement

        of = self.wanted.placement
        assert of is not None
        table = np.tile(np.arange(of.num_slots) % of.num_experts, (num_layers, 1))
        table[list(of.layer_ids)] = rows
        whole = Placement(table.astype(np.int32), of.num_experts, of.nodes, of.ep_size // of.nodes)
        count, copies = (array.astype(np.int64) for array in (whole.replica_count, whole.replica_slots))
        return torch.from_numpy(table), torch.from_numpy(copies), torch.from_numpy(count)

    def rebalance(
        self, original: Callable[..., Any], tokens_per_expert: Any, num_physical_experts: int,
        num_local_physical_experts: int, num_groups: int | None, num_nodes: int, algorithm: Any,
    ) -> Any:  # fmt: skip
        """The map for the load [steps, hidden layers, E] of the last passes."""
        try:
            ours = self._rebalance(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_nodes)
        except Exception as error:
            self.balancer.say(f"the plug-in failed, SGLang's own balancer goes on ({kind(error)})")
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

        of = self.wanted.placement
        load = tokens.sum(dim=0).cpu().numpy()
        if of is None or self.out or of.layer_ids[-1] >= len(load):
            self.balancer.agreed(slots // local)  # other ranks may have the plan, and ask
            return None
        current = get_global_expert_location_metadata()
        old = None if current is None else current.physical_to_logical_map_cpu.numpy()
        others = np.setdiff1d(np.arange(len(load)), of.layer_ids)
        if load[others].any():
            layer = int(others[load[others].any(axis=1)][0])
            self.balancer.say(f"{self.wanted.words} places no experts in layer {layer}, which has some: SGLang goes on")
            return None
        at = list(of.layer_ids)
        rows = self.balancer.rows(load[at], slots, nodes, slots // local, None if old is None else old[at])
        if rows is None:
            return None
        return self._tensors(len(load), rows)
