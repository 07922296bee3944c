"""Print the figures of the embedded model's card: ``python models/evaluate.py OUT [--traces DIR]``.

OUT is the folder that ``train.py`` wrote (it has the held-out text as token ids). Loss is on
documents never trained on, each token with at least 256 tokens of context before it; the n-gram
baseline is trained on *all* training tokens of the domain alone, at its best order.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import DOMAINS
from ngram import KneserNey
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import moeplan
from moeplan.embedded import MODEL

CONTEXT, LIMIT = 256, 40_000  # tokens before the first that is scored; tokens scored per domain


def losses(model: torch.nn.Module, ids: torch.Tensor) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Loss in nats of each token from the 257th on, and the picks [layers, experts] that were counted on the way."""
    found = []
    picks = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    with torch.inference_mode():
        for start in range(0, min(len(ids), LIMIT) - 2 * CONTEXT, CONTEXT):
            window = ids[start : start + 2 * CONTEXT].long()
            output = model(input_ids=window[None], output_router_logits=True)
            likelihood = output.logits[0, CONTEXT - 1 : -1].log_softmax(-1)
            found.append(-likelihood.gather(1, window[CONTEXT:, None])[:, 0].double().numpy())
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(model.config.num_experts_per_tok, -1).indices
                picks[layer] += chosen.flatten().bincount(minlength=picks.size(1))
    return np.concatenate(found), picks


def language(out: Path) -> None:
    """Held-out loss beside the n-gram's, and whether each layer keeps its experts in use."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    picks = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    print("held-out loss, nats a token; difference with 95 % interval over windows of 256 tokens")
    for domain in DOMAINS:
        held = torch.load(out / f"{domain}.held.pt", weights_only=True)
        train = torch.load(out / f"{domain}.pt", weights_only=True).numpy().astype(np.int64)
        loss, counted = losses(model, held)
        picks += counted
        target = held.numpy().astype(np.int64)[: CONTEXT + len(loss)]
        by_order = {n: KneserNey(train, n, model.config.vocab_size).loss(target)[-len(loss) :] for n in (3, 4, 5)}
        order, base = min(by_order.items(), key=lambda entry: entry[1].mean())
        gap = (loss - base).reshape(-1, CONTEXT).mean(axis=1)
        reach = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
        print(
            f"  {domain:6s} model {loss.mean():.3f}  {order}-gram {base.mean():.3f}  "
            f"difference {gap.mean():+.3f} ({gap.mean() - reach:+.3f} to {gap.mean() + reach:+.3f})"
        )
    share = picks / picks.sum(1, keepdim=True)
    used = torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1))
    print("\nshare of picks by layer over the four domains, 1 = even (32 experts)")
    for layer, row in enumerate(share * share.size(1)):
        print(
            f"  layer {layer}: busiest {row.max():.2f}, least used {row.min():.2f}, effective experts {used[layer]:.1f}"
        )


def routing(name: str, trace: moeplan.Trace, signature: int | None) -> None:
    """Load under `linear`, similarity of domains and prefill-decode correlation, each beside its null."""
    found = moeplan.profile_trace(trace, signature_tokens=signature).to_dict()
    requests = moeplan.read_requests(trace, signature_tokens=signature)
    table = moeplan.compare(requests, moeplan.Cluster(8, 4), ("linear",))
    linear = table.row("linear").figures
    head, stages = found["trace"], found["stages"]
    print(f"\n{name}: {head['requests']} requests, {head['tokens']:,} tokens")
    print(f"  stages: {stages['prefill']}, then {stages['decode']}")
    print(f"  busiest expert over the mean, mean of layers        {found['imbalance']['mean']:.2f}")
    print(f"  the same, within one domain                         {_by_domain(found):.2f}")
    for key in ("node_load_ratio", "gpu_load_ratio"):
        print(f"  linear, 8 nodes x 4 GPUs, {key:25s} {linear[key].value:.2f}")
    for pair in found["similarity"]["decode"]["pairs"]:
        verdict = "differ beyond noise" if pair["differs"] else "no more than noise"
        print(f"  similarity of {pair['a']} and {pair['b']}, decode: {pair['similarity']:.2f} ({verdict})")
    for key, value in found["predictability"]["mean"].items():
        print(f"  decode foretold by {key.replace('_', ' '):32s} {value:.2f}")
    gain = found["predictability"]["advantage"]["domain_popularity"]
    low, high = gain["ci95"]
    print(f"  own prefill less domain popularity                  {gain['value']:+.3f} ({low:+.3f} to {high:+.3f})")
    kinds = found["request_types"]
    told, chance = kinds["mean_accuracy"], kinds["chance"]
    print(f"  kind told from one layer's routing                  {told:.0%} (chance {chance:.0%})")


def _by_domain(found: dict[str, Any]) -> float:
    return float(np.mean([row["decode"]["mean"] for row in found["imbalance"]["mean_by_domain"].values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="what train.py wrote; without it, only the routing")
    parser.add_argument("--traces", type=Path, help="folder with gpt-oss-20b.npz, to compare with")
    arguments = parser.parse_args()
    if arguments.out:
        language(arguments.out)
    routing("embedded", moeplan.open_trace("embedded"), None)
    if arguments.traces:
        from moeplan.importers.arrays import import_arrays

        with tempfile.TemporaryDirectory() as folder:
            trace = import_arrays(arguments.traces / "gpt-oss-20b.npz", Path(folder) / "trace")
            routing("gpt-oss-20b", trace, 48)


if __name__ == "__main__":
    main()
