"""What recording costs: tokens a second of `record transformers` against plain generation of the same batches.

The embedded model (8 layers, 32 experts, top-4). "Off" generates without a hook; "on" does everything that `record`
does: hooks, dropping padding, writing the trace. Both alternate in one process; the best time of
each is kept, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

REPEATS, REQUESTS, BATCH, NEW = 9, 16, 8, 32


def bench() -> list[tuple[str, str]]:
    """(label, result): tokens/s with hooks off and on, and the difference."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return [("record transformers, overhead of hooks", "not measured: torch and transformers are not installed")]
    from moeplan.record.prompts import Prompt
    from moeplan.record.transformers import TransformersOptions, record_transformers
    from moeplan.record.transformers_model import load_model

    torch.manual_seed(0)
    loaded = load_model("embedded", dtype="float32")
    rng = np.random.default_rng(0)
    lengths = rng.integers(48, 96, REQUESTS)
    prompts = [
        Prompt("", f"row {i}", token_ids=tuple(rng.integers(3, 3072, n).tolist())) for i, n in enumerate(lengths)
    ]
    options = TransformersOptions(max_new_tokens=NEW, batch_size=BATCH)
    off, on = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS + 1):
            path = Path(folder) / f"{repeat}"
            pair = (
                lambda: _generate(loaded.model, prompts),
                lambda path=path: record_transformers(loaded, prompts, path, options),
            )
            order = (0, 1) if repeat % 2 else (1, 0)
            seconds = {which: _seconds(pair[which]) for which in order}
            if repeat:  # the first pair warms up
                off.append(seconds[0])
                on.append(seconds[1])
    tokens = int(lengths.sum()) + REQUESTS * (NEW - 1)
    rates = [tokens / min(times) for times in (off, on)]
    text = (
        f"{rates[0]:,.0f} tokens/s off, {rates[1]:,.0f} on: {rates[1] / rates[0] - 1:+.1%} (best of {REPEATS}, in turn)"
    )
    return [(f"record transformers, embedded model, {BATCH} at once", text)]


def _generate(model: Any, prompts: list[Any]) -> None:
    """The same batches as the recorder's, without it."""
    import torch

    for start in range(0, len(prompts), BATCH):
        batch = [prompt.token_ids for prompt in prompts[start : start + BATCH]]
        length = max(map(len, batch))
        ids = torch.tensor([(0,) * (length - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    for label, result in bench():
        print(f"{label}: {result}")
