"""Check and write the placement files of all engines, also against the plan that a file should hold.

One module per engine has its format and rules; `map_rules` has the rules that all share.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moeplan.engines import sglang, tensorrt_llm, vllm, vllm_ascend
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import EpSettings, Report
from moeplan.errors import OutputError, UsageError, expect
from moeplan.io.files import atomic_path
from moeplan.model.spec import GIVE_MODEL, ModelSpec, Moe
from moeplan.planning.plan import Plan
from moeplan.types import has_duplicate_experts

__all__ = ["ENGINES", "check", "check_write", "examine", "without_placement", "write"]

_EXAMINE = {
    "sglang": sglang.examine,
    "vllm": vllm.examine,
    "tensorrt-llm": tensorrt_llm.examine,
    "vllm-ascend": vllm_ascend.examine,
}
ENGINES = tuple(_EXAMINE)
#: Served by SGLang 0.5.23 (`srt/models/`) in a class without `get_model_config_for_expert_location`: it then
#: silently starts without any placement.
_SGLANG_WITHOUT = (
    "MixtralForCausalLM", "QuantMixtralForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration",
    "OlmoeForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM",
    "Ernie4_5_MoeForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
    "Lfm2MoeForCausalLM", "Cohere2MoeForCausalLM", "Qwen3OmniMoeForConditionalGeneration", "XverseMoeForCausalLM",
)  # fmt: skip
#: TensorRT-LLM's wide_ep README, 2a595f81: families with a load balancer.
_TENSORRT_LLM_WITH = ("DeepseekV3", "Mixtral", "Llama4", "Qwen2Moe", "Qwen3Moe")


def examine(path: str | Path, engine: str, model: ModelSpec | None = None, layout: EpSettings | None = None) -> Report:
    """Check a file; the report says what is wrong and where.

    Raises:
        FormatError: the file cannot be read. UsageError: no such engine.
    """
    return _EXAMINE[_known(engine)](Path(path), model or ModelSpec(), layout or EpSettings())


def write(
    path: Path, engine: str, placement: EnginePlacement, *, num_layers: int | None = None, model: str = ""
) -> None:
    """Write an engine's file, whole or not at all, and read it back.

    Args:
        num_layers: all hidden layers, which SGLang's file needs. model: its name, for the plug-in's file.

    Raises:
        UsageError: a file name that the engine does not accept; a placement that it does not support.
        OutputError: the path exists or cannot be written.
    """
    check_write(path, engine, placement)
    with atomic_path(path) as temporary:
        temporary.write_text(_text(engine, placement, num_layers, model), encoding="utf-8")
    spec = ModelSpec(layers=num_layers, moe=Moe(experts=placement.num_experts, layers=placement.layer_ids))
    layout = EpSettings(placement.ep_size, placement.nodes, placement.redundant)
    assert examine(path, engine, spec, layout).require_placement().same_as(placement), "a file that does not read back"


def check_write(path: Path, engine: str, placement: EnginePlacement) -> None:
    """Raise the errors of `write`, without writing.

    Raises:
        UsageError: a file name that the engine does not accept; a placement that it does not support.
        OutputError: the path exists.
    """
    suffixes = (".yaml", ".yml") if _known(engine) == "tensorrt-llm" else (".json",)
    if path.suffix not in suffixes:
        raise UsageError(
            f"the name ends in {path.suffix or 'nothing'}, but {engine} needs {' or '.join(suffixes)}",
            where=str(path),
            hint="choose another name",
        )
    if path.exists():
        raise OutputError("already exists", where=str(path), hint="choose another place, or remove it")
    _check_supported(engine, placement)


def _text(engine: str, placement: EnginePlacement, num_layers: int | None, model: str) -> str:
    if engine == "tensorrt-llm":
        return tensorrt_llm.content(placement)
    if engine == "sglang":
        if num_layers is None:
            raise UsageError("SGLang's file needs the number of hidden layers", hint=GIVE_MODEL)
        data = sglang.content(placement, num_layers)
    else:
        data = vllm.content(placement, model) if engine == "vllm" else vllm_ascend.content(placement)
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"


def _check_supported(engine: str, placement: EnginePlacement) -> None:
    """Raise a UsageError for a placement that the engine does not support."""
    if engine == "vllm" and placement.redundant > vllm.MAX_REDUNDANT:
        raise UsageError(
            f"{placement.redundant} redundant slots are more than vLLM's limit of {vllm.MAX_REDUNDANT}",
            hint="plan with a smaller --redundant",
        )
    if engine in ("sglang", "vllm") and placement.ep_size == 1:
        raise UsageError(f"{engine} places experts over at least 2 GPUs", hint="plan for more GPUs")
    twice = np.argwhere(has_duplicate_experts(placement.physical_to_logical, placement.ep_size))
    if engine == "vllm-ascend" and len(twice):
        row, device = twice[0]
        raise UsageError(
            f"layer {placement.layer_ids[row]}: device {device} has an expert twice, which vLLM-Ascend serves wrongly",
            hint="plan with --strategy moeplan, which avoids duplicates",
        )


def _known(engine: str) -> str:
    if engine not in _EXAMINE:
        raise UsageError(f"--engine {engine[:40]!r} is not known", hint=f"choose one of {', '.join(ENGINES)}")
    return engine


def check(
    path: str | Path,
    engine: str,
    model: ModelSpec | None = None,
    layout: EpSettings | None = None,
    *,
    plan: Plan | None = None,
    plan_path: str = "",
) -> Report:
    """Check an engine's placement file against the rules of the engine, including those that it does not check itself.

    Args:
        model: `load_model` of its name or config.json. layout: what the engine is started with.
        plan: also compare with this plan, slot by slot.
        plan_path: path of the plan, for messages.

    Raises:
        FormatError: the file cannot be read. UsageError: no such engine; `model` or `layout` contradicts the plan.
    """
    model, layout = model or ModelSpec(), layout or EpSettings()
    ignored = without_placement(engine, model.architectures)
    if plan is not None:
        expect(plan, Plan, 'moeplan.load_plan("PATH")')
        model, layout = _with_plan(model, layout, plan, plan_path)
    report = examine(path, engine, model, layout)
    if plan is not None:
        _compare(report, plan, plan_path)
    if ignored is not None:
        report.add_warning("", ignored, "the file would have no effect")
    return report


def _with_plan(model: ModelSpec, layout: EpSettings, plan: Plan, where: str) -> tuple[ModelSpec, EpSettings]:
    """What the plan says, where nothing else does; a contradiction is the reader's to correct."""
    for key, given, value in (
        ("num_experts", model.num_experts, plan.model.num_experts),
        ("moe_layers", model.moe_layers, plan.model.layer_ids),
        ("ep_size", layout.ep_size, plan.cluster.num_gpus),
        ("nodes", layout.nodes, plan.cluster.nodes),
        ("redundant", layout.redundant, plan.redundant),
    ):
        if given not in (None, value):
            raise UsageError(
                f"{key.replace('_', ' ')} {given} is not the plan's {value}"[:200],
                where=where,
                hint="leave it out, or give the file's own plan",
            )
    spec = model.override(num_experts=plan.model.num_experts, moe_layers=plan.model.layer_ids)
    return spec, EpSettings(plan.cluster.num_gpus, plan.cluster.nodes, plan.redundant)


def _compare(report: Report, plan: Plan, where: str) -> None:
    """An error for the first slot that differs from the plan's."""
    if report.placement is None:
        return
    ours, theirs = report.placement.physical_to_logical, plan.placement.slots
    differ = np.argwhere(ours != theirs)
    if len(differ):
        row, slot = (int(i) for i in differ[0])
        report.add_error(
            f"layer {plan.model.layer_ids[row]}, slot {slot}",
            f"holds expert {ours[row, slot]}, the plan {where} has {theirs[row, slot]} "
            f"({len(differ)} of {ours.size} slots differ)",
            "export the plan again, or check against the plan that is served",
        )


def without_placement(engine: str, architectures: tuple[str, ...]) -> str | None:
    """A warning if the engine ignores or refuses any placement of this model; else None.

    Args:
        architectures: class names that the model's config.json gives.
    """
    for name in architectures:
        if engine == "sglang" and name in _SGLANG_WITHOUT:
            return f"SGLang 0.5.23 silently serves {name} without any placement"
        if engine == "tensorrt-llm" and not name.startswith(_TENSORRT_LLM_WITH):
            return f"TensorRT-LLM names {', '.join(_TENSORRT_LLM_WITH)} as models with a load balancer, not {name}"
    return None
