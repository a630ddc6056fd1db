"""A real TCP proxy on loopback that records what clients send, and can reset a connection in the
middle of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from twisted.internet import reactor as installed
from twisted.internet.defer import maybeDeferred
from twisted.protocols.portforward import ProxyFactory, ProxyServer

reactor: Any = installed


class CuttingProxy:
    """``url`` leads to where ``target`` leads. ``sent`` is what clients sent, by connection;
    ``cut_after`` (bytes of one connection) resets those that send more, ``cuts`` times.
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
        """Everything that was sent, as text, in lower case: for looking for header lines."""
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
    """Before ``target`` (``http://host:port``), on a free port."""
    proxy = CuttingProxy(target)

    class Server(_Server):
        watch = proxy

    assert proxy.target.hostname is not None and proxy.target.port is not None
    factory = ProxyFactory(proxy.target.hostname, proxy.target.port)
    factory.protocol = Server
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    proxy.url = f"http://127.0.0.1:{port.getHost().port}"
    try:
        yield proxy
    finally:
        for connection in list(proxy.open):
            connection.transport.abortConnection()
        await maybeDeferred(port.stopListening)
