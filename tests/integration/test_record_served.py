"""Recording from servers: what is asked, what is stored and in which order, what stops it, and how it goes on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_server import DENSE, EXPERTS, LAYERS, TOP_K, Fake, new_of, picks_of, serve, tokens_of
from moeplan.errors import FormatError, MoeplanError, OutputError, ServerError, UsageError
from moeplan.model.config import described
from moeplan.model.spec import ModelSpec
from moeplan.progress import Progress, silent
from moeplan.record import http_client as http
from moeplan.record import recording
from moeplan.record import server as serving
from moeplan.record.http_client import Server
from moeplan.record.prompts import Prompt
from moeplan.record.server import ServedOptions, in_order, served_model
from moeplan.record.sglang import record_sglang
from moeplan.record.vllm import record_vllm
from moeplan.trace import open_trace
from moeplan.trace.prompts import PromptPolicy
from moeplan.trace.reader import Trace
from moeplan.trace.retention import RetentionPolicy

FACTS = ModelSpec().override(num_experts=EXPERTS, num_layers=LAYERS, top_k=TOP_K, hidden=64)
SPARSE = [layer for layer in range(LAYERS) if layer != DENSE]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve(Fake()) as running:
        yield running


def prompts_of(count: int = 12) -> list[Prompt]:
    """Texts, chats and token ids in turn, of different lengths."""
    kinds: list[dict[str, Any]] = [
        {"text": "secret words "},
        {"messages": (("system", "secret rules"), ("user", "secret question"))},
        {"token_ids": (5, 6, 7)},
    ]
    made = []
    for i in range(count):
        kind = dict(kinds[i % 3])
        if "text" in kind:
            kind["text"] += str(i) * (i + 1)
        if "token_ids" in kind:
            kind["token_ids"] = (*kind["token_ids"], *range(i))
        made.append(Prompt(f"d{i % 2}", f"p.jsonl, row {i}", arrival=i / 2, **kind))
    return made


def record(
    fake: Fake,
    out: Path,
    prompts: list[Prompt] | None = None,
    progress: Progress = silent,
    openai: bool = False,
    **options: Any,
) -> Trace:
    chosen = ServedOptions(**{"max_new_tokens": 6, "timeout": 60, "retries": 2, "model": FACTS, **options})
    asked = prompts or prompts_of()
    if fake.engine == "sglang":
        return record_sglang(asked, out, chosen, url=fake.url, openai=openai, progress=progress)
    return record_vllm(asked, out, chosen, url=fake.url, progress=progress)


def expected(prompt: Prompt, new: int = 6) -> tuple[np.ndarray, int]:
    """(picks of the MoE layers, prefill) of a prompt on the fake server."""
    messages = [{"content": content} for _, content in prompt.messages or ()]
    body = {
        "prompt": prompt.token_ids or prompt.text,
        "max_tokens": new,
        **({"messages": messages} if messages else {}),
    }
    ids = tokens_of(body)
    return picks_of(ids, len(ids) + new_of(body) - 1)[:, SPARSE], len(ids)


def assert_holds(trace: Trace, prompts: list[Prompt], new: int = 6) -> None:
    """The trace is just these prompts, in their order."""
    rows, found = trace.load(), trace.requests
    assert trace.complete and trace.shape.layer_ids == tuple(SPARSE) and trace.shape.hidden == 64
    assert [found.domains[i] for i in found.domain] == [prompt.domain for prompt in prompts]
    assert found.arrival.tolist() == [prompt.arrival for prompt in prompts]
    for number, prompt in enumerate(prompts):
        picks, prefill = expected(prompt, new)
        assert found.prefill[number] == prefill
        assert np.array_equal(rows.experts[rows.offsets[number] : rows.offsets[number + 1]], picks)


@pytest.mark.parametrize(
    ("engine", "openai"), [("vllm", False), ("dynamo", False), ("sglang", False), ("sglang", True)]
)
def test_answers_in_any_order_are_written_in_prompt_order(
    fake: Fake, tmp_path: Path, engine: str, openai: bool
) -> None:
    fake.engine = engine
    shuffled = random.Random(1)
    fake.delay = lambda body: shuffled.choice([0, 0, 0.05])
    prompts = prompts_of()
    trace = record(fake, tmp_path / "t", prompts, openai=openai, concurrency=4)
    assert_holds(trace, prompts)
    assert trace.shape.name == "tiny" and trace.source["model"] == "tiny"  # not the folder that it was started from
    assert trace.source[engine if engine == "sglang" else "vllm"] == "1.2.3"
    text = (tmp_path / "t" / "trace.json").read_text()
    assert "secret" not in text and "127.0.0.1" not in text and "/models" not in text
    texts = "/generate" if engine == "sglang" and not openai else "/v1/completions"
    ranks = pq.read_table(tmp_path / "t" / "requests.parquet").to_pydict().get("dp_rank")
    lengths = enumerate(trace.requests.prefill.tolist())
    assert ranks == ([None if i % 3 == 1 else n % 4 for i, n in lengths] if texts == "/generate" else None)
    asked = {path: len(fake.bodies(path)) for path in (texts, "/v1/chat/completions")}
    assert asked == {texts: 8 + 1, "/v1/chat/completions": 4}  # one more to see how answers look
    assert all(b.get("return_routed_experts", False) == (engine == "sglang") for b in fake.bodies(texts))


def test_what_is_sampled_is_said_whatever_the_model_prefers(fake: Fake, tmp_path: Path) -> None:
    prompts = [
        Prompt("", "r", text="abc", max_new_tokens=3),
        Prompt("", "r", text="abcd"),
        Prompt("", "r", text="x" * 390),
    ]
    record(fake, tmp_path / "t", prompts, temperature=0.7, seed=5, max_new_tokens=None)
    _, first, second, third = sorted(
        fake.bodies("/v1/completions"), key=lambda body: (len(body["prompt"]), body["max_tokens"])
    )
    assert [body["max_tokens"] for body in (first, second, third)] == [3, 128, 10]
    assert first["temperature"] == 0.7 and (first["top_p"], first["top_k"], first["min_p"]) == (1.0, -1, 0.0)
    assert first["repetition_penalty"] == 1.0 and first["seed"] != second["seed"]


def test_no_more_is_under_way_than_asked_for(fake: Fake, tmp_path: Path) -> None:
    fake.delay = lambda body: 0.01
    record(fake, tmp_path / "t", prompts_of(30), concurrency=3)
    assert 1 < fake.most <= 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 2**32))
def test_order_and_a_bounded_number_ahead(count: int, workers: int, seed: int) -> None:
    begun, taken = [], []
    slow = random.Random(seed)

    def ask(item: int) -> int:
        begun.append(item)
        assert item - len(taken) <= workers * serving.AHEAD
        if slow.random() < 0.1:
            sum(range(20_000))
        return item * 2

    taken += in_order(ask, range(count), workers, lambda: None)  # one by one: `ask` sees it grow
    assert taken == [2 * item for item in range(count)] and sorted(begun) == list(range(count))


def test_the_flag_is_missing(fake: Fake, tmp_path: Path) -> None:
    for engine in ("none", "sglang"):
        fake.engine, fake.seen = engine, []
        fake.fault = lambda path, before: None
        if engine == "sglang":
            body = json.dumps({"text": "..", "meta_info": {"prompt_tokens": 3, "completion_tokens": 1}}).encode()
            raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            fake.fault = lambda path, before, raw=raw: raw if path == "/generate" else None
        with pytest.raises(FormatError, match=r"row 0.*: has no routed_experts.*start the server with --enable-re"):
            record(fake, tmp_path / "t")
        assert len(fake.bodies("/v1/completions") + fake.bodies("/generate")) == 1  # not a crowd of useless requests
        assert not (tmp_path / "t").exists()


def test_what_is_not_known_of_the_model_is_asked_for_at_once(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give --num-experts, e.g. 128, or the model.s config.json"):
        record(fake, tmp_path / "t", model=ModelSpec())
    assert not fake.bodies()
    fake.engine = "sglang"
    with pytest.raises(UsageError, match=r"picks without their shape; give --config .*--num-layers"):
        record(fake, tmp_path / "t", model=ModelSpec().override(num_experts=EXPERTS))
    fake.engine = "vllm"
    with pytest.raises(FormatError, match=r"row 0.*: 4 hidden layers, but the config or a flag says 5"):
        record(fake, tmp_path / "t", model=ModelSpec().override(num_experts=EXPERTS, num_layers=5))
    with pytest.raises(FormatError, match=r"is outside 0..7; check the number of experts"):
        record(fake, tmp_path / "t", model=ModelSpec().override(num_experts=8))


def test_models(fake: Fake, tmp_path: Path) -> None:
    fake.models = [{"id": "base", "max_model_len": 9}, {"id": "tuned", "parent": "base"}, {"id": 7}]
    server = Server(fake.url)
    assert served_model(server, None) == ("base", 9) and served_model(server, "tuned") == ("tuned", None)
    with pytest.raises(UsageError, match="does not serve other; choose one with --served-model: base, tuned"):
        served_model(server, "other")
    fake.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(UsageError, match="serves several models; choose one with --served-model: a, b"):
        served_model(server, None)
    for models in ([], None, [3], [{"id": None}], [{"id": "\x1b[2J"}]):
        fake.models = models  # type: ignore[assignment]
        with pytest.raises(ServerError, match="lists no model; check --url"):
            served_model(server, None)


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(fake: Fake, tmp_path: Path) -> None:
    long = Prompt("", "p.jsonl, row 12", text="secret " * 80)
    prompts = [*prompts_of(), long]
    with pytest.raises(FormatError, match="row 12: 560 prompt tokens and 6 new ones are more than the model's 400"):
        record(fake, tmp_path / "t", prompts)
    assert not fake.bodies("completions") and not (tmp_path / "t").exists()
    fake.seen = []
    trace = record(fake, tmp_path / "t", prompts, max_prompt_tokens=300)
    assert trace.requests.prefill[-1] == 300
    assert list(b"secret " * 80)[:300] in [body["prompt"] for body in fake.bodies("/v1/completions")]
    with pytest.raises(FormatError, match="row 1: gives no token; leave the row out"):
        record(fake, tmp_path / "u", [long, Prompt("", "row 1", text="")], max_prompt_tokens=300)


def test_a_gateway_without_tokenize(fake: Fake, tmp_path: Path) -> None:
    fake.paths = ("/tokenize", "/version")
    trace = record(fake, tmp_path / "t")
    assert_holds(trace, prompts_of())
    assert trace.source["vllm"] is None and len(fake.bodies("/tokenize")) == 1
    with pytest.raises(UsageError, match="has no /tokenize, so prompts cannot be cut; leave out --max-prompt-tokens"):
        record(fake, tmp_path / "u", max_prompt_tokens=5)


@pytest.mark.parametrize("paths", [(), ("/tokenize",)])
def test_prompt_tokens_are_kept(fake: Fake, tmp_path: Path, paths: tuple[str, ...]) -> None:
    """From the server's tokenizer, or from its answers."""
    fake.paths = paths
    prompts, keep = prompts_of(), RetentionPolicy(prompts=PromptPolicy("ids"))
    trace = record(fake, tmp_path / "t", prompts, retention=keep)
    assert_holds(trace, prompts)
    assert trace.prompts is not None and trace.prompts_info is not None and trace.prompts_info.kind == "ids"
    for number, prompt in enumerate(prompts):
        messages = [{"content": content} for _, content in prompt.messages or ()]
        body = {"messages": messages} if messages else {"prompt": prompt.token_ids or prompt.text}
        assert trace.prompts.of(number)[0].tolist() == tokens_of(body)
    asked = {bool(body.get("return_token_ids")) for body in fake.bodies("/v1/")}
    assert (True in asked) == bool(paths)
    if not paths:
        cut = record(fake, tmp_path / "u", prompts, retention=keep, max_prompt_tokens=5)
        assert cut.prompts is not None and np.diff(cut.prompts.offsets).max() == 5


def test_prompt_tokens_that_no_one_tells(fake: Fake, tmp_path: Path) -> None:
    fake.paths, fake.engine = ("/tokenize",), "dynamo"
    with pytest.raises(FormatError, match=r"p.jsonl, row 0: the server does not tell its token ids; leave out --keep"):
        record(fake, tmp_path / "t", retention=RetentionPolicy(prompts=PromptPolicy("ids")))


def test_failures_that_pass_leave_no_mark(fake: Fake, tmp_path: Path) -> None:
    whole = record(fake, tmp_path / "whole")
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"
    fake.seen = []
    fake.fault = lambda path, before: [429, 503, cut][len(path) % 3] if before == 0 and path != "/v1/models" else None
    trace = record(fake, tmp_path / "t")
    assert trace.checksum == whole.checksum and files_of(tmp_path / "t") == files_of(tmp_path / "whole")


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


class StopError(Exception):
    """What the tests interrupt a recording with."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PART_PICKS", 1)
    monkeypatch.setattr(recording, "PART_TOKENS", 90)


@pytest.mark.parametrize(
    ("concurrency", "kind"), [(1, None), (5, None), (2, PromptPolicy("ids")), (2, PromptPolicy("hashed", bytes(32)))]
)
def test_killed_and_resumed_equals_uninterrupted(
    fake: Fake, tmp_path: Path, small_parts: None, concurrency: int, kind: PromptPolicy | None
) -> None:
    prompts, keep = prompts_of(12), RetentionPolicy(prompts=kind)
    whole = record(fake, tmp_path / "whole", prompts, retention=keep)
    assert len(list(whole.parts())) >= 3
    for after in range(1, 12, 4):  # Ctrl-C after so many requests, and what a kill at the same moment leaves

        def stop(done: int, total: int, note: str, after: int = after) -> None:
            if "requests" in note and done == after:
                if (tmp_path / f"ctrl-c-{after}").exists():
                    shutil.copytree(tmp_path / f"ctrl-c-{after}", tmp_path / f"kill-{after}")
                raise StopError

        with pytest.raises(StopError):
            record(fake, tmp_path / f"ctrl-c-{after}", prompts, stop, concurrency=concurrency, retention=keep)
        for path in (tmp_path / f"ctrl-c-{after}", tmp_path / f"kill-{after}"):
            path.mkdir(exist_ok=True)
            (path / ".part-00009.parquet.abc.tmp").write_bytes(b"cut off")
            done = len(open_trace(path).requests) if (path / "trace.json").exists() else 0
            with serve(Fake()) as again:
                resumed = record(again, path, prompts, resume=True, concurrency=concurrency, retention=keep)
                assert_holds(resumed, prompts)
            assert files_of(path) == files_of(tmp_path / "whole")
            assert len(again.bodies("completions")) == 12 - done + 1  # only what was missing, and the first look
    before = files_of(tmp_path / "whole")
    assert record(fake, tmp_path / "whole", prompts, resume=True, retention=keep).complete
    assert files_of(tmp_path / "whole") == before


def test_a_server_that_dies_leaves_what_can_be_resumed(fake: Fake, tmp_path: Path, small_parts: None) -> None:
    prompts = prompts_of(20)
    record(fake, tmp_path / "whole", prompts)
    fake.seen = []
    fake.fault = lambda path, before: 503 if len(fake.bodies("completions")) > 12 else None
    with pytest.raises(ServerError, match=r"p.jsonl, row \d+: .*answers 503.*tried 3 times.*continue with --resume"):
        record(fake, tmp_path / "t", prompts, concurrency=2)
    stopped = open_trace(tmp_path / "t")
    assert not stopped.complete and 5 <= len(stopped.requests) <= 12
    fake.fault = lambda path, before: None
    record(fake, tmp_path / "t", prompts, resume=True)
    assert files_of(tmp_path / "t") == files_of(tmp_path / "whole")


def test_another_recording_is_not_resumed(fake: Fake, tmp_path: Path, small_parts: None) -> None:
    fake.fault = lambda path, before: 400 if len(fake.bodies("completions")) > 8 else None
    with pytest.raises(ServerError):
        record(fake, tmp_path / "t", concurrency=1)
    fake.fault = lambda path, before: None
    record(fake, tmp_path / "whole")
    with pytest.raises(OutputError, match="already exists; choose another place, remove it, or add --resume"):
        record(fake, tmp_path / "t")
    for prompts, options, message in (
        (prompts_of(11), {}, "begun with prompts_sha256"),
        (prompts_of(), {"max_new_tokens": 5}, "begun with max_new_tokens 6, not 5"),
        (prompts_of(), {"model": ModelSpec().override(num_experts=17)}, "another shape"),
    ):
        for path in (tmp_path / "t", tmp_path / "whole"):  # cut off, and complete
            before = files_of(path)
            with pytest.raises(UsageError, match=message):
                record(fake, path, prompts, resume=True, **options)
            assert files_of(path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"usage": {"prompt_tokens": 12, "completion_tokens": 1}},
            "15 rows, but 12 prompt and 1 completion tokens",
        ),
        ({"usage": None}, "does not count its tokens"),
        ({"choices": []}, "choices is empty"),
        ({"choices": [{"routed_experts": "!!"}]}, "not base64"),
        ({"choices": [{"routed_experts": "AAAA"}]}, "row 0"),
        ({"choices": [{"routed_experts": 5}]}, "row 0"),
    ],
)
def test_answers_that_lie_stop_with_the_row(fake: Fake, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from helpers.fake_server import answer

    body = {"model": "m", "prompt": "secret words 00", "max_tokens": 1}
    data = json.dumps({**answer("vllm", "/v1/completions", body), **change}).encode()
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    fake.fault = lambda path, before: raw if path == "/v1/completions" else None
    with pytest.raises(MoeplanError, match=message) as error:
        record(fake, tmp_path / "t")
    assert "p.jsonl, row 0" in error.value.line() and "secret" not in error.value.line()


def test_options_out_of_range() -> None:
    for options in (
        {"concurrency": 0},
        {"concurrency": 5000},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"seed": -1},
        {"timeout": 0.0},
    ):
        with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')} "):
            ServedOptions(**options)  # type: ignore[arg-type]


def test_a_folder_will_do_as_config(tmp_path: Path) -> None:
    config = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert described(tmp_path) == described(tmp_path / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"config.json: cannot be read"):
        described(tmp_path / "empty")
