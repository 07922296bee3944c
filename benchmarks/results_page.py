"""docs/results/strategies.md, from the figures of every setting."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from results_parts import parts_section, signatures_section
from results_settings import KEY, SOURCES, Results, Setting, cannot, requests_of
from results_tables import OVER, change_of, markdown, name_of, over_guard, percent

#: Rows that `moeplan` is held against: placements and routers that know no more of a request than it does.
RIVALS = ("random", "linear", "linear/prefill", "eplb", "eplb/prefill", "affinity", "paper")
#: Columns of the main tables beside `moeplan`'s own.
SHOWN = ("random", "eplb", "eplb/prefill", "affinity", "paper")
#: Tables of wins and losses, by key; the mode's own where there is none.
TALLIES = (
    ("Wins / undecided / losses of `moeplan` on the figure of the mode, by paired intervals, eligible or not:", None),
    ("The same for the busiest GPU in a step (`gpu_load_ratio`), where nodes have several GPUs:", "gpu_load_ratio"),
    ("The same for kernels that pad every pair of nodes to the largest (`padded_ratio`):", "padded_ratio"),
)
UNIT = {"pick": "picks served on another node", "node": "distinct other nodes that a token reaches"}
GROUPED = {"none": "at random", "prefill": "signature", "domain": "domain", "oracle": "oracle"}


def page(results: Results, ablated: Results, parts: Sequence[str]) -> str:
    """docs/results/strategies.md; sections without figures are left out.

    Args:
        results: of the tables; ablated: with parts of `moeplan` left out.
    """
    sections = [
        _head(next(iter(results))),
        *(_set_section(name, results) for name in SOURCES),
        signatures_section(results),
        parts_section(ablated, parts),
        REPRODUCE,
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def summary(results: Results) -> str:
    """The generated part of docs/results/index.md: wins and losses, and how often each strategy was better."""
    return "\n".join([*_findings(results), "", *_tallies(results)])


REPRODUCE = """
## Reproduce

`python benchmarks/strategies.py --write` makes this page, the summary and the CSV file anew; `--sets`, `--nodes`,
`--redundant`, `--modes`, `--folds` and `--steps` print a part. The real traces are read from
`../shared/traces`; they are not part of the project. One setting by hand:

```sh
moeplan import arrays maverick-mmlu.npz -o maverick --without-layers 45
moeplan compare maverick --nodes 8 --gpus-per-node 6 --redundant 16 --steps 200
```
"""


def _head(setting: Setting) -> str:
    return f"""
# Strategies, all settings

Every strategy on held-out requests: {setting.folds} splits, one half to fit and the other to measure, equal groups,
{setting.steps} replayed steps per split. Figures are changes against `linear` with as many slots; less is better;
[95 % intervals] are of paired differences. Definitions: [Metrics](../reference/metrics.md) and
[Strategies](../concepts/strategies.md). Every row of every setting: [strategies.csv](strategies.csv).

A figure is eligible if groups are equal and the busiest node's load in a step is at most 1.05 x `linear`'s. Others
carry {OVER}.
"""


# ---- summary


def _findings(results: Results) -> list[str]:
    """What was won and what was lost."""
    lines = []
    for mode in KEY:
        ours = [(s, f["strategies"]["moeplan"]) for s, f in _guarded(results, mode)]
        eligible = [row[KEY[mode]]["vs_linear"]["value"] for _, row in ours if row["guarded"]]
        if eligible:
            lines.append(
                f"- **`{mode}`** ({UNIT[mode]}): `moeplan` is within the load guard in {len(eligible)} of {len(ours)} "
                f"settings, and changes the figure by {percent(max(eligible), 0)} to {percent(min(eligible), 0)} there."
            )
        for setting, row in ours:
            if not row["guarded"]:
                ratio = over_guard(results[setting], "moeplan")
                lines.append(f"    - over the guard: {name_of(setting)}, node load {ratio:.3f} x `linear`'s.")
    lost = [line for mode in KEY for line in _losses(results, mode)]
    if lost:
        lines += ["- **Lost**, beyond chance, to an eligible row:", *(f"    - {line}" for line in lost)]
    else:
        lines.append("- **Lost**: no eligible row is ahead of `moeplan` on the figure of its mode, beyond chance.")
    return [*lines, *_load_losses(results), *_padded_losses(results)]


def _tallies(results: Results) -> list[str]:
    lines = []
    for title, key in TALLIES:
        rows = []
        for name, mode in itertools.product(SOURCES, KEY):
            several = key != "gpu_load_ratio"
            of = [f for s, f in _guarded(results, mode) if s.source == name and (several or s.gpus > 1)]
            if of:
                cells = [_tally(of, rival, key or KEY[mode]) for rival in RIVALS]
                rows.append([name, f"`{mode}`", str(len(of)), *cells])
        lines += [title, "", *markdown(["trace", "mode", "settings", *(f"`{rival}`" for rival in RIVALS)], rows), ""]
    return lines[:-1]


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
    """The busiest GPU of a step beside `eplb`'s, which plans for nothing else."""
    key = "gpu_load_ratio"
    for replicas in (False, True):
        rows = [
            (setting, found["strategies"])
            for mode in KEY
            for setting, found in _guarded(results, mode)
            if setting.gpus > 1 and (setting.redundant > 0) is replicas
        ]
        if rows:
            lost = [(r["moeplan"][key]["vs_eplb"]["value"], s) for s, r in rows if "moeplan" in r["eplb"]["beats"][key]]
            won = sum("eplb" in r["moeplan"]["beats"][key] for _, r in rows)
            with_replicas = "with" if replicas else "without"
            line = f"- **GPU load** in a step, {with_replicas} replicas: above `eplb`'s beyond chance in "
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
    return "\n".join(lines)


def _reason(name: str, nodes: int) -> str | None:
    return cannot(name, nodes) if SOURCES[name].path.exists() else None


def _stand_in(found: dict[str, Any], name: str) -> str:
    source, said = SOURCES[name], ""
    if found["signature_stands_in"]:
        said += f" The {found['signature_stands_in']} stand in for the prefill."
    if source.block > 1:
        said += f" Blocks of {source.block} consecutive requests stay together."
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


CSV_HEAD = (
    "trace", "nodes", "gpus_per_node", "redundant", "live_per_group", "row", "planned_for", "load_guard", "groups",
    "remote_share", "remote_share_change_pct", "remote_share_low", "remote_share_high",
    "remote_nodes_per_token", "remote_nodes_change_pct", "remote_nodes_low", "remote_nodes_high",
    "padded_pick", "padded_node", "gpu_load", "gpu_load_total", "node_load", "eligible",
)  # fmt: skip


def csv_rows(results: Results) -> Iterator[list[str]]:
    """Every row of every setting. Only `moeplan` plans for the mode; for others the mode changes the padding alone."""
    sizes = dict.fromkeys((s.source, s.nodes, s.gpus, s.redundant) for s in results if not s.without)
    for size in sizes:
        settings = [s for s in results if (s.source, s.nodes, s.gpus, s.redundant) == size and not s.without]
        first = results[settings[0]]
        head = [*map(str, size), str(first["setup"]["live_per_group"])]
        for name, row in first["strategies"].items():
            if not _ours(name):
                padded = {s.mode: results[s]["strategies"][name] for s in settings if s.guarded}
                yield [*head, name, "", "", *_csv_cells(name, row, padded)]
        for setting in settings:
            guard = "on" if setting.guarded else "off"
            for name, row in results[setting]["strategies"].items():
                if _ours(name) and (setting.guarded or name in ("moeplan", "moeplan/oracle")):
                    yield [*head, name, setting.mode, guard, *_csv_cells(name, row, {setting.mode: row})]


def _ours(row: str) -> bool:
    return row.partition("/")[0] == "moeplan"


def _csv_cells(name: str, row: dict[str, Any], padded: dict[str, dict[str, Any]]) -> list[str]:
    cells = [GROUPED[row["signature"]]]
    for key in ("remote_share", "remote_nodes_per_token"):
        cells.append(f"{row[key]['value']:.3f}")
        versus = row[key].get("vs_linear")
        numbers = [versus["value"], *versus["ci95"]] if versus and name != "linear" else []
        cells += [f"{100 * number:+.1f}" for number in numbers] or ["", "", ""]
    cells += [f"{padded[mode]['padded_ratio']['value']:.2f}" if mode in padded else "" for mode in KEY]
    cells += [f"{row[key]['value']:.2f}" for key in ("gpu_load_ratio", "gpu_load_total", "node_load_ratio")]
    return [*cells, "yes" if row["guarded"] else "no"]
