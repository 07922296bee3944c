"""Asking a server: retries, limits, refusals, and what never goes into a message."""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_server import Fake, serve
from moeplan.errors import ServerError, UsageError
from moeplan.record import http_client as module
from moeplan.record.http_client import Server, ServerOptions

#: Of localhost, signed by itself, valid for a century; the key protects nothing.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUa2LprnueQQTtAo8Iq2n96Wec1+UwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyODEyNTQxNloYDzIxMjYxMTA0
MTI1NDE2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQnoom572P57CVk6zvDratzAuUc14oHf8K8OAGF5eyyovbPEqvOHENq
4a4PnhWL7/Ev7keZgdlSc1RczEgZKJVGo28wbTAdBgNVHQ4EFgQUJGzlrkC3MI65
IBL6y9hvfMGVO8AwHwYDVR0jBBgwFoAUJGzlrkC3MI65IBL6y9hvfMGVO8AwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgOztnEZP+8oLjPJAVBLR0Bi7TqsJTJimj5YnzOaf+8ckCIEzL
0MtAtmKxcmq5woHNxbBfXHlhcz7sbhhUdpUU6mH1
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgURD9Z/mX4YX4/3CG
FgIxVYTPjSGV4SfkhtZYN+l2S+mhRANCAAQnoom572P57CVk6zvDratzAuUc14oH
f8K8OAGF5eyyovbPEqvOHENq4a4PnhWL7/Ev7keZgdlSc1RczEgZKJVG
-----END PRIVATE KEY-----
"""
BODY = {"model": "m", "prompt": "secret words", "max_tokens": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve(Fake()) as running:
        yield running


def ask(fake: Fake, where: str | None = "p.jsonl, row 3", **options: Any) -> dict[str, Any]:
    return Server(fake.url, options=ServerOptions(**options)).post("/v1/completions", BODY, where=where)


CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "fault",
    [
        408,
        429,
        500,
        502,
        503,
        599,
        CUT,
        CHUNKED + b"ff\r\n{",
        CHUNKED + b"zz\r\n",
        b"",
        b"HTTP/1.1 2",
        b"what?\r\n\r\n",
    ],
)
def test_what_may_pass_is_tried_again(fake: Fake, fault: Any) -> None:
    fake.fault = lambda path, before: fault if before < 2 else None
    assert ask(fake)["usage"]["completion_tokens"] == 3
    assert len(fake.seen) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "answers 503 BadRequestError, max_tokens"),
        ((429, {"Retry-After": "0"}), "answers 429"),
        (CUT, "closed the connection mid-response"),
        (b"", "closed the connection mid-response"),
    ],
)
def test_retries_are_bounded(fake: Fake, fault: Any, message: str) -> None:
    fake.fault = lambda path, before: fault
    with pytest.raises(ServerError) as error:
        ask(fake, retries=3)
    line = error.value.line()
    assert line.startswith(f"p.jsonl, row 3: {fake.url}/v1/completions: {message}")
    assert "(tried 4 times); make sure that the server runs, then continue with --resume" in line
    assert len(fake.seen) == 4


def test_nobody_there() -> None:
    with serve(Fake()) as gone:
        pass
    server = Server(gone.url, options=ServerOptions(retries=1))
    with pytest.raises(ServerError, match=r"cannot be reached \(Connection refused\); make sure that .* check --url"):
        server.get("/v1/models", retry=False)
    with pytest.raises(ServerError, match=r"cannot be reached \(Connection refused\) \(tried 2 times\)"):
        server.get("/v1/models")


def test_retry_after_is_honoured_within_a_bound(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.fault = lambda path, before: (429, {"Retry-After": "1"}) if before < 1 else None
    start = time.monotonic()
    ask(fake)
    assert time.monotonic() - start >= 1
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)
    fake.seen.clear()
    fake.fault = lambda path, before: (503, {"Retry-After": "86400"}) if before < 2 else None
    start = time.monotonic()
    ask(fake)
    assert time.monotonic() - start < 60


def test_retry_after_in_each_form() -> None:
    wait = module._retry_after
    texts = (None, "", "7", "-7", "soon", "9" * 400, "Fri, 99 Foo 2024 00:00:00 GMT")
    assert [wait(text) for text in texts] == [0, 0, 7, 0, 0, 0, 0]
    assert 25 < wait(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert wait(email.utils.formatdate(0, usegmt=True)) == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "refuses the request, BadRequestError, max_tokens (HTTP 400); its log says why"),
        (422, "refuses the request, BadRequestError, max_tokens (HTTP 422)"),
        (401, "refuses the key (HTTP 401); put the server's key into THE_KEY"),
        (403, "refuses the key (HTTP 403)"),
        (404, "unknown path or model (HTTP 404); check --url and --served-model"),
        (302, "redirects, which is not followed (HTTP 302); give the final address with --url"),
    ],
)
def test_refusals_are_final_and_quote_nothing(fake: Fake, status: int, message: str) -> None:
    fake.fault = lambda path, before: (status, {"Location": "http://127.0.0.1:1/"})
    server = Server(fake.url, key="k3y", key_name="THE_KEY")
    with pytest.raises(ServerError) as error:
        server.post("/v1/completions", BODY, where="p.jsonl, row 3")
    assert message in error.value.line() and error.value.status == status
    assert "secret" not in error.value.line() and "k3y" not in error.value.line()
    assert len(fake.seen) == 1 and fake.seen[0][2]["Authorization"] == "Bearer k3y"


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[1]", b"", b'{"a": NaN', b"[" * 100_000, b"\xff\xfe", b'{"error": 3}' + b" " * 3],
)
def test_errors_of_any_form_are_one_line(fake: Fake, body: bytes) -> None:
    fake.fault = lambda path, before: b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with pytest.raises(ServerError, match=r"refuses the request \(HTTP 400\)"):
        ask(fake)


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"", b'{"a": 1', b'{"a":' * 50_000, b"\xff\xfe", b'"\xed"'])
def test_an_answer_that_is_no_object(fake: Fake, body: bytes) -> None:
    fake.fault = lambda path, before: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with pytest.raises(ServerError, match="the response is not a JSON object; check --url"):
        ask(fake)
    assert len(fake.seen) == 1


@pytest.mark.parametrize("head", [b"Content-Length: 5000000", b"Transfer-Encoding: chunked", b"X: y"])
def test_a_huge_answer_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(module, "MAX_RESPONSE_BYTES", 100_000)
    block = b" " * 4096
    chunk = b"1000\r\n%s\r\n" % block if b"chunked" in head else block
    fake.fault = lambda path, before: b"HTTP/1.1 200 OK\r\n%s\r\n\r\n%s" % (head, chunk * 1220)
    with pytest.raises(ServerError, match="the response is larger than 100000 bytes; use a smaller --max-new-tokens"):
        ask(fake)
    assert len(fake.seen) == 1


def test_a_huge_error_is_cut_short(fake: Fake) -> None:
    fake.fault = lambda path, before: b"HTTP/1.1 400 Bad\r\nContent-Length: 5000000\r\n\r\n" + b" " * 5_000_000
    with pytest.raises(ServerError, match=r"refuses the request \(HTTP 400\)"):
        ask(fake)


def test_time_limits(fake: Fake) -> None:
    fake.delay = lambda body: 60.0
    with pytest.raises(ServerError, match=r"did not answer within 0.2 s \(--timeout\) \(tried 2 times\)"):
        ask(fake, timeout=0.2, retries=1)


def test_a_trickle_is_no_way_around_them(fake: Fake) -> None:
    fake.fault = lambda path, before: [b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", *[b" "] * 1200]
    start = time.monotonic()
    with pytest.raises(ServerError, match="did not answer within 1 s"):
        ask(fake, timeout=1, retries=0)
    assert time.monotonic() - start < 30


def test_stop_ends_waiting_at_once(fake: Fake) -> None:
    fake.delay = lambda body: 60.0
    server = Server(fake.url)
    threading.Timer(0.3, server.stop).start()
    start = time.monotonic()
    for _ in range(2):  # what is under way, and what comes later
        with pytest.raises(ServerError):
            server.post("/v1/completions", BODY)
    assert time.monotonic() - start < 30


def test_stop_ends_waiting_for_a_retry_at_once(fake: Fake) -> None:
    fake.fault = lambda path, before: (503, {"Retry-After": "50"})
    server = Server(fake.url)
    threading.Timer(0.3, server.stop).start()
    start = time.monotonic()
    with pytest.raises(ServerError, match="stopped"):
        server.post("/v1/completions", BODY)
    assert time.monotonic() - start < 30 and len(fake.seen) == 1


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cert.pem").write_text(CERTIFICATE + KEY)
    with serve(Fake(), tmp_path / "cert.pem") as fake:
        with pytest.raises(ServerError, match=r"certificate cannot be verified \(self.signed .*SSL_CERT_FILE") as error:
            Server(fake.url).post("/v1/completions", BODY)
        assert "tried" not in error.value.line() and not fake.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert Server(fake.url).post("/v1/completions", BODY)["choices"]
        fake.delay = lambda body: 60.0
        server, start = Server(fake.url), time.monotonic()
        threading.Timer(0.3, server.stop).start()
        with pytest.raises(ServerError):
            server.post("/v1/completions", BODY)
        assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "is not a valid http URL"),
        ("ftp://host", "is not a valid http URL"),
        ("http://", "is not a valid http URL"),
        ("http://host:port", "is not a valid http URL"),
        ("http://[::1", "is not a valid http URL"),
        ("http://host/?q=1", "is not a valid http URL"),
        ("http://ho st", "is not a valid http URL"),
        ("http://host/\nx", "is not a valid http URL"),
        ("http://höst", "is not a valid http URL"),
        ("http://user:pw@host", "holds a user or a password"),
    ],
)
def test_invalid_addresses(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Server(url)
    assert "pw" not in error.value.line()


def test_the_path_before_v1_is_kept_and_v1_is_not_needed() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Server(url).url == "http://h:1"
    assert Server("https://h/moe/v1/").url == "https://h/moe"


@pytest.mark.parametrize("key", ["", " ", "a\nb", "ключ"])
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(UsageError, match=r"THE_KEY is empty or holds characters that no header can carry$"):
        Server("http://h", key=key, key_name="THE_KEY")


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("nan")}, {"retries": -1}, {"retries": 101}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options))} "):
        ServerOptions(**options)
