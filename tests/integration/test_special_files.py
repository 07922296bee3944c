"""Pipes, devices and sockets in place of files: refused at once, by every reader."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.cli.app import run

FILES = ROOT / "tests" / "data" / "archives" / "0.1.0"
CLUSTER = ["--nodes", "2", "--gpus-per-node", "4"]
ENGINE = ["--ep-size", "8", "--nodes", "2"]
RECORD = ["record", "transformers", "-o", "OUT"]
PROMPTED = [*RECORD, "--model", "embedded", "--prompts", "FILE"]
SHAPE = ["--num-experts", "8", "--num-layers", "2", "--top-k", "2"]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """A reader that waits, or reads on and on, fails instead of hanging."""

    def late(*_: object) -> None:
        raise AssertionError("still reading after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


#: Command, a directory of 0.1.0's files (DIR in the command is a copy), and the name of the special file (FILE).
READERS = {
    "trace part": (["profile", "DIR"], "trace", "part-00000.parquet"),
    "trace requests": (["profile", "DIR"], "trace", "requests.parquet"),
    "trace of a recording": (["profile", "DIR"], "trace-cut-off", "requests.parquet"),
    "trace head": (["profile", "DIR"], "trace", "trace.json"),
    "trace of sums": (["plan", "DIR", *CLUSTER, "-o", "OUT"], "trace-sums", "part-00000.parquet"),
    "import trace": (["import", "trace", "DIR", "-o", "OUT"], "trace", "part-00000.parquet"),
    "plan": (["evaluate", "TRACE", "--plan", "DIR"], "plan-paper", "plan.json"),
    "plan slots": (["evaluate", "TRACE", "--plan", "DIR"], "plan-paper", "slots.npy"),
    "plan router": (["evaluate", "TRACE", "--plan", "DIR"], "plan-paper", "centroids.npy"),
    "plan to export": (["export", "DIR", "--engine", "vllm", "-o", "OUT.json"], "plan-eplb", "slots.npy"),
    "counts": (["export", "DIR", "--engine", "vllm", *CLUSTER, "-o", "OUT.json"], "counts", "counts.json"),
    "counts array": (["export", "DIR", "--engine", "vllm", *CLUSTER, "-o", "OUT.json"], "counts", "counts.npy"),
    "sglang": (["check", "FILE", "--engine", "sglang"], "", "p.json"),
    "sglang tensors": (["check", "FILE", "--engine", "sglang"], "", "p.pt"),
    "vllm": (["check", "FILE", "--engine", "vllm"], "", "p.json"),
    "vllm array": (["check", "FILE", "--engine", "vllm"], "", "p.npy"),
    "vllm-ascend": (["check", "FILE", "--engine", "vllm-ascend"], "", "p.json"),
    "tensorrt-llm": (["check", "FILE", "--engine", "tensorrt-llm"], "", "p.yaml"),
    "placement": (["import", "placement", "FILE", "--engine", "vllm", *ENGINE, "-o", "OUT"], "", "p.json"),
    "replayed placement": (["evaluate", "TRACE", "--placement", "FILE", "--engine", "vllm", *ENGINE], "", "p.json"),
    "config": (["import", "vllm", "x.json", "--config", "FILE", "-o", "OUT"], "", "config.json"),
    "config of a folder": (["import", "vllm", "x.json", "--config", "DIR", "-o", "OUT"], "counts", "config.json"),
    "model": (["estimate", "--hardware", "H100", "--model", "FILE"], "", "config.json"),
    "hardware": (["estimate", "--hardware", "H100", "--model", "deepseek-v3", "--hardware-file", "FILE"], "", "h.json"),
    "arrays": (["import", "arrays", "FILE", "-o", "OUT"], "", "a.npz"),
    "expert-selection": (["import", "expert-selection", "FILE", "--num-experts", "8", "-o", "OUT"], "", "a.json"),
    "moe-beyond": (["import", "moe-beyond", "FILE", "--num-experts", "8", "-o", "OUT"], "", "a.csv"),
    "responses of vllm": (["import", "vllm", "FILE", "--num-experts", "8", "-o", "OUT"], "", "a.jsonl"),
    "responses of sglang": (["import", "sglang", "FILE", *SHAPE, "-o", "OUT"], "", "a.json"),
    "sglang-recorder": (["import", "sglang-recorder", "FILE", "-o", "OUT"], "", "a.pt"),
    "logical-count": (["import", "logical-count", "FILE", "-o", "OUT"], "", "a.json"),
    "megatron": (["import", "megatron", "FILE", "--num-experts", "8", "-o", "OUT"], "", "a.jsonl"),
    "tensorrt-llm folder": (["import", "tensorrt-llm", "DIR", "-o", "OUT"], "counts", "meta_info.json"),
    "prompts": (PROMPTED, "", "p.jsonl"),
    "prompts, packed": (
        PROMPTED,
        "",
        "p.jsonl.gz",
    ),
    "prompts, table": (PROMPTED, "", "p.csv"),
    "prompts, text": (PROMPTED, "", "p.txt"),
    "prompts of a server": (["record", "vllm", "--num-experts", "8", "--prompts", "FILE", "-o", "OUT"], "", "p.jsonl"),
    "model folder": ([*RECORD, "--model", "DIR", "--prompts", "PROMPTS"], "counts", "model.safetensors"),
}


@pytest.mark.parametrize(
    "make", [pipe, pytest.param(device, marks=pytest.mark.slow), pytest.param(unix_socket, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(
    reader: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, directory, name = READERS[reader]
    if directory:
        shutil.copytree(FILES / directory, tmp_path / "dir")
    file = tmp_path / "dir" / name if directory else tmp_path / name
    file.unlink(missing_ok=True)
    make(file)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}')
    words = {"FILE": file, "DIR": tmp_path / "dir", "TRACE": FILES / "trace", "PROMPTS": tmp_path / "prompts.jsonl"}
    words |= {"OUT": tmp_path / "out", "OUT.json": tmp_path / "out.json"}
    before = sorted(tmp_path.rglob("*"))
    assert run([str(words.get(word, word)) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    kind = "a pipe" if make is pipe else "a device" if make is device else "a socket"
    assert f"{name}: cannot be read (it is {kind})" in line or "is not a moeplan" in line or "is neither a plan" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("make", [pipe, device])
def test_results_are_not_put_in_place_of_a_device(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "x")
    for place in (tmp_path / "x", "/dev/null"):
        assert run(["estimate", "--hardware", "H100", "--model", "deepseek-v3", "--json", str(place)]) == 2
        assert "cannot be written (it is a" in capsys.readouterr().err
    assert not Path("/dev/null").is_file()
