"""Prompts for the embedded trace, cut from documents that the model never saw in training.

``python models/prompts.py MODEL OUT.jsonl`` writes them where you say; they are text of others and
stay out of the project. Lengths of prompts and answers are spread over about an octave and a half,
as those of requests are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import corpus
from train import SEED
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moeplan.embedded import MODEL

REQUESTS_PER_DOMAIN = 200
PROMPT_TOKENS = (40, 160)
NEW_TOKENS = (40, 128)
MARK = "<|im_start|>"


def _cut(text: str, length: int, tokenizer: PreTrainedTokenizerBase, random: Random) -> str:
    """A piece of a document that begins at a line and has so many tokens."""
    starts = [0] + [i + 1 for i, letter in enumerate(text[: max(len(text) - 6 * length, 1)]) if letter == "\n"]
    start = random.choice(starts)
    ids = tokenizer(text[start : start + 12 * length], add_special_tokens=False)["input_ids"][:length]
    return str(tokenizer.decode(ids)).rstrip()


def _question(text: str) -> str:
    """A mathematical document up to where its last solution begins."""
    before, _, last = text.rstrip().rpartition("\n\n")
    head = last.split("\nSolution:")[0].split("\nA:")[0].split("\n")[0]
    return f"{before}\n\n{head}\n".lstrip()


def _messages(text: str, length: int) -> list[dict[str, str]]:
    """A conversation up to a turn of the user's, of about so many tokens."""
    turns = [turn.split("<|im_end|>")[0].split("\n", 1) for turn in text.split(MARK)[1:]]
    messages, size = [], 0
    for role, content in turns:
        messages.append({"role": role, "content": content})
        size += len(content) // 3
        if role == "user" and size >= length:
            break
    return messages if messages[-1]["role"] == "user" else messages[:-1]


def main(model: str, place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL if model == "embedded" else model)
    random = Random(SEED)
    rows = []
    for domain, (_, held) in corpus.load(SEED).items():
        order = random.sample(held, len(held))
        for number in range(REQUESTS_PER_DOMAIN):
            text = order[number % len(order)]
            low, high = PROMPT_TOKENS
            length = round(low * (high / low) ** random.random())
            low, high = NEW_TOKENS
            row: dict[str, object] = {"domain": domain, "max_new_tokens": round(low * (high / low) ** random.random())}
            if domain == "chat":
                row["messages"] = _messages(text, length)
            elif domain == "math":
                row["prompt"] = _question(text)
            else:
                row["prompt"] = _cut(text, length, tokenizer, random)
            rows.append(row)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
