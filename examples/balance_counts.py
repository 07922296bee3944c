"""Counts of picks per expert to a placement file for SGLang: `python examples/balance_counts.py`."""

import numpy as np

import moeplan as mp

# Counts [layers, experts], for example from SGLang's recorder; here: 4 layers with a few hot experts.
rng = np.random.default_rng(0)
counts = rng.gamma(shape=0.5, scale=1000.0, size=(4, 64)).astype(np.int64) + 1

cluster = mp.Cluster(nodes=2, gpus_per_node=4)
placement = mp.balance(counts, cluster, redundant=8)  # EPLB's idea, adapted to how SGLang selects replicas
report = mp.export(placement, "sglang", "placement.json")
print(report)
