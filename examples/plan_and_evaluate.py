"""From a trace to a plan, evaluated on requests that it was not made from: `python examples/plan_and_evaluate.py`."""

import moeplan as mp

trace = mp.open_trace("embedded")  # the bundled trace; give the folder of yours
cluster = mp.Cluster(nodes=4, gpus_per_node=4)

table = mp.compare(trace, cluster, ("eplb", "moeplan"), redundant=16, settings=mp.EvaluationSettings(folds=2, steps=50))
gain = table.row("moeplan").figures["remote_share"]
print(f"held-out requests, remote picks: {gain}")

plan = mp.plan(trace, cluster, redundant=16)
plan.save("plan")
print(mp.load_plan("plan"))
print(mp.evaluate(plan, trace, mp.EvaluationSettings(steps=50)))  # warns: the plan was made from this trace
