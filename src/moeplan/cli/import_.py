"""`moeplan import`: recordings of other tools into traces, counts profiles and plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moeplan.cli import options as o
from moeplan.cli.prompt_flags import PromptTokenFlags
from moeplan.cli.terminal import progress, show
from moeplan.cli.text.engines import placement_facts, placement_lines
from moeplan.cli.text.made import show_counts, show_made, show_trace

if TYPE_CHECKING:
    from moeplan.importers.options import ImportOptions
    from moeplan.trace.counts import CountsProfile

__all__ = ["import_"]

import_ = App(
    name="import", help="Turn recordings of other tools into a trace, a counts profile or a plan.", **o.SETTINGS
)

SourceFiles = Annotated[o.Sources, Parameter(name="FILE..", help="Files, or folders of them.")]
Start = Annotated[
    o.Int, Parameter(group=o.REQUESTS, help="Start length set in the requests: the responses have no rows before it.")
]


@Parameter(name="*", group=o.REQUESTS)
@dataclass(frozen=True)
class SourceFlags:
    """How the requests of a source are stored."""

    domain: str | None = None
    """Domain label of every request. Default: the source's own, or the file name up to its trailing number."""
    without_layers: o.Layers = ()
    """Leave out these layers, e.g. 45 or 0,1,45."""

    def options(self, model: o.ModelFlags = o.ModelFlags(), keep: o.KeepFlags = o.KeepFlags()) -> ImportOptions:
        """What an importer is told beside the source."""
        from moeplan.importers.options import ImportOptions

        dense = model.dense_layers if isinstance(model, o.LayeredModelFlags) else None
        return ImportOptions(model.spec(), dense, self.domain, self.without_layers, keep.policy())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewTraceFlags:
    """The trace to make of requests, and what their source does not say."""

    output: o.TraceOut
    how: SourceFlags = SourceFlags()
    model: o.ModelFlags = o.ModelFlags()

    def make(self, importer: Callable[..., Any], source: Path | list[Path], what: str, **more: Any) -> Any:
        """What an importer makes of a source."""
        with progress(f"importing {what}") as tick:
            return importer(source, self.output, self.how.options(self.model), progress=tick, **more)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ResponseFlags(NewTraceFlags):
    """The same for the responses of an engine."""

    start: Start = 0
    model: o.LayeredModelFlags = o.LayeredModelFlags()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DumpFlags(NewTraceFlags):
    """The same for a source that may be counts."""

    output: o.RecorderOut


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewCountsFlags:
    """The counts profile to make, and what its source does not say."""

    output: o.CountsOut
    phase: o.CountedPhase = "unknown"
    name: o.ModelName = None

    def make(self, importer: Callable[..., CountsProfile], source: Path, **known: Any) -> CountsProfile:
        """What an importer makes of a source."""
        from moeplan.importers.options import ImportOptions

        return importer(source, self.output, ImportOptions(o.described(name=self.name, **known)), phase=self.phase)


@import_.command
def placement(
    file: o.PlacementIn,
    /,
    *,
    engine: o.Engine,
    output: o.PlanOut,
    model: o.PlacedModelFlags = o.PlacedModelFlags(),
    top_k: o.TopK = None,
    name: o.ModelName = None,
    served: o.ServedFlags = o.ServedFlags(),
    deployment: Annotated[o.Deployment, Parameter(group=o.CLUSTER)] = "nodes",
    dispatch: Annotated[o.DispatchMode, Parameter(group=o.CLUSTER)] = "pick",
    json: o.Json = None,
) -> None:
    """Import a placement file of SGLang, vLLM, TensorRT-LLM or vLLM-Ascend: a plan, not a trace.

    Args:
        deployment: One attention data-parallel rank per node (nodes) or per GPU (gpus).
        dispatch: Dispatch mode, as in plan.
    """
    from moeplan.engines.from_placement import import_placement

    o.refuse_plan(file)
    plan = import_placement(
        file,
        engine,
        model.spec(top_k=top_k, name=name),
        served.layout(),
        deployment=deployment,
        dispatch=dispatch,
    )
    plan.save(output)
    show(placement_lines(plan, file, output), json, placement_facts(plan, output))


@import_.command
def arrays(
    source: o.InputFile,
    /,
    *,
    into: NewTraceFlags,
    prompts: PromptTokenFlags = PromptTokenFlags(),
    json: o.Json = None,
) -> None:
    """Import request-level arrays from an .npz file.

    It holds experts, request_offsets, prefill_lengths and num_experts, and may hold domain, layer_ids, session, turn,
    arrival, prompt_tokens and prompt_offsets.

    Args:
        source: The .npz file.
    """
    from moeplan.importers.arrays import import_arrays

    options = into.how.options(into.model)
    with prompts.added(options.retention, into.output) as retention, progress("importing requests") as tick:
        trace = import_arrays(source, into.output, replace(options, retention=retention), progress=tick)
    show_trace(trace, json)


@import_.command
def expert_selection(sources: SourceFiles, /, *, into: NewTraceFlags, json: o.Json = None) -> None:
    """Import JSON files, one per request: a list of steps, each a map from layer to the picks of its tokens."""
    from moeplan.importers.expert_selection import import_expert_selection

    show_trace(into.make(import_expert_selection, sources, "files"), json)


@import_.command
def moe_beyond(sources: SourceFiles, /, *, into: NewTraceFlags, json: o.Json = None) -> None:
    """Import CSV files of MoE-Beyond: prompts with layer, batch number, token and expert ids.

    The text of the tokens is not stored.
    """
    from moeplan.importers.moe_beyond import import_moe_beyond

    show_trace(into.make(import_moe_beyond, sources, "files"), json)


@import_.command
def megatron(sources: SourceFiles, /, *, into: NewTraceFlags, json: o.Json = None) -> None:
    """Import router traces (.jsonl) of Megatron-LM; each step becomes a pseudo-request."""
    from moeplan.importers.megatron import import_megatron

    show_trace(into.make(import_megatron, sources, "files"), json)


@import_.command
def vllm(
    sources: SourceFiles,
    /,
    *,
    into: ResponseFlags,
    prompts: PromptTokenFlags = PromptTokenFlags(),
    json: o.Json = None,
) -> None:
    """Import stored responses of vLLM with routed_experts, JSON or JSONL.

    Prompt tokens are in responses whose requests asked with return_token_ids.
    """
    from moeplan.importers.vllm_responses import import_vllm

    options = into.how.options(into.model)
    with prompts.added(options.retention, into.output) as retention, progress("importing responses") as tick:
        kept = replace(options, retention=retention)
        trace = import_vllm(sources, into.output, kept, start=into.start, progress=tick)
    show_trace(trace, json)


@import_.command
def sglang(sources: SourceFiles, /, *, into: ResponseFlags, json: o.Json = None) -> None:
    """Import stored responses of SGLang with routed_experts, JSON or JSONL."""
    from moeplan.importers.sglang_responses import import_sglang

    show_trace(into.make(import_sglang, sources, "responses", start=into.start), json)


@import_.command
def sglang_recorder(
    sources: SourceFiles,
    /,
    *,
    into: DumpFlags,
    counts: bool = False,
    phase: o.CountedPhase = "unknown",
    json: o.Json = None,
) -> None:
    """Import dumps (.pt) of SGLang's expert recorder: a trace from per_token, a counts profile from stat and per_pass.

    Args:
        counts: Count the picks of a per_token dump instead of rebuilding its requests.
    """
    from moeplan.importers.sglang_recorder import import_sglang_recorder

    show_made(into.make(import_sglang_recorder, sources, "dumps", counts=counts, phase=phase), json)


@import_.command
def tensorrt_llm(folder: o.InputFile, /, *, into: NewCountsFlags, json: o.Json = None) -> None:
    """Import expert statistics of TensorRT-LLM: a counts profile, not a trace.

    Args:
        folder: Folder with meta_info.json and rank*.safetensors.
    """
    from moeplan.importers.tensorrt_llm import import_tensorrt_llm

    show_counts(into.make(import_tensorrt_llm, folder), json)


@import_.command
def logical_count(source: o.InputFile, /, *, into: NewCountsFlags, top_k: o.TopK = None, json: o.Json = None) -> None:
    """Import SGLang's logical_count JSON: a counts profile, not a trace.

    Args:
        source: A JSON object with "logical_count".
    """
    from moeplan.importers.logical_count import import_logical_count

    show_counts(into.make(import_logical_count, source, top_k=top_k), json)


@import_.command
def trace(
    source: o.TraceIn,
    /,
    *,
    output: o.TraceOut,
    how: SourceFlags = SourceFlags(),
    keep: o.KeepFlags = o.KeepFlags(),
    prompts: PromptTokenFlags = PromptTokenFlags(),
    json: o.Json = None,
) -> None:
    """Copy a trace and store less: drop short requests, or replace token rows by sums over requests."""
    from moeplan.importers.trace import import_trace
    from moeplan.trace import open_trace

    options, stored = how.options(keep=keep), open_trace(source).prompts_info
    key = stored.key if stored else ""
    with prompts.added(options.retention, output, key=key) as retention, progress("copying requests") as tick:
        made = import_trace(source, output, replace(options, retention=retention), progress=tick)
    show_trace(made, json)
