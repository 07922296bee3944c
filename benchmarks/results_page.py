"""docs/results/strategies.md, from the figures of every setting."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from results_bars import (
    GPU_STEP,
    GPU_TOTAL,
    OVER,
    Bar,
    LoadBar,
    bar_row,
    change_of,
    load_row,
    markdown,
    name_of,
    over_guard,
    percent,
)
from results_parts import parts_section, signatures_section
from results_settings import KEY, SOURCES, Results, Setting, cannot, requests_of

#: Rows that `moeplan` is held against: placements and routers that know no more of a request than it does.
RIVALS = ("random", "linear", "linear/prefill", "eplb", "eplb/prefill", "affinity", "paper")
#: Columns of the main tables beside `moeplan`'s own.
SHOWN = ("random", "eplb", "eplb/prefill", "affinity", "paper")
#: Tables of wins and losses, by key; the mode's own where there is none.
TALLIES = (
    ("Wins / undecided / losses of `moeplan` on the figure of the mode, by paired intervals, guard or not:", None),
    ("The same for the busiest GPU in a step (`gpu_load_ratio`), where nodes have several GPUs:", "gpu_load_ratio"),
    ("The same for kernels that pad every pair of nodes to the largest (`padded_ratio`):", "padded_ratio"),
)
UNIT = {"pick": "picks served on another node", "node": "distinct other nodes a token reaches"}
GROUPED = {"none": "at random", "prefill": "signature", "domain": "domain", "oracle": "oracle"}


def page(
    results: Results, bars: Sequence[Bar | LoadBar], barred: Results, ablated: Results, parts: Sequence[str]
) -> str:
    """The whole page; sections without figures are left out.

    Args:
        results: of the table; barred: of the bars' settings; ablated: with parts of `moeplan` left out.
    """
    any_setting = next(iter(results))
    sections = [
        _head(any_setting, results),
        _short(results, bars, barred),
        bars_section(bars, barred),
        *(_set_section(name, results) for name in SOURCES),
        signatures_section(results),
        parts_section(ablated, parts),
        REPRINT,
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


BARS_SAY = """
What `moeplan` was asked for before it was written, guarded. *Same slots*: against `linear` with as many copies, which
decides. *Without copies*: against `linear` at R = 0 (there 0.875 of the picks leave a node of 8). *Oracle*: the same
placement with requests grouped by their own decode, so what a better signature could still give. *Unguarded*: a plan
that may load nodes as it likes. Each bar stands twice: with one GPU a node, where only nodes have a load, and with
several, where the plan also pays for uneven GPUs, out of locality.
"""

REPRINT = """
## Reprint

```console
$ python benchmarks/strategies.py --write
```

prints this page anew; `--only-bars` prints the bars alone, and `--sets`, `--nodes`, `--redundant`, `--modes`, `--folds`
and `--steps` a part of the tables. The real sets are read from `../shared/traces`; they are not part of the project.
One setting by hand:

```console
$ moeplan import arrays maverick-mmlu.npz -o maverick --without-layers 45
$ moeplan compare maverick --nodes 8 --gpus-per-node 6 --redundant 16 --steps 200
```
"""


def _head(setting: Setting, results: Results) -> str:
    sets = ", ".join(name for name in SOURCES if any(key.source == name for key in results))
    return f"""
# Results

Every strategy on requests that its plan never saw: {setting.folds} splits, one half to fit and the other to measure,
equal groups, {setting.steps} replayed steps a split ({sets}). Figures are changes against
`linear` on the same slots, less is better; [95 % intervals] are of paired differences. What each figure means:
[metrics.md](../reference/metrics.md); what each strategy does: [strategies.md](../concepts/strategies.md);
how `moeplan` works: [method.md](../concepts/method.md). All of this page is printed by one [command](#reprint).

A figure **counts** when groups are equal and the busiest node's load in a step is at most 1.05 x `linear`'s. Those that
do not count carry {OVER}.
"""


# ---- in short


def _short(results: Results, bars: Sequence[Bar | LoadBar], barred: Results) -> str:
    """What was won and what was lost."""
    judged = [(bar.name, _verdict(bar, barred)) for bar in bars]
    met = [name for name, verdict in judged if verdict.startswith("**yes")]
    lines = ["## In short", ""]
    if judged:
        lines.append(f"- **Bars**: {len(met)} of {len(judged)} are met ([below](#the-bars)).")
    for mode in KEY:
        ours = [(s, f["strategies"]["moeplan"]) for s, f in _guarded(results, mode)]
        if not ours:
            continue
        counted = [row[KEY[mode]]["vs_linear"]["value"] for _, row in ours if row["guarded"]]
        if counted:
            lines.append(
                f"- **`{mode}`** ({UNIT[mode]}): `moeplan` keeps the guard in {len(counted)} of {len(ours)} settings, "
                f"and changes the figure by {percent(max(counted), 0)} to {percent(min(counted), 0)} there."
            )
        for setting, row in ours:
            if not row["guarded"]:
                ratio = over_guard(results[setting], "moeplan")
                lines.append(f"  - over the guard: {name_of(setting)}, node load {ratio:.3f} x `linear`'s.")
    lost = [line for mode in KEY for line in _losses(results, mode)]
    if lost:
        lines += [
            "- **Lost**: settings where a row that counts is ahead beyond chance:",
            *(f"  - {line}" for line in lost),
        ]
    else:
        lines.append("- **Lost**: no row that counts is ahead of `moeplan` on the figure of its mode, beyond chance.")
    lines += [*_load_losses(results), *_padded_losses(results)]
    for title, key in TALLIES:
        rows = []
        for name, mode in itertools.product(SOURCES, KEY):
            several = key != "gpu_load_ratio"
            of = [f for s, f in _guarded(results, mode) if s.source == name and (several or s.gpus > 1)]
            if of:
                cells = [_tally(of, rival, key or KEY[mode]) for rival in RIVALS]
                rows.append([name, f"`{mode}`", str(len(of)), *cells])
        lines += ["", title, "", *markdown(["set", "mode", "settings", *(f"`{rival}`" for rival in RIVALS)], rows)]
    return "\n".join(lines)


def _verdict(bar: Bar | LoadBar, results: Results) -> str:
    return bar_row(bar, results)[5] if isinstance(bar, Bar) else load_row(bar, results)[4]


def _guarded(results: Results, mode: str) -> list[tuple[Setting, dict[str, Any]]]:
    return [(s, f) for s, f in results.items() if s.mode == mode and s.guarded and not s.without]


def _tally(of: Iterable[dict[str, Any]], rival: str, key: str) -> str:
    won = undecided = lost = 0
    for found in of:
        rows = found["strategies"]
        ahead, behind = rival in rows["moeplan"]["beats"][key], "moeplan" in rows[rival]["beats"][key]
        won, undecided, lost = won + ahead, undecided + (not ahead and not behind), lost + behind
    return f"{won} / {undecided} / {lost}"


def _losses(results: Results, mode: str) -> Iterator[str]:
    key = KEY[mode]
    for setting, found in _guarded(results, mode):
        rows = found["strategies"]
        ahead = [name for name in RIVALS if rows[name]["guarded"] and "moeplan" in rows[name]["beats"][key]]
        if ahead:
            own = percent(rows["moeplan"][key]["vs_linear"]["value"])
            better = ", ".join(f"`{name}` {percent(rows[name][key]['vs_linear']['value'])}" for name in ahead)
            yield f"{name_of(setting)}: `moeplan` {own}, {better}"


def _load_losses(results: Results) -> Iterator[str]:
    """How the busiest GPU of a step does beside `eplb`'s, which plans for nothing else."""
    key = "gpu_load_ratio"
    for copies in (False, True):
        rows = [
            (setting, found["strategies"])
            for mode in KEY
            for setting, found in _guarded(results, mode)
            if setting.gpus > 1 and (setting.redundant > 0) is copies
        ]
        if rows:
            lost = [(r["moeplan"][key]["vs_eplb"]["value"], s) for s, r in rows if "moeplan" in r["eplb"]["beats"][key]]
            won = sum("eplb" in r["moeplan"]["beats"][key] for _, r in rows)
            line = (
                f"- **GPU load** in a step, {'with' if copies else 'without'} copies: above `eplb`'s beyond chance in "
            )
            line += f"{len(lost)} of {len(rows)} settings, below in {won}"
            yield line + _worst(lost)


def _padded_losses(results: Results) -> Iterator[str]:
    """What a kernel that pads to the largest pair of nodes sends, beside `linear`."""
    key = "padded_ratio"
    rows = [(setting, found["strategies"]) for mode in KEY for setting, found in _guarded(results, mode)]
    if rows:
        lost = [(r["moeplan"][key]["value"] - 1.0, s) for s, r in rows if "moeplan" in r["linear"]["beats"][key]]
        won = sum("linear" in r["moeplan"]["beats"][key] for _, r in rows)
        line = "- **Padding**: a kernel that pads every pair of nodes to the largest sends more than under `linear` in "
        yield line + f"{len(lost)} of {len(rows)} settings, less in {won}" + _worst(lost)


def _worst(lost: Sequence[tuple[float, Setting]]) -> str:
    if not lost:
        return "."
    value, setting = max(lost, key=lambda pair: pair[0])
    return f"; at most {percent(value, 0)} ({name_of(setting)})."


# ---- the bars


def bars_section(bars: Sequence[Bar | LoadBar], results: Results) -> str:
    """The two tables of bars."""
    first = [bar_row(bar, results) for bar in bars if isinstance(bar, Bar)]
    second = [load_row(bar, results) for bar in bars if isinstance(bar, LoadBar)]
    lines = []
    if first:
        lines += [
            "## The bars", "", *BARS_SAY.strip().splitlines(), "",
            *markdown(
                ["setting", "figure", "asked", "same slots", "without copies", "met", "oracle", "unguarded"], first
            ),
        ]  # fmt: skip
    if second:
        lines += [
            "",
            "Locality and load in one plan, in multiples of `eplb`'s in the same run: `remote_share` at most as said,",
            f"`gpu_load_total` at most {GPU_TOTAL}, `gpu_load_ratio` at most {GPU_STEP}.", "",
            *markdown(["setting", "`remote_share`", "`gpu_load_total`", "`gpu_load_ratio`", "met"], second),
        ]  # fmt: skip
    return "\n".join(lines)


# ---- one set


def _set_section(name: str, results: Results) -> str:
    own = [setting for setting in results if setting.source == name and not setting.without]
    if not own:
        reasons = [r for r in (_reason(name, nodes) for nodes in (4, 8)) if r]
        return f"## {name}\n\nNothing can be compared: {reasons[0]}." if reasons else ""
    found = results[own[0]]
    shape, count = requests_of(name).shape, found["requests"]
    lines = [
        f"## {name}", "",
        f"{shape.name}: {shape.num_layers} layers x {shape.num_experts} experts, top-{shape.top_k}; {count['usable']} "
        f"of {count['total']} requests; measured on their {found['column']}." + _stand_in(found, name),
    ]  # fmt: skip
    for mode in KEY:
        chosen = [setting for setting in own if setting.mode == mode and setting.guarded]
        if chosen:
            lines += ["", f"**`{mode}`**: {UNIT[mode]} (`{KEY[mode]}`).", "", *_main_table(chosen, results)]
    for size in dict.fromkeys((setting.nodes, setting.redundant) for setting in own):
        lines += ["", *_details([s for s in own if (s.nodes, s.redundant) == size], results)]
    return "\n".join(lines)


def _reason(name: str, nodes: int) -> str | None:
    return cannot(name, nodes) if SOURCES[name].path.exists() else None


def _stand_in(found: dict[str, Any], name: str) -> str:
    source, said = SOURCES[name], ""
    if found["signature_stands_in"]:
        said += f" The {found['signature_stands_in']} stand in for the prefill."
    if source.block > 1:
        said += f" Blocks of {source.block} neighbours stay together."
    if source.without_layers:
        said += f" Layer {', '.join(map(str, source.without_layers))} is left out, as one expert takes it all."
    return said


def _main_table(chosen: Sequence[Setting], results: Results) -> list[str]:
    head = ["nodes", "R", "GPUs", "`linear`", *(f"`{name}`" for name in SHOWN), "**`moeplan`**", "unguarded", "oracle"]
    rows = []
    for setting in chosen:
        found, key = results[setting]["strategies"], KEY[setting.mode]
        counted = [name for name in (*SHOWN, "moeplan") if found[name]["guarded"]]
        best = min(counted, key=lambda name: found[name][key]["value"]) if counted else ""
        cells = []
        for name in SHOWN:
            text = percent(found[name][key]["vs_linear"]["value"]).removesuffix(" %") + _mark(found[name])
            cells.append(f"**{text}**" if name == best else text)
        own = change_of(found["moeplan"][key]) + _mark(found["moeplan"])
        loose = results.get(dataclasses.replace(setting, guarded=False))
        bare = "-" if loose is None else _short_change(loose["strategies"]["moeplan"][key])
        load = "-"
        if setting.gpus > 1:
            load = " / ".join(f"{found[name]['gpu_load_ratio']['value']:.2f}" for name in ("linear", "eplb", "moeplan"))
        rows.append(
            [
                str(setting.nodes), str(setting.redundant), str(setting.gpus) if setting.gpus > 1 else "-",
                f"{found['linear'][key]['value']:.3f}", *cells, f"**{own}**" if best == "moeplan" else own, bare,
                _short_change(found["moeplan/oracle"][key]), load,
            ]
        )  # fmt: skip
    return markdown([*head, "GPU load: linear / eplb / moeplan"], rows)


def _short_change(figure: dict[str, Any]) -> str:
    return percent(figure["vs_linear"]["value"]).removesuffix(" %")


def _mark(row: dict[str, Any]) -> str:
    return "" if row["guarded"] else OVER


def _details(settings: Sequence[Setting], results: Results) -> list[str]:
    """Every row of the settings of one size: only `moeplan` plans for the mode; with others it changes the padding."""
    first, found = settings[0], results[settings[0]]
    modes = list(dict.fromkeys(setting.mode for setting in settings))
    rows = [
        _detail(f"`{name}`", row, first, [results[s]["strategies"][name] for s in settings if s.guarded])
        for name, row in found["strategies"].items()
        if not _ours(name)
    ]
    for setting in settings:
        for name, row in results[setting]["strategies"].items():
            if _ours(name) and (setting.guarded or name in ("moeplan", "moeplan/oracle")):
                label = f"`{name}` for `{setting.mode}`" + ("" if setting.guarded else ", unguarded")
                rows.append(_detail(label, row, first, [row if mode == setting.mode else None for mode in modes]))
    loads = ["gpu_load_ratio", "gpu_load_total"] if first.gpus > 1 else []
    floors = [f"{found['strategies']['linear'][key]['noise_floor']:.2f}" for key in (*loads, "node_load_ratio")]
    rows.append(["(noise floor)", *[""] * (5 + len(modes)), *floors])
    head = ["row", "groups", "`remote_share`", "vs `linear`, %", "remote nodes", "vs `linear`, %"]
    head += [f"padded, `{mode}`" for mode in modes] + ["GPU load", "GPU load, total"][: len(loads)] + ["node load"]
    title = f"{first.nodes} nodes x {first.gpus} GPU{'s' * (first.gpus > 1)}, R = {first.redundant}: every row"
    return [
        f"<details><summary>{title} ({found['setup']['live_per_group']} live requests a group)</summary>", "",
        *markdown(head, rows), "", "</details>",
    ]  # fmt: skip


def _ours(row: str) -> bool:
    return row.partition("/")[0] == "moeplan"


def _detail(label: str, row: dict[str, Any], setting: Setting, by_mode: Sequence[dict[str, Any] | None]) -> list[str]:
    cells = [label, GROUPED[row["signature"]]]
    for key in ("remote_share", "remote_nodes_per_token"):
        versus = "" if label == "`linear`" else change_of(row[key]).replace(" %", "", 1)
        cells += [f"{row[key]['value']:.3f}", versus]
    cells += ["" if of is None else f"{of['padded_ratio']['value']:.2f}" for of in by_mode]
    if setting.gpus > 1:
        cells += [f"{row[key]['value']:.2f}" for key in ("gpu_load_ratio", "gpu_load_total")]
    return [*cells, f"{row['node_load_ratio']['value']:.2f}{_mark(row)}"]
