"""The flags: each is written once, with its one meaning; those that go together are a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Group, Parameter, Token

from moeplan.cli.files import File
from moeplan.errors import FormatError, UsageError

if TYPE_CHECKING:
    from moeplan.engines.report import EpSettings
    from moeplan.model.spec import ModelSpec
    from moeplan.planning import Plan, PlanningTask, RequestSet, Strategy
    from moeplan.replay.settings import EvaluationSettings
    from moeplan.replay.timing import Timing
    from moeplan.trace import Trace
    from moeplan.trace.retention import RetentionPolicy
    from moeplan.types import ModelShape

# ---- how text becomes a value


def whole(_: Any, tokens: Sequence[Token]) -> int:
    """A whole number; '2.5' is refused, not rounded."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise UsageError(f"{tokens[0].keyword} {tokens[0].value[:60]!r} is not a whole number") from None


def _integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas, each once, rising; none where the text is something else."""
    try:
        return tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        return ()


def _layers(_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """'45' or '0,1,45' as layers, 'none' or nothing as no layer."""
    flag, text = tokens[0].keyword, tokens[0].value.strip()
    if not text or text.lower() == "none":
        return ()
    found = _integers(text)
    if not found:
        raise UsageError(f"{flag} {text[:60]!r} is not a list of layer numbers", hint="e.g. 45 or 0,1,45")
    return found


def _numbers(_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """'1,2,8' as numbers of at least 1, each once, rising."""
    flag, text = tokens[0].keyword, tokens[0].value
    found = _integers(text)
    if not found or found[0] < 1:
        raise UsageError(f'{flag} "{text[:60]}" is not a list of numbers of at least 1', hint=f"e.g. {flag} 1,2,8")
    return found


Int: TypeAlias = Annotated[int, Parameter(converter=whole)]
Layers: TypeAlias = Annotated[tuple[int, ...], Parameter(converter=_layers, n_tokens=1, metavar="IDS")]
Numbers: TypeAlias = Annotated[tuple[int, ...], Parameter(converter=_numbers, n_tokens=1, metavar="N,..")]

# ---- groups, in the order of --help

#: Of every command and sub-command.
SETTINGS: dict[str, Any] = {
    "help_format": "plaintext",
    "default_parameter": Parameter(negative=(), allow_repeating=True, show_default=lambda value: _shown(value)),
    "group_parameters": Group("Options", sort_key=1),
    "result_action": "return_value",
}


def _shown(value: Any) -> Any:
    """A default as `--help` shows it: nothing where the flag's own text says what happens without it."""
    if value is None or value is False or value == ():
        return None
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


CLUSTER = Group("Cluster", sort_key=2)
PLANNING = Group("Planning", sort_key=3)
REQUESTS = Group("Requests of the trace", sort_key=4)
MEASURING = Group("Measurement", sort_key=5)
MODEL = Group("Model", sort_key=6)
TIMES = Group("Step times", sort_key=7)
OUTPUT = Group("Output", sort_key=20)

# ---- inputs and outputs


def output(metavar: str, help: str) -> Parameter:
    """The flag of what a verb makes: `-o` everywhere."""
    return Parameter(name=("--output", "-o"), group=OUTPUT, metavar=metavar, help=f"Output: {help}.")


TraceIn: TypeAlias = Annotated[Path, File("input"), Parameter(help="A moeplan trace (a directory), or embedded.")]
Sources: TypeAlias = Annotated[list[Path], File("input")]
PlanIn: TypeAlias = Annotated[
    Path | None, File("input"), Parameter(metavar="PLAN", help="A plan made by 'moeplan plan'.")
]
TraceOut: TypeAlias = Annotated[Path, File("folder"), output("TRACE", "the trace directory to make")]
CountsOut: TypeAlias = Annotated[Path, File("folder"), output("COUNTS", "the counts profile to make")]
NeededPlan: TypeAlias = Annotated[Path, File("input"), Parameter(metavar="PLAN", help="A plan made by 'moeplan plan'.")]
PlacementIn: TypeAlias = Annotated[Path, File("input"), Parameter(help="A placement file of an engine.")]
InputFile: TypeAlias = Annotated[Path, File("input")]
PlanOut: TypeAlias = Annotated[Path, File("new folder"), output("PLAN", "the directory of the new plan")]
RecorderOut: TypeAlias = Annotated[Path, File("folder"), output("OUT", "the trace or the counts profile to make")]
PageOut: TypeAlias = Annotated[Path | None, File("file"), output("HTML", "a page with figures")]
Json: TypeAlias = Annotated[
    Path | None,
    File("file"),
    Parameter(
        group=OUTPUT,
        metavar="PATH",
        allow_leading_hyphen=True,
        help="Write the figures as JSON: to a file, or to - (standard output).",
    ),
]

# ---- single flags

Seed: TypeAlias = Annotated[int, Parameter(converter=whole, help="Random seed.")]
Block: TypeAlias = Annotated[
    int,
    Parameter(
        converter=whole,
        group=REQUESTS,
        help="Keep runs of N consecutive requests in the same half (one conversation).",
    ),
]
EngineName: TypeAlias = Literal["sglang", "vllm", "tensorrt-llm", "vllm-ascend"]
Engine: TypeAlias = Annotated[EngineName, Parameter(help="Target engine of the file.")]
Deployment: TypeAlias = Literal["nodes", "gpus"]
DispatchMode: TypeAlias = Literal["pick", "gpu", "node", "allgather"]
ReplicaRuleName: TypeAlias = Literal["nearest-static", "nearest-even", "hash"]
CountedPhase: TypeAlias = Annotated[
    Literal["prefill", "decode", "mixed", "unknown"], Parameter(help="Inference phase: what was counted.")
]

ServedRedundant: TypeAlias = Annotated[
    int | None, Parameter(converter=whole, group=CLUSTER, help="Redundant experts in each layer, over all GPUs.")
]
ModelName: TypeAlias = Annotated[str | None, Parameter(group=MODEL, help="Name of the model.")]
TopK: TypeAlias = Annotated[
    int | None,
    Parameter(converter=whole, group=MODEL, help="Experts that each token picks, if the source does not have it."),
]

# ---- groups of flags; a field's docstring is its help, where it takes one line

_DEPLOYMENT = (
    "One attention data-parallel rank per node (nodes: TP inside it; SGLang --attn-dp-size = nodes) or per GPU (gpus: "
    "DP attention; SGLang --attn-dp-size = GPUs), or instances: independent ones, in compare. A request group is the "
    "requests of one rank or instance."
)
_DISPATCH = (
    "Dispatch mode: pick (DeepEP low-latency), node (DeepEP normal; vLLM deepep_high_throughput), gpu (direct "
    "all-to-all; vLLM deepep_v2) or allgather (vLLM allgather_reducescatter, SGLang --moe-a2a-backend none)."
)
_REPLICA_RULE = (
    "Replica selection rule: nearest-static (SGLang, several nodes), nearest-even (SGLang, one node), hash (vLLM, "
    "TensorRT-LLM, vLLM-Ascend)."
)
_OBJECTIVE = (
    "What to minimise: traffic between nodes (bytes), load imbalance (balance), or step time (time, needs --hardware). "
    "Default: bytes; in rebalance, the plan's."
)


@Parameter(name="*", group=CLUSTER)
@dataclass(frozen=True)
class ClusterFlags:
    """The cluster, and how it serves a token."""

    nodes: Int = 8
    """Nodes of the cluster."""
    gpus_per_node: Int = 8
    """GPUs in each node."""
    redundant: Int = 0
    """Redundant experts in each layer, over all GPUs (SGLang --ep-num-redundant-experts)."""
    deployment: Annotated[Literal["nodes", "gpus", "instances"], Parameter(help=_DEPLOYMENT)] = "nodes"
    dispatch: Annotated[DispatchMode, Parameter(help=_DISPATCH)] = "pick"
    replica_rule: Annotated[ReplicaRuleName, Parameter(help=_REPLICA_RULE)] = "nearest-static"

    def task(self) -> PlanningTask:
        """The flags as the library's own value."""
        from moeplan.cluster import Cluster, Deployment, Dispatch, ReplicaRule
        from moeplan.planning import PlanningTask

        if self.nodes < 1 or self.gpus_per_node < 1:
            raise UsageError(f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node}: both must be at least 1")
        if self.deployment == "instances":
            raise UsageError("--deployment instances has no placement to plan", hint="moeplan compare shows its gain")
        cluster = Cluster(self.nodes, self.gpus_per_node, Deployment(self.deployment))
        return PlanningTask(cluster, self.redundant, Dispatch(self.dispatch), ReplicaRule(self.replica_rule))


@Parameter(name="*", group=PLANNING)
@dataclass(frozen=True)
class ObjectiveFlags:
    """What the strategy moeplan is given."""

    guard: float | None = None
    """Highest allowed node load, as a multiple of linear's (inf: no limit). Default: 1.05; in rebalance, the plan's."""
    objective: Annotated[Literal["bytes", "balance", "time"] | None, Parameter(help=_OBJECTIVE)] = None

    def values(self, timing: Timing | None, task: PlanningTask) -> dict[str, Any]:
        """The same by the names of the library's parameters."""
        cost = None if timing is None else timing.step_cost(task.cluster, task.dispatch)
        return {"guard": self.guard, "objective": self.objective, "step_cost": cost}


@Parameter(name="*", group=PLANNING)
@dataclass(frozen=True)
class PaperFlags:
    """What the strategies paper and paper-unbalanced are given."""

    clusters: Int | None = None
    """Request clusters (K) of the strategy paper. Default: selected on the fit requests."""

    def strategies(self, names: str) -> tuple[str | Strategy, ...]:
        """The strategies of a list of names, separated by commas; an unknown one is refused."""
        from moeplan.planning.strategies import find
        from moeplan.planning.strategies.paper import PaperStrategy

        chosen = [name.strip() for name in names.split(",") if name.strip()]
        if not chosen:
            raise UsageError("--strategies names none", hint="e.g. linear,eplb,paper")
        for name in chosen:
            find(name)
        both = {
            params.name: params for params in (PaperStrategy(self.clusters), PaperStrategy(self.clusters, equal=False))
        }
        if self.clusters is not None and not both.keys() & chosen:
            raise UsageError(f"--clusters is for the strategies {' and '.join(both)}", hint="leave it out")
        return tuple(both.get(name, name) for name in chosen)


@Parameter(name="*", group=REQUESTS)
@dataclass(frozen=True)
class TraceFlags:
    """What is read of a trace."""

    signature_tokens: Int | None = None
    """Use each request's first N tokens as its signature, instead of the prefill."""
    without_layers: Layers = ()
    """Leave out these layers, e.g. 45 or 0,1,45."""

    def open(self, trace: str | Path) -> Trace:
        """Open a trace, or the embedded one, without these layers."""
        from moeplan.trace import open_trace

        return open_trace(trace, without_layers=self.without_layers)

    def read(self, trace: Trace, plan: Plan | None = None, **how: Any) -> RequestSet:
        """The requests of an opened trace, with the signature of a plan unless the flags say another."""
        from moeplan.planning import read_requests

        tokens = plan.signature.tokens if plan is not None and self.signature_tokens is None else self.signature_tokens
        return read_requests(trace, signature_tokens=tokens, **how)


@Parameter(name="*", group=TIMES)
@dataclass(frozen=True)
class TimingFlags:
    """The hardware to model step times on."""

    hardware: str | None = None
    """Hardware: also model step times on it, e.g. H100."""
    model: Annotated[str | None, File("input")] = None
    """The model: a catalogue name, or a config.json. Default: the model of the trace."""
    context: Int | None = None
    """Context tokens of each request. Default: 4096."""

    def timing(self, shape: ModelShape, task: PlanningTask) -> Timing | None:
        """What to time steps with, checked; None without --hardware."""
        if self.hardware is None:
            if self.model is not None or self.context is not None:
                flag = "--context" if self.model is None else "--model"
                raise UsageError(f"{flag} is for step times", hint="give --hardware too, e.g. --hardware H100")
            return None
        from moeplan.replay import timing

        context = timing.CONTEXT if self.context is None else self.context
        return timing.find_timing(shape, task.cluster, task.dispatch, self.hardware, self.model, context)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class ModelFlags:
    """Facts of the model that a source does not have, or that it is checked against."""

    config: InputFile | None = None
    """The model's config.json, or its folder: experts, top-k, dense layers."""
    num_experts: Int | None = None
    """Routed experts per layer, if not in --config."""
    top_k: Int | None = None
    """Experts that each token picks, if not in --config."""
    name: str | None = None
    """Name of the model."""
    hidden: Int | None = None
    """Hidden size. Byte figures need it."""
    expert_bytes: Int | None = None
    """Bytes of the weights of one expert in one layer."""
    kv_bytes_per_token: Int | None = None
    """Bytes of the KV cache of one token over all layers."""
    expert_groups: Int | None = None
    """Expert groups of the gate, n_group of config.json (DeepSeek-V3: 8). Default: the config's, or 1."""

    def spec(self) -> ModelSpec:
        """The model as config and flags describe it."""
        return described(**vars(self))


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class LayeredModelFlags(ModelFlags):
    """The same where a source may have rows for layers without experts."""

    num_layers: Int | None = None
    """Hidden layers, dense ones included, if not in --config."""
    dense_layers: Layers | None = None
    """Layers without experts, e.g. 0,1,2, or none."""


@Parameter(name="*", group=REQUESTS)
@dataclass(frozen=True)
class KeepFlags:
    """What of the recorded requests is stored."""

    min_tokens: Int = 1
    """Drop requests with fewer than N tokens (prefill + decode)."""
    aggregate: Int | None = None
    """Store sums over N requests of a domain instead of token rows."""

    def policy(self) -> RetentionPolicy:
        """The same as the library's value."""
        from moeplan.trace.retention import RetentionPolicy

        return RetentionPolicy(self.min_tokens, self.aggregate)


def described(config: Path | None = None, **given: Any) -> ModelSpec:
    """A model as its config.json, if there is one, and flags describe it."""
    from moeplan.model import config as reader

    return reader.described(config, **given)


@Parameter(name="*", group=MEASURING)
@dataclass(frozen=True)
class MeasureFlags:
    """What is measured."""

    phase: Literal["decode", "prefill", "mixed"] = "decode"
    """Inference phase: rows to measure. Plans are always fitted on decode."""
    block: Int = 1
    """Keep runs of N consecutive requests in the same half (one conversation)."""
    steps: Int = 500
    """Decode steps measured in each fold."""
    hidden: Int | None = None
    """Hidden size, if the trace does not have it."""

    def settings(self, timing: Timing | None, seed: int, **split: Any) -> EvaluationSettings:
        """The same as the library's value; one split without `split`."""
        from moeplan.replay.settings import EvaluationSettings

        split = split or {"folds": 1}
        return EvaluationSettings(
            block=self.block, steps=self.steps, seed=seed, hidden=self.hidden, timing=timing, **split
        )


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class PlacedModelFlags:
    """The model that a placement file is for."""

    config: InputFile | None = None
    """The model's config.json, or its folder: experts, layers, which of them are dense."""
    num_experts: Int | None = None
    """Routed experts per layer, if not in --config."""
    num_layers: Int | None = None
    """Hidden layers, dense ones included, if not in --config."""
    dense_layers: Layers | None = None
    """Layers without experts, e.g. 0,1,2, or none."""

    def spec(self, **more: Any) -> ModelSpec:
        """The model as config and flags describe it."""
        return described(**vars(self), **more)


@Parameter(name="*", group=CLUSTER)
@dataclass(frozen=True)
class ServedFlags:
    """The deployment that a placement file is for."""

    ep_size: Int | None = None
    """GPUs that share the experts, over all nodes."""
    nodes: Int | None = None
    """Nodes of the cluster."""

    def layout(self, redundant: int | None = None) -> EpSettings:
        """What the flags say of the deployment."""
        from moeplan.engines.report import EpSettings

        return EpSettings(self.ep_size, self.nodes, redundant)


@Parameter(name="*", group=Group("Placement file, in place of a plan", sort_key=1.5))
@dataclass(frozen=True)
class PlacementFlags(ServedFlags):
    """A placement that an engine serves with."""

    placement: Annotated[Path | None, File("input"), Parameter(metavar="FILE")] = None
    """A placement file of an engine."""
    engine: EngineName | None = None
    """Target engine of the file."""
    config: InputFile | None = None
    """The model's config.json, or its folder: layers, which of them are dense."""
    num_layers: Int | None = None
    """Hidden layers, dense ones included, if not in --config."""
    deployment: Deployment | None = None
    """One attention data-parallel rank per node (nodes) or per GPU (gpus). Default: nodes."""


def refuse_trace(source: Path) -> Path:
    """Raise a FormatError where a trace stands in place of a plan; else the path itself."""
    if not (source / "plan.json").is_file() and (str(source) == "embedded" or (source / "trace.json").is_file()):
        raise FormatError(
            "is a trace, not a plan", where=str(source), hint=f"make a plan of it: moeplan plan {source} -o PLAN"
        )
    return source


def refuse_plan(file: Path) -> None:
    """Raise a FormatError where a plan or a folder stands in place of a placement file."""
    if (file / "plan.json").is_file():
        hint = f"write the engine's file first: moeplan export {file} --engine E -o FILE"
        raise FormatError("is a plan, not an engine's placement file", where=str(file), hint=hint)
    if file.is_dir():
        raise FormatError("is a directory, not a placement file", where=str(file), hint="give the file itself")
