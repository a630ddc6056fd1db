"""A test double: an upstream that misbehaves on purpose, byte by byte.

The answers that a registry should give are tested on a real one. ``upstream.script(path, answer,
…)`` queues answers for a path (the last one is repeated). An answer is called with the connection
after the request's head has arrived, and writes any bytes. ``upstream.seen`` are the requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IPushProducer, IReactorSSL
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import PrivateCertificate
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor

reactor = cast(IReactor, installed)


@dataclass(frozen=True)
class Seen:
    """One request's head; header names in lower case."""

    method: str
    path: str
    headers: dict[str, list[str]]

    def header(self, name: str) -> str | None:
        """Returns the first value."""
        return (self.headers.get(name) or [None])[0]  # type: ignore[list-item]


Answer = Callable[["Connection"], None]


class Connection(Protocol):
    """One connection; ``gone`` fires when either side closes it."""

    transport: Any

    def __init__(self, upstream: HostileUpstream) -> None:
        self._upstream = upstream
        self._head = b""
        self.request: Seen | None = None
        self.gone: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self._upstream.connections.append(self)

    def dataReceived(self, data: bytes) -> None:
        self._head += data
        while b"\r\n\r\n" in self._head:
            head, _, self._head = self._head.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers: dict[str, list[str]] = {}
            for line in lines[1:]:
                name, _, value = line.partition(":")
                headers.setdefault(name.lower(), []).append(value.strip())
            self.request = Seen(method, path, headers)
            self._upstream.answer(self, self.request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.gone.callback(None)

    def drop(self) -> None:
        """Resets the connection after the written bytes were sent."""
        self.transport.loseConnection()


@dataclass
class HostileUpstream:
    """The double; ``url`` has no path."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    _scripts: dict[str, list[Answer]] = field(default_factory=dict)

    def script(self, path: str, *answers: Answer) -> None:
        """Sets the answers at a path (without its query), one for each request."""
        self._scripts[path] = list(answers)

    def answer(self, connection: Connection, request: Seen) -> None:
        """Gives the next answer in the path's script; 404 if there is none."""
        self.seen.append(request)
        script = self._scripts.get(request.path.partition("?")[0], [response(404, b"{}")])
        (script.pop(0) if len(script) > 1 else script[0])(connection)

    def requests_to(self, path: str) -> list[Seen]:
        """Returns the requests for a path."""
        return [request for request in self.seen if request.path.partition("?")[0] == path]


@asynccontextmanager
async def hostile_upstream(
    certificate: PrivateCertificate | None = None, name: str = "127.0.0.1"
) -> AsyncIterator[HostileUpstream]:
    """Runs the double on a free loopback port; with TLS if there is a certificate."""
    upstream = HostileUpstream()

    class Connections(Factory):
        noisy = False

        def buildProtocol(self, addr: object) -> Connection:
            return Connection(upstream)

    connections: Any = Connections()
    port: Any
    if certificate is None:
        port = reactor.listenTCP(0, connections, interface="127.0.0.1")
    else:
        tls = IReactorSSL(reactor)
        port = tls.listenSSL(0, connections, certificate.options(), interface="127.0.0.1")
    upstream.url = f"{'http' if certificate is None else 'https'}://{name}:{port.getHost().port}"
    try:
        yield upstream
    finally:
        for connection in [one for one in upstream.connections if not one.gone.called]:
            connection.transport.abortConnection()
            await connection.gone
        await maybeDeferred(port.stopListening)


def head(status: int, headers: dict[str, str]) -> bytes:
    """Returns a response's head."""
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def response(status: int, body: bytes = b"", **headers: str) -> Answer:
    """Returns a complete, well-formed response; ``content_type="…"`` gives ``content-type``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(connection: Connection) -> None:
        given = {"content-length": str(len(body)), **named}
        assert connection.request is not None
        connection.transport.write(
            head(status, given) + (b"" if connection.request.method == "HEAD" else body)
        )

    return answer


def dropping(body: bytes, at: int, status: int = 200, **headers: str) -> Answer:
    """Returns a response that announces all of ``body`` and ends after ``at`` bytes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(connection: Connection) -> None:
        sent = head(status, {"content-length": str(len(body)), **named})
        connection.transport.write(sent if _is_head(connection) else sent + body[:at])
        connection.drop()

    return answer


def ranged(body: bytes, *, at: int | None = None) -> Answer:
    """Returns a correct answer to ``Range: bytes=N-`` (or to none), cut after ``at`` bytes."""

    def answer(connection: Connection) -> None:
        assert connection.request is not None
        range_header = connection.request.header("range")
        start = int(range_header.removeprefix("bytes=").rstrip("-")) if range_header else 0
        rest = body[start:]
        headers = {"content-length": str(len(rest))}
        if range_header:
            headers["content-range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        sent = head(206 if range_header else 200, headers)
        connection.transport.write(sent if _is_head(connection) else sent + rest[:at])
        if at is not None and not _is_head(connection):
            connection.drop()

    return answer


def _is_head(connection: Connection) -> bool:
    assert connection.request is not None
    return connection.request.method == "HEAD"


class Gated:
    """A correct answer to a GET (or HEAD) of ``body`` that stops after ``at`` bytes until
    :meth:`go_on` is called.
    """

    def __init__(self, body: bytes, at: int) -> None:
        self._body, self._at = body, at
        self._held: list[Connection] = []

    def __call__(self, connection: Connection) -> None:
        """As an answer."""
        sent = head(200, {"content-length": str(len(self._body))})
        connection.transport.write(sent if _is_head(connection) else sent + self._body[: self._at])
        if not _is_head(connection):
            self._held.append(connection)

    def go_on(self) -> None:
        """Sends the rest to all clients."""
        for connection in self._held:
            connection.transport.write(self._body[self._at :])
        self._held.clear()


def hanging(sent: bytes = b"") -> Answer:
    """Writes these bytes and then nothing, for ever."""
    return lambda connection: connection.transport.write(sent)


def chunked(body: bytes, *, piece: int = 1, whole: bool = True) -> Answer:
    """Returns a chunked response in pieces of ``piece`` bytes, each in a separate write; without
    the last chunk if not ``whole``.
    """

    def answer(connection: Connection) -> None:
        connection.transport.write(head(200, {"transfer-encoding": "chunked"}))
        for at in range(0, len(body), piece):
            part = body[at : at + piece]
            connection.transport.write(b"%x\r\n%s\r\n" % (len(part), part))
        if whole:
            connection.transport.write(b"0\r\n\r\n")
        else:
            connection.drop()

    return answer


@implementer(IPushProducer)
class Flood:
    """A body without an end (or of ``size`` bytes), sent as fast as the connection accepts it.
    ``sent`` counts its bytes. ``stalled`` fires when the connection has accepted nothing for a
    hundred turns of the reactor.
    """

    def __init__(self, size: int = 1 << 40, status_line: bytes | None = None) -> None:
        self.size, self.sent = size, 0
        self.stalled: Deferred[None] = Deferred()
        self._head = (
            status_line if status_line is not None else head(200, {"content-length": str(size)})
        )
        self._connection: Connection | None = None
        self._paused = False

    def __call__(self, connection: Connection) -> None:
        """As an answer."""
        self._connection = connection
        connection.transport.write(self._head)
        connection.transport.registerProducer(self, True)
        self._write()

    def _write(self) -> None:
        if self._paused or self._connection is None:
            return
        piece = bytes(min(64 * 1024, self.size - self.sent))
        self.sent += len(piece)
        self._connection.transport.write(piece)
        if self._connection is not None and self.sent == self.size:
            self._connection.transport.unregisterProducer()
            self._connection = None
        reactor.callLater(0, self._write)

    def pauseProducing(self) -> None:
        self._paused = True
        reactor.callLater(0, self._watch, 100)

    def resumeProducing(self) -> None:
        self._paused = False
        reactor.callLater(0, self._write)

    def stopProducing(self) -> None:
        self._connection = None

    def _watch(self, turns: int) -> None:
        if not self._paused or self._connection is None or self.stalled.called:
            return
        if turns == 0:
            self.stalled.callback(None)
        else:
            reactor.callLater(0, self._watch, turns - 1)


def small_manifest(config: bytes = b"{}", *layers: bytes) -> bytes:
    """Returns a Docker manifest of these blobs."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": _descriptor("application/vnd.docker.container.image.v1+json", config),
            "layers": [
                _descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", layer)
                for layer in layers
            ],
        }
    ).encode()


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {
        "mediaType": media_type,
        "size": len(blob),
        "digest": "sha256:" + hashlib.sha256(blob).hexdigest(),
    }
