# Run in this folder, in an environment with moeplan 0.1.0 (commit fa249b2) and its tests/ on PYTHONPATH.
set -e
python columns.py
python cut_off.py
moeplan generate demo --requests 64 --prefill 10 --decode 14 --layer-ids 1,2,3,4 --seed 5 -o trace
moeplan import trace trace --aggregate 4 -o trace-sums
moeplan import trace trace --min-tokens 20 --domain all -o trace-dropped
moeplan import arrays arrays.npz -o trace-arrays

moeplan plan trace --nodes 2 --gpus-per-node 4 --redundant 8 -o plan-moeplan
moeplan plan trace --nodes 2 --gpus-per-node 4 --strategy paper -o plan-paper
moeplan plan trace --nodes 2 --gpus-per-node 4 --strategy paper-unbalanced --clusters 4 -o plan-paper-unbalanced
moeplan plan trace --nodes 2 --gpus-per-node 4 --redundant 8 --strategy eplb -o plan-eplb
moeplan plan trace --nodes 2 --gpus-per-node 2 --home gpu --dispatch gpu --replica-rule hash --redundant 4 -o plan-gpu
moeplan plan trace --nodes 2 --gpus-per-node 4 --signature-tokens 4 -o plan-first-tokens
moeplan plan trace --nodes 2 --gpus-per-node 4 --objective balance --guard inf --seed 3 -o plan-balance
moeplan plan trace --nodes 2 --gpus-per-node 4 --objective time --hardware H100 --model model.json -o plan-time
moeplan plan trace --from plan-eplb --max-moves 2 -o plan-moved
moeplan plan trace-sums --nodes 2 --gpus-per-node 4 -o plan-sums

moeplan import logical-count logical-count.json --stage decode --top-k 4 --name small -o counts
for engine in sglang vllm vllm-ascend; do
  moeplan export plan-moeplan --engine $engine --num-layers 5 --dense-layers 0 -o $engine.json
done
moeplan export plan-moeplan --engine tensorrt-llm --num-layers 5 --dense-layers 0 -o tensorrt-llm.yaml
moeplan import placement sglang.json --engine sglang --num-experts 32 --num-layers 5 --dense-layers 0 --top-k 4 \
  --ep-size 8 --nnodes 2 -o plan-imported
python expected.py > expected.json
