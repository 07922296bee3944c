"""What choosing by experts changes when requests arrive one by one: regimes of load and traffic, on a real trace.

    python benchmarks/simulate_regimes.py TRACE [--seeds 5] [--only NAME,..] [--json OUT]

TRACE: a moeplan trace; where it has no prefill, its first 48 decode tokens stand in. Each line: experts read per step,
p99 TPOT and p99 TTFT against least loaded, with 95 % intervals paired over seeds, and balance over 10 s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import moeplan as mp
from moeplan.planning.requests import read_requests
from moeplan.simulation.settings import SimulationSettings

MIXES = ("trace", "one-domain", "drift")
#: name: (settings, requests of a run).
LOADS = {
    "4 live": ({"live": 4}, 1500),
    "8 live": ({"live": 8}, 1500),
    "16 live": ({"live": 16}, 2000),
    "64 live": ({"live": 64}, 4200),
    "8 slots, 50 %": ({"slots": 8, "load": 0.5}, 1500),
    "8 slots, 80 %": ({"slots": 8, "load": 0.8}, 1500),
    "8 slots, 95 %": ({"slots": 8, "load": 0.95}, 1500),
    "8 slots, 120 %": ({"slots": 8, "load": 1.2}, 2500),
}


def regimes(seeds: int) -> Iterator[tuple[str, SimulationSettings]]:
    """Every load under every mix."""
    for mix in MIXES:
        for name, (load, count) in LOADS.items():
            settings = SimulationSettings(("experts",), requests=count, seeds=seeds, budget=2048)
            yield f"{name}, {mix}", replace(settings, mix=mix, **load)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--policies", default="experts")
    parser.add_argument("--hardware", default="H100")
    parser.add_argument("--model", default=None)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    trace = mp.open_trace(given.trace)
    tokens = 48 if (trace.requests.prefill_known == 0).all() else None
    requests, found = read_requests(trace, signature_tokens=tokens), {}
    for name, settings in regimes(given.seeds):
        if given.only and not any(part in name for part in given.only.split(";")):
            continue
        rows = replace(settings, policies=tuple(given.policies.split(",")))
        result = mp.simulate(requests, rows, hardware=given.hardware, model=given.model)
        base = result.row("least-loaded")
        for row in result.rows[1:]:
            cells = [f"{name:28s} {row.name:14s}"]
            for key in ("experts_per_step", "tpot_p50_ms", "tpot_p99_ms", "ttft_p99_ms"):
                change = row.change(base, key)
                assert change is not None and change["ci95"] is not None
                low, high = change["ci95"]
                cells.append(f"{key} {100 * change['value']:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]")
            cells += [f"{key} {row.mean(key) or float('nan'):.3f}" for key in ("live_ratio", "token_ratio")]
            print("  ".join(cells), flush=True)
        found[name] = result.to_dict()
        if given.json:
            given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
