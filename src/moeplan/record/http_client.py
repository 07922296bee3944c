"""Requests to an inference server: JSON in, JSON out, with time limits, size limits and retries.

A busy or restarting server is the normal case of a long recording: 408, 429, any 5xx, a refused or broken connection
and a response that is cut short are retried, after longer and longer waits, or when the server asks (at most a minute).
Refusals (other 4xx) are final. No text of an error response is repeated, since it may quote the prompt; redirects are
not followed, since they could send the key to another host.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import tenacity

from moeplan.errors import FormatError, ServerError, UsageError
from moeplan.io.json import MAX_JSON_BYTES, decode_json

__all__ = ["KEY_VARIABLE", "Server", "ServerOptions", "connect"]

#: Environment variable that holds the server's key where no other is named.
KEY_VARIABLE = "MOEPLAN_API_KEY"
#: Seconds: to connect; before the first retry, doubled for each further one; at most, whatever `Retry-After` says.
CONNECT_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
#: A response of a size that `moeplan import` would refuse as a file is refused here as well.
MAX_RESPONSE_BYTES = MAX_JSON_BYTES
MAX_ERROR_BYTES = 64 * 1024
#: Statuses to retry besides 5xx: request timeout, too many requests.
_BUSY = (408, 429)


@dataclass(frozen=True)
class ServerOptions:
    """Time limit, retries, and where the key is.

    Attributes:
        timeout: seconds for one request, from sending it to the last byte of its response; looked at when bytes come.
        retries: how often a request is retried after a temporary failure.
        api_key_env: the environment variable that holds the server's key; by default `KEY_VARIABLE`, if it is set.
    """

    timeout: float = 600.0
    retries: int = 5
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 86400:
            raise UsageError(f"--timeout {self.timeout:g} is outside 0 to 86400 seconds")
        if not 0 <= self.retries <= 100:
            raise UsageError(f"--retries {self.retries} is outside 0 to 100")


def connect(url: str, options: ServerOptions) -> Server:
    """A server, with its key from the environment: command lines are visible to others and kept in histories.

    Raises:
        UsageError: no such variable; what `Server` raises.
    """
    if options.api_key_env is not None and options.api_key_env not in os.environ:
        raise UsageError(f"--api-key-env {options.api_key_env}: the environment has no such variable")
    name = options.api_key_env or KEY_VARIABLE
    return Server(url, key=os.environ.get(name), key_name=name, options=options)


class _TemporaryError(Exception):
    """A failure that may pass; `wait` is the seconds that the server asks for."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class Server:
    """One server; any number of threads may send requests at a time, each on its own connection.

    Args:
        url: http or https, host, port, and a path before the server's own if there is one; a final `/v1` is dropped.
        key: sent as a bearer token.
        key_name: where the key comes from, for messages.

    Raises:
        UsageError: an invalid URL, or one that holds a password; a key that no header can carry.
    """

    def __init__(
        self, url: str, *, key: str | None = None, key_name: str = "the API key", options: ServerOptions | None = None
    ) -> None:
        options = options or ServerOptions()
        address = _parse_url(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise UsageError(f"{key_name} is empty or holds characters that no header can carry")
        self.url = str(address).rstrip("/").removesuffix("/v1").rstrip("/")
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "moeplan"}
        headers |= {"Accept-Encoding": "identity", "Connection": "close"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(
            headers=headers,
            # The system's certificates and SSL_CERT_FILE, not those that httpx brings along.
            verify=ssl.create_default_context() if address.scheme == "https" else False,
            timeout=httpx.Timeout(options.timeout, connect=min(CONNECT_SECONDS, options.timeout)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )
        self._key_name, self._options = key_name, options
        self._stopped, self._open, self._lock = threading.Event(), set[socket.socket](), threading.Lock()

    def get(self, path: str, *, retry: bool = True) -> dict[str, Any]:
        """The JSON object at a path; without `retry`, a server that cannot be reached is an error at once."""
        return self._request("GET", path, None, tries=self._options.retries + 1 if retry else 1)

    def post(self, path: str, body: dict[str, Any], *, where: str | None = None) -> dict[str, Any]:
        """The JSON object that answers a body.

        Args:
            where: what an error should call this request (a file and row).

        Raises:
            ServerError: it refuses, keeps failing, or its response is not a JSON object of bounded size.
        """
        return self._request("POST", path, json.dumps(body).encode(), tries=self._options.retries + 1, where=where)

    def stop(self) -> None:
        """Interrupt every request in progress or waiting for its retry; later ones fail."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # it may have ended by itself
                    connection.shutdown(socket.SHUT_RDWR)

    def _request(
        self, method: str, path: str, body: bytes | None, *, tries: int, where: str | None = None
    ) -> dict[str, Any]:
        place = f"{where}: {self.url}{path}" if where else f"{self.url}{path}"
        # tenacity and not stamina: its waits end when an event is set, so that Ctrl-C does not wait for a retry.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TemporaryError),
            stop=tenacity.stop_any(tenacity.stop_after_attempt(tries), tenacity.stop_when_event_set(self._stopped)),
            wait=_wait_seconds,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, place)
        except _TemporaryError as error:
            often = f" (tried {tries} times)" if tries > 1 else ""
            then = "continue with --resume" if where else "check --url"
            hint = f"make sure that the server runs, then {then}"
            raise ServerError(f"{error}{often}", where=place, hint=hint) from None

    def _once(self, method: str, path: str, body: bytes | None, place: str) -> dict[str, Any]:
        """One attempt on a connection of its own."""
        if self._stopped.is_set():
            raise _TemporaryError("stopped")
        deadline = time.monotonic() + self._options.timeout
        with (
            _explained(place, self._client.timeout),
            self._interruptible() as trace,
            self._client.stream(method, self.url + path, content=body, extensions={"trace": trace}) as response,
        ):
            data = _read_body(response, deadline, place)
        if response.status_code in _BUSY or response.status_code >= 500:
            why = f"answers {response.status_code} {_error_kind(data)}".rstrip()
            raise _TemporaryError(why, _retry_after(response.headers.get("Retry-After")))
        if response.status_code != 200:
            raise self._refusal(response.status_code, data, place)
        try:
            value = decode_json(data, where=place)
        except FormatError:
            value = None
        if not isinstance(value, dict):
            raise ServerError("the response is not a JSON object", where=place, hint="check --url")
        return value

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[Callable[[str, dict[str, Any]], None]]:
        """A hook for httpx that keeps the sockets of a request where `stop` finds them."""
        own: list[socket.socket] = []

        def trace(event: str, info: dict[str, Any]) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                own.append(info["return_value"].get_extra_info("socket"))
                with self._lock:
                    self._open.add(own[-1])
                if self._stopped.is_set():
                    raise _TemporaryError("stopped")

        try:
            yield trace
        finally:
            with self._lock:
                self._open.difference_update(own)

    def _refusal(self, status: int, data: bytes, place: str) -> ServerError:
        if status in (401, 403):
            why, hint = "refuses the key", f"put the server's key into {self._key_name}"
        elif status in (404, 405):
            why, hint = "unknown path or model", "check --url and --served-model"
        elif 300 <= status < 400:
            why, hint = "redirects, which is not followed", "give the final address with --url"
        else:
            why, hint = f"refuses the request, {_error_kind(data)}".rstrip(", "), "its log says why"
        return ServerError(f"{why} (HTTP {status})", where=place, hint=hint, status=status)


def _parse_url(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.userinfo:
        raise UsageError("--url holds a user or a password", hint="use an API key from the environment")
    plain = url.isascii() and url.isprintable() and " " not in url
    if address.scheme not in ("http", "https") or not address.host or address.query or address.fragment or not plain:
        raise UsageError("--url is not a valid http URL", hint="give e.g. --url http://127.0.0.1:8000")
    return address


@contextlib.contextmanager
def _explained(place: str, limits: httpx.Timeout) -> Iterator[None]:
    """What went wrong with a connection, as a temporary failure, or a final one; nothing that the server sent."""
    try:
        yield
    except httpx.ConnectTimeout:
        raise _TemporaryError(f"cannot be reached within {limits.connect:g} s") from None
    except httpx.TimeoutException:
        raise _TemporaryError(f"did not answer within {limits.read:g} s (--timeout)") from None
    except httpx.RemoteProtocolError as error:
        cut = re.match("peer closed|Server disconnected", str(error))
        why = "closed the connection mid-response" if cut else "the response is not valid HTTP"
        raise _TemporaryError(why) from None
    except httpx.TransportError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise ServerError(
                f"its certificate cannot be verified ({cause.verify_message})",
                where=place,
                hint="name the authority's certificate in SSL_CERT_FILE",
            ) from None
        why = (cause.strerror if cause else None) or type(cause or error).__name__
        raise _TemporaryError(f"cannot be reached ({why})") from None


def _read_body(response: httpx.Response, deadline: float, place: str) -> bytes:
    """The whole body, block by block, so that both its size and the time it takes are bounded."""
    good = response.status_code == 200
    limit = MAX_RESPONSE_BYTES if good else MAX_ERROR_BYTES
    data = bytearray()
    for block in response.iter_raw():
        data += block
        if len(data) > limit:
            if not good:
                return b""  # no server explains itself at such length
            hint = "use a smaller --max-new-tokens"
            raise ServerError(f"the response is larger than {limit} bytes", where=place, hint=hint)
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("")
    return bytes(data)


def _error_kind(data: bytes) -> str:
    """The type and field of an error, where the response has them as words; never its text."""
    try:
        error = decode_json(data, where="")["error"]
        words = [error.get("type"), error.get("param")]
    except (FormatError, AttributeError, LookupError, TypeError):
        return ""
    return ", ".join(word for word in words if isinstance(word, str) and re.fullmatch(r"[A-Za-z_. ]{1,40}", word))


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt, random so that several threads do not return at the same moment."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _TemporaryError) else 0.0
    back_off = min(FIRST_WAIT * 2.0 ** (state.attempt_number - 1), LONGEST_WAIT)
    return min(max(asked, back_off * random.uniform(0.75, 1.25)), LONGEST_WAIT)


def _retry_after(text: str | None) -> float:
    """Seconds of a `Retry-After`, given in seconds or as a date (RFC 9110, 10.2.3); 0 without one."""
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
