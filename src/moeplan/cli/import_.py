"""`moeplan import`: recordings of other tools into traces, counts profiles and plans."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from moeplan.cli import options as o
from moeplan.cli.import_placement import placement
from moeplan.cli.terminal import progress
from moeplan.cli.text.made import show_counts, show_made, show_trace

__all__ = ["import_"]

import_ = App(
    name="import", help="Turn recordings of other tools into a trace, a counts profile or a plan.", **o.SETTINGS
)
import_.command(placement)

SourceFiles = Annotated[o.Sources, Parameter(name="FILE..", help="Files, or folders of them.")]
Start = Annotated[
    o.Int, Parameter(group=o.REQUESTS, help="Start length set in the requests: the responses have no rows before it.")
]


@import_.command
def arrays(
    source: o.InputFile,
    /,
    *,
    output: o.TraceOut,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.ModelFlags = o.ModelFlags(),
    json: o.Json = None,
) -> None:
    """Import request-level arrays from an .npz file.

    It holds experts, request_offsets, prefill_lengths, domain, layer_ids and num_experts.

    Args:
        source: The .npz file.
    """
    from moeplan.importers.arrays import import_arrays

    with progress("importing requests") as tick:
        trace = import_arrays(source, output, how.options(model), progress=tick)
    show_trace(trace, json)


@import_.command
def expert_selection(
    sources: SourceFiles,
    /,
    *,
    output: o.TraceOut,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.ModelFlags = o.ModelFlags(),
    json: o.Json = None,
) -> None:
    """Import JSON files, one per request: a list of steps, each a map from layer to the picks of its tokens."""
    from moeplan.importers.expert_selection import import_expert_selection

    with progress("importing files") as tick:
        trace = import_expert_selection(sources, output, how.options(model), progress=tick)
    show_trace(trace, json)


@import_.command
def moe_beyond(
    sources: SourceFiles,
    /,
    *,
    output: o.TraceOut,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.ModelFlags = o.ModelFlags(),
    json: o.Json = None,
) -> None:
    """Import CSV files of MoE-Beyond: prompts with layer, batch number, token and expert ids.

    The text of the tokens is not stored.
    """
    from moeplan.importers.moe_beyond import import_moe_beyond

    with progress("importing files") as tick:
        trace = import_moe_beyond(sources, output, how.options(model), progress=tick)
    show_trace(trace, json)


@import_.command
def megatron(
    sources: SourceFiles,
    /,
    *,
    output: o.TraceOut,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.ModelFlags = o.ModelFlags(),
    json: o.Json = None,
) -> None:
    """Import router traces (.jsonl) of Megatron-LM; each step becomes a pseudo-request."""
    from moeplan.importers.megatron import import_megatron

    with progress("importing files") as tick:
        trace = import_megatron(sources, output, how.options(model), progress=tick)
    show_trace(trace, json)


@import_.command
def vllm(
    sources: SourceFiles,
    /,
    *,
    output: o.TraceOut,
    start: Start = 0,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.LayeredModelFlags = o.LayeredModelFlags(),
    json: o.Json = None,
) -> None:
    """Import stored responses of vLLM with routed_experts, JSON or JSONL."""
    from moeplan.importers.vllm_responses import import_vllm

    with progress("importing responses") as tick:
        trace = import_vllm(sources, output, how.options(model), start=start, progress=tick)
    show_trace(trace, json)


@import_.command
def sglang(
    sources: SourceFiles,
    /,
    *,
    output: o.TraceOut,
    start: Start = 0,
    how: o.SourceFlags = o.SourceFlags(),
    model: o.LayeredModelFlags = o.LayeredModelFlags(),
    json: o.Json = None,
) -> None:
    """Import stored responses of SGLang with routed_experts, JSON or JSONL."""
    from moeplan.importers.sglang_responses import import_sglang

    with progress("importing responses") as tick:
        trace = import_sglang(sources, output, how.options(model), start=start, progress=tick)
    show_trace(trace, json)


@import_.command
def sglang_recorder(
    sources: SourceFiles,
    /,
    *,
    output: o.RecorderOut,
    counts: bool = False,
    phase: o.CountedPhase = "unknown",
    how: o.SourceFlags = o.SourceFlags(),
    model: o.ModelFlags = o.ModelFlags(),
    json: o.Json = None,
) -> None:
    """Import dumps (.pt) of SGLang's expert recorder: a trace from per_token, a counts profile from stat and per_pass.

    Args:
        counts: Count the picks of a per_token dump instead of rebuilding its requests.
    """
    from moeplan.importers.sglang_recorder import import_sglang_recorder

    with progress("importing dumps") as tick:
        made = import_sglang_recorder(sources, output, how.options(model), counts=counts, phase=phase, progress=tick)
    show_made(made, json)


@import_.command
def tensorrt_llm(
    folder: o.InputFile,
    /,
    *,
    output: o.CountsOut,
    phase: o.CountedPhase = "unknown",
    name: o.ModelName = None,
    json: o.Json = None,
) -> None:
    """Import expert statistics of TensorRT-LLM: a counts profile, not a trace.

    Args:
        folder: Folder with meta_info.json and rank*.safetensors.
    """
    from moeplan.importers.tensorrt_llm import import_tensorrt_llm

    show_counts(
        import_tensorrt_llm(folder, output, o.SourceFlags().options(o.ModelFlags(name=name)), phase=phase), json
    )


@import_.command
def logical_count(
    source: o.InputFile,
    /,
    *,
    output: o.CountsOut,
    phase: o.CountedPhase = "unknown",
    top_k: o.TopK = None,
    name: o.ModelName = None,
    json: o.Json = None,
) -> None:
    """Import SGLang's logical_count JSON: a counts profile, not a trace.

    Args:
        source: A JSON object with "logical_count".
    """
    from moeplan.importers.logical_count import import_logical_count

    show_counts(
        import_logical_count(
            source, output, o.SourceFlags().options(o.ModelFlags(name=name, top_k=top_k)), phase=phase
        ),
        json,
    )


@import_.command
def trace(
    source: o.TraceIn,
    /,
    *,
    output: o.TraceOut,
    how: o.SourceFlags = o.SourceFlags(),
    keep: o.KeepFlags = o.KeepFlags(),
    json: o.Json = None,
) -> None:
    """Copy a trace and store less: drop short requests, or replace token rows by sums over requests."""
    from moeplan.importers.trace import import_trace

    with progress("copying requests") as tick:
        made = import_trace(source, output, how.options(keep=keep), progress=tick)
    show_trace(made, json)
