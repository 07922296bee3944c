"""Print the figures of the embedded model's card: ``python models/evaluate.py OUT [--traces DIR]``.

OUT is the folder that ``train.py`` wrote (it has the held-out text as token ids). Loss is on
documents never trained on, each token with at least 256 tokens of context before it; the n-gram
baseline is trained on *all* training tokens of the domain alone, at its best order.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from corpus import DOMAINS
from ngram import KneserNey
from transformers import AutoModelForCausalLM

import moeplan
from moeplan.embedded import MODEL, TRACE

CONTEXT, LIMIT = 256, 40_000  # tokens before the first that is scored; tokens scored per domain


def losses(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss in nats a token, and the picks [layers, experts] that were counted on the way."""
    total, scored = 0.0, 0
    picks = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    with torch.inference_mode():
        for start in range(0, min(len(ids), LIMIT) - 2 * CONTEXT, CONTEXT):
            window = ids[start : start + 2 * CONTEXT + 1].long()
            output = model(input_ids=window[None, :-1], output_router_logits=True)
            likelihood = output.logits[0, CONTEXT:].log_softmax(-1)
            target = window[CONTEXT + 1 :]
            total -= float(likelihood[: len(target)].gather(1, target[:, None]).sum())
            scored += len(target)
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(model.config.num_experts_per_tok, -1).indices
                picks[layer] += chosen.flatten().bincount(minlength=picks.size(1))
    return total / scored, picks


def language(out: Path) -> None:
    """Held-out loss beside the n-gram's, and whether each layer keeps its experts in use."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    picks = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    print("held-out loss, nats a token (perplexity)")
    for domain in DOMAINS:
        held = torch.load(out / f"{domain}.held.pt", weights_only=True)
        train = torch.load(out / f"{domain}.pt", weights_only=True).numpy().astype(np.int64)
        loss, counted = losses(model, held)
        picks += counted
        target = held[:LIMIT].numpy().astype(np.int64)
        order, base = min(
            ((n, KneserNey(train, n, model.config.vocab_size).loss(target)) for n in (3, 4, 5)), key=lambda e: e[1]
        )
        print(f"  {domain:6s} model {loss:.3f} ({np.exp(loss):.1f})  {order}-gram {base:.3f} ({np.exp(base):.1f})")
    share = picks / picks.sum(1, keepdim=True)
    used = torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1))
    print("\nshare of picks by layer over the four domains, 1 = even (32 experts)")
    for layer, row in enumerate(share * share.size(1)):
        print(f"  layer {layer}: busiest {row.max():.2f}, least used {row.min():.2f}, effective experts {used[layer]:.1f}")


def routing(traces: list[tuple[str, Path, int | None]]) -> None:
    """Load under `linear`, similarity of domains and prefill-decode correlation, each with its null."""
    for name, path, signature in traces:
        trace = moeplan.open_trace(path)
        found = moeplan.profile(trace, signature_tokens=signature).to_dict()
        table = moeplan.compare(
            moeplan.read_requests(trace, signature_tokens=signature),
            moeplan.Setup(moeplan.Cluster(8, 4), ("linear",)),
        ).to_dict()
        row = next(r for r in table["rows"] if r["strategy"] == "linear")
        print(f"\n{name}: {found['trace']['requests']} requests, {found['trace']['tokens']} tokens")
        print(f"  busiest expert over mean, mean of layers: {found['imbalance']['mean']:.2f}")
        for key in ("node_load_ratio", "gpu_load_ratio", "remote_share"):
            print(f"  linear on 8 nodes x 4 GPUs, {key}: {row[key]}")
        for stage, similar in found["similarity"].items():
            if "pairs" in similar:
                for pair in similar["pairs"]:
                    print(f"  {stage}: {pair}")
        mean, gain = found["predictability"]["mean"], found["predictability"]["advantage"]
        print(f"  prefill to decode, per request: {mean}")
        print(f"  advantage over nulls: {gain}")
        print(f"  request types from one layer: {found['request_types']['mean_accuracy']:.2f}, chance {found['request_types']['chance']:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="what train.py wrote; without it, only the routing")
    parser.add_argument("--traces", type=Path, help="folder with gpt-oss-20b.npz, to compare with")
    arguments = parser.parse_args()
    if arguments.out:
        language(arguments.out)
    traces: list[tuple[str, Path, int | None]] = [("embedded", TRACE, None)]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.traces:
            place = Path(folder) / "gpt-oss-20b"
            moeplan.import_arrays(arguments.traces / "gpt-oss-20b.npz", place)
            traces.append(("gpt-oss-20b", place, 48))
        routing(traces)


if __name__ == "__main__":
    main()
