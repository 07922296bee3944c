"""Check and write the placement files of all engines.

One module per engine has its format and rules; `map_rules` has the rules that all share.
"""

from __future__ import annotations

import json
from pathlib import Path

from moeplan.engines import sglang, tensorrt_llm, vllm, vllm_ascend
from moeplan.engines.placement import EnginePlacement
from moeplan.engines.report import ExpertLayout, Finding, Report
from moeplan.errors import OutputError, UsageError
from moeplan.io.files import atomic_path
from moeplan.model.spec import GIVE_MODEL, ModelSpec, Moe

__all__ = ["ENGINES", "EnginePlacement", "ExpertLayout", "Finding", "Report", "check_write", "examine", "write"]

_EXAMINE = {
    "sglang": sglang.examine,
    "vllm": vllm.examine,
    "tensorrt-llm": tensorrt_llm.examine,
    "vllm-ascend": vllm_ascend.examine,
}
#: Engine -> allowed suffixes of its files.
_SUFFIXES = {
    "sglang": (".json",),
    "vllm": (".json",),
    "tensorrt-llm": (".yaml", ".yml"),
    "vllm-ascend": (".json",),
}
ENGINES = tuple(_EXAMINE)


def examine(
    path: str | Path, engine: str, model: ModelSpec | None = None, layout: ExpertLayout | None = None
) -> Report:
    """Check a file; the report says what is wrong and where.

    Raises:
        FormatError: the file cannot be read. UsageError: no such engine.
    """
    return _EXAMINE[_known(engine)](Path(path), model or ModelSpec(), layout or ExpertLayout())


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
    layout = ExpertLayout(placement.ep_size, placement.nodes, placement.redundant)
    assert examine(path, engine, spec, layout).require_placement().same_as(placement), "a file that does not read back"


def check_write(path: Path, engine: str, placement: EnginePlacement) -> None:
    """Raise the errors of `write`, without writing.

    Raises:
        UsageError: a file name that the engine does not accept; a placement that it does not support.
        OutputError: the path exists.
    """
    if path.suffix not in _SUFFIXES[_known(engine)]:
        raise UsageError(
            f"the name ends in {path.suffix or 'nothing'}, but {engine} needs {' or '.join(_SUFFIXES[engine])}",
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
    if engine == "vllm-ascend":
        held = placement.physical_to_logical.reshape(len(placement.layer_ids), placement.ep_size, -1)
        for row, layer in zip(held, placement.layer_ids, strict=True):
            for device, experts in enumerate(row.tolist()):
                if len(set(experts)) < len(experts):
                    raise UsageError(
                        f"layer {layer}: device {device} has an expert twice, which vLLM-Ascend serves incorrectly",
                        hint="plan with --strategy moeplan, which avoids duplicates",
                    )


def _known(engine: str) -> str:
    if engine not in _EXAMINE:
        raise UsageError(f"--engine {engine[:40]!r} is not known", hint=f"choose one of {', '.join(ENGINES)}")
    return engine
