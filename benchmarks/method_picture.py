"""Draw docs/images/method.png: the placement of the experts of one request. `python benchmarks/method_picture.py`

Real routing of the embedded trace, 4 nodes x 4 GPUs, no copies: `moeplan` is fitted on one half of the requests, and
the request shown is of the other half. It is not the best one: by the share of its picks that its node serves, it
stands in the middle of all unseen requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from moeplan import open_trace
from moeplan.cluster import Cluster
from moeplan.planning import Plan, read_requests, solve
from moeplan.planning.plan import PlanningTask
from moeplan.planning.requests import blocks, split
from moeplan.replay.evaluator import FoldEvaluator

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "method.png"
NODES, GPUS, SEED = 4, 4, 0
HOME, AWAY, INK, FAINT = "#c2410c", "#64748b", "#1e293b", "#cbd5e1"
SIZE, DPI = (9.0, 5.5), 200  # 1800 pixels wide, read at 900

Grid = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shown:
    """What the picture shows of one request.

    Attributes:
        prefill: [L, E], share of each layer's prefill picks, experts by number.
        held: plan -> [L, N, E / N], share of each layer's decode picks, experts where that plan puts them.
        home: plan -> the node where the request decodes.
        known: [N], share of the prefill's picks that each node holds under `moeplan`.
    """

    domain: str
    layers: tuple[int, ...]
    prefill: Grid
    held: dict[str, Grid]
    home: dict[str, int]
    known: Grid

    def at_home(self, plan: str) -> float:
        """Share of the decode's picks that the home serves."""
        return float(self.held[plan][:, self.home[plan]].sum() / self.held[plan].sum())


def chosen() -> Shown:
    """Fit on one half; the middle request of the other."""
    trace = open_trace("embedded")
    requests = read_requests(trace)
    seen = split(requests.domain, blocks(requests.index, 1), 0.5, np.random.default_rng([SEED, 0, 0]))
    fit, test = np.flatnonzero(seen), np.flatnonzero(~seen)
    problem = requests.problem(PlanningTask(Cluster(NODES, GPUS)), fit)
    plans: dict[str, Plan] = {name: solve(problem, name, SEED) for name in ("linear", "moeplan")}
    fold = FoldEvaluator(requests, fit, test, live=1, steps=1, seed=SEED)
    group = {
        name: fold.group(plan, how).group for (name, plan), how in zip(plans.items(), ("none", "prefill"), strict=True)
    }
    use = requests.use[test].astype(np.float64)
    home = use_at(use, plans["moeplan"])[np.arange(len(test)), :, group["moeplan"]].sum(axis=(1, 2))
    share = home / use.sum(axis=(1, 2))
    one = int(np.argsort(share, kind="stable")[len(share) // 2])
    prefill = requests.signature[test[one]].astype(np.float64)
    known = use_at(prefill[None], plans["moeplan"])[0].sum(axis=(0, 2))
    return Shown(
        str(trace.requests.domains[requests.domain[test[one]]]),
        requests.shape.layer_ids,
        prefill / prefill.sum(axis=1, keepdims=True),
        {name: use_at(use[one : one + 1], plan)[0] / use[one].sum(axis=1).mean() for name, plan in plans.items()},
        {name: int(of[one]) for name, of in group.items()},
        known / known.sum(),
    )


def use_at(use: Grid, plan: Plan) -> Grid:
    """[n, L, N, E / N]: use [n, L, E] of the experts that each node holds, in falling order inside it."""
    slots = plan.placement.slots
    by_slot = np.take_along_axis(use, slots[None].astype(np.intp), axis=2)
    return np.asarray(-np.sort(-by_slot.reshape(len(use), len(slots), NODES, -1), axis=3))


def draw(shown: Shown) -> Figure:
    """The figure: left what is known before decoding, right where the decode's picks are served."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK})
    figure = plt.figure(figsize=SIZE, dpi=DPI, facecolor="white")
    _prefill(figure.add_axes((0.075, 0.575, 0.35, 0.27)), shown)
    _router(figure.add_axes((0.115, 0.075, 0.29, 0.24)), shown)
    titles = {
        "linear": "Without a plan: linear placement, random group",
        "moeplan": f"3  With the plan: decode on node {shown.home['moeplan']}",
    }
    for (name, title), bottom in zip(titles.items(), (0.525, 0.03), strict=True):
        _served(figure.add_axes((0.50, bottom, 0.485, 0.335)), shown, name, title)
    figure.text(0.02, 0.945, "A held-out request", size=13, weight="bold")
    figure.text(0.505, 0.945, "Node that serves its decode, % of picks", size=13, weight="bold")
    figure.add_artist(_arrow((0.25, 0.475), (0.25, 0.42)))
    figure.add_artist(_arrow((0.435, 0.195), (0.493, 0.195)))
    return figure


def _prefill(axes: Any, shown: Shown) -> None:
    _cells(axes, shown.prefill, 0.0, AWAY)
    layers, experts = shown.prefill.shape
    axes.set(xlim=(-0.5, experts - 0.5), ylim=(layers - 0.5, -0.5))
    axes.set_xticks([0, 8, 16, 24, experts - 1])
    axes.set_yticks([0, layers - 1], [f"layer {shown.layers[0]}", f"{shown.layers[-1]}"])
    axes.set_xlabel("experts, by number", labelpad=2)
    axes.set_title(f"1  Picks of its prompt ({shown.domain})", loc="left", size=10, weight="bold")
    _bare(axes)


def _router(axes: Any, shown: Shown) -> None:
    home = shown.home["moeplan"]
    axes.barh(range(NODES), shown.known, color=[HOME if n == home else FAINT for n in range(NODES)], height=0.62)
    for node, value in enumerate(shown.known):
        axes.text(value + 0.01, node, f"{100 * value:.0f} %", va="center", size=9)
    axes.set(ylim=(NODES - 0.4, -0.6), xlim=(0.0, 1.2 * shown.known.max()))
    axes.set_yticks(range(NODES), [f"node {n}" for n in range(NODES)])
    axes.set_xticks([])
    axes.set_title("2  Share of these picks on each node (plan)", loc="left", size=10, weight="bold", x=-0.14)
    _bare(axes)
    axes.get_yticklabels()[home].set(color=HOME, weight="bold")


def _served(axes: Any, shown: Shown, name: str, title: str) -> None:
    held, home = shown.held[name], shown.home[name]
    layers, nodes, room = held.shape
    for node in range(nodes):
        left = node * (room + 1.5)
        ink = HOME if node == home else AWAY
        _cells(axes, held[:, node], left, ink)
        share = held[:, node].sum() / held.sum()
        text = f"{100 * share:.0f} %"
        axes.text(left + (room - 1) / 2, -1.5, text, ha="center", size=11, weight="bold", color=ink)
        axes.text(left + (room - 1) / 2, layers + 0.8, f"node {node}" + (", own" * (node == home)), ha="center",
                  color=ink, weight="bold" if node == home else "normal")  # fmt: skip
        if node == home:
            axes.add_patch(Rectangle((left - 0.8, -0.8), room + 0.6, layers + 0.6, fill=False, ec=HOME, lw=2))
    axes.set(xlim=(-1.2, nodes * (room + 1.5) - 1.3), ylim=(layers + 1.1, -2.4))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, loc="left", size=10, weight="bold", x=0.01, pad=7)
    _bare(axes)


def _cells(axes: Any, share: Grid, left: float, ink: str) -> None:
    """One square a layer and expert, the darker the more picks; the darkest has a quarter of a layer's picks."""
    rgb = np.array(matplotlib.colors.to_rgb(ink))
    for (layer, i), value in np.ndenumerate(share):
        depth = min(1.0, float(value) / 0.25) ** 0.7
        axes.add_patch(
            Rectangle((left + i - 0.44, layer - 0.44), 0.88, 0.88, fc=tuple(0.955 + depth * (rgb - 0.955)), lw=0)
        )


def _arrow(start: tuple[float, float], stop: tuple[float, float]) -> FancyArrowPatch:
    return FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=16, lw=1.8, color=INK)


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def bench() -> list[tuple[str, str]]:
    """(label, result) pairs: what the picture says."""
    shown = chosen()
    return [
        (f"the request of the picture, served locally, {name}", f"{100 * shown.at_home(name):.0f} %")
        for name in shown.held
    ]


if __name__ == "__main__":
    IMAGE.parent.mkdir(exist_ok=True)
    draw(chosen()).savefig(IMAGE, metadata={"Software": None})
    print(f"wrote {IMAGE}")
