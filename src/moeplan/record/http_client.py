"""Asking an inference server over HTTP: JSON in, JSON out, with time limits, size limits and retries.

A busy or restarting server is the normal case of a long recording: 408, 429, any 5xx, a refused or broken connection
and an answer that is cut off are tried again, later each time, and when the server asks (up to a minute). What it
refuses (other 4xx) is final. Nothing that a server says in an error is repeated, since it may quote the prompt;
redirects are not followed, since they could carry the key to somebody else.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from moeplan.errors import ServerError, UsageError
from moeplan.io.json import MAX_JSON_BYTES

__all__ = ["Server", "ServerOptions"]

#: Seconds: to connect; before the first retry, doubled for each further one; at most, whatever `Retry-After` says.
CONNECT_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
#: An answer of a size that `moeplan import` would refuse as a file is refused here as well.
MAX_ANSWER_BYTES = MAX_JSON_BYTES
MAX_ERROR_BYTES = 64 * 1024
_BLOCK = 64 * 1024
#: Worth trying again, besides all of 5xx.
_BUSY = (408, 429)


@dataclass(frozen=True)
class ServerOptions:
    """How patient to be.

    Attributes:
        timeout: seconds for one request, from sending it to the last byte of its answer.
        retries: how often a request is tried again after a failure that may pass.
    """

    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 86400:
            raise UsageError(f"--timeout {self.timeout:g} is outside 0 to 86400 seconds")
        if not 0 <= self.retries <= 100:
            raise UsageError(f"--retries {self.retries} is outside 0 to 100")


class _PassingError(Exception):
    """A failure that may pass; `wait` is the seconds that the server asks for."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class Server:
    """One server; any number of threads may ask at a time, each request on a connection of its own.

    Args:
        url: http or https, host, port, and a path before the server's own if there is one; a final `/v1` is dropped.
        key: sent as a bearer token.
        key_name: where the key comes from, for messages.

    Raises:
        UsageError: a URL that is none, or holds a password; a key that no header can carry.
    """

    def __init__(
        self, url: str, *, key: str | None = None, key_name: str = "the API key", options: ServerOptions | None = None
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise UsageError("--url is no address", hint="give e.g. --url http://127.0.0.1:8000") from None
        if parts.username is not None or parts.password is not None:
            raise UsageError("--url holds a user or a password", hint="use an API key from the environment")
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not plain:
            raise UsageError("--url is no http address", hint="give e.g. --url http://127.0.0.1:8000")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise UsageError(f"{key_name} is empty or holds characters that no header can carry")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key_name, self._options = key_name, options or ServerOptions()
        self._stopped, self._open, self._lock = threading.Event(), set[socket.socket | None](), threading.Lock()

    def get(self, path: str, *, patient: bool = True) -> dict[str, Any]:
        """The JSON object at a path; not `patient`: a server that cannot be reached is an error at once."""
        return self._ask("GET", path, None, patient=patient)

    def post(self, path: str, body: dict[str, Any], *, where: str | None = None) -> dict[str, Any]:
        """The JSON object that answers a body.

        Args:
            where: what an error should call this request (a file and row).

        Raises:
            ServerError: it refuses, keeps failing, or answers with something that is no JSON object of bounded size.
        """
        return self._ask("POST", path, json.dumps(body).encode(), where=where)

    def stop(self) -> None:
        """Break off whatever is being waited for; every request under way, or made later, fails."""
        self._stopped.set()
        with self._lock:
            for connection in filter(None, self._open):
                with contextlib.suppress(OSError):  # it may have ended by itself
                    connection.shutdown(socket.SHUT_RDWR)

    def _ask(
        self, method: str, path: str, body: bytes | None, *, where: str | None = None, patient: bool = True
    ) -> dict[str, Any]:
        place = f"{where}: {self.url}{path}" if where else f"{self.url}{path}"
        tries = self._options.retries + 1 if patient else 1
        for attempt in range(tries):
            try:
                return self._once(method, path, body, place)
            except _PassingError as error:
                why, wait = str(error), max(error.wait, _back_off(attempt))
            if attempt + 1 < tries and self._stopped.wait(min(wait, LONGEST_WAIT)):
                break
        often = f" (tried {tries} times)" if tries > 1 else ""
        then = "go on with --resume" if where else "check --url"
        raise ServerError(f"{why}{often}", where=place, hint=f"see that the server runs, then {then}")

    def _once(self, method: str, path: str, body: bytes | None, place: str) -> dict[str, Any]:
        """One attempt: connect, send, read; the connection is closed whatever happens."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(CONNECT_SECONDS, self._options.timeout))
        deadline = time.monotonic() + self._options.timeout
        sock: socket.socket | None = None
        try:
            connection.connect()
            sock = connection.sock
            with self._lock:
                self._open.add(sock)
            if self._stopped.is_set():
                raise _PassingError("stopped")
            sock.settimeout(self._options.timeout)
            connection.request(method, self._path + path, body, self._headers)
            answer = connection.getresponse()
            data = _read(answer, sock, deadline, place)
        except ssl.SSLCertVerificationError as error:
            raise ServerError(
                f"its certificate cannot be verified ({error.verify_message})",
                where=place,
                hint="name the authority's certificate in SSL_CERT_FILE",
            ) from None
        except TimeoutError:
            limit = f"did not answer within {self._options.timeout:g} s (--timeout)"
            raise _PassingError(limit if sock else f"cannot be reached within {connection.timeout:g} s") from None
        except OSError as error:
            raise _PassingError(f"cannot be reached ({error.strerror or type(error).__name__})") from None
        except http.client.HTTPException as error:
            raise _PassingError(f"broke off its answer ({type(error).__name__})") from None
        finally:
            with self._lock:
                self._open.discard(sock)
            connection.close()
        if answer.status in _BUSY or answer.status >= 500:
            raise _PassingError(f"answers {answer.status} {_kind(data)}".rstrip(), _asked_wait(answer))
        if answer.status != 200:
            raise self._refusal(answer.status, data, place)
        return _object(data, place)

    def _refusal(self, status: int, data: bytes, place: str) -> ServerError:
        if status in (401, 403):
            why, hint = "refuses the key", f"put the server's key into {self._key_name}"
        elif status in (404, 405):
            why, hint = "knows no such path, or no such model", "check --url and --served-model"
        elif 300 <= status < 400:
            why, hint = "redirects, which is not followed", "give the final address with --url"
        else:
            why, hint = f"refuses the request, {_kind(data)}".rstrip(", "), "its log says why"
        return ServerError(f"{why} (HTTP {status})", where=place, hint=hint, status=status)


def _read(answer: http.client.HTTPResponse, sock: socket.socket, deadline: float, place: str) -> bytes:
    """The whole body, block by block, so that neither its size nor a trickle of bytes is without bound."""
    most = MAX_ANSWER_BYTES if answer.status == 200 else MAX_ERROR_BYTES
    blocks, size = list[bytes](), 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        block = answer.read1(_BLOCK)
        if not block:
            break
        blocks.append(block)
        size += len(block)
        if size > most:
            if answer.status != 200:
                return b""  # no server explains itself at such length
            raise ServerError(
                f"answers with more than {most} bytes", where=place, hint="use a smaller --max-new-tokens"
            )
    if answer.length:  # read1 ends quietly where a connection breaks; what was promised is still missing
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(blocks)


def _object(data: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerError("answers with no JSON object", where=place, hint="check --url")
    return value


def _kind(data: bytes) -> str:
    """The type and field of an error, if the answer names them as words; never its text, which may quote the prompt."""
    try:
        error = json.loads(data).get("error")
        words = [error.get("type"), error.get("param")]
    except (ValueError, RecursionError, AttributeError):
        return ""
    return ", ".join(word for word in words if isinstance(word, str) and re.fullmatch(r"[A-Za-z_. ]{1,40}", word))


def _back_off(attempt: int) -> float:
    """Seconds before the next attempt, spread so that several threads do not return at the same moment."""
    return min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)


def _asked_wait(answer: http.client.HTTPResponse) -> float:
    """Seconds of a `Retry-After`, given in seconds or as a date (RFC 9110, 10.2.3); 0 without one."""
    text = (answer.getheader("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
