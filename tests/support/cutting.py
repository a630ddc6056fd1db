"""A real TCP proxy on loopback that records what clients send, and can reset a connection in the
middle of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from twisted.internet import reactor as installed
from twisted.internet.defer import maybeDeferred
from twisted.protocols.portforward import ProxyFactory, ProxyServer

from obdelta.concurrency.reactor import IReactor

reactor = cast(IReactor, installed)


class CuttingProxy:
    """Forwards ``url`` to ``target``. ``sent`` is the clients' bytes, by connection. A connection
    with more than ``cut_after`` of them is reset, up to ``cuts`` times.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.url = ""
        self.sent: list[bytearray] = []
        self.cut_after: int | None = None
        self.cuts = 0
        self.open: set[Any] = set()

    @property
    def heads(self) -> str:
        """Returns all bytes of clients as lower-case text, to search for header lines."""
        return b"".join(self.sent).decode("latin-1").lower()


class _Server(ProxyServer):
    watch: CuttingProxy
    transport: Any

    def connectionMade(self) -> None:
        self.record = bytearray()
        self.watch.sent.append(self.record)
        self.watch.open.add(self)
        super().connectionMade()

    def dataReceived(self, data: bytes) -> None:
        self.record += data
        after = self.watch.cut_after
        if after is not None and self.watch.cuts and len(self.record) > after:
            self.watch.cuts -= 1
            self.transport.abortConnection()
            return
        super().dataReceived(data)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Any = None) -> None:
        self.watch.open.discard(self)
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def cutting_proxy(target: str) -> AsyncIterator[CuttingProxy]:
    """Runs a proxy before ``target`` (``http://host:port``), on a free port."""
    proxy = CuttingProxy(target)

    class Server(_Server):
        watch = proxy

    assert proxy.target.hostname is not None and proxy.target.port is not None
    factory: Any = ProxyFactory(proxy.target.hostname, proxy.target.port)
    factory.protocol = Server
    factory.noisy = False
    port: Any = reactor.listenTCP(0, factory, interface="127.0.0.1")
    proxy.url = f"http://127.0.0.1:{port.getHost().port}"
    try:
        yield proxy
    finally:
        for connection in list(proxy.open):
            connection.transport.abortConnection()
        await maybeDeferred(port.stopListening)
