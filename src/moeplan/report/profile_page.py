"""The page of a profile: every measure with one sentence that says what it shows in this trace."""

from __future__ import annotations

import numpy as np

from moeplan.profile import Profile, Skipped
from moeplan.profile.counts import OTHER, STAGES
from moeplan.profile.phases import NULLS
from moeplan.profile.similarity import Similarity
from moeplan.report import profile_figures as draw
from moeplan.report.page import Section, Table, render
from moeplan.report.privacy_section import privacy_section

__all__ = ["profile_html", "sentences"]

MAX_PAIRS, MAX_DOMAINS, MAX_STRONGEST = 12, 20, 10


def profile_html(found: Profile) -> str:
    """The whole page."""
    shape, requests = found.trace.shape, found.trace.requests
    subtitle = (
        f"{found.trace.path.name}: {shape.num_layers} MoE layers x {shape.num_experts} experts, top-{shape.top_k}; "
        f"{len(requests):,} {found.trace.request_noun}, {int(requests.rows.sum()):,} tokens; seed {found.seed}"
    )
    sections = [_trace(found), *_measures(found)]
    return render(f"Expert use of {found.trace.label}", subtitle, found.notices, sections)


def sentences(found: Profile) -> dict[str, str]:
    """What each measure shows in this trace, by topic; the terminal and the page say the same."""
    return {section.heading: section.sentence for section in _measures(found, figures=False)}


def _measures(found: Profile, *, figures: bool = True) -> list[Section]:
    """A section for each measure."""
    makers = (_imbalance, _similarity, _phases, _map, _classification, privacy_section, _coactivation, _distinct)
    return [make(found, figures=figures) for make in makers]


def _named(found: Profile) -> dict[str, str]:
    """The stages' labels as they read in a sentence."""
    return {name: found.counts.stages.phrase(s) for s, name in enumerate(STAGES)}


def _stages(found: Profile) -> list[tuple[int, str]]:
    """The stages that have rows, with their labels; what a stand-in leaves unused is not a stage."""
    stages = found.counts.stages
    shown = range(len(STAGES) if stages.signature_tokens is None else OTHER)
    return [(s, stages.label(s)) for s in shown if stages.lengths(s).any()]


def _trace(found: Profile) -> Section:
    counts, requests = found.counts, found.trace.requests
    stages = _stages(found)
    rows_of = [np.bincount(counts.domain, counts.stages.lengths(s), len(counts.domains)) for s, _ in stages]
    requests_of = np.bincount(counts.domain, minlength=len(counts.domains))
    order = np.argsort(-requests_of, kind="stable")
    load = found.imbalance.mean(found.imbalance.by_domain_stage)  # [D, S]
    rows = [
        [
            counts.domains[d],
            f"{requests_of[d]:,}",
            *(f"{int(rows_of[i][d]):,}" for i in range(len(stages))),
            *(_number(load[d, s]) for s, _ in stages),
            *(_number(found.imbalance.floor_by_domain_stage[d, s]) for s, _ in stages[:1]),
        ]
        for d in order[:MAX_DOMAINS]
    ]
    caption = f"the {MAX_DOMAINS} largest of {len(order)} domains" if len(order) > MAX_DOMAINS else ""
    head = ["domain", "requests"]
    head += [f"rows: {label}" for _, label in stages] + [f"imbalance: {label}" for _, label in stages]
    head += [f"noise floor: {label}" for _, label in stages[:1]]
    usable, total = int(counts.stages.usable.sum()), len(requests)
    both = f"{'all' if usable == total else f'{usable:,}'} have enough rows of both stages to compare them"
    if not usable:
        both = "none has enough rows of both stages to compare them"
    domains = f"{len(counts.domains)} domain{'s' if len(counts.domains) != 1 else ''}"
    return Section(
        "What was recorded",
        f"{total:,} {found.trace.request_noun} of {domains}; {both}.",
        table=Table(head, rows, caption),
        note="Imbalance: load of the busiest expert over the mean load, mean over layers. Noise floor: the imbalance "
        "of as many uniformly random picks; small samples are imbalanced by chance.",
    )


def _imbalance(found: Profile, *, figures: bool) -> Section:
    load, stages = found.imbalance, _stages(found)
    kept = load.kept
    worst = int(kept[np.nanargmax(load.overall[kept])])
    by_stage = ", ".join(f"{label} {load.mean(load.by_stage[s]):.1f}" for s, label in stages)
    floor = float(np.nanmax(load.floor_by_stage[[s for s, _ in stages]]))
    sentence = (
        f"The busiest expert of a layer has {load.mean(load.overall):.1f} times the mean load, over all rows, averaged "
        f"over {len(kept)} layers (by stage: {by_stage}). The largest value is {load.overall[worst]:.1f}, in layer "
        f"{load.layer_ids[worst]}. Noise floor, the value of uniformly random routing: at most {floor:.2f}."
    )
    if load.flagged.any():
        flagged = ", ".join(str(load.layer_ids[i]) for i in np.flatnonzero(load.flagged))
        sentence += f" Left out of means, because one expert takes more than half of all picks: layer {flagged}."
    return Section(
        "Imbalance of expert load",
        sentence,
        [draw.imbalance_figure(load, stages, floor)] if figures else (),
        Table(
            ["layer", "busiest expert", "its load / mean", "its share of picks"],
            [
                [
                    str(load.layer_ids[i]),
                    f"{load.largest[i]}",
                    f"{load.overall[i]:.1f}",
                    f"{100 * load.largest_share[i]:.1f} %",
                ]
                for i in np.argsort(-load.overall, kind="stable")[:8]
            ],
            "the layers with the largest imbalance, all rows",
        ),
        "Load of an expert: its picks over the mean picks per expert. Imbalance: the largest load of a layer.",
    )


def _similarity(found: Profile, *, figures: bool) -> Section:
    heading = "Similarity of domains"
    given = [(name, item) for name, item in found.similarity.items() if isinstance(item, Similarity)]
    if not given:
        reasons = [item.reason for item in found.similarity.values() if isinstance(item, Skipped)]
        return Section(heading, f"Not shown. {'; '.join(reasons)}.", skipped=True)
    label, named = found.stage_labels, _named(found)
    stage, last = given[-1]
    pairs = last.pairs
    if pairs:
        least, differs = pairs[0], sum(pair["differs"] for pair in pairs)
        verdict = f"{differs} of {len(pairs)} pairs of domains differ by more than noise"
        if len(pairs) == 1:
            verdict = f"they differ by {'more' if differs else 'no more'} than noise"
        sentence = (
            f"Least similar domains in {named[stage]}: {least['a']} and {least['b']} (correlation "
            f"{least['between']:.2f}; the same domain gives {least['reliability']:.2f}); {verdict}."
        )
    else:
        upper = last.matrix[np.triu_indices(len(last.domains), 1)]
        upper = upper[np.isfinite(upper)]
        reach = f"{upper.min():.2f} to {upper.max():.2f}" if len(upper) else "undefined"
        sentence = (
            f"In {named[stage]}, similarity is {reach} over {len(upper)} pairs, but fewer than two domains have the 4 "
            "requests that a comparison with noise needs."
        )
    if last.left_out and pairs:
        sentence += f" {len(last.left_out)} domains are too small to split in halves."
    rows = [
        [
            f"{pair['a']} - {pair['b']}",
            f"{pair['similarity']:.2f}",
            f"{pair['between']:.2f}",
            f"{pair['reliability']:.2f}",
            _number(pair["disattenuated"], 2),
            "differ" if pair["differs"] else "no difference shown",
        ]
        for pair in pairs[:MAX_PAIRS]
    ]
    head = ["pair", "similarity", "between halves", "within (reliability)", "disattenuated", "verdict"]
    some = f", the {MAX_PAIRS} least similar of {len(pairs)} pairs" if len(pairs) > MAX_PAIRS else ""
    caption = f"{label[stage]}{some}"
    return Section(
        heading,
        sentence,
        [draw.similarity_figure(item, label[name]) for name, item in given] if figures else (),
        Table(head, rows, caption) if rows else None,
        "Pearson correlation of expert counts, mean over layers. Halves: seeded random halves of each domain's "
        "requests, so that both comparisons have samples of the same size. Disattenuated: between / within; 1 means no "
        "difference. Verdict: 'differ' if the 95 % interval of within minus between (bootstrap over requests) is above "
        "0.",
    )


def _phases(found: Profile, *, figures: bool) -> Section:
    heading = "Predicting decode from prefill"
    item = found.phases
    if isinstance(item, Skipped):
        return Section(heading, f"Not shown: it {item.reason}.", skipped=True)
    names = _named(found)
    best = int(np.nanargmax(item.mean_nulls)) if np.isfinite(item.mean_nulls).any() else 0
    low, high = item.advantage_ci[best]
    gain = float(item.advantage[best])
    verdict = "as well as" if not (low > 0 or high < 0) else ("better than" if gain > 0 else "worse than")
    nulls = ", ".join(f"{name} {_number(item.mean_nulls[i], 2)}" for i, name in enumerate(NULLS))
    sentence = (
        f"The expert counts of a request in {names['prefill']} and {names['decode']} have a correlation of "
        f"{item.mean_own:.2f}. Baselines: {nulls}. A request's own prefill predicts its decode {verdict} {NULLS[best]} "
        f"does (difference {gain:+.3f}, 95 % interval {_number(low, 3)} to {_number(high, 3)}). Pooled over requests, "
        f"as in arXiv 2604.23150: {item.mean_pooled:.2f}."
    )
    used = f"{item.sampled:,} requests" + (f" of {item.usable:,} usable" if item.sampled < item.usable else "")
    unused = item.requests - item.usable
    rows = [["pooled over requests (published measure)", _number(item.mean_pooled, 3), "-"]]
    rows += [["each request's own prefill", _number(item.mean_own, 3), "-"]]
    rows += [
        [
            name,
            _number(item.mean_nulls[i], 3),
            f"{item.advantage[i]:+.3f} [{item.advantage_ci[i, 0]:+.3f}, {item.advantage_ci[i, 1]:+.3f}]"
            if np.isfinite(item.advantage_ci[i]).all()
            else "-",
        ]
        for i, name in enumerate(NULLS)
    ]
    return Section(
        heading,
        sentence,
        [draw.phases_figure(item, found.imbalance)] if figures else (),
        Table(["predictor of the decode", "mean over layers", "own minus this [95 %]"], rows, strong=[1]),
        f"Pearson correlation of the experts' counts per layer, on {used}"
        + (f"; {unused:,} requests are too short or have no such rows" if unused else "")
        + ". Popularity is the decode counts of all other requests (of the same domain), the request itself left out. "
        "Pooling averages over requests, so popular experts alone can make it high.",
    )


def _map(found: Profile, *, figures: bool) -> Section:
    heading = "Map of requests"
    given = [(name, item) for name, item in found.maps.items() if not isinstance(item, Skipped)]
    if not given:
        reasons = [item.reason for item in found.maps.values() if isinstance(item, Skipped)]
        return Section(heading, f"Not shown. {'; '.join(reasons)}.", skipped=True)
    label, named = found.stage_labels, _named(found)
    parts = [
        f"in {named[name]}, {100 * item.same_neighbour:.0f} % of {len(item.requests)} requests have their nearest "
        f"neighbour in their own domain ({100 * item.same_by_chance:.0f} % by chance)"
        for name, item in given
    ]
    sentence = "; ".join(parts) + "."
    sentence = sentence[0].upper() + sentence[1:]
    if len(found.counts.domains) < 2:
        item = given[0][1]
        sentence = (
            f"The {len(item.requests)} requests shown are of one domain. Mean cosine of expert use: {item.nearest:.2f} "
            f"to the nearest neighbour, {item.typical:.2f} to another request."
        )
    drawn = [
        f"{len(item.requests)} of {item.of} requests in {label[n]}" for n, item in given if len(item.requests) < item.of
    ]
    return Section(
        heading,
        sentence,
        [draw.map_figure(item, label[name]) for name, item in given] if figures else (),
        note="t-SNE (perplexity 30, seeded) of each request's expert counts over all layers, scaled to length 1, after "
        "PCA to 50. Only neighbourhoods are meaningful, not distances between far points. The neighbours in the "
        "sentence are by cosine, before any reduction." + (f" Drawn: {', '.join(drawn)}." if drawn else ""),
    )


def _classification(found: Profile, *, figures: bool) -> Section:
    heading = "Domain leakage of expert load"
    item = found.leakage
    if isinstance(item, Skipped):
        return Section(heading, f"Not shown: it {item.reason}.", skipped=True)
    order = np.argsort(-item.accuracy, kind="stable")
    rows = [
        [str(item.layer_ids[i]), f"{100 * item.accuracy[i]:.1f} %", f"{100 * item.control[i]:.1f} %"]
        for i in (*order[:4], *order[-2:])
    ]
    tried = f"{len(item.layers)} of {item.all_layers} layers, " if len(item.layers) < item.all_layers else ""
    return Section(
        heading,
        item.meaning,
        [draw.classification_figure(item)] if figures else (),
        Table(["layer", "accuracy", "shuffled labels"], rows, "the four best and the two worst layers"),
        f"One multinomial logistic regression per layer ({tried}{item.splits} split{'s' if item.splits > 1 else ''} of "
        f"80:20, {item.per_class} requests per type) on raw expert counts of {item.rows}. "
        f"Types: {', '.join(item.classes[:12])}{' ..' if len(item.classes) > 12 else ''}."
        + (f" Left out, with fewer than 10 requests: {len(item.left_out)} domains." if item.left_out else ""),
    )


def _coactivation(found: Profile, *, figures: bool) -> Section:
    heading = "Co-activation of experts"
    item = found.coactivation
    if isinstance(item, Skipped):
        return Section(heading, f"Not shown: {item.reason}.", skipped=True)
    far, near = float(np.nanmean(item.distance)), float(np.nanmean(item.floor))
    sentence = (
        f"The expert pairs that tokens pick differ from independent choice by {100 * far:.0f} % (total variation "
        f"distance; noise floor {100 * near:.1f} %)."
    )
    if item.strongest:
        layer, a, b, _, _, lift = item.strongest[0]
        sentence += (
            f" The strongest pair, {a} and {b} in layer {layer}, is picked {lift:.1f} times as often as expected."
        )
    rows = [
        [str(layer), f"{a}, {b}", f"{observed:,}", f"{expected:,.0f}", f"{lift:.1f}"]
        for layer, a, b, observed, expected, lift in item.strongest[:MAX_STRONGEST]
    ]
    return Section(
        heading,
        sentence,
        [draw.coactivation_figure(item)] if figures else (),
        Table(["layer", "experts", "observed", "expected", "lift"], rows, "the strongest pairs") if rows else None,
        f"On {item.rows:,} sampled rows of {item.stage}. Expected: quasi-independence, a table x(a) x(b) without "
        "diagonal with the observed popularity of every expert. Distance: total variation. Noise floor: a Poisson draw "
        "of the expectation; tokens of one request are similar, so the true noise is somewhat larger.",
    )


def _distinct(found: Profile, *, figures: bool) -> Section:
    heading, item, size = "Distinct experts in a batch", found.distinct, found.trace.shape.num_experts
    if isinstance(item, Skipped):
        return Section(heading, f"Not shown: {item.reason}.", skipped=True)
    at = int(np.argmin(np.abs(item.mixed - size / 2)))  # the most informative batch: half of the experts used
    b = int(item.batch[at])
    sentence = (
        f"A batch of {b} tokens uses {item.mixed[at]:.1f} of {size} experts per layer ({item.batch[-1]} tokens: "
        f"{item.mixed[-1]:.1f}). {b} independent tokens would use {item.uniform[at]:.1f} with uniform routing and "
        f"{item.popular[at]:.1f} with the observed expert popularity"
    )
    if np.isfinite(item.single[at]):
        change = 100 * (item.single[at] / item.mixed[at] - 1)
        sentence += f". {b} tokens of one domain use {item.single[at]:.1f} ({change:+.0f} %)"
    rows = [
        [str(b), *(_number(series[i], 1) for series in (item.mixed, item.single, item.popular, item.uniform))]
        for i, b in enumerate(item.batch.tolist())
    ]
    return Section(
        heading,
        sentence + ".",
        [draw.distinct_figure(item, size)] if figures else (),
        Table(
            ["batch, tokens", "all domains", "one domain", "popularity", "uniform"], rows, "distinct experts per layer"
        ),
        f"Batches of {item.stage} rows drawn at random from {item.rows:,}, mean over draws and layers. A decode "
        "step reads the weights of the distinct experts from memory.",
    )


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
