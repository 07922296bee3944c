"""A real vLLM server on the CPU: what it answers over HTTP is what Transformers computes from the same model.

Run with `make test-engines`. The model is the folder named in MOEPLAN_ENGINE_MODEL, else the embedded one, else, where
that is absent, a random one made on the spot.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment
import jobs
import numpy as np
import pytest

from moeplan.cli.app import run as command_line
from moeplan.embedded import MODEL
from moeplan.engines import vllm
from moeplan.trace import open_trace
from moeplan.trace.reader import Trace

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not environment.is_ready(), reason="no .venv-vllm of these pins: `make test-engines` makes it"),
]

POSITIONS, NEW = 512, 16
#: Of a server's start, in seconds; it takes about 40 on two free cores.
PATIENCE = 600
WORDS = (
    "the of and to in a is that it for was on are as with his they at be this from have or by one had not but what all"
    " were when we there can an your which their said if do will each about how up out them then she many some so these"
    " would other into has more her two like him see time could no make than first been its who now people my made over"
)


def random_model(folder: Path) -> Path:
    """A tiny Qwen3-MoE with random weights, a dense first layer, and a tokenizer of bytes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention takes 32, 48, 64 ..; not 24
        intermediate_size=256,
        moe_intermediate_size=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    vocabulary = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "MOEPLAN_ENGINE_MODEL" in os.environ:
        return Path(os.environ["MOEPLAN_ENGINE_MODEL"])
    if (MODEL / "config.json").is_file():
        return MODEL
    return random_model(tmp_path_factory.mktemp("models") / "tiny-random")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and chats of different lengths; the last ones share a beginning, which the server's prefix cache serves."""
    rng = np.random.default_rng(1)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS.split(), words))

    rows = [{"prompt": text(int(rng.integers(3, 40))), "domain": "text"} for _ in range(16)]
    chats = [{"messages": [{"role": "user", "content": text(12)}], "domain": "chat"} for _ in range(6)]
    shared = text(30)
    again = [{"prompt": f"{shared} {text(3)}", "domain": "again"} for _ in range(6)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *chats, *again]))
    return path


@contextlib.contextmanager
def shown_on_failure(log: Path) -> Iterator[None]:
    """Print the end of a server's log if the block fails: pytest shows it beside the failure."""
    try:
        yield
    except BaseException:
        print(f"end of the server's log:\n{log.read_text(errors='replace')[-6000:]}")
        raise


@contextlib.contextmanager
def serving(model: Path, log: Path, **environ: str) -> Iterator[str]:
    """A vLLM server on a free port, from its first answer to the end of the block; it is stopped whatever happens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(environment.PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", "float32", "--max-model-len", str(POSITIONS), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-return-routed-experts"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **environ,
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MOEPLAN_VLLM")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**kept, **settings}, cwd=log.parent, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_up(url):
            assert process.poll() is None, f"the server ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"the server was not up after {PATIENCE} s"
            time.sleep(0.5)
        yield url
    finally:
        stop(process)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine that it started, which share a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, log)."""
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with shown_on_failure(log), serving(model, log) as url:
        yield url, log


def record(url: str, model: Path, prompts: Path, out: Path, *flags: str) -> Trace:
    arguments = ["record", "vllm", "--url", url, "--config", str(model), "--prompts", str(prompts), "-o", str(out)]
    assert command_line([*arguments, "--max-new-tokens", str(NEW), *flags]) == 0
    return open_trace(out)


def agreement(ours: Trace, theirs: Trace, phase: str) -> float:
    """Share of the picks of one phase that both traces have; rows that only one has are left out."""
    a, b = ours.load(), theirs.load()
    same = count = 0
    for first, last, other_first, other_last in zip(*a.phase_ranges(phase), *b.phase_ranges(phase), strict=True):
        rows = min(last - first, other_last - other_first)
        x, y = a.experts[first : first + rows], b.experts[other_first : other_first + rows]
        same += int((x[..., :, None] == y[..., None, :]).any(axis=3).sum())
        count += x.size
    return same / count


def test_a_real_server_agrees_with_transformers(
    server: tuple[str, Path], model: Path, prompts: Path, tmp_path: Path
) -> None:
    url, log = server
    with shown_on_failure(log):
        ours = record(url, model, prompts, tmp_path / "vllm")
        arguments = ["--model", str(model), "--prompts", str(prompts), "-o", str(tmp_path / "transformers")]
        arguments += ["--dtype", "float32", "--max-new-tokens", str(NEW)]
        assert command_line(["record", "transformers", *arguments]) == 0
        theirs = open_trace(tmp_path / "transformers")
        for key in ("num_layers", "num_experts", "top_k", "layer_ids", "hidden"):
            assert getattr(ours.shape, key) == getattr(theirs.shape, key)
        assert ours.shape.name == theirs.shape.name == model.name
        assert ours.complete and ours.source["vllm"] == "0.30.0"
        assert np.array_equal(ours.requests.prefill, theirs.requests.prefill)
        assert [ours.requests.domains[i] for i in ours.requests.domain] == [
            theirs.requests.domains[i] for i in theirs.requests.domain
        ]
        prefill, decode = agreement(ours, theirs, "prefill"), agreement(ours, theirs, "decode")
        print(f"picks that agree: prefill {prefill:.4%}, decode {decode:.4%}")
        assert prefill >= 0.99
        # One token that is sampled otherwise, on a near tie, changes all that follow it.
        assert decode >= 0.9 and np.mean(ours.requests.rows == theirs.requests.rows) >= 0.9


def test_a_recording_that_stops_goes_on(
    server: tuple[str, Path], model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeplan.model.config import described
    from moeplan.record import recording
    from moeplan.record.server import ServedOptions
    from moeplan.record.vllm import record_vllm

    class StopError(Exception):
        pass

    def stop_at_ten(done: int, total: int, note: str) -> None:
        if "requests" in note and done == 10:
            raise StopError

    monkeypatch.setattr(recording, "PART_PICKS", 1)
    url, log = server
    with shown_on_failure(log):
        options, out = ServedOptions(model=described(model), max_new_tokens=NEW), tmp_path / "cut"
        with pytest.raises(StopError):
            record_vllm(prompts, out, options, url=url, progress=stop_at_ten)
        stopped = open_trace(out)
        assert not stopped.complete and len(stopped.requests) == 10
        whole, resumed = record(url, model, prompts, tmp_path / "whole"), record(url, model, prompts, out, "--resume")
        assert resumed.complete and np.array_equal(resumed.requests.prefill, whole.requests.prefill)
        assert agreement(resumed, whole, "prefill") >= 0.99


def answers(url: str, model: Path, prompts: Path) -> list[tuple[str, str]]:
    """Text and picks of some completions, one after the other."""
    out = []
    for row in [row for row in map(json.loads, prompts.read_text().splitlines()) if "prompt" in row][:8]:
        body = {"model": str(model), "prompt": row["prompt"], "max_tokens": NEW, "temperature": 0.0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            choice = json.load(answer)["choices"][0]
        out.append((choice["text"], choice["routed_experts"]))
    return out


def test_the_plug_in_is_installed_and_changes_nothing(
    server: tuple[str, Path], model: Path, prompts: Path, tmp_path: Path
) -> None:
    """`server` has it, idle. One that loads no plug-ins and one that is given a plan answer the same; the latter cannot
    apply the plan, and says so."""
    url, log = server
    idle = answers(url, model, prompts)
    assert "moeplan:" not in log.read_text(errors="replace")
    placement, _ = jobs.planned((1, 2, 3), 32, 8, 2, 2)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(vllm.content(placement)))
    without, named = tmp_path / "without.log", tmp_path / "named.log"
    both = [serving(model, without, VLLM_PLUGINS="none"), serving(model, named, MOEPLAN_VLLM_PLAN=str(plan))]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for each in (without, named):
            stack.enter_context(shown_on_failure(each))
        for url in pool.map(stack.enter_context, both):  # they start side by side
            assert answers(url, model, prompts) == idle
    said = [line for line in named.read_text(errors="replace").splitlines() if "moeplan:" in line]
    print("\n".join(said))
    assert len(said) == 1 and f"plan {plan} (3 layers, 32 experts + 8 redundant, 2 nodes x 2 GPUs" in said[0]
    assert "is not applied: this vLLM runs on cpu, where it has no expert parallelism and no EPLB" in said[0]
