"""A server on the loopback that answers as vLLM or SGLang do, or fails as a test tells it to."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, DENSE, EXPERTS, TOP_K, POSITIONS = 4, 1, 16, 3, 400


@dataclass
class Fake:
    """What the server does, and what it saw.

    Attributes:
        engine: vllm, dynamo (vLLM's picks as plain bytes with a shape), sglang, or none (the flag is missing).
        fault: (path, how many requests for just this body came before) -> None to answer well; an HTTP status, or
            (status, headers); or raw bytes to send in place of a response, or a list of them, sent slowly.
        delay: seconds for a body, before it is answered.
        paths: that do not exist.
        most: good answers that were made at a time.
    """

    engine: str = "vllm"
    fault: Callable[[str, int], Any] = lambda path, before: None
    delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
    paths: tuple[str, ...] = ()
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "/models/tiny", "max_model_len": POSITIONS}])
    url: str = ""
    seen: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts what runs at a time; a client that has its answer does not count any more."""
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        yield
        with self.lock:
            self.running -= 1

    def bodies(self, path: str = "") -> list[dict[str, Any]]:
        """What was posted, to one path or anywhere."""
        return [body for to, body, _ in self.seen if path in to and body]


def tokens_of(body: dict[str, Any]) -> list[int]:
    """A token for each byte; a chat begins with one more."""
    if "messages" in body:
        return [1, *"\n".join(m["content"] for m in body["messages"]).encode()]
    text = next(body[key] for key in ("prompt", "text", "input_ids") if body.get(key) is not None)
    return list(text.encode()) if isinstance(text, str) else list(text)


def picks_of(ids: list[int], rows: int) -> np.ndarray:
    """uint8 [rows, LAYERS, TOP_K], a function of the prompt; the dense layer is zeros."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(str(ids).encode()).digest()[:8], "big"))
    picks = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (rows, LAYERS, 1)), axis=2)[..., :TOP_K].copy()
    picks[:, DENSE] = 0
    return picks


def new_of(body: dict[str, Any]) -> int:
    """How many tokens a body gets: all it asks for, or fewer, as if an end of sequence came."""
    most = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
    return min(most, 2 + len(tokens_of(body)) % 7)


def npy(picks: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, picks)
    return base64.b64encode(file.getvalue()).decode()


def answer(engine: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A response as the engine sends it (shared reference: sections 2.2 and 3.1)."""
    ids, new = tokens_of(body), new_of(body)
    picks = picks_of(ids, len(ids) + new - 1)
    usage = {"prompt_tokens": len(ids), "completion_tokens": new, "total_tokens": len(ids) + new}
    plain = base64.b64encode(picks.astype("<i4").tobytes()).decode()
    asked = body.get("return_routed_experts")
    if path == "/generate":
        meta = {**usage, "dp_rank": len(ids) % 4, "finish_reason": {"type": "length"}}
        return {"text": "..", "meta_info": {**meta, "routed_experts": plain} if asked else meta}
    choice: dict[str, Any] = {"index": 0, "text": "..", "finish_reason": "length", "routed_experts": None}
    response = {"model": body["model"], "choices": [choice], "usage": usage}
    if engine == "vllm":
        choice["routed_experts"] = npy(picks)
    elif engine == "dynamo":
        data = base64.b64encode(picks.tobytes()).decode()
        response["nvext"] = {"routed_experts": {"data": data, "shape": list(picks.shape), "dtype": "uint8", "start": 0}}
    elif engine == "sglang" and asked:
        response["sglext"] = {"routed_experts": plain}
    if body.get("return_token_ids") and engine == "vllm":
        (response if "messages" in body else choice)["prompt_token_ids"] = ids
        choice["token_ids"] = list(range(new))
    return response


class _Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._respond({})

    def do_POST(self) -> None:
        self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _respond(self, body: dict[str, Any]) -> None:
        fake, path = self.fake, self.path
        with fake.lock:
            before = sum(1 for to, sent, _ in fake.seen if (to, sent) == (path, body))
            fake.seen.append((path, body, dict(self.headers)))
        fault = fake.fault(path, before)
        if isinstance(fault, bytes | list):
            for block in [fault] if isinstance(fault, bytes) else fault:
                self.wfile.write(block)
                self.wfile.flush()
                fake.closing.wait(0.05 if isinstance(fault, list) else 0)
        elif fault is not None or path in fake.paths:
            status, headers = fault if isinstance(fault, tuple) else (fault or 404, {})
            error = {"error": {"message": f"about {body}", "type": "BadRequestError", "param": "max_tokens"}}
            self._send(status, error, headers)
        else:
            with fake.under_way():
                fake.closing.wait(fake.delay(body))
            self._send(200, self._good(path, body), {})

    def _good(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"object": "list", "data": self.fake.models}
        if path in ("/version", "/server_info"):
            return {"version": "1.2.3", "launch_command": "--api-key secret"}
        if path == "/tokenize":
            return {"tokens": tokens_of(body), "count": len(tokens_of(body))}
        return answer(self.fake.engine, path, body)

    def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serve(fake: Fake, certificate: Path | None = None) -> Iterator[Fake]:
    """Run it until the block ends; `fake.url` says where. With a certificate (and its key): over TLS."""
    server = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    fake.url = f"http{'s' * (certificate is not None)}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
