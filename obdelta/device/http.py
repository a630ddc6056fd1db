"""HTTP client of a device: HTTP/1.1, a new connection each, streamed bodies, an error class for
each fault.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urljoin, urlsplit

from obdelta import __version__
from obdelta.errors import ObdeltaError

AGENT = f"Supervisor/16.1.0 (Linux; obdelta {__version__})"
CHUNK = 256 * 1024
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_ERROR = 64 * 1024


class ServerFault(ObdeltaError):
    """A server's answer is unusable for a device. ``what`` is the request, ``status`` its HTTP
    status, None without a response.
    """

    def __init__(self, what: str, why: str, *, status: int | None = None) -> None:
        self.what, self.why, self.status = what, why, status
        super().__init__(f"{what} {why}")


class Dropped(ServerFault):
    """The connection ended before the body did."""


class TimedOut(ServerFault):
    """No response within the time that a device gives it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose head has been read. ``chunks`` and ``small`` read its body, once."""

    request: str
    status: int
    headers: Mapping[str, str]
    response: http.client.HTTPResponse = field(repr=False)

    @property
    def length(self) -> int | None:
        """Returns ``Content-Length`` in bytes, None if there is none."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    def chunks(self) -> Iterator[bytes]:
        """Yields the body. Raises Dropped when the connection ends before the body does."""
        received = 0
        try:
            while chunk := self.response.read(CHUNK):
                received += len(chunk)
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise Dropped(
                self.request, f"was dropped after {received} bytes", status=self.status
            ) from error
        if self.length is not None and received != self.length:
            raise Dropped(
                self.request, f"ended after {received} of {self.length} bytes", status=self.status
            )

    def small(self, limit: int) -> bytes:
        """Returns the whole body, which may have at most ``limit`` bytes."""
        body = bytearray()
        for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise ServerFault(
                    self.request, f"answered with more than {limit} bytes", status=self.status
                )
        return bytes(body)

    def fault(self) -> ServerFault:
        """Returns the error for an unusable status, with the first reason in the body."""
        return ServerFault(
            self.request, f"answered {self.status}{_reason(self)}", status=self.status
        )


@dataclass(frozen=True, slots=True)
class Http:
    """Connection options. ``timeout`` is in seconds, for each wait on the connection and not for
    all.
    """

    user_agent: str = AGENT
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    timeout: float = 60.0
    socket: Path | None = None
    """A Unix socket for all connections, whatever the URL's host. For plain HTTP."""

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        timeout: float | None = None,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """Sends one request without following redirects. The URL is sent unescaped."""
        parts = urlsplit(url)
        request = f"{method} {parts.path}"
        target = url[url.index(parts.netloc) + len(parts.netloc) :] or "/"
        connection = self._connection(parts.scheme, parts.netloc, timeout or self.timeout)
        try:
            try:
                connection.request(
                    method,
                    target,
                    body,
                    headers={
                        "User-Agent": self.user_agent,
                        "Accept-Encoding": "identity",
                        **headers,
                    },
                )
                response = connection.getresponse()
            except TimeoutError as error:
                raise TimedOut(request, "did not answer in time") from error
            except http.client.InvalidURL as error:
                raise ServerFault(
                    request, "was not sent: the URL has a blank or control character"
                ) from error
            except (OSError, http.client.HTTPException, UnicodeEncodeError) as error:
                why = " ".join(str(error).split()) or type(error).__name__
                raise ServerFault(
                    request, f"failed at {parts.netloc.rpartition('@')[2]}: {why}"
                ) from error
            found = {name.lower(): value for name, value in response.getheaders()}
            yield Answer(request, response.status, MappingProxyType(found), response)
        finally:
            connection.close()

    @contextmanager
    def follow(
        self, url: str, headers: Mapping[str, str], authorization: str | None
    ) -> Iterator[Answer]:
        """Sends a GET and follows redirects, as an engine does for blobs. Only the first host gets
        the credentials.
        """
        first = urlsplit(url).netloc
        for _ in range(_MAX_REDIRECTS):
            own = (
                {"Authorization": authorization}
                if authorization and urlsplit(url).netloc == first
                else {}
            )
            with self.request("GET", url, {**headers, **own}) as answer:
                if answer.status not in _REDIRECTS:
                    yield answer
                    return
                if "location" not in answer.headers:
                    raise ServerFault(
                        answer.request, "redirected without a Location", status=answer.status
                    )
                url = urljoin(url, answer.headers["location"])
                if urlsplit(url).scheme not in ("http", "https"):
                    raise ServerFault(
                        answer.request, "redirected away from HTTP", status=answer.status
                    )
        raise ServerFault(
            f"GET {urlsplit(url).path}", f"redirected more than {_MAX_REDIRECTS} times"
        )

    def _connection(self, scheme: str, host: str, timeout: float) -> http.client.HTTPConnection:
        if scheme == "https":
            context = self.tls or ssl.create_default_context()
            return http.client.HTTPSConnection(host, timeout=timeout, context=context)
        if self.socket is not None:
            return _UnixConnection(self.socket, timeout)
        return http.client.HTTPConnection(host, timeout=timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path, self._seconds = path, timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(str(self._path))


def _reason(answer: Answer) -> str:
    """Returns the message in a registry's or an API's error body, made fit for one line."""
    try:
        body = answer.small(_MAX_ERROR)
    except ServerFault:
        return ""
    try:
        text = json.loads(body)["errors"][0]["message"]
    except (ValueError, LookupError, TypeError):
        text = body.decode("utf-8", "replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return f": {text[:200]}" if text else ""
