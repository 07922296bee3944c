"""The gain of `moeplan --objective time`: step times of every strategy on held-out requests, by link bandwidth.

    python benchmarks/time_objective.py                          # gpt-oss-20b and maverick-mmlu, printed
    python benchmarks/time_objective.py --write                  # into docs/results/planning-for-latency.md
    python benchmarks/time_objective.py --sets gpt-oss-20b --folds 1 --steps 20 --loads 1

Each plan is made on one half of a set's requests. Steps of the other half are drawn and counted once per plan, as
`moeplan compare` does, and timed on H100s whose links have a quarter, once and four times their bandwidth, and on one
fast network that joins all GPUs. Only the `time` plans depend on the links; they are made for each.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeplan.cluster import Cluster, Dispatch
from moeplan.model.catalogue import load_model
from moeplan.model.spec import CompleteSpec
from moeplan.perf.hardware import Hardware, load_hardware
from moeplan.perf.memory import Precision
from moeplan.perf.routing import Routing, counted_routing
from moeplan.perf.step_model import StepModel, StepOptions
from moeplan.planning import Plan, PlanningTask, Strategy, solve
from moeplan.planning.strategies.moeplan import MoeplanStrategy
from moeplan.replay.evaluator import EvaluationRun, FoldEvaluator
from moeplan.replay.settings import EvaluationSettings
from moeplan.replay.statistics import MeasuredValue, change
from moeplan.replay.timing import CONTEXT, cluster_parallel
from results_settings import REAL, ROOT, SOURCES, present, requests_of

PAGE = ROOT / "docs" / "results" / "planning-for-latency.md"
Array = np.ndarray
DRAWS = 1000
OBJECTIVES = ("bytes", "balance")
#: Bandwidths at which plans are only timed, to find where locality and balance change places.
FACTORS = tuple(2.0**i for i in range(-8, 9))
FULL = 128  # requests of a group at full load: the published set-up's


@dataclass(frozen=True)
class Place:
    """Where a set is served: nodes x GPUs a node, and redundant slots."""

    source: str
    gpus: int
    redundant: int
    nodes: int = 8

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.nodes, self.gpus)

    @property
    def spec(self) -> CompleteSpec:
        return load_model(SOURCES[self.source].model or "")


#: GPUs a node that divide the model's heads and the slots: some slots on each GPU.
PLACES = {p.source: p for p in (Place("gpt-oss-20b", 2, 16), Place("maverick-mmlu", 4, 32))}


@dataclass(frozen=True)
class World:
    """Links: `factor` x today's, over nodes, or one fast network that joins all GPUs (`flat`)."""

    name: str
    factor: float = 1.0
    flat: bool = False

    @property
    def machine(self) -> Hardware:
        h100 = load_hardware("H100")
        up, out = (
            replace(link, bytes_per_s=link.bytes_per_s * self.factor) for link in (h100.scale_up, h100.scale_out)
        )
        return replace(h100, scale_up=up, scale_out=out)


WORLDS = (World("links x 1/4", 0.25), World("today's links"), World("links x 4", 4.0), World("one domain", flat=True))


@dataclass(frozen=True)
class Steps:
    """Counted steps of one plan, as a network over nodes and as one flat network see them; batch: of a group."""

    nodes: Routing
    flat: Routing
    batch: int

    def ms(self, place: Place, world: World, load: float) -> Array:
        """float64 [S], each with `load` times the requests: that many independent ones of the same routing."""
        routing = (self.flat if world.flat else self.nodes).part(load)
        cluster, spec = place.cluster, place.spec
        per_node = cluster.num_gpus if world.flat else cluster.gpus_per_node
        timed = StepModel(
            spec, world.machine, cluster_parallel(cluster, spec, place.redundant), Precision.of_checkpoint(spec),
            StepOptions(Dispatch.PICK, gpus_per_node=per_node),
        )  # fmt: skip
        step = timed.decode(self.batch * load, CONTEXT, routing=routing)
        seconds = np.asarray(step.seconds)
        return 1e3 * (seconds.mean(axis=1) if seconds.ndim > 1 else seconds)


def counted(place: Place, links: Any, picks: Any, touched: Any) -> Steps:
    """From arrays [S, L, P, P] and [S, L, P]; each layer as a step of alike layers, where not all were recorded."""
    cluster, moe = place.cluster, place.spec.moe
    assert moe is not None
    links, picks, touched = (np.asarray(a) for a in (links, picks, touched))
    batch = int(picks[0, 0].sum()) // moe.top_k // cluster.num_groups
    if picks.shape[1] != len(moe.layers):
        links, picks, touched = links[:, :, None], picks[:, :, None], touched[:, :, None]
    slots = (moe.experts + place.redundant) / cluster.num_gpus
    near, flat = (
        counted_routing(picks, touched, links, gpus_per_node=size, slots=slots)
        for size in (cluster.gpus_per_node, cluster.num_gpus)
    )
    return Steps(near, flat, batch)


#: (strategy row, strategy, signature) of the plans that do not depend on the links.
ROWS = (
    ("linear", "linear", "none"), ("linear/prefill", "linear", "prefill"), ("eplb", "eplb", "none"),
    ("eplb/prefill", "eplb", "prefill"), ("affinity", "affinity", "none"), ("paper", "paper", "prefill"),
)  # fmt: skip


@dataclass
class Found:
    """Of one set: ms [F, S] by row, world and load; the winner of each `time` plan; of each plan, its counted steps."""

    place: Place
    live: int
    ms: dict[tuple[str, str, float], list[Array]] = field(default_factory=dict)
    won: dict[tuple[str, float], Counter[str]] = field(default_factory=dict)
    steps: dict[str, list[Steps]] = field(default_factory=dict)


def run(place: Place, folds: int, steps: int, full: bool) -> Found:
    """Plan on each fold's fit part and time steps of the rest."""
    requests = requests_of(place.source)
    settings = EvaluationSettings(folds=folds, steps=steps, block=SOURCES[place.source].block)
    task = PlanningTask(place.cluster, place.redundant)
    common = EvaluationRun.split(requests, task, settings, "{} fit requests are too few", "use another trace")
    found = Found(place, common.live)
    loads = (1.0, FULL / common.live) if full else (1.0,)
    for fold in common.folds():

        def measured(plan: Plan, signature: str, fold: FoldEvaluator = fold) -> Steps:
            sampled = fold.sample(plan, fold.group(plan, signature))
            return joined([counted(place, *part) for part in sampled.counts(steps)])

        plans = {name: measured(_solved(fold, task, of), sign) for name, of, sign in ROWS}
        for objective in OBJECTIVES:
            result = _solved(fold, task, MoeplanStrategy(objective=objective))
            plans[f"moeplan {objective}"] = measured(result, "prefill")
        for name, kept in plans.items():
            found.steps.setdefault(name, []).append(kept)
        for load in loads:
            for world in WORLDS:
                for name, kept in plans.items():
                    found.ms.setdefault((name, world.name, load), []).append(kept.ms(place, world, load))
                result = _timed(fold, task, place, world, load)
                won = next(found[1] for note in result.provenance.notes if (found := re.search(r"chosen: (\w+)", note)))
                found.won.setdefault((world.name, load), Counter())[won] += 1
                kept = measured(result, "prefill")
                found.ms.setdefault(("moeplan time", world.name, load), []).append(kept.ms(place, world, load))
                say(f"{place.source}, fold {fold.fold + 1}, {world.name}, load x {load:g}: {won}")
    return found


def _solved(fold: FoldEvaluator, task: PlanningTask, strategy: str | Strategy) -> Plan:
    return solve(fold.requests.problem(task, fold.fit), strategy, fold.seed + fold.fold)


def _timed(fold: FoldEvaluator, task: PlanningTask, place: Place, world: World, load: float) -> Plan:
    """The `time` plan for these links and this load."""

    def cost(links: Array, picks: Array, touched: Array) -> float:
        return float(counted(place, links[None], picks[None], touched[None]).ms(place, world, load)[0])

    return _solved(fold, task, MoeplanStrategy(objective="time", step_cost=cost))


def joined(parts: Sequence[Steps]) -> Steps:
    """Steps that were counted in several runs, as one."""
    if len(parts) == 1:
        return parts[0]

    def one(routings: list[Routing]) -> Routing:
        first = routings[0]
        messages = [vars(r.messages) for r in routings]
        together = replace(
            first.messages, **{name: np.concatenate([m[name] for m in messages]) for name in messages[0]}
        )  # type: ignore[type-var]
        picks, experts = (np.concatenate([getattr(r, name) for r in routings]) for name in ("picks", "experts"))
        return Routing(picks, experts, together, first.slots, first.source)

    return Steps(one([p.nodes for p in parts]), one([p.flat for p in parts]), parts[0].batch)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def figure(ms: list[Array]) -> MeasuredValue:
    """Mean over steps and folds, with bootstrap draws of steps; the same draws for every plan."""
    values = np.concatenate(ms)
    weights = np.random.default_rng([0, 4]).multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
    return MeasuredValue(
        float(values.mean()), weights @ values / len(values), tuple(float(m.mean()) for m in ms), "steps"
    )


def names(found: Found) -> list[str]:
    return [*found.steps, "moeplan time"]


def table(found: Found, load: float) -> list[str]:
    """Markdown: milliseconds of each plan, and how much longer they are than the `time` plan's."""
    head = ["plan", *(f"{world.name}, ms" for world in WORLDS)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name in names(found):
        cells = [name]
        for world in WORLDS:
            mine, best = (figure(found.ms[who, world.name, load]) for who in (name, "moeplan time"))
            cells.append(f"{mine.value:.3f}" if name == "moeplan time" else f"{mine.value:.3f} ({versus(mine, best)})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def versus(mine: MeasuredValue, best: MeasuredValue) -> str:
    """How much longer, with its interval; bold where `time` loses."""
    found = change(mine, best)
    if found is None or found["ci95"] is None:
        return "-"
    low, high = found["ci95"]
    text = f"{100 * found['value']:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]"
    return f"**{text}**" if high < 0 else text


def score(found: Found, load: float) -> str:
    """Wins, ties and losses of `time`, by paired intervals."""
    wins, ties, losses = 0, 0, 0
    for world in WORLDS:
        best = figure(found.ms["moeplan time", world.name, load])
        for name in found.steps:
            pair = change(figure(found.ms[name, world.name, load]), best)
            low, high = pair["ci95"] if pair and pair["ci95"] else (0.0, 0.0)
            wins, ties, losses = wins + (low > 0), ties + (low <= 0 <= high), losses + (high < 0)
    return f"`time` against every other plan, on all four networks: {wins} won, {ties} undecided, {losses} lost"


def crossover(found: Found, load: float) -> str:
    """At which bandwidth the `bytes` plan and the `balance` plan change places, the plans as they are."""
    gaps = []
    for factor in FACTORS:
        world = World("", factor)
        bytes_, balance = (
            np.mean([s.ms(found.place, world, load).mean() for s in found.steps[f"moeplan {o}"]]) for o in OBJECTIVES
        )
        gaps.append(balance / bytes_ - 1)
    signs = np.sign(gaps)
    ends = f"{100 * gaps[0]:+.1f} % at 1/{1 / FACTORS[0]:g}, {100 * gaps[-1]:+.1f} % at {FACTORS[-1]:g} times"
    changes = np.flatnonzero(signs[1:] != signs[:-1])
    if not len(changes):
        ahead = "locality" if signs[0] > 0 else "balance"
        return f"no crossover: {ahead} is ahead at every bandwidth (balance against bytes: {ends})"
    i = int(changes[0])
    share = gaps[i] / (gaps[i] - gaps[i + 1])
    at = FACTORS[i] * (FACTORS[i + 1] / FACTORS[i]) ** share
    first, then = ("locality", "balance") if signs[i] > 0 else ("balance", "locality")
    more = f"; {len(changes) - 1} more beyond, within noise" if len(changes) > 1 else ""
    where = f"{first} is ahead up to {at:.3g} times today's bandwidth, {then} from there"
    return f"{where} (balance against bytes: {ends}){more}"


def winners(found: Found, load: float) -> str:
    """Which member of the portfolio the `time` plans were, of how many folds."""
    said = []
    for world in WORLDS:
        counts = found.won[world.name, load].most_common()
        said.append(f"{world.name}: {', '.join(f'{name} {n}' for name, n in counts)}")
    return "plan selected by `time`, number of folds: " + "; ".join(said)


def section(found: Found, folds: int, steps: int) -> list[str]:
    """One set, at every load."""
    place = found.place
    out = [
        f"## {place.source} on {place.nodes} nodes of {place.gpus} H100, {place.redundant} redundant slots",
        "",
        f"{place.spec.name}, {folds} folds, {steps} steps per fold, "
        f"{found.live} requests of {CONTEXT:,} tokens per group.",
    ]
    for load in sorted({key[2] for key in found.ms}):
        requests = f"{found.live * load:.0f} requests per group"
        kind = f"As replayed: {requests}" if load == 1 else f"At full load: {requests} with the same routing"
        out += [
            "",
            f"### {kind}",
            "",
            *table(found, load),
            "",
            f"- {score(found, load)}.",
            f"- {winners(found, load)}.",
        ]
        out.append(f"- Locality and balance: {crossover(found, load)}.")
    return out


INTRO = """# Planning for latency

Written by `python benchmarks/time_objective.py --write`. Step times are from the [time model](accuracy.md), for steps
drawn from held-out requests. Changes are against the `time` plan of the same network and load, with paired 95 %
intervals over steps: positive is slower than `time`; bold where `time` loses.

- *Links*: bandwidth of all links, inside and between nodes, relative to H100; latencies are unchanged.
- *One domain*: all GPUs on one scale-up network, as in an NVL72 rack, with groups and replica selection as on nodes.
- *As replayed*: as many requests per group as the held-out half of the trace has. *At full load*: 128 requests, with
  the same routing used several times as independent requests.
- `time` makes several plans and selects the one whose steps on the fit requests are shortest
  ([method](../concepts/method.md)); the page names it.
- *Locality* is `moeplan` with the objective `bytes`, *balance* with `balance`."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bench() -> list[tuple[str, str]]:
    """For `make bench`: one fold of each set, as replayed."""
    return [(name, score(run(PLACES[name], 1, 50, False), 1.0)) for name in present(PLACES)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print it, or write the page."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--sets", default=",".join(PLACES), help="sets, separated by commas")
    flags.add_argument("--folds", type=int, default=4)
    flags.add_argument("--steps", type=int, default=100, help="steps timed in each fold")
    flags.add_argument("--loads", type=int, choices=(1, 2), default=2, help="1: only as replayed")
    flags.add_argument("--write", action="store_true", help="write the page; needs both sets")
    given = flags.parse_args(arguments)
    wanted = given.sets.split(",")
    if unknown := [name for name in wanted if name not in PLACES]:
        flags.error(f"set {unknown[0]!r} is not one of {', '.join(PLACES)}")
    there = present(wanted)
    if len(there) < len(wanted) or (given.write and set(there) != set(PLACES)):
        flags.error(f"needs {', '.join(PLACES)} in {REAL}" if given.write else f"{', '.join(wanted)} is not in {REAL}")
    start, parts = time.perf_counter(), [INTRO]
    for name in there:
        parts.append(
            "\n".join(section(run(PLACES[name], given.folds, given.steps, given.loads == 2), given.folds, given.steps))
        )
        print(parts[-1] + "\n", flush=True)
    say(f"{time.perf_counter() - start:.0f} s")
    if given.write:
        PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
