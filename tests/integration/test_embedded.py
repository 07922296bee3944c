"""The model and the trace that come with the package: frozen, whole, small enough, and what their card says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplan
from helpers import ROOT
from moeplan.embedded import MODEL, TRACE
from moeplan.model.config import described
from moeplan.trace.prompts import find_secret

MIB = 1 << 20
#: The model was frozen before any plan was fitted on it; whoever changes it must say so here and in its card.
FROZEN = "28019336689314a82fb00964b3cf021ec908197db8b53f8b8eaee33043a39333"


def test_the_model_is_the_frozen_one() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12 * MIB
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == FROZEN
    assert FROZEN in (ROOT / "docs" / "concepts" / "demo-model.md").read_text()


def test_the_trace_is_small_and_recorded_from_that_model() -> None:
    assert sum(f.stat().st_size for f in TRACE.iterdir()) <= 4 * MIB
    trace = moeplan.open_trace("embedded")
    config = json.loads((MODEL / "config.json").read_text())
    assert (trace.shape.num_layers, trace.shape.num_experts, trace.shape.top_k) == (
        config["num_hidden_layers"], config["num_local_experts"], config["num_experts_per_tok"],
    )  # fmt: skip
    requests = trace.requests
    assert not trace.synthetic and trace.complete and len(requests) >= 500
    labels, counts = np.unique(requests.domain, return_counts=True)
    assert len(labels) == 4 and counts.min() >= 0.9 * counts.max()
    assert (requests.prefill > 0).all() and (requests.decode > 0).mean() > 0.95


def test_the_trace_keeps_hashed_prompts_under_a_public_secret() -> None:
    trace = moeplan.open_trace("embedded")
    prompts = trace.prompts
    assert prompts is not None and prompts.kind == "hashed" and prompts.known.all() and len(prompts) == 800
    find_secret(TRACE, prompts.key)
    # A prompt of n tokens has n 1-grams and n - 1 2-grams.
    assert prompts.counts is not None
    total = np.add.reduceat(prompts.counts.astype(np.int64), prompts.offsets[:-1])
    np.testing.assert_array_equal(total, 2 * trace.requests.prefill - 1)


def test_no_text_but_our_own_is_shipped() -> None:
    """Weights, a vocabulary of word pieces, settings; no prompt and no corpus."""
    kinds = {f.suffix for folder in (MODEL, TRACE) for f in folder.iterdir()}
    assert kinds <= {".json", ".safetensors", ".parquet", ".jinja"}
    words = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    assert max(map(len, words)) <= 32  # pieces of words and indentation, never a sentence


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `profile` says of the trace."""
    return moeplan.profile_trace(moeplan.open_trace("embedded")).to_dict()


@pytest.mark.slow
def test_no_layer_collapses(found: dict[str, Any]) -> None:
    assert found["imbalance"]["flagged_layers"] == []
    assert max(found["imbalance"]["overall"]) < 8  # 32 would be one expert doing everything a token asks for


def test_specialises_and_foretells_beyond_the_nulls(found: dict[str, Any]) -> None:
    for stage in ("prefill", "decode"):
        assert all(pair["differs"] for pair in found["similarity"][stage]["pairs"])
    gain = found["predictability"]["advantage"]
    assert min(gain[null]["ci95"][0] for null in ("other_request", "global_popularity")) > 0
    # What a domain as a whole activates foretells as much as the own prompt does (docs/concepts/demo-model.md says so).
    assert abs(gain["domain_popularity"]["value"]) < 0.02


@pytest.mark.slow
def test_speaks_its_four_domains() -> None:
    """It is a language model: right answers are likelier than the same tokens shuffled."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = (
        "def __init__(self, name, value=None):\n    self.name = name\n    self.value = value\n",
        "Problem: What is 50% of 80?\nSolution: 50% is 50/100. 80 * 50 / 100 = 40.\nAnswer: 40\n",
        "Fellow citizens, the state of the Union is strong, and the Congress has done its duty to the people.\n",
    )
    torch.manual_seed(0)
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        mixed = ids[:, torch.randperm(ids.size(1))]
        with torch.inference_mode():
            said, noise = (float(model(input_ids=i, labels=i).loss) for i in (ids, mixed))
        assert said < 0.7 * noise, text
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert written == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_the_word_names_its_config_too() -> None:
    facts = described(Path("embedded"))
    assert (facts.num_experts, facts.top_k, facts.moe_layers) == (32, 4, tuple(range(8)))
