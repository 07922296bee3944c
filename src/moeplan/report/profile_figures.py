"""The figures of a profile; each takes a measure and returns one image."""

from __future__ import annotations

import numpy as np

from moeplan.profile.coactivation import Coactivation
from moeplan.profile.distinct import Distinct
from moeplan.profile.imbalance import Imbalance
from moeplan.profile.leakage import Leakage
from moeplan.profile.phases import NULLS, Phases
from moeplan.profile.privacy import Reidentification
from moeplan.profile.request_map import RequestMap
from moeplan.profile.similarity import Similarity
from moeplan.report.figures import GREY, PALETTE, Image, canvas, heat_map, legend_below, lines, shorten, to_image


def imbalance_figure(load: Imbalance, stages: list[tuple[int, str]], floor: float) -> Image:
    """Imbalance factor by layer, a line per stage; flagged layers are marked and cut from the lines."""
    with canvas() as (figure, axes):
        x = np.array(load.layer_ids)
        shown = [(label, np.where(load.flagged, np.nan, load.by_stage[s])) for s, label in stages]
        lines(axes, x, shown, ("layer", "largest load / mean load"))
        axes.axhline(floor, color=GREY, linestyle=":", linewidth=1.4, label="noise floor")
        top = max(float(np.nanmax(y)) for _, y in shown) if not load.flagged.all() else 1.0
        axes.set_ylim(0, top * 1.08)
        for layer in np.flatnonzero(load.flagged):
            axes.axvline(x[layer], color=PALETTE[1], linewidth=5, alpha=0.25)
        if load.flagged.any():
            out = [f"{x[i]} ({load.overall[i]:.0f} times)" for i in np.flatnonzero(load.flagged)[:3]]
            axes.set_title(f"left out: layer {', '.join(out)}", fontsize=9.5)
        legend_below(figure, axes, columns=3)
        return to_image(figure, f"Imbalance factor by layer, {len(x)} layers")


def similarity_figure(found: Similarity, title: str) -> Image:
    """Heat map of domain similarity in one stage; a heavier reading than the table, for the pattern."""
    values = found.matrix
    with canvas(height=3.9) as (figure, axes):
        low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
        heat_map(figure, axes, values, found.domains, low=min(0.0, low), high=1.0, label="Pearson correlation")
        axes.set_title(title)
        return to_image(figure, f"Similarity of {len(found.domains)} domains, {title}")


def phases_figure(found: Phases, load: Imbalance) -> Image:
    """Correlation by layer: pooled, per request, and the null baselines in grey; flagged layers are left out."""
    with canvas(height=3.7) as (figure, axes):
        series = [("pooled over requests", found.pooled), ("each request's own", found.own)]
        series += [(name, found.nulls[i]) for i, name in enumerate(NULLS)]
        series = [(name, np.where(load.flagged, np.nan, values)) for name, values in series]
        lines(axes, np.array(found.layer_ids), series, ("layer", "Pearson correlation"), *NULLS)
        axes.set_ylim(min(0.0, float(np.nanmin([np.nanmin(y) for _, y in series if np.isfinite(y).any()]))), 1.02)
        legend_below(figure, axes)
        return to_image(figure, "Prefill-decode correlation by layer with its null baselines")


def map_figure(found: RequestMap, title: str) -> Image:
    """Every request a dot, coloured by domain; at most 8 domains get a colour of their own."""
    markers = "osD^vPXp"
    with canvas(height=3.9) as (figure, axes):
        size = np.bincount(found.domain, minlength=len(found.domains))
        named = sorted(int(d) for d in np.argsort(-size, kind="stable")[: len(PALETTE)] if size[d])
        rest = ~np.isin(found.domain, named)
        if rest.any():
            label = f"{len(np.unique(found.domain[rest]))} other domains"
            axes.scatter(*found.xy[rest].T, s=9, color="#c3cad1", label=label, linewidths=0)
        for i, d in enumerate(named):
            at = found.domain == d
            look = {"s": 13, "color": PALETTE[i], "marker": markers[i], "alpha": 0.75, "linewidths": 0}
            axes.scatter(*found.xy[at].T, label=shorten(found.domains[d]), **look)
        axes.set(xticks=[], yticks=[], title=title)
        axes.grid(False)
        for side in axes.spines.values():
            side.set(visible=True, color="#d8dee4")
        if len(found.domains) > 1:
            longest = max(len(shorten(found.domains[d])) for d in named)
            legend_below(figure, axes, columns=3 if longest <= 12 else 2)
        return to_image(figure, f"Map of {len(found.requests)} requests, {title}")


def classification_figure(found: Leakage) -> Image:
    """Accuracy by layer with the shuffled control and chance."""
    with canvas() as (figure, axes):
        series = [("true labels", 100 * found.accuracy), ("shuffled labels", 100 * found.control)]
        labels = ("layer", "accuracy, held-out requests, %")
        lines(axes, np.array(found.layer_ids), series, labels, "shuffled labels")
        axes.axhline(100 * found.chance, color=PALETTE[1], linewidth=1, label=f"chance ({found.chance:.0%})")
        axes.set_ylim(0, 103)
        legend_below(figure, axes, columns=3)
        return to_image(figure, "Request-type classification accuracy by layer with its control")


def link_figure(found: Reidentification) -> Image:
    """Share of requests whose row is identified, by the number of requests in a row, with intervals and chance."""
    with canvas() as (figure, axes):
        series = (
            ("by text", found.by_text, found.text_ci, PALETTE[1]),
            ("by routing", found.by_routing, found.routing_ci, PALETTE[0]),
        )
        for label, rate, ci, colour in series:
            axes.fill_between(found.aggregate, 100 * ci[:, 0], 100 * ci[:, 1], color=colour, alpha=0.15, linewidth=0)
            axes.plot(found.aggregate, 100 * rate, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(100 * found.chance, color=GREY, linestyle=":", linewidth=1.4, label=f"chance ({found.chance:.0%})")
        axes.set_xscale("log", base=2)
        axes.set_xticks(found.aggregate, [str(n) for n in found.aggregate])
        axes.minorticks_off()
        axes.set(ylim=(0, 103), xlabel="requests summed into a row", ylabel="row identified among 10, %")
        legend_below(figure, axes, columns=3)
        return to_image(figure, "Share of requests whose row is identified, against the requests summed into a row")


def coactivation_figure(found: Coactivation) -> Image:
    """Distance from independence by layer, and its noise floor."""
    with canvas() as (figure, axes):
        series = [("observed pairs", 100 * found.distance), ("noise floor", 100 * found.floor)]
        lines(axes, np.array(found.layer_ids), series, ("layer", "distance from independence, %"), "noise floor")
        axes.set_ylim(0, None)
        legend_below(figure, axes)
        return to_image(figure, "Co-activation: distance from quasi-independence by layer")


def distinct_figure(found: Distinct, num_experts: int) -> Image:
    """Distinct experts against batch size."""
    with canvas(height=3.7) as (figure, axes):
        series = [("all domains", found.mixed)]
        if np.isfinite(found.single).any():
            series.append(("one domain", found.single))
        quiet = ("uniform routing", "observed popularity")
        series += list(zip(quiet, (found.uniform, found.popular), strict=True))
        lines(axes, found.batch, series, ("tokens in the batch", "distinct experts per layer"), *quiet)
        axes.set_xscale("log", base=2)
        ticks = found.batch[:: 2 if len(found.batch) > 6 else 1]
        axes.set_xticks(ticks, [str(b) for b in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, num_experts * 1.04)
        legend_below(figure, axes)
        return to_image(figure, f"Distinct experts per layer, batch 1 to {found.batch[-1]}")
