"""Train the embedded model: ``python models/train.py --out DIR`` (about an hour on two cores).

A Qwen3-MoE of 6 million parameters on four domains in equal parts. The recipe is fixed below and
seeded; two processes with one thread each share every batch, because expert matrices this small
gain nothing from a second thread. Needs ``torch==2.13.0`` and the versions in ``requirements.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20261122
WORKERS = 2
VOCABULARY = 3072
STEPS = 1800
LONG_FROM = 0.75  # the last quarter of the steps sees windows twice as long
WINDOW, WINDOWS = 256, 16  # tokens in a window; windows of one worker's part of a batch
WARMUP = 60
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.01
# Load balance is asked for over a whole batch of all four domains, not within a sequence, and
# lightly: experts may specialise by domain as long as the batch keeps them all in use
# (the same choice as in the Qwen3 report, arXiv 2505.09388, section 2).
BALANCE = 0.01
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=256,
    moe_intermediate_size=32,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    router_aux_loss_coef=BALANCE,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def train_tokenizer(texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on two million characters of each domain; digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    order = np.random.default_rng(SEED)
    samples = []
    for documents in texts.values():
        budget = 2_000_000
        for index in order.permutation(len(documents)):
            samples.append(documents[index][:budget])
            budget -= len(samples[-1])
            if budget <= 0:
                break
    tokenizer.train_from_iterator(samples, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=TEMPLATE,
        model_max_length=1024,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> torch.Tensor:
    """The documents in a shuffled order as one row of ids, each ended by the end-of-text id."""
    order = np.random.default_rng(seed).permutation(len(documents))
    encoded = tokenizer.backend_tokenizer.encode_batch([documents[i] for i in order])
    return torch.tensor([token for part in encoded for token in [*part.ids, 0]], dtype=torch.int16)


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of a stack, [.., rows, columns], by Newton-Schulz (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.size(-2) > update.size(-1)
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal per matrix, for a matrix or a stack of experts' matrices.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                update = orthogonal(weight.grad.lerp(momentum, 0.95))
                rate = group["lr"] * max(1.0, weight.size(-2) / weight.size(-1)) ** 0.5
                weight.mul_(1 - group["lr"] * WEIGHT_DECAY).add_(update, alpha=-rate)


def balance_loss(logits: tuple[torch.Tensor, ...], chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over layers of E * sum(share of picks * mean probability), 1 where even; and the largest share * E."""
    total, worst = torch.zeros(()), torch.zeros(())
    for layer in logits:
        probability = layer.float().softmax(-1)
        picks = probability.topk(chosen, -1).indices.flatten().bincount(minlength=layer.size(-1))
        share = picks / picks.sum()
        total = total + layer.size(-1) * (share * probability.mean(0)).sum()
        worst = torch.maximum(worst, share.max() * layer.size(-1))
    return total / len(logits), worst


def worker(rank: int, out: Path, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out.resolve()}/meeting", rank=rank, world_size=WORKERS)
    streams = [torch.load(out / f"{domain}.pt", weights_only=True) for domain in corpus.DOMAINS]
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(CONFIG)
    model.set_experts_implementation("grouped_mm")
    model.train()
    parameters = dict(model.named_parameters())
    by_adam = [p for n, p in parameters.items() if p.dim() < 2 or "embed" in n or n.endswith("gate.weight")]
    known = {id(p) for p in by_adam}
    optimizers = [
        Muon([p for p in parameters.values() if id(p) not in known], MUON_RATE),
        torch.optim.AdamW(by_adam, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    started = time.time()
    for step in range(steps):
        rate = min((step + 1) / WARMUP, (steps - step) / steps)
        for optimizer, full in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate
        stretch = 2 if step >= LONG_FROM * steps else 1
        window, windows = WINDOW * stretch, WINDOWS // stretch
        random = torch.Generator().manual_seed(SEED + step * WORKERS + rank)
        rows = []
        for stream in streams:
            starts = torch.randint(len(stream) - window - 1, (windows // len(streams),), generator=random)
            rows += [stream[start : start + window + 1] for start in starts]
        batch = torch.stack(rows).long()
        output = model.model(input_ids=batch[:, :-1], output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance, worst = balance_loss(output.router_logits, CONFIG.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [loss.detach()[None]])
        dist.all_reduce(flat)
        flat /= WORKERS
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(by_adam, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and (step % 20 == 0 or step == steps - 1):
            seen = (step + 1) * WORKERS * WINDOW * WINDOWS
            print(
                f"step {step} loss {flat[-1]:.3f} balance {balance:.3f} busiest expert {worst:.1f}x "
                f"{seen / (time.time() - started):.0f} tokens/s {time.time() - started:.0f} s",
                flush=True,
            )
        if rank == 0 and ((step + 1) % 200 == 0 or step == steps - 1):
            save(model, out)
    dist.destroy_process_group()


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Weights as bfloat16 (a third of 12 MiB would go to unused bits otherwise), the master copy untouched."""
    half = Qwen3MoeForCausalLM(CONFIG).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.eos_token_id = [0, 2]  # the end of a text, and of a turn
    half.save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and the log")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try the script out")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "meeting").unlink(missing_ok=True)
    documents = corpus.load(SEED)
    tokenizer = train_tokenizer({domain: train for domain, (train, _) in documents.items()})
    tokenizer.save_pretrained(out / "model")
    for domain, (train, held) in documents.items():
        torch.save(encode(tokenizer, train, SEED), out / f"{domain}.pt")
        torch.save(encode(tokenizer, held, SEED), out / f"{domain}.held.pt")
        print(domain, len(torch.load(out / f"{domain}.pt", weights_only=True)), "tokens", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    # glibc would hand every large activation back to the system and fault it in again: 15 % slower.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="4000000000", MALLOC_TRIM_THRESHOLD_="8000000000")
    torch.multiprocessing.spawn(worker, (out, arguments.steps), nprocs=WORKERS)
    (out / "recipe.json").write_text(json.dumps({"seed": SEED, "steps": arguments.steps, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
