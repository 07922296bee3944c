"""The commands of golden.py, the files that they read, and what may differ between release 0.1.0 and this tree.

A command runs in a folder of its own; `../NAME/` is the folder of the case NAME, which therefore runs first, and
`../old/NAME/` is that of the same case under release 0.1.0, so that a tree must read what 0.1.0 has written.

When the command line changes: give a case its new command (an indented line "=> ..." under the old one), or, for a
change that is the same everywhere, add a line to REWRITTEN. When a key of the JSON or of a written file changes, add a
line to RENAMED, ADDED or TEXT, with the reason.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """A command, or a function that makes files; `new` is the command under this tree where it differs."""

    name: str
    old: str = ""
    new: str | None = None
    make: Callable[[Path], None] | None = None
    after: tuple[str, ...] = ()  # cases that `make` reads

    @property
    def area(self) -> str:
        return self.name.split("-")[0]

    @property
    def bad(self) -> bool:
        return self.area == "bad"


# ---- what may differ. Patterns are searched (re.search) in paths such as "plan-bytes: expected.remote_share.value" (of
#      the JSON on standard output) and "plan-bytes/plan/plan.json: guard" (of a file).

#: (pattern in a command without `new`, replacement), in order.
REWRITTEN: tuple[tuple[str, str], ...] = (
    (r"^replay ", "evaluate "),
    (r"^plan --from (\S+) --drift (\S+)", r"drift \2 --plan \1"),
    (r"^plan --drift ", "drift "),
    (r"^plan (\S+) --from (\S+) --max-moves", r"rebalance \1 --plan \2 --max-moves"),
    (r"--home (node|gpu)\b", r"--deployment \1s"),
    (r"--nnodes\b", "--nodes"),
    (r"--stage\b", "--phase"),
    (r"--(weights|experts|kv) ", r"--\1-dtype "),
    (r"--prompt ", "--prompt-tokens "),
    (r"^(size .*)--output ", r"\1--output-tokens "),
    (r"^(size .*)--requests ", r"\1--concurrency "),
)
#: (pattern of an old path, its replacement (re.sub), reason).
RENAMED: tuple[tuple[str, str, str], ...] = (
    (r"^(import-\w+: )stage$", r"\1phase", "what was counted is a phase, as everywhere else"),
    (r"\b(setup|cluster)\.home$", r"\1.deployment", "a deployment: nodes or gpus"),
    (r"plan\.json: (guard|objective)$", r"plan.json: params.\1", "with the other parameters of the strategy"),
    (r"plan\.json: signature_stands_in$", "plan.json: signature", "a source and a number of tokens"),
    (r"\bmoved\.copies$", "moved.replicas", "a replica, never a copy"),
    (r"^(check-[\w-]+: findings\[\d+\])\.mend$", r"\1.hint", "a hint, as in error messages"),
)


def signature(words: str | None) -> dict[str, object]:
    """The signature of plan format 2 for the text of format 1, such as "first 48 decode tokens"."""
    if words is None:
        return {"source": "prefill", "tokens": None}
    _, tokens, source, _ = words.split()
    return {"source": source, "tokens": int(tokens)}


#: (pattern of a new path, how the old value is converted; a dictionary stands for the leaves below the path).
CONVERTED: tuple[tuple[str, Callable[[Any], object]], ...] = (
    (r"\.deployment$", lambda home: f"{home}s"),
    (r"plan\.json: signature$", signature),
)
#: (pattern of a path that only the new tree has, reason).
ADDED: tuple[tuple[str, str], ...] = (
    (r"^(import|generate)-[\w-]+: notes\b", "every verb that makes a trace gives the notes of the source"),
    (r"plan\.json: requires$", "plan format version 2"),
    (r"plan\.json: params(\.(policy|clusters|equal))?$", "plan format version 2 keeps all parameters"),
    (r"^(replay|evaluate)[\w-]*: synthetic$", "as in compare"),
)
#: (pattern of an old path, under its new name, that the new tree has no more, reason).
REMOVED: tuple[tuple[str, str], ...] = (
    (
        r"^(plan-(embedded|eplb|paper|unequal|signature)|import-placement)/plan/plan\.json: params\.(guard|objective)$",
        "the strategy takes neither",
    ),
)
#: (pattern of a path whose text is for people and may be worded anew, reason).
TEXT: tuple[tuple[str, str], ...] = (
    (r": method\b", "how figures are made, in standard terms"),
    (r"plan\.json: notes\b", "notes of a plan, in standard terms"),
    (r"^check-[\w-]+: (findings|not_checked)\b", "messages of a check, in standard terms"),
    (r"^export-[\w-]+: (notes|lacks)\b", "notes of an export, in standard terms"),
    (r"^estimate-[\w-]+: real\.notes\b", "notes of an estimate, in standard terms"),
    (r"^profile-[\w-]+: (request_types\.meaning|notices|.*\.skipped)\b", "sentences of a profile, in standard terms"),
)
#: (pattern of a path that is left out on both sides, reason).
VOLATILE: tuple[tuple[str, str], ...] = (
    (r"\bfit_seconds\b", "a time"),
    (r"[ .]moeplan$", "the version"),
    (r"plan\.json: version$", "of the format: 1 and 2"),
)


# ---- files made here


def make_inputs(folder: Path) -> None:
    """Recordings, counts and configurations that the commands read: small, made from fixed seeds; and broken ones."""
    rng = np.random.default_rng(5)

    def arrays(name: str, top_k: int = 2, experts: int = 16, mixed: bool = False, **changes: object) -> None:
        """Requests of 3 domains; each prefers a quarter of the experts: neighbours, or (mixed) every fourth."""
        requests, layers, tokens = 72, 3, 30
        domain = np.arange(requests) % 3
        quarter = np.arange(experts) % 4 if mixed else np.arange(experts) * 4 // experts
        exponent = 1 / (1 + 7 * (quarter == domain[:, None]))  # [requests, experts]
        liking = rng.random((requests, tokens, layers, experts)) ** exponent[:, None, None]
        values = {
            "experts": np.argsort(-liking, axis=-1)[..., :top_k].reshape(-1, layers, top_k).astype(np.uint8),
            "request_offsets": np.arange(requests + 1) * tokens,
            "prefill_lengths": np.full(requests, 10),
            "domain": np.array(["chat", "code", "math"])[domain],
            "layer_ids": np.array([1, 2, 3]),
            "num_experts": np.array(experts),
        }
        np.savez(folder / name, **{k: v for k, v in (values | changes).items() if v is not None})  # type: ignore[arg-type]

    arrays("small.npz")
    arrays("moved.npz", mixed=True, domain=None)
    arrays("prefill.npz", prefill_lengths=np.full(72, 30))
    arrays("other.npz", experts=24)
    arrays("offsets.npz", request_offsets=np.array([0, 7, 4, 12]))
    arrays("range.npz", num_experts=np.array(4))
    arrays("huge.npz", num_experts=np.array(10**9))
    arrays("objects.npz", layer_ids=np.array([None, 1, 2], object))
    arrays("missing.npz", request_offsets=None)
    (folder / "cut.npz").write_bytes((folder / "small.npz").read_bytes()[:3000])

    def text(name: str, value: object) -> None:
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    counts = rng.zipf(1.6, (8, 32)).clip(1, 5000)
    text("counts.json", {"logical_count": counts.tolist()})
    text("counts-other.json", {"logical_count": rng.permuted(counts, axis=1).tolist()})
    text("counts-small.json", {"logical_count": [[1, 2]]})
    text("counts-negative.json", {"logical_count": [[1, -2, 3, 4]]})
    text("counts-cut.json", '{"logical_count": [[1, 2')
    text("config.json", EMBEDDED)  # of the embedded model
    text("config-part.json", EMBEDDED | {"mlp_only_layers": [1, 2, 3, 5, 6, 7]})
    text("config-llama.json", {"model_type": "llama", "hidden_size": 4096})
    text("config-cut.json", json.dumps(EMBEDDED)[:-40])
    text("config-eight.json", EMBEDDED | {"num_local_experts": 8})
    text("deep.json", "[" * 100_000)
    text("hardware.json", {"H100": {"usd_per_hour": 1.5}, "mine": {"usd_per_hour": "cheap"}})
    text("prices.json", {"H100": {"usd_per_hour": 1.5}})
    text("number.json", {"H100": {"usd_per_hour": 10**400}})
    steps = [{"0": None, "1": [[5, 6], [7, 1]], "3": [[0, 2], [3, 4]]}, {"0": None, "1": [[1, 2]], "3": [[6, 5]]}]
    text("chat-1.json", [*steps, steps[1]])
    text("code-1.json", [*steps, {"0": None, "1": [[4, 7]], "3": [[2, 3]]}])
    text("steps-range.json", [*steps, {"0": None, "1": [[4, 7]], "3": [[2, 8]]}])
    text("steps-none.json", [{"0": None}])
    line = {"stage": "pre_dispatch", "block": "decoder", "rank": 0, "num_tokens": 2, "topk": 2}
    rows = [line | {"step": s, "layer": la, "top_indices": [[s, 3], [1, 2]]} for s in (0, 1) for la in (2, 3)]
    text("megatron.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    text("megatron-cut.jsonl", json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:-9])
    text("responses.json", {"choices": [{"index": 0, "text": "no picks"}], "usage": {"prompt_tokens": 3}})
    text("sglang-short.json", {"physical_to_logical_map": [[0, 1]]})
    text("sglang-twice.json", {"physical_to_logical_map": [[0] * 40] * 8})
    text("vllm.json", {"physical_to_logical_map": [list(range(8))] * 2, "layer_ids": [1, 2]})
    text("trtllm.yaml", "num_slots: 2\ninitial_global_assignments: {0: [0, 1]}\nmore: 1\n")
    text("not-yaml.yaml", "a: [1, 2\n")


EMBEDDED = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 192,
    "intermediate_size": 256, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_hidden_layers": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 3072,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": True,
}  # fmt: skip


def make_damaged(folder: Path) -> None:
    """Copies of a plan and of a trace, each damaged in one way."""

    def copy(kind: str, name: str) -> Path:
        shutil.copytree(folder.parent / kind, folder / name)
        return folder / name

    plan, trace = "plan-eplb/plan", "generate-demo/trace"
    slots = copy(plan, "plan-cut") / "slots.npy"
    slots.write_bytes(slots.read_bytes()[:-40])
    (copy(plan, "plan-missing") / "slots.npy").unlink()
    slots = copy(plan, "plan-expert") / "slots.npy"
    array = np.load(slots)
    array[0, 0] = 99
    np.save(slots, array)
    for name, pattern, replacement in (
        ("plan-json", r"\s*\}\s*$", ""),
        ("plan-version", r'"version": \d+', '"version": 99'),
        ("plan-seed", r'"seed": \d+', '"seed": "one"'),
        ("plan-nodes", r'"nodes": \d+', '"nodes": 2.5'),
        ("plan-dispatch", r'"dispatch": "\w+"', '"dispatch": "post"'),
    ):
        head = copy(plan, name) / "plan.json"
        head.write_text(re.sub(pattern, replacement, head.read_text(), count=1))
    for name, pattern, replacement in (
        ("trace-json", r"\s*\}\s*$", ""),
        ("trace-version", r'"version": \d+', '"version": 99'),
        ("trace-incomplete", r'"complete": true', '"complete": false'),
    ):
        head = copy(trace, name) / "trace.json"
        head.write_text(re.sub(pattern, replacement, head.read_text(), count=1))
    part = copy(trace, "trace-cut") / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    part = copy(trace, "trace-changed") / "part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 255
    part.write_bytes(bytes(data))
    (copy(trace, "trace-missing") / "requests.parquet").unlink()


# ---- the commands. A line is "name: command" ("command" alone for bad input); an indented line goes on with it, and
#      "=>" starts the command under this tree where it differs, e.g. "    => evaluate ../plan-bytes/plan embedded".

SHORT = {
    "DEMO": "../generate-demo/trace",
    "GPT": "../import-gpt-oss/trace",
    "PART": "embedded --without-layers 1,2,3,5,6,7",
    "FAST": "--folds 2 --steps 50",
    "TWO": "--nodes 2 --gpus-per-node 2",
    "SERVED": "--config ../inputs/config.json --ep-size 8 --nnodes 2",
    "EXPORT": "export ../plan-embedded/plan --engine",
    "COUNTS": "export ../inputs/counts.json --engine sglang -o out.json",
    "ESTIMATE": "estimate --model deepseek-v3 --hardware H100",
}

GOOD = """
generate-demo: generate demo -o trace --requests 96 --seed 3 --layers 4 --decode 40
generate-top1: generate llama-4-maverick -o trace --requests 48 --layers 2 --prefill 12 --decode 16 --exact
generate-groups: generate deepseek-v3 -o trace --requests 48 --layer-ids 3,42 --prefill 12 --decode 16
import-arrays: import arrays ../inputs/small.npz -o trace --name m --hidden 512 --expert-bytes 1000
import-moved: import arrays ../inputs/moved.npz -o trace --name m --hidden 512 --expert-bytes 1000
import-prefill: import arrays ../inputs/prefill.npz -o trace --without-layers 2
import-other: import arrays ../inputs/other.npz -o trace
import-steps: import expert-selection ../inputs/chat-1.json ../inputs/code-1.json -o trace --num-experts 8
import-megatron: import megatron ../inputs/megatron.jsonl -o trace --num-experts 4
import-aggregate: import trace $DEMO -o trace --aggregate 3 --min-tokens 30
import-counts: import logical-count ../inputs/counts.json -o counts --stage decode --top-k 4
import-vllm: import vllm ../shared/engines/vllm_completion_response.json -o trace --num-experts 8
import-sglang: import sglang ../shared/engines/sglang_generate_response.json -o trace --num-experts 8 --num-layers 4
    --top-k 2 --dense-layers 0
import-tensorrt: import tensorrt-llm ../shared/engines/trtllm_stats -o counts --stage prefill
import-beyond: import moe-beyond ../shared/traces/formats/moe_beyond_csv -o trace --num-experts 64
import-gpt-oss: import arrays ../shared/traces/gpt-oss-20b.npz -o trace
    --without-layers 0,1,2,4,5,6,7,8,9,10,11,12,13,14,16,17,18,19,20,21,22,23
profile-demo: profile $DEMO -o page.html
profile-layers: profile ../import-prefill/trace -o page.html --signature-tokens 8 --seed 4
profile-aggregate: profile ../import-aggregate/trace -o page.html
profile-gpt-oss: profile $GPT -o page.html --signature-tokens 32
plan-embedded: plan embedded -o plan --nodes 2 --gpus-per-node 4 --redundant 8 --strategy affinity
plan-bytes: plan $PART -o plan --nodes 2 --gpus-per-node 4 --redundant 8
plan-eplb: plan $DEMO -o plan $TWO --redundant 4 --strategy eplb --home gpu
plan-balance: plan $DEMO -o plan $TWO --redundant 8 --objective balance --guard 1.2 --dispatch gpu
    --replica-rule hash --seed 3
plan-time: plan $PART -o plan --nodes 2 --gpus-per-node 4 --objective time --hardware H100
    --model ../inputs/config-part.json --context 512
plan-even: plan ../import-arrays/trace -o plan --nodes 4 --gpus-per-node 2 --redundant 8 --replica-rule nearest-even
    --dispatch node --guard inf
plan-paper: plan ../import-arrays/trace -o plan --nodes 4 --gpus-per-node 1 --strategy paper --clusters 3
plan-unequal: plan $DEMO -o plan --nodes 4 --gpus-per-node 2 --strategy paper-unbalanced
plan-signature: plan ../import-prefill/trace -o plan $TWO --signature-tokens 8 --block 4 --strategy paper
plan-moves: plan $DEMO --from ../plan-eplb/plan --max-moves 3 -o plan
plan-moves-balance: plan $DEMO --from ../old/plan-balance/plan --max-moves 2 -o plan
drift-good: plan --from ../plan-eplb/plan --drift $DEMO
drift-stale: plan --from ../plan-paper/plan --drift ../import-moved/trace
drift-signature: plan --from ../plan-signature/plan --drift ../import-prefill/trace --signature-tokens 4
compare-pick: compare $DEMO $TWO --redundant 4 $FAST -o page.html
compare-gpu: compare $DEMO $TWO --dispatch gpu --home gpu --strategies linear,eplb,paper,moeplan $FAST
compare-node: compare ../import-arrays/trace --nodes 2 --gpus-per-node 4 --redundant 8 --dispatch node
    --replica-rule nearest-even --strategies eplb,moeplan,paper-unbalanced $FAST --seed 2
compare-allgather: compare $DEMO --nodes 2 --gpus-per-node 4 --redundant 8 --dispatch allgather --replica-rule hash
    --strategies eplb,moeplan $FAST
compare-home-gpu: compare $PART --nodes 2 --gpus-per-node 4 --home gpu --strategies eplb,moeplan $FAST
compare-hardware: compare embedded --nodes 4 --gpus-per-node 2 --strategies eplb,paper --hardware H100 --context 512
    $FAST
compare-groups: compare ../generate-groups/trace --nodes 4 --gpus-per-node 2 --strategies eplb-hierarchical,affinity
    $FAST
compare-top1: compare ../generate-top1/trace --nodes 4 --gpus-per-node 2 --strategies eplb,moeplan $FAST
    --phase mixed
compare-prefill: compare $DEMO $TWO --strategies eplb,paper --phase prefill $FAST --fit 0.6
compare-gpt-oss: compare $GPT --nodes 4 --gpus-per-node 2 --signature-tokens 32 --strategies eplb,paper,moeplan
    $FAST
replay-plan: replay $PART --plan ../plan-bytes/plan --steps 50
replay-old-plan: replay $DEMO --plan ../old/plan-balance/plan --steps 50 --phase mixed
replay-unequal: replay $DEMO --plan ../plan-unequal/plan --steps 50 --dispatch node
replay-signature: replay ../import-prefill/trace --plan ../plan-signature/plan --signature-tokens 8 --steps 50
replay-hardware: replay embedded --plan ../plan-embedded/plan --hardware H100 --context 500 --steps 30
export-sglang: $EXPORT sglang --config ../inputs/config.json -o file.json
export-vllm: $EXPORT vllm -o file.json
export-tensorrt: $EXPORT tensorrt-llm -o file.yaml --trace embedded
export-ascend: $EXPORT vllm-ascend --config ../inputs/config.json -o file.json
export-counts-sglang: export ../inputs/counts.json --nodes 2 --gpus-per-node 4 --redundant 8 --engine sglang
    --num-layers 8 -o file.json --measure ../inputs/counts-other.json
export-counts-vllm: export ../inputs/counts.json --nodes 2 --gpus-per-node 4 --redundant 8 --engine vllm
    -o file.json --hardware H100 --model ../inputs/config.json --batch 64
export-counts-tensorrt: export ../import-counts/counts --nodes 2 --gpus-per-node 4 --redundant 8
    --engine tensorrt-llm -o file.yaml
export-counts-ascend: export ../inputs/counts.json --nodes 2 --gpus-per-node 4 --redundant 8 --engine vllm-ascend
    -o file.json
export-counts-real: export ../shared/traces/sglang_logical_count/decode_in1000out1000.json --engine sglang --nodes 4
    --gpus-per-node 8 --redundant 32 --hardware H100 --model deepseek-v3
    --measure ../shared/traces/sglang_logical_count/decode_in500out1500.json -o file.json
replay-placement: replay embedded --placement ../export-sglang/file.json --engine sglang $SERVED --steps 50
check-good: check ../export-sglang/file.json --engine sglang $SERVED --redundant 8 --plan ../plan-embedded/plan
check-tensorrt: check ../export-tensorrt/file.yaml --engine tensorrt-llm $SERVED
check-ascend: check ../export-ascend/file.json --engine vllm-ascend $SERVED
check-twice: check ../inputs/sglang-twice.json --engine sglang $SERVED
check-short: check ../inputs/sglang-short.json --engine sglang $SERVED
check-plan: check ../export-counts-vllm/file.json --engine vllm $SERVED --plan ../plan-embedded/plan
import-placement: import placement ../export-ascend/file.json --engine vllm-ascend $SERVED -o plan --dispatch node
estimate-decode: $ESTIMATE --nodes 9 --redundant 32 --overlap --skew 1.3 --mtp 1
estimate-prefill: estimate --model deepseek-v3 --hardware H200 --nodes 4 --phase prefill --batch 2 --context 2048
estimate-dense: estimate --model llama-3.1-70b --hardware h200 --tp 4 --kv fp8 --weights fp8 -o page.html
estimate-config: estimate --model ../inputs/config.json --hardware H100 --gpus-per-node 4 --balanced --weights bf16
    --hardware-file ../inputs/prices.json
estimate-plan: estimate --trace embedded --plan ../plan-embedded/plan --hardware H100 --batch 8 --context 512
sweep-models: sweep --model gpt-oss-120b --hardware H100,H200 --nodes 1,2 --batch 8,64 --context 1024,8192
sweep-overlap: sweep --model deepseek-v3 --hardware H100 --gpus 16,32 --batch 32,128 --overlap --tpot 60
    -o page.html
size-chat: size --model qwen3-30b-a3b --hardware H100,H200 --use-case chat --requests 64
size-lengths: size --model gpt-oss-120b --hardware H100 --prompt 2000 --output 500 --ttft 2000 --tpot 40
    --requests 200 --sensitivity -o page.html
"""

#: Status 2, one line on standard error, and nothing left behind.
BAD = """
compare $DEMO --nodes 0
compare $DEMO --nodes 32 --gpus-per-node 1
compare $DEMO --nodes 4 --gpus-per-node 2 --redundant -8
compare $DEMO --nodes 4 --gpus-per-node 4 --home gpu
compare $DEMO $TWO --strategies linear,best
compare $DEMO $TWO --folds 0
compare $DEMO $TWO --block 0
compare $DEMO $TWO --block 99999999999999999999
compare $DEMO $TWO --clusters 1000
compare $DEMO $TWO --signature-tokens 10000
compare $DEMO $TWO --without-layers 77
compare $DEMO $TWO --dispatch carrier-pigeon
compare $DEMO $TWO --strategies eplb-hierarchical
compare $DEMO $TWO --no-such-flag
compare $DEMO $TWO --json no/x.json
compare $DEMO $TWO --hardware H1000
compare $DEMO $TWO --hardware H100 --model nowhere.json
compare $DEMO $TWO --hardware H100 --model gpt-oss-120b
compare $DEMO $TWO --redundant 1000000000000
compare nothing $TWO
compare ../inputs $TWO
compare ../inputs/small.npz $TWO
compare ../import-prefill/trace $TWO
compare ../import-aggregate/trace $TWO
profile ../plan-eplb/plan -o x.html
profile ../damaged/trace-json -o x.html
profile ../damaged/trace-version -o x.html
profile ../damaged/trace-cut -o x.html
profile ../damaged/trace-changed -o x.html
profile ../damaged/trace-missing -o x.html
import arrays ../inputs/cut.npz -o t
import arrays ../inputs/offsets.npz -o t
import arrays ../inputs/range.npz -o t
import arrays ../inputs/huge.npz -o t
import arrays ../inputs/objects.npz -o t
import arrays ../inputs/config.json -o t
import arrays ../inputs/small.npz -o t --without-layers 46
import expert-selection ../inputs/steps-range.json -o t --num-experts 8
import expert-selection ../inputs/deep.json -o t --num-experts 8
import expert-selection ../inputs/chat-1.json -o t
import megatron ../inputs/megatron-cut.jsonl -o t --num-experts 4
import vllm ../inputs/responses.json -o t --num-experts 8
import logical-count ../inputs/counts-negative.json -o c
import logical-count ../inputs/counts-cut.json -o c
import trace $DEMO -o t --aggregate 1000
import trace $DEMO -o ../import-arrays/trace
import placement ../export-sglang/file.json --engine sglang -o p
plan $DEMO $TWO
plan $DEMO -o ../plan-eplb/plan $TWO
plan --drift embedded
plan $DEMO -o p $TWO --strategy eplb --objective balance
plan $DEMO -o p $TWO --objective time
plan $DEMO --from ../plan-eplb/plan --max-moves 99999999999999999999 -o p
plan $DEMO --from nothing --max-moves 1 -o p
plan --from ../plan-eplb/plan --drift $DEMO --nodes 4
plan --from ../plan-eplb/plan --drift ../import-other/trace
replay $DEMO
replay $DEMO --plan $DEMO
replay ../import-other/trace --plan ../plan-eplb/plan
replay $DEMO --plan ../damaged/plan-cut
replay $DEMO --plan ../damaged/plan-missing
replay $DEMO --plan ../damaged/plan-expert
replay $DEMO --plan ../damaged/plan-json
replay $DEMO --plan ../damaged/plan-version
replay $DEMO --plan ../damaged/plan-seed
replay $DEMO --plan ../damaged/plan-nodes
replay embedded --placement ../export-sglang/file.json
replay embedded --placement ../export-sglang/file.json --engine sglang
replay embedded --placement ../inputs/sglang-short.json --engine sglang --ep-size 2 --nnodes 2
$EXPORT sglang -o x.json --config ../inputs/config-eight.json
$EXPORT sglang -o x.json --config ../inputs/config-cut.json
$EXPORT vllm -o ../export-vllm/file.json
$EXPORT tensorrt-llm -o x.json
$EXPORT vllm -o x.json --trace nothing
$EXPORT vllm -o x.json --json x.json
$COUNTS
$COUNTS $TWO --redundant 3
$COUNTS $TWO --hardware H100
$COUNTS $TWO --measure ../inputs/counts-small.json
export ../inputs/sglang-short.json --engine sglang -o x.json $TWO
export embedded --engine vllm -o x.json
check nothing.json --engine sglang
estimate --model deepseek-v9 --hardware H100
estimate --model deepseek-v3 --hardware H999
estimate --hardware H100
$ESTIMATE --nodes 9
$ESTIMATE --tp 3
$ESTIMATE --skew 0.5
$ESTIMATE --mtp 1 --accepted 3
$ESTIMATE --context 99999999999999999999
estimate --model deepseek-v3 --hardware mine --hardware-file ../inputs/hardware.json
$ESTIMATE --hardware-file ../inputs/number.json
estimate --model ../inputs/config-llama.json --hardware H100
estimate --trace embedded --hardware H100
estimate --trace embedded --plan ../plan-embedded/plan --hardware H100 --nodes 4
sweep --model gpt-oss-120b --hardware H100 --batch 1,x
sweep --model gpt-oss-120b --hardware H100 --gpus 0
size --model gpt-oss-120b --hardware H100 --use-case poetry
size --model gpt-oss-120b --hardware H100 --use-case chat --requests 0
generate unknown -o t
nonsense
"""


def parsed(text: str) -> Iterator[tuple[str, str | None]]:
    """Each command of a table, and the one under this tree where it differs."""
    for entry in re.split(r"\n(?=\S)", Template(text).substitute(SHORT).strip()):
        old, *new = (" ".join(part.split()) for part in entry.split("=>"))
        yield old, new[0] if new else None


def good_cases() -> Iterator[Case]:
    for entry, new in parsed(GOOD):
        name, old = entry.split(": ", 1)
        yield Case(name, old, new)


def bad_cases() -> Iterator[Case]:
    count: Counter[str] = Counter()
    for old, new in parsed(BAD):
        verb = old.split()[0]
        count[verb] += 1
        yield Case(f"bad-{verb}-{count[verb]:02}", old, new)


CASES = (
    Case("inputs", make=make_inputs),
    *good_cases(),
    Case("damaged", make=make_damaged, after=("plan-eplb", "generate-demo")),
    *bad_cases(),
)
