"""`moeplan export`: a plan, or counts of picks, as an engine's placement file, and the flags that go with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Group, Parameter

from moeplan.cli import options as o
from moeplan.cli.files import File
from moeplan.cli.terminal import echo, emit_json
from moeplan.cli.text.engines import balanced_lines, replica_lines, show_export
from moeplan.errors import FormatError, UsageError

if TYPE_CHECKING:
    from moeplan.engines.balancing import Balanced
    from moeplan.engines.exporting import ExportReport
    from moeplan.engines.placement import EnginePlacement
    from moeplan.model.spec import ModelSpec
    from moeplan.planning import Plan

__all__ = ["export"]

Exported: TypeAlias = "tuple[ExportReport, Iterator[str], dict[str, Any]]"
FileOut = Annotated[Path, File("new file"), o.output("FILE", "the file to write")]


@Parameter(name="*", group=Group("With a plan", sort_key=2))
@dataclass(frozen=True)
class PlanFlags:
    """What only a plan goes with."""

    trace: Annotated[Path | None, File("input")] = None
    """A moeplan trace: also estimate the remote share on it, with and without nearest-replica selection."""
    signature_tokens: o.Int | None = None
    """Use each request's first N tokens as its signature, instead of the prefill."""


@Parameter(name="*", group=Group("With counts", sort_key=3))
@dataclass(frozen=True)
class CountsFlags:
    """What only counts need: a plan says it itself."""

    nodes: o.Int | None = None
    """Nodes of the cluster."""
    gpus_per_node: o.Int | None = None
    """GPUs in each node."""
    redundant: o.Int | None = None
    """Redundant experts in each layer, over all GPUs. Default: 0."""
    measure: Annotated[Path | None, File("input"), Parameter(metavar="COUNTS")] = None
    """Measure the placement on these counts, instead of those that it was made from."""
    batch: o.Int | None = None
    """Requests that decode together, on each data-parallel rank or instance (here: of each node). Default: 128."""

    def balance(self, source: Path, engine: str, expert_groups: int, times: o.TimingFlags) -> Balanced:
        """Balance counts, and model a step where hardware is given."""
        from moeplan.cluster import Cluster
        from moeplan.engines.balancing import balance_counts, read_any_counts, step_times

        if self.nodes is None or self.gpus_per_node is None:
            raise UsageError(
                "counts do not say the cluster", where=str(source), hint="give --nodes and --gpus-per-node"
            )
        if times.hardware is None and (times.model is not None or times.context is not None):
            raise UsageError(
                "--model and --context are for step times", hint="give --hardware too, e.g. --hardware H100"
            )
        if times.hardware is not None and times.model is None:
            raise UsageError(
                "step times need the model", hint="give --model: a name of the catalogue, or a config.json"
            )
        found = balance_counts(
            read_any_counts(source),
            engine,
            Cluster(self.nodes, self.gpus_per_node),
            redundant=self.redundant or 0,
            expert_groups=expert_groups,
            others=None if self.measure is None else read_any_counts(self.measure),
            others_name=str(self.measure),
        )
        if times.hardware is None or times.model is None:
            return found
        batch = 128 if self.batch is None else self.batch
        return replace(found, step=step_times(found, times.hardware, times.model, context=times.context, batch=batch))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """The file to write, and the model that it is for."""

    engine: o.Engine
    output: FileOut
    model: o.PlacedModelFlags = o.PlacedModelFlags()
    expert_placement_strategy: Literal["linear", "round_robin"] | None = None
    """Layout that vLLM has built in: only write if the plan equals it (then no plug-in is needed)."""

    def write(self, placed: Plan | EnginePlacement, source: Path, model: ModelSpec, name: str = "") -> ExportReport:
        """Write a plan, or the placement of a model of this name."""
        from moeplan.engines.exporting import export

        strategy = self.expert_placement_strategy
        return export(
            placed, self.engine, self.output, model=model, where=str(source), name=name, vllm_strategy=strategy
        )


def export(
    source: Annotated[o.InputFile, Parameter(help="A plan, or counts of picks.")],
    /,
    *,
    target: TargetFlags,
    plan: PlanFlags = PlanFlags(),
    counts: CountsFlags = CountsFlags(),
    times: o.TimingFlags = o.TimingFlags(),
    json: o.Json = None,
) -> None:
    """Write an engine's placement file and print the flags to start the engine with.

    SOURCE is a plan, or counts of picks (SGLang's logical_count JSON, or a counts profile), which are balanced first.
    """
    if _is_plan(source):
        _refuse((counts, times), "a plan")
        report, lines, more = _export_plan(source, target, plan)
    else:
        _refuse((plan,), "counts")
        report, lines, more = _export_counts(source, target, counts, times)
    for line in lines:
        echo(line)
    show_export(report, source)
    emit_json(json, {**report.to_dict(), **more})


def _export_plan(source: Path, target: TargetFlags, flags: PlanFlags) -> Exported:
    from moeplan.planning.replica_value import trace_locality
    from moeplan.planning.store import load_plan

    plan, value = load_plan(source), None
    if flags.trace is not None:
        value = trace_locality(flags.trace, plan, signature_tokens=flags.signature_tokens)
    report = target.write(plan, source, target.model.spec())
    rule = report.launch.rule
    more = {"remote_share": None if value is None else value[0].to_dict(), "replica_rule": rule.value}
    return report, replica_lines(plan, rule, value), more


def _export_counts(source: Path, target: TargetFlags, flags: CountsFlags, times: o.TimingFlags) -> Exported:
    spec = target.model.spec()
    found = flags.balance(source, target.engine, spec.moe.groups if spec.moe else 1, times)
    report = target.write(found.placement, source, found.complete(spec), found.counts.name)
    return report, balanced_lines(found, source, target.engine, flags.measure), found.to_dict()


def _is_plan(source: Path) -> bool:
    """A plan (True), or counts (False)."""
    if not source.exists() or source.is_dir():
        o.refuse_trace(source)
    if not source.exists():
        raise FormatError("does not exist", where=str(source), hint="give a plan, or counts")
    if source.is_dir() and not any((source / name).is_file() for name in ("plan.json", "counts.json")):
        raise FormatError(
            "is neither a plan (plan.json) nor a counts profile (counts.json)",
            where=str(source),
            hint="give what moeplan plan or moeplan import made",
        )
    return (source / "plan.json").is_file()


def _refuse(groups: Sequence[PlanFlags | CountsFlags | o.TimingFlags], what: str) -> None:
    """Refuse flags of the other kind of source."""
    for name, value in (item for group in groups for item in asdict(group).items()):
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} does not go with {what}", hint="leave it out, or give the other kind of source")
