"""What hashed prompt tokens reveal, with the secret and without: `python benchmarks/prompt_privacy.py PROMPTS`.

PROMPTS is a file that `moeplan record` reads. Prompts are tokenised with the bundled model's tokenizer. Every second
one is kept as a trace would keep it (`PromptFeatures.hashed`); the others are the attacker's text of the same kind.

With the secret: a dictionary attack on the first prompts. Every token id is hashed, then, prompt by prompt, every pair
of the tokens that were found; an Eulerian path through the pairs puts the tokens in order.

Without it: grams are matched to hashes by rank of frequency, in the reference text and in the trace. And what follows
for the others once some prompts are known, for example because the attacker sent them.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from moeplan.embedded import MODEL
from moeplan.record.prompts import read_prompts
from moeplan.trace.prompts import PromptFeatures

SECRET = bytes(range(32))
#: Longest prompt, in tokens; runs of tokens that count as text that was read; shares of prompts that are known; prompts
#: that the dictionary is tried on.
LONGEST, RUN, KNOWN, ATTACKED = 400, 8, (0.01, 0.1), 100

Gram = tuple[int, ...]


def tokenised(path: Path) -> list[list[int]]:
    """Token ids of the prompts, by the bundled model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [prompt.text or "\n".join(content for _, content in prompt.messages or ()) for prompt in read_prompts(path)]
    return [ids[:LONGEST] for ids in tokenizer(texts)["input_ids"] if len(ids) >= RUN]


def grams_of(ids: list[int]) -> list[Gram]:
    """The 1- and 2-grams of a prompt."""
    return [(i,) for i in ids] + list(pairwise(ids))


def hashes_of_tokens(count: int) -> list[int]:
    """The hash of each token id below `count`."""
    return PromptFeatures.of_ids([[i] for i in range(count)]).hashed(SECRET).tokens.tolist()


def hashes_of_pairs(pairs: list[Gram], of_token: list[int]) -> list[int]:
    """The hash of each 2-gram: what a prompt of its two tokens has beside the hashes of the tokens themselves."""
    both = PromptFeatures.of_ids(pairs).hashed(SECRET)
    found = []
    for number, (a, b) in enumerate(pairs):
        alone = (of_token[a], of_token[b])
        found.append(next((h for h in both.of(number)[0].tolist() if h not in alone), -1))
    return found


def ordered(pairs: Counter[Gram], tokens: Counter[int]) -> list[int]:
    """An Eulerian path through the pairs: the tokens in an order that has just these pairs."""
    following: dict[int, list[int]] = defaultdict(list)
    balance: Counter[int] = Counter()
    for (a, b), count in pairs.items():
        following[a] += [b] * count
        balance[a] += count
        balance[b] -= count
    start = next((token for token, surplus in balance.items() if surplus > 0), next(iter(tokens)))
    stack, path = [start], []
    while stack:
        if following[stack[-1]]:
            stack.append(following[stack[-1]].pop())
        else:
            path.append(stack.pop())
    return path[::-1]


def with_the_secret(prompts: list[list[int]], vocabulary: int) -> dict[str, float]:
    """Shares that the dictionary attack recovers."""
    trace, of_token = PromptFeatures.of_ids(prompts).hashed(SECRET), hashes_of_tokens(vocabulary)
    dictionary = {value: token for token, value in enumerate(of_token)}
    found_grams, all_grams, whole, runs, all_runs = 0, 0, 0, 0, 0
    for number, ids in enumerate(prompts):
        hashes, counts = trace.of(number)
        assert counts is not None
        seen = dict(zip(hashes.tolist(), counts.tolist(), strict=True))
        tokens = Counter({dictionary[value]: count for value, count in seen.items() if value in dictionary})
        candidates = [(a, b) for a in tokens for b in tokens]
        pairs = Counter(
            {
                gram: seen[value]
                for gram, value in zip(candidates, hashes_of_pairs(candidates, of_token), strict=True)
                if value in seen
            }
        )
        right = Counter(grams_of(ids))
        found_grams += sum(min(count, pairs[g] if len(g) == 2 else tokens[g[0]]) for g, count in right.items())
        all_grams += right.total()
        path = ordered(pairs, tokens)
        whole += path == ids
        read = {tuple(path[i : i + RUN]) for i in range(len(path) - RUN + 1)}
        there = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        runs, all_runs = runs + sum(run in read for run in there), all_runs + len(there)
    return {"grams": found_grams / all_grams, "runs": runs / all_runs, "whole prompts": whole / len(prompts)}


def by_rank(prompts: list[list[int]], reference: list[list[int]]) -> dict[str, float]:
    """Share of occurrences of grams that matching by rank of frequency names rightly: what needs no secret."""
    found = {}
    for n in (1, 2):
        ours, theirs = (
            Counter(gram for ids in part for gram in grams_of(ids) if len(gram) == n) for part in (prompts, reference)
        )
        # Hashes have the counts of the grams behind them, and the attacker sees which are 1-grams from their counts.
        ranked = zip(ours.most_common(), theirs.most_common(), strict=False)
        found[f"{n}-grams"] = sum(count for (gram, count), (guess, _) in ranked if gram == guess) / ours.total()
    return found


def from_known(prompts: list[list[int]], share: float) -> float:
    """Share of the other prompts' grams that also occur in the first prompts, whose hashes are then known."""
    count = max(1, round(share * len(prompts)))
    known = {gram for ids in prompts[:count] for gram in grams_of(ids)}
    rest = [gram in known for ids in prompts[count:] for gram in grams_of(ids)]
    return float(np.mean(rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    ids = tokenised(parser.parse_args().prompts)
    vocabulary = max(max(each) for each in ids) + 1
    stored, reference = ids[::2], ids[1::2]
    mean = np.mean([len(each) for each in stored])
    print(f"{len(stored)} prompts, {mean:.0f} tokens on average; {len(reference)} others for reference\n")
    secret, ranks = with_the_secret(stored[:ATTACKED], vocabulary), by_rank(stored, reference)
    rows = [
        ("the secret", secret["grams"], "of all tokens and pairs, with their counts"),
        ("", secret["runs"], f"of all runs of {RUN} tokens, in order"),
        ("", secret["whole prompts"], "of the prompts, whole and in order"),
        ("text of the same kind (match by rank of frequency)", ranks["1-grams"], "of all tokens"),
        ("", ranks["2-grams"], "of all pairs"),
    ]
    rows += [
        (f"{100 * p:.0f} % of the prompts", from_known(stored, p), "of tokens and pairs of the others") for p in KNOWN
    ]
    print("| the attacker has | recovers |\n|---|---|")
    for what, value, of in rows:
        print(f"| {what} | {100 * value:.1f} % {of} |")


if __name__ == "__main__":
    main()
