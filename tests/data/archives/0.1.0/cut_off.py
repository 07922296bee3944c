"""Recordings that a failing server ended after six requests, and the same recordings without a failure."""

from __future__ import annotations

from pathlib import Path

from fake_server import Fake, serve  # tests/fake_server.py of version 0.1.0

from moeplan.cli.app import run

HERE = Path(__file__).parent
PATIENCE = ["--concurrency", "1", "--retries", "0"]


def record(out: Path, *flags: str, good: int) -> None:
    """Nine prompts, one at a time; the server fails from the one after `good` on."""
    fake = Fake(engine="sglang")
    fake.fault = lambda path, before: 500 if path != "/tokenize" and answers() > good else None

    def answers() -> int:
        return sum(1 for path, body, _ in fake.seen if path in ("/generate", "/v1/chat/completions") and body)

    with serve(fake):
        files = ["--prompts", str(HERE / "prompts.jsonl"), "--config", str(HERE / "server-config.json"), "-o", str(out)]
        run(["record", "sglang", "--url", fake.url, *files, "--max-new-tokens", "6", *PATIENCE, *flags])


for name, flags in (("", []), ("-sums", ["--aggregate", "2"])):
    record(HERE / f"trace-cut-off{name}", *flags, good=7)  # the first answer is a short trial
    record(HERE / f"trace-recorded{name}", *flags, good=1000)
