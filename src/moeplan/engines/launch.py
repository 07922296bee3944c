"""The command that starts an engine with a placement file.

Read in SGLang 0.5.23 (`srt/arg_groups/fields/`, `moe_hook.py`), vLLM 0.33.0 (`config/parallel.py`,
`engine/arg_utils.py`), vLLM-Ascend 182b75ea and TensorRT-LLM's wide_ep README 2a595f81; the table is in
docs/guides/export.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from moeplan.cluster import Dispatch, ReplicaRule
from moeplan.engines.from_placement import find_replica_rule
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.vllm import own_strategy

__all__ = ["Launch", "Serving", "launch"]


@dataclass(frozen=True)
class Serving:
    """What a plan says of serving, besides the placement.

    Attributes:
        groups: data-parallel ranks of attention; None if unknown.
        dispatch: how tokens are sent; None if unknown.
    """

    groups: int | None = None
    dispatch: Dispatch | None = None


@dataclass(frozen=True)
class Launch:
    """How to start an engine.

    Attributes:
        command: one argument with its value per item. environment: variables. extra: name and text of a further file.
        flags: required values by name, for JSON.
        rule: the replica rule that models the engine.
        notes: one line each.
    """

    command: tuple[str, ...]
    flags: dict[str, object]
    rule: ReplicaRule
    environment: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The command for a shell."""
        lines = [f"{name}={value} \\" for name, value in self.environment]
        return "\n".join([*lines, " \\\n  ".join(self.command)])


def launch(engine: str, placement: EnginePlacement, file: str, serving: Serving | None = None) -> Launch:
    """The command that serves with a placement file; MODEL, HEAD and RANK are to be set by the user."""
    return _BY_ENGINE[engine](placement, file, serving or Serving())


def _sglang(placement: EnginePlacement, file: str, serving: Serving) -> Launch:
    ranks, notes = placement.ep_size, []
    backend, algorithm, rule = ["--moe-a2a-backend deepep"], "static", find_replica_rule("sglang", placement.nodes)
    if serving.dispatch is Dispatch.PICK:
        backend.append("--deepep-mode low_latency")
    elif serving.dispatch is Dispatch.NODE:
        backend.append("--deepep-mode normal")
    elif serving.dispatch is Dispatch.GPU:
        mode = "direct" if placement.nodes == 1 else "hybrid"
        backend = [f"--moe-a2a-backend deepep_v2 --deepep-v2-mode {mode}"]
        if placement.nodes > 1:
            notes.append("between nodes DeepEP V2 sends as --dispatch node counts it: its direct mode is for one node")
    elif serving.dispatch is Dispatch.ALLGATHER:
        backend, algorithm, rule = ["--moe-a2a-backend none"], "dynamic", ReplicaRule.HASH
        if placement.has_replicas:
            notes.append("without an all-to-all backend SGLang selects replicas by row number, wherever they are")
    else:
        notes.append("the all-to-all backend is yours to choose; with none, use --ep-dispatch-algorithm dynamic")
    parallel = [f"--tp-size {ranks} --ep-size {ranks}"]
    if serving.groups and serving.groups > 1:
        parallel.append(f"--attn-dp-size {serving.groups}")
    if placement.nodes > 1:
        parallel.append(f"--nnodes {placement.nodes} --node-rank $RANK --dist-init-addr $HEAD:20000")
    notes.append("do not add --enable-eplb: with it SGLang moves the experts again")
    command = (
        "python -m sglang.launch_server --model-path $MODEL",
        *parallel,
        *backend,
        f"--init-expert-location {file}",
        f"--ep-num-redundant-experts {placement.redundant} --ep-dispatch-algorithm {algorithm}",
    )
    return Launch(command, _flags(placement, serving, ep_dispatch_algorithm=algorithm), rule, notes=tuple(notes))


def _vllm(placement: EnginePlacement, file: str, serving: Serving) -> Launch:
    notes, groups = [], serving.groups
    if own := own_strategy(placement):
        only = "" if own == "linear" else ", with a DeepEP low-latency or NIXL backend only"
        notes.append(f"vLLM has this placement by itself: --expert-placement-strategy {own} without EPLB{only}")
    where = "docs/guides/engines/vllm.md"
    notes.append(f"the plug-in has to be installed with vLLM ({where}): vLLM alone reads no placement file")
    backend = {
        Dispatch.PICK: "deepep_low_latency",
        Dispatch.NODE: "deepep_high_throughput",
        Dispatch.GPU: "deepep_v2",
        Dispatch.ALLGATHER: "allgather_reducescatter",
    }
    parallel = [f"--data-parallel-size {groups or placement.ep_size}"]
    if groups:
        parallel = [f"--tensor-parallel-size {placement.ep_size // groups} {parallel[0]}"]
    if placement.nodes > 1:
        parallel.append(f"--nnodes {placement.nodes} --node-rank $RANK --master-addr $HEAD")
    eplb = json.dumps({"num_redundant_experts": placement.redundant})
    command = (
        "vllm serve $MODEL",
        *parallel,
        "--enable-expert-parallel",
        *([f"--all2all-backend {backend[serving.dispatch]}"] if serving.dispatch else []),
        f"--enable-eplb --eplb-config '{eplb}'",
    )
    environment = (("MOEPLAN_VLLM_PLAN", file),)
    return Launch(command, _flags(placement, serving), ReplicaRule.HASH, environment, notes=tuple(notes))


def _vllm_ascend(placement: EnginePlacement, file: str, serving: Serving) -> Launch:
    groups = serving.groups or placement.ep_size
    eplb = json.dumps({"eplb_config": {"expert_map_path": file, "num_redundant_experts": placement.redundant}})
    command = (
        "vllm serve $MODEL",
        f"--tensor-parallel-size {placement.ep_size // groups} --data-parallel-size {groups}",
        "--enable-expert-parallel",
        f"--additional-config '{eplb}'",
    )
    notes = ("model runner V1 only, and announced for removal; on main, test that weights follow the file's map",)
    return Launch(command, _flags(placement, serving), ReplicaRule.HASH, notes=notes)


def _tensorrt_llm(placement: EnginePlacement, file: str, serving: Serving) -> Launch:
    ranks = placement.ep_size
    attention = "true" if serving.groups is None or serving.groups > 1 else "false"
    options = f"enable_attention_dp: {attention}\nmoe_config:\n  backend: WideEP\n  load_balancer: {file}\n"
    front = "trtllm-llmapi-launch trtllm-serve $MODEL" if placement.nodes > 1 else "trtllm-serve $MODEL"
    command = (front, f"--tp_size {ranks} --ep_size {ranks}", "--extra_llm_api_options options.yaml")
    notes = ["num_slots and the layers are in the file; the EP size must be as planned"]
    if serving.groups not in (None, 1, ranks):
        notes.append(f"attention runs on each GPU, not in {serving.groups} groups: plan with --deployment gpus")
    extra = ("options.yaml", options)
    return Launch(command, _flags(placement, serving), ReplicaRule.HASH, extra=extra, notes=tuple(notes))


def _flags(placement: EnginePlacement, serving: Serving, **more: object) -> dict[str, object]:
    return {
        "ep_size": placement.ep_size,
        "nnodes": placement.nodes,
        "slots": placement.num_slots,
        "slots_per_gpu": placement.num_slots // placement.ep_size,
        "redundant": placement.redundant,
        "attention_groups": serving.groups,
        **more,
    }


_BY_ENGINE = {"sglang": _sglang, "vllm": _vllm, "vllm-ascend": _vllm_ascend, "tensorrt-llm": _tensorrt_llm}
