"""Recording with Transformers: tiny random models of each family, held to picks computed by hand."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moeplan.cli.app import run as command_line  # noqa: E402
from moeplan.errors import MoeplanError, UsageError  # noqa: E402
from moeplan.record import recording  # noqa: E402
from moeplan.record.prompts import Prompt, read_prompts  # noqa: E402
from moeplan.record.transformers import TransformersOptions, record_transformers  # noqa: E402
from moeplan.record.transformers_model import LoadedModel, load_model  # noqa: E402
from moeplan.trace import open_trace  # noqa: E402
from moeplan.trace.retention import RetentionPolicy  # noqa: E402

EXPERTS, TOP_K, VOCABULARY, NEW = 8, 2, 64, 7
STOPS = [3, 9, 17, 33, 40, 51]
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": STOPS, "intermediate_size": 16, "num_experts_per_tok": TOP_K,
}  # fmt: skip
LATENT = {
    "moe_intermediate_size": 16, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip


def highest(logits: np.ndarray, k: int = TOP_K) -> np.ndarray:
    """The k largest of each row, rising by id."""
    return np.sort(np.argsort(-logits, axis=-1)[:, :k])


def linear(router: Any, hidden: np.ndarray) -> np.ndarray:
    """Router logits [T, E] in float64, with a bias where the router has one."""
    logits = hidden @ router.weight.detach().double().numpy().T
    bias = getattr(router, "bias", None)
    return logits if bias is None else logits + bias.detach().double().numpy()


def by_logits(router: Any, hidden: np.ndarray) -> np.ndarray:
    return highest(linear(router, hidden))


def by_one_logit(router: Any, hidden: np.ndarray) -> np.ndarray:
    return highest(linear(router, hidden), 1)


def by_groups(router: Any, hidden: np.ndarray) -> np.ndarray:
    """DeepSeek-V3: biased sigmoid scores; the 2 groups of 4 whose two best experts sum highest; then the 2 best."""
    score = 1 / (1 + np.exp(-(hidden @ router.weight.detach().double().numpy().T)))
    score += router.e_score_correction_bias.double().numpy()
    picks = []
    for row in score:
        groups = row.reshape(4, 2)
        kept = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[:2]
        allowed = [e for e in range(EXPERTS) if e // 2 in kept]
        picks.append(sorted(sorted(allowed, key=lambda e: -row[e])[:2]))
    return np.array(picks)


#: name -> (config class, its settings, router module inside a layer, MoE layers, hand-made rule)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...], Callable[[Any, np.ndarray], np.ndarray]]] = {
    "qwen3": ("Qwen3MoeConfig", {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
              "mlp.gate", (0, 1, 2), by_logits),
    "deepseek-v3": ("DeepseekV3Config", LATENT, "mlp.gate", (1, 2), by_groups),
    "llama4": ("Llama4TextConfig", {"num_local_experts": EXPERTS, "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
                                    "head_dim": 8, "interleave_moe_layer_step": 2},
               "feed_forward.router", (1,), by_one_logit),
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}, "mlp.gate", (0, 1, 2), by_logits),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS}, "mlp.gate", (0, 1, 2), by_logits),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 16,
                                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                "mlp.router", (0, 1, 2), by_logits),
    "granite": ("GraniteMoeConfig", {"num_local_experts": EXPERTS}, "block_sparse_moe.router", (0, 1, 2), by_logits),
    "dbrx": ("DbrxConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
                            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K,
                                           "hidden_size": 32},
                            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
             "ffn.router.layer", (0, 1), by_logits),
}  # fmt: skip


def build(config: str, settings: dict[str, Any]) -> Any:
    """A random model whose routers and embeddings are wide enough apart for picks to be far from ties."""
    torch.manual_seed(0)
    own = {"vocab_size": VOCABULARY, "eos_token_id": STOPS} if config == "DbrxConfig" else COMMON
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**own, **settings}))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name for part in ("gate.", "router", "embed", "wte", "lm_head", "e_score")):
            torch.nn.init.normal_(tensor, std=0.2 if "e_score" in name else 1.0)
    model.generation_config.eos_token_id = STOPS
    return model.eval()


@pytest.fixture(scope="module")
def qwen() -> LoadedModel:
    config, settings, *_ = FAMILIES["qwen3"]
    return LoadedModel.of(build(config, settings), None, "tiny")


def token_prompts(count: int = 11) -> list[Prompt]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 20, count)
    return [
        Prompt(f"d{i % 3}", f"row {i}", token_ids=tuple(int(t) for t in rng.integers(4, VOCABULARY, n)))
        for i, n in enumerate(lengths)
    ]


def sampled_alone(model: Any, prompt: Prompt, limit: int = NEW) -> list[int]:
    """Greedy tokens of one request, alone, without padding and without a cache, to its own end."""
    ids = list(prompt.token_ids or ())
    while len(ids) - len(prompt.token_ids or ()) < limit:
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in STOPS:
            break
    return ids[len(prompt.token_ids or ()) :]


def router_inputs(model: Any, path: str, layers: tuple[int, ...], ids: list[int]) -> list[tuple[Any, np.ndarray]]:
    """(router, what goes into it, float64 [T, H]) of each MoE layer, for one sequence alone."""
    seen: list[tuple[Any, np.ndarray]] = []

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        seen.append((module, args[0].reshape(-1, args[0].shape[-1]).double().numpy()))

    named = dict(model.named_modules())
    stem = "transformer.blocks" if "transformer" in named else "model.layers"
    handles = [named[f"{stem}.{layer}.{path}"].register_forward_pre_hook(keep) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_picks_equal_those_computed_by_hand(family: str, tmp_path: Path) -> None:
    config, settings, path, layers, rule = FAMILIES[family]
    model, prompts = build(config, settings), token_prompts()
    loaded = LoadedModel.of(model, None, family)
    trace = record_transformers(
        loaded, prompts, tmp_path / "t", TransformersOptions(max_new_tokens=NEW, batch_size=4, keep_gate_weights=True)
    )
    assert trace.complete and trace.shape.layer_ids == layers and trace.shape.num_experts == EXPERTS
    assert trace.shape.hidden == 32 and trace.shape.routing_groups == (4 if family == "deepseek-v3" else 1)
    (rows,) = trace.parts(weights=True)
    lengths = []
    for number, prompt in enumerate(prompts):
        sampled = sampled_alone(model, prompt)
        ids = [*(prompt.token_ids or ()), *sampled[:-1]]  # the last sampled token never goes through the model
        lengths.append(len(sampled))
        span = slice(*rows.offsets[number : number + 2])
        assert (trace.requests.rows[number], trace.requests.prefill[number]) == (len(ids), len(prompt.token_ids or ()))
        for place, (router, hidden) in enumerate(router_inputs(model, path, layers, ids)):
            np.testing.assert_array_equal(np.sort(rows.experts[span, place]), rule(router, hidden))
    assert min(lengths) < NEW == max(lengths)  # some ended early
    assert [trace.requests.domains[d] for d in trace.requests.domain] == [p.domain for p in prompts]
    assert rows.weights is not None and (rows.weights > 0).all()


def test_gate_weights_belong_to_their_picks(qwen: LoadedModel, tmp_path: Path) -> None:
    prompt = token_prompts()[0]
    options = TransformersOptions(max_new_tokens=1, keep_gate_weights=True)
    (rows,) = record_transformers(qwen, [prompt], tmp_path / "t", options).parts(weights=True)
    inputs = router_inputs(qwen.model, "mlp.gate", (0, 1, 2), list(prompt.token_ids or ()))
    assert rows.weights is not None and len(rows.experts) == len(prompt.token_ids or ())
    for place, (router, hidden) in enumerate(inputs):
        logits = linear(router, hidden)
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected = np.take_along_axis(share, rows.experts[:, place].astype(int), axis=1)
        if router.norm_topk_prob:
            expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(rows.weights[:, place], expected, atol=1e-3)


def test_a_row_has_its_own_limit(qwen: LoadedModel, tmp_path: Path) -> None:
    prompts = [replace(prompt, max_new_tokens=1 + i % 3) for i, prompt in enumerate(token_prompts())]
    trace = record_transformers(qwen, prompts, tmp_path / "t", TransformersOptions(batch_size=5))
    expected = [len(sampled_alone(qwen.model, p, p.max_new_tokens or 0)) - 1 for p in prompts]
    assert trace.requests.decode.tolist() == expected and max(expected) == 2
    capped = record_transformers(qwen, prompts, tmp_path / "c", TransformersOptions(batch_size=5, max_new_tokens=2))
    assert capped.requests.decode.max() == 1


def test_draws_follow_the_seed(qwen: LoadedModel, tmp_path: Path) -> None:
    def checksum(name: str, seed: int, temperature: float = 1.0) -> str:
        options = TransformersOptions(max_new_tokens=NEW, temperature=temperature, seed=seed)
        return record_transformers(qwen, token_prompts(), tmp_path / name, options).checksum

    assert checksum("a", 1) == checksum("b", 1) != checksum("c", 2)
    assert checksum("d", 1, 0.0) == checksum("e", 2, 0.0) != checksum("f", 1)


class StopError(Exception):
    """What the tests interrupt a recording with."""


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "keep"),
    [
        (0.0, RetentionPolicy()),
        (0.8, RetentionPolicy()),
        (0.8, RetentionPolicy(min_tokens=9)),
        (0.8, RetentionPolicy(9, 2)),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    qwen: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, keep: RetentionPolicy
) -> None:
    monkeypatch.setattr(recording, "PART_PICKS", 1)
    monkeypatch.setattr(recording, "PART_TOKENS", 45 if keep.aggregate is None else 9)  # parts end inside batches
    prompts, options = (
        token_prompts(17),
        TransformersOptions(max_new_tokens=4, batch_size=3, temperature=temperature, retention=keep),
    )
    whole = record_transformers(qwen, prompts, tmp_path / "whole", options)
    assert len(list(tmp_path.glob("whole/part-*"))) >= 3 and bool(whole.dropped) == (keep.min_tokens > 1)
    resumed_from = []
    for after in range(1, 6):  # Ctrl-C after so many batches, and what a kill at the same moment would have left

        def stop(done: int, total: int, note: str, after: int = after) -> None:
            if done >= 3 * after:
                if (tmp_path / f"ctrl-c-{after}").exists():
                    shutil.copytree(tmp_path / f"ctrl-c-{after}", tmp_path / f"kill-{after}")
                raise StopError

        with pytest.raises(StopError):
            record_transformers(qwen, prompts, tmp_path / f"ctrl-c-{after}", options, progress=stop)
        for how in ("ctrl-c", "kill"):
            path = tmp_path / f"{how}-{after}"
            path.mkdir(exist_ok=True)
            (path / ".part-00009.parquet.abc.tmp").write_bytes(b"cut off")
            if (path / "trace.json").exists():
                resumed_from.append(len(open_trace(path).requests))
            trace = record_transformers(qwen, prompts, path, replace(options, resume=True))
            assert trace.complete and files_of(path) == files_of(tmp_path / "whole")
    assert any(n % 3 for n in resumed_from)  # a batch was cut in two
    before = files_of(tmp_path / "whole")
    assert record_transformers(qwen, prompts, tmp_path / "whole", replace(options, resume=True)).complete
    assert files_of(tmp_path / "whole") == before


def test_another_recording_is_not_resumed(qwen: LoadedModel, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        raise StopError

    with pytest.raises(StopError):
        record_transformers(
            qwen, token_prompts(), tmp_path / "t", TransformersOptions(max_new_tokens=2, batch_size=3), progress=stop
        )
    record_transformers(qwen, token_prompts(), tmp_path / "whole", TransformersOptions(max_new_tokens=2, batch_size=3))
    before = files_of(tmp_path / "t"), files_of(tmp_path / "whole")
    for prompts, options, message in (
        (token_prompts(10), TransformersOptions(max_new_tokens=2, batch_size=3), "begun with prompts_sha256"),
        (token_prompts(), TransformersOptions(max_new_tokens=2, batch_size=4), "begun with batch_size 3, not 4"),
        (
            token_prompts(),
            TransformersOptions(max_new_tokens=2, batch_size=3, keep_gate_weights=True),
            "resume without --keep-gate-weights",
        ),
    ):
        for path in (tmp_path / "t", tmp_path / "whole"):  # cut off, and complete
            with pytest.raises(UsageError, match=message):
                record_transformers(qwen, prompts, path, replace(options, resume=True))
    with pytest.raises(MoeplanError, match="already exists"):
        record_transformers(qwen, token_prompts(), tmp_path / "t")
    assert (files_of(tmp_path / "t"), files_of(tmp_path / "whole")) == before


def test_a_dense_model_and_an_unreadable_router_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no MoE layer; looked at \d+ modules: .*model.layers.2.mlp \(Qwen3MLP\)"):
        LoadedModel.of(build("Qwen3Config", {"head_dim": 8}), None, "dense")
    jet = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": EXPERTS}
    config = transformers.JetMoeConfig(**{k: v for k, v in {**COMMON, **jet}.items() if k != "num_attention_heads"})
    with pytest.raises(UsageError, match=r"cannot be read; looked at .*mlp.router \(JetMoeTopKGating\)"):
        LoadedModel.of(transformers.AutoModelForCausalLM.from_config(config), None, "jet")


def test_a_bypassed_router_is_noticed(qwen: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = qwen.model.model.layers[1].mlp.gate
    monkeypatch.setattr(qwen.model.model.layers[1].mlp, "forward", lambda hidden: hidden)
    with pytest.raises(MoeplanError, match=r"layers.1.mlp.gate .* chose experts for 0 tokens in 0 calls"):
        record_transformers(qwen, token_prompts(), tmp_path / "t", TransformersOptions(max_new_tokens=2))
    assert not (tmp_path / "t").exists() and not gate._forward_hooks


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (Prompt("", "p.jsonl, row 4", token_ids=(64,)), {}, "row 4: token id 64 is outside the model's 64"),
        (Prompt("", "p.jsonl, row 4", text="a"), {}, "row 4: is text, but the model has no tokenizer"),
        (Prompt("", "r", token_ids=(5,) * 120), {"max_new_tokens": 9}, "r: 120 prompt tokens.*--max-prompt-tokens 119"),
        (Prompt("", "r", token_ids=(5,)), {"max_new_tokens": 128}, "use a smaller --max-new-tokens"),
    ],
)
def test_prompts_that_the_model_cannot_take(
    qwen: LoadedModel, tmp_path: Path, prompt: Prompt, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoeplanError, match=message):
        record_transformers(qwen, [*token_prompts(3), prompt], tmp_path / "t", TransformersOptions(**options))
    assert not (tmp_path / "t").exists()


def test_options_out_of_range() -> None:
    for options in (
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"max_prompt_tokens": 0},
        {"temperature": -1.0},
        {"seed": -1},
    ):
        with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')} "):
            TransformersOptions(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, qwen: LoadedModel) -> Path:
    """The tiny model as a user has it: config, safetensors and a word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "tiny-qwen"
    qwen.model.save_pretrained(path)
    words = ["<pad>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(40))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
        "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    )
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def run(folder: Path, prompts: Path, out: Path, *flags: str) -> int:
    arguments = ["record", "transformers", "--model", str(folder), "--prompts", str(prompts), "-o", str(out)]
    return command_line([*arguments, *flags])


@pytest.mark.slow
def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "w1 w2 w3", "domain": "a"},
        {"messages": [{"role": "user", "content": "w4 w5"}], "max_new_tokens": 2},
        {"prompt": "w6"},
    ]
    prompts = write_rows(tmp_path / "set.jsonl", rows)
    assert run(folder, prompts, tmp_path / "t", "--max-new-tokens", "3", "--keep-gate-weights", "--json", "-") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["requests"], facts["domains"]) == ("tiny-qwen", 3, {"a": 1, "set": 2})
    trace = open_trace(tmp_path / "t")
    assert trace.requests.prefill.tolist() == [3, 4, 1]  # user w4 w5 assistant
    assert trace.source["dtype"] == "float32" and "w1" not in json.dumps(trace.source)
    assert run(folder, prompts, tmp_path / "t") == 2
    assert "already exists" in capsys.readouterr().err
    assert run(folder, prompts, tmp_path / "t", "--max-new-tokens", "3", "--keep-gate-weights", "--resume") == 0
    assert run(folder, prompts, tmp_path / "one", "--limit", "2", "--domain", "z", "--dtype", "bfloat16") == 0
    assert open_trace(tmp_path / "one").requests.domains == ("z",)
    assert command_line(["profile", str(tmp_path / "t"), "-o", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    flags = ("--max-new-tokens", "3", "--min-tokens", "3", "--domain", "all", "--aggregate", "2")
    assert run(folder, prompts, tmp_path / "sums", *flags) == 0
    said = capsys.readouterr().out
    assert "1 sum of 2 requests" in said and "not stored: " in said
    assert open_trace(tmp_path / "sums").aggregate == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere: is not a model folder; check the path, or add --allow-download"),
        (["--model", "EMPTY"], "Transformers cannot load it"),
        (["--dtype", "float8"], "--dtype 'float8' is not one of"),
        (["--device", "toaster"], "cannot load it"),
        (["--limit", "0"], "--limit 0 is not positive"),
        (["--min-tokens", "0"], "--min-tokens 0 is not positive"),
        (["--aggregate", "2"], "--aggregate 2: no domain has so many requests, the largest has 1"),
        (["--aggregate", "1"], "--aggregate 1 must be at least 2"),
        (["--prompts", "nothing.jsonl"], "nothing.jsonl: does not exist"),
    ],
)
def test_bad_flags_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    prompts = write_rows(tmp_path / "set.jsonl", [{"prompt": "w1"}])
    flags = [str(tmp_path) if flag == "EMPTY" else flag for flag in flags]
    assert run(folder, prompts, tmp_path / "t", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "t").exists()


def test_a_chat_that_the_template_refuses(folder: Path, tmp_path: Path) -> None:
    prompts = read_prompts(write_rows(tmp_path / "c.jsonl", [{"messages": [{"role": "robot", "content": "w1"}]}]))
    with pytest.raises(MoeplanError, match=r"c.jsonl, row 0: does not fit the model's chat template \(no robots\)"):
        record_transformers(load_model(str(folder)), prompts, tmp_path / "t")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "w', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({"query": "w1"}, "has no prompt .keys: 'query'"),
        ({"prompt": 3}, "prompt is not text"),
        ({"prompt": " "}, "prompt is not text, or is empty"),
        ({"prompt": "w1", "max_new_tokens": 0}, "max_new_tokens is '0', not a whole number from 1"),
        ({"prompt": "w1", "max_new_tokens": True}, "max_new_tokens is 'True'"),
        ({"prompt": "w1", "domain": 5}, "domain is not text"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no text role and content"),
        ({"turns": []}, r"turns\[0\] is not text"),
        ({"input_tok_ids": [1, "2"], "output_toks": 3}, "not a list of token ids"),
        ({"input_tok_ids": [1], "output_toks": 3, "arrival_time_ns": -1}, "arrival_time_ns"),
        ('{"prompt": "\\ud800' + "[" * 100_000, "is not JSON"),
    ],
)
def test_bad_rows_name_file_and_row(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "w1"}, row])
    with pytest.raises(MoeplanError, match=f"p.jsonl, row 1: .*{message}"):
        read_prompts(path)


def test_bad_files(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"prompt": "w1"}).encode() * 50)
    for name, data, message in (
        ("a.jsonl", b"", "holds no prompt"),
        ("b.jsonl", b'{"prompt": "\xff"}', "row 0: is not UTF-8"),
        ("c.jsonl.gz", whole[:-20], "is not a whole gzip file"),
        ("d.jsonl.gz", b'{"prompt": "w1"}', "is not a whole gzip file"),
        ("e.csv", b"only,two\n", "row 0: has 2 columns"),
        ("f.csv", b'q,a,b,c,d,"A', "row 0: is not CSV"),
        ("g.txt", b"  \n", "holds no text"),
        ("h.parquet", b"PAR1", "is not a prompt file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MoeplanError, match=f"{name}.*{message}"):
            read_prompts(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoeplanError, match="holds no prompt file"):
        read_prompts(tmp_path / "empty")
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(17):
            file.write(b" " * 1024 * 1024)
    with pytest.raises(MoeplanError, match="row 0: is longer than"):
        read_prompts(tmp_path / "bomb.jsonl.gz")


def test_a_folder_per_domain(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    write_rows(root / "math" / "rows.jsonl", [{"prompt": "1"}, {"prompt": "2", "domain": "own"}])
    for number in (10, 9):
        write_rows(root / "prose" / f"{number}.txt", [f"text {number}"])
    write_rows(root / "code.jsonl", [{"prompt": "x"}])
    write_rows(root / "notes.txt", ["loose"])
    write_rows(root / ".hidden.txt", ["no"])
    found = [(p.domain, p.text) for p in read_prompts(root)]
    assert found == [
        ("math", "1"), ("own", "2"), ("prose", "text 9"), ("prose", "text 10"), ("code", "x"), ("sets", "loose"),
    ]  # fmt: skip
    assert [p.text for p in read_prompts(root, limit=4)] == ["1", "2", "text 9", "x"]
    assert {p.domain for p in read_prompts(root, domain="all")} == {"all"}


@pytest.mark.parametrize(
    ("name", "rows", "domain"),
    [
        ("HumanEval.jsonl.gz", 164, "code"),
        ("mbpp.jsonl", 974, "code"),
        ("gsm8k_test.jsonl", 1319, "math"),
        ("mmlu/test", 14042, "abstract_algebra"),
        ("mt_bench_question.jsonl", 80, "chat"),
        ("vicuna_bench_question.jsonl", 80, "chat"),
        ("sharegpt-qwen3-30b-a3b-300-sps10.tokenids.jsonl", 300, "chat"),
    ],
)
def test_public_sets(shared: Path, name: str, rows: int, domain: str) -> None:
    if not (shared / "prompts" / name).exists():
        pytest.skip("the public prompts are not on this machine")
    prompts = read_prompts(shared / "prompts" / name)
    assert (len(prompts), prompts[0].domain) == (rows, domain)
    if "tokenids" in name:
        assert (prompts[0].max_new_tokens, prompts[0].arrival) == (532, 0.046926808)
