"""Sections of docs/results/strategies.md: the effect of each signature, and of each part of the method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from results_settings import ABLATED, ABLATED_AT, KEY, SOURCES, Results, Setting
from results_tables import OVER, change_of, markdown, percent

SIGNATURES_SAY = """
The same placements of `moeplan` on 8 nodes, with groups by each kind of signature: change against `linear`, %. `none`
is the effect of placement alone; `domain` needs labels; `oracle` knows the decode and is the upper limit for better
prediction with this placement. *Gap*: relative difference of `prefill` to the oracle.
"""
HANDOVER_SAY = """
With groups by prefill, the KV cache moves to the group's node if prefill ran elsewhere. The table shows the size of
this transfer, the inter-node bytes that each decoded token saves, and the number of tokens after which the transfer
has paid off (for traces with a recorded prefill; every request is counted).
"""
HANDOVER_HEAD = ("trace", "mode", "R", "KV moved, MB/request", "saved, KB/token", "pays off after, tokens")
PARTS_SAY = """
`moeplan` without one part (8 nodes; change against `linear`, %; mode `node` on two splits). The parts are described in
[The planning method](../concepts/method.md#ablations).
"""


def signatures_section(results: Results) -> str:
    """What each kind of signature is worth on the same placement, and what choosing after prefill costs."""
    chosen = [s for s in results if s.guarded and not s.without and s.nodes == 8]
    if not chosen:
        return ""
    kinds = (
        ("none", "moeplan/none"),
        ("domain", "moeplan/domain"),
        ("prefill", "moeplan"),
        ("oracle", "moeplan/oracle"),
    )
    rows, moved = [], []
    for setting in sorted(chosen, key=lambda s: (list(SOURCES).index(s.source), s.mode != "pick", s.redundant)):
        found, key = results[setting]["strategies"], KEY[setting.mode]
        gap = found["moeplan"][key]["value"] / found["moeplan/oracle"][key]["value"] - 1.0
        cells = [change_of(found[row][key]).replace(" %", "") if row in found else "-" for _, row in kinds]
        rows.append([setting.source, f"`{setting.mode}`", str(setting.redundant), *cells, percent(gap)])
        moved += _handover(setting, found)
    lines = [
        "## Signatures", "",
        *SIGNATURES_SAY.strip().splitlines(), "",
        *markdown(["trace", "mode", "R", *(kind for kind, _ in kinds), "gap"], rows),
    ]  # fmt: skip
    if moved:
        lines += [
            "",
            *HANDOVER_SAY.strip().splitlines(), "",
            *markdown(HANDOVER_HEAD, moved),
        ]  # fmt: skip
    return "\n".join(lines)


def _handover(setting: Setting, found: dict[str, Any]) -> Iterator[list[str]]:
    kv = found["moeplan"]["kv_handover_bytes_per_request"]
    if kv["value"] is None or kv.get("break_even_decode_tokens") is None:
        return
    sent = [found[name]["inter_node_bytes_per_token"]["value"] for name in ("linear", "moeplan")]
    yield [
        setting.source, f"`{setting.mode}`", str(setting.redundant), f"{kv['value'] / 1e6:.2f}",
        f"{(sent[0] - sent[1]) / 1e3:.0f}", f"{kv['break_even_decode_tokens']:.0f}",
    ]  # fmt: skip


def parts_section(ablated: Results, parts: Sequence[str]) -> str:
    """What is lost when a part of the method is left out."""
    if not parts or not ablated:
        return ""
    lines = [
        "## Ablations", "",
        *PARTS_SAY.strip().splitlines(), "",
    ]  # fmt: skip
    for name in ABLATED:
        own = {(s.mode, s.redundant, s.without): f["strategies"] for s, f in ablated.items() if s.source == name}
        if not own:
            continue
        rows = []
        for without in ((), *((part,) for part in parts)):
            cells = []
            for mode, extra in ABLATED_AT:
                row = own[mode, extra, without]["moeplan"]
                cells.append(change_of(row[KEY[mode]]).replace(" %", "") + ("" if row["guarded"] else OVER))
            rows.append([f"without `{without[0]}`" if without else "**whole**", *cells])
        head = [name, *(f"`{mode}`, R = {extra}" for mode, extra in ABLATED_AT)]
        lines += [*markdown(head, rows), ""]
    return "\n".join(lines)
