"""The settings of docs/results/strategies.md and their figures: sets, clusters, replicas and modes, each run once.

Real sets are read from ../shared/traces. A setting is a comparison as `moeplan compare` makes it
(docs/reference/metrics.md).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moeplan import embedded, open_trace
from moeplan.cluster import Cluster, Dispatch, check_slots
from moeplan.errors import PlanError
from moeplan.importers.arrays import import_arrays
from moeplan.importers.options import ImportOptions
from moeplan.model.catalogue import load_model
from moeplan.model.spec import ModelSpec
from moeplan.perf.memory import Precision, expert_bytes, kv_bytes_per_token
from moeplan.planning import RequestSet, read_requests
from moeplan.planning.plan import PlanningTask
from moeplan.planning.strategies.moeplan import PARTS, MoeplanStrategy
from moeplan.replay.compare import compare_task
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.split import least_requests
from moeplan.replay.statistics import change

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "traces"

STRATEGIES = ("random", "linear", "eplb", "affinity", "paper", "moeplan")
GPUS = (2, 3, 4, 5, 6, 8)
TIMES = (0, 1, 2, 4)  # redundant slots, in multiples of the nodes
#: What each dispatch mode is about.
KEY = {"pick": "remote_share", "node": "remote_nodes_per_token"}
#: Ablations: sets, and (mode, redundant slots on 8 nodes).
ABLATED = ("gpt-oss-20b", "maverick-mmlu", "deepseek-v2-lite-chat")
ABLATED_AT = (("pick", 0), ("pick", 16), ("node", 0))


@dataclass(frozen=True)
class Source:
    """One set of requests.

    Attributes:
        model: its name in the catalogue, for bytes of messages, weights and KV cache; None where the trace says.
        signature_tokens: first tokens that stand in for the prefill, where phases are not both recorded.
        block: neighbouring requests that are kept in one part. without_layers: left out of every figure.
    """

    name: str
    model: str | None = None
    signature_tokens: int | None = None
    block: int = 1
    without_layers: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        return embedded.TRACE if self.name == embedded.WORD else REAL / f"{self.name}.npz"


SOURCES = {
    source.name: source
    for source in (
        Source("gpt-oss-20b", "gpt-oss-20b", signature_tokens=48),
        Source("maverick-mmlu", "Llama-4-Maverick", without_layers=(45,)),
        Source("deepseek-v2-lite-chat", "DeepSeek-V2-Lite", signature_tokens=24, block=20),
        Source("mixtral-8x7b-long-context", "Mixtral-8x7B"),
        Source("embedded"),
    )
}


@dataclass(frozen=True)
class Setting:
    """One comparison: where, with how many copies, under which mode, and how `moeplan` is held.

    Attributes:
        guarded: whether `moeplan` keeps the guard on node load; if not, it alone is fitted beside `linear`.
        without: parts of `moeplan` that are left out; with any, it alone is fitted too.
    """

    source: str
    nodes: int
    gpus: int
    redundant: int
    mode: str
    guarded: bool = True
    without: tuple[str, ...] = ()
    folds: int = 4
    steps: int = 200

    @property
    def strategies(self) -> tuple[str, ...]:
        return STRATEGIES if self.guarded and not self.without else ("moeplan",)

    @property
    def label(self) -> str:
        marks = ["unguarded"] * (not self.guarded) + [f"without-{part}" for part in self.without]
        size = f"{self.nodes}x{self.gpus}-R{self.redundant}"
        return "-".join((self.source, size, self.mode, f"{self.folds}x{self.steps}", *marks))


Results = dict[Setting, dict[str, Any]]


def gpus_per_node(source: str, nodes: int, redundant: int) -> int:
    """The most GPUs of `GPUS` on which slots divide evenly; 1 where none does."""
    experts = requests_of(source).shape.num_experts
    for gpus in sorted(GPUS, reverse=True):
        try:
            check_slots(experts, redundant, Cluster(nodes, gpus))
        except PlanError:
            continue
        return gpus
    return 1


@cache
def requests_of(name: str) -> RequestSet:
    """The usable requests of a set, with what the catalogue knows of its model."""
    source = SOURCES[name]
    if source.model is None:
        return read_requests(open_trace(source.path))
    spec = load_model(source.model)
    precision = Precision.of_checkpoint(spec)
    model = ModelSpec().override(
        hidden=spec.hidden,
        expert_bytes=round(expert_bytes(spec, precision.experts or precision.weights)),
        kv_bytes_per_token=round(kv_bytes_per_token(spec, precision.kv)),
    )
    with tempfile.TemporaryDirectory() as folder:
        trace = import_arrays(
            source.path, Path(folder) / "t", ImportOptions(model, without_layers=tuple(source.without_layers))
        )
        return read_requests(trace, signature_tokens=source.signature_tokens)


def cannot(name: str, nodes: int) -> str | None:
    """Why a set has no comparison on that many nodes; None where it has."""
    usable = len(requests_of(name))
    need = least_requests(Cluster(nodes, 1), 0.5)
    return f"{usable} usable requests, and {nodes} groups need {need}" if usable < need else None


def table(
    sources: Iterable[str], nodes: Sequence[int], times: Sequence[int], modes: Collection[str], folds: int, steps: int
) -> list[Setting]:
    """Every setting of the table, guarded and not."""
    return [
        Setting(name, count, gpus_per_node(name, count, time * count), time * count, mode, guarded, (), folds, steps)
        for name in sources
        for count in nodes
        if cannot(name, count) is None
        for mode in modes
        for time in times
        for guarded in (True, False)
    ]


def ablations(sources: Iterable[str], steps: int) -> list[Setting]:
    """Every part of `moeplan` left out in turn, on 8 nodes; two folds in mode `node`, which is slow to fit."""
    return [
        Setting(name, 8, gpus_per_node(name, 8, extra), extra, mode, True, without, 2 if mode == "node" else 4, steps)
        for name in sources
        for mode, extra in ABLATED_AT
        for without in ((), *((part,) for part in PARTS))
    ]


def figures(setting: Setting) -> dict[str, Any]:
    """The comparison's own JSON, with `vs_eplb` (paired change and interval) beside `vs_linear`."""
    ours = MoeplanStrategy(without=setting.without) if setting.guarded else MoeplanStrategy(guard=float("inf"))
    task = PlanningTask(Cluster(setting.nodes, setting.gpus), setting.redundant, Dispatch(setting.mode))
    settings = EvaluationSettings(folds=setting.folds, block=SOURCES[setting.source].block, steps=setting.steps)
    found = compare_task(requests_of(setting.source), task, (*setting.strategies[:-1], ours), settings)
    out = found.to_dict()
    if "eplb" in setting.strategies:
        base = found.row("eplb").figures
        for row in found.rows:
            for key, figure in row.figures.items():
                if versus := change(figure, base[key]):
                    out["strategies"][row.name][key]["vs_eplb"] = versus
    return out


def version() -> str:
    """Twelve digits that change with the code that figures rest on."""
    package = ROOT / "src" / "moeplan"
    files = [package / "cluster.py", package / "types.py", package / "importers" / "arrays.py", Path(__file__)]
    files += [package / "perf" / "memory.py", package / "model" / "data" / "models.json"]
    for room in ("_kernels", "trace", "planning", "replay"):
        files += sorted((package / room).rglob("*.py"))
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def run(settings: Sequence[Setting], folder: Path, say: Callable[[str], None]) -> Results:
    """Figures of every setting, from `folder` where they are there already; each is kept as soon as it is made."""
    made_by, out = version(), {}
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(settings))
    for number, setting in enumerate(wanted):
        file = folder / f"{setting.label}-{made_by}.json"
        known = _read(file)
        if known is None:
            start = time.perf_counter()
            known = figures(setting)
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(known), encoding="utf-8")
            unfinished.replace(file)
            say(f"{number + 1}/{len(wanted)} {setting.label}: {time.perf_counter() - start:.0f} s")
        out[setting] = known
    return out


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not there, or cut off
        return None


def present(names: Iterable[str]) -> list[str]:
    """Those sets whose file is there."""
    return [name for name in names if SOURCES[name].path.exists()]
