"""Independent instances and batch jobs: experts that a decode step reads, with requests grouped and in order.

`python benchmarks/instances.py TRACE [--signature-tokens N] [--without-layers IDS] [--instances D] [--batch B,..]`: the
tables of `compare_instances` on held-out requests.
"""

from __future__ import annotations

import argparse

import moeplan
from moeplan.replay.instances import InstanceTask, compare_instances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--signature-tokens", type=int)
    parser.add_argument("--without-layers", default="")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--batch", default="8,16")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    layers = tuple(int(layer) for layer in given.without_layers.split(",") if layer)
    trace = moeplan.open_trace(given.trace, without_layers=layers)
    requests = moeplan.read_requests(trace, signature_tokens=given.signature_tokens)
    settings = moeplan.EvaluationSettings(folds=given.folds, steps=given.steps)
    for batch in map(int, given.batch.split(",")):
        print(compare_instances(requests, InstanceTask(given.instances, batch), settings), flush=True)


if __name__ == "__main__":
    main()
