"""Several ranks of torch.distributed in forked processes: an engine's own code is loaded once, and run by all of them.

Runs in the engine's environment, not in that of the tests.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def on_ranks(size: int, work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `work(rank)` returns on each of `size` ranks, with its log lines under "log"; a rank's failure ends all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        sys.stdout.flush()
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _one(rank, size, port, work, Path(name) / str(rank))
            children.append(child)
        status = [os.waitpid(child, 0)[1] for child in children]
        if any(status):
            raise SystemExit(f"ranks ended with {status}")
        return [pickle.loads((Path(name) / str(rank)).read_bytes()) for rank in range(size)]


def _one(rank: int, size: int, port: int, work: Callable[[int], dict[str, Any]], out: Path) -> None:
    """One rank, from its start to its end."""
    try:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        lines = Lines()
        result = work(rank)
        dist.barrier()
        out.write_bytes(pickle.dumps({**result, "log": lines.said}))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Lines(logging.Handler):
    """The plug-in's lines, as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        for name in ("vllm.moeplan", "moeplan.sglang"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
