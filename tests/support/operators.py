"""The operators' endpoint with one login, and requests to it with or without a socket."""

from __future__ import annotations

import http.client
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread

from obdelta.concurrency.tasks import Threads
from obdelta.net.client_address import ForwardedClients
from obdelta.web.operators.app import OperatorApp
from obdelta.web.operators.login import ActionGuard
from obdelta.web.request import make_site
from tests.support.web import reactor, serving_site

KEY = b"k" * 32
GUARD = ActionGuard(KEY, Threads(reactor, reactor.getThreadPool()), reactor)
LOGIN = {"authorization": f"Bearer {KEY.hex()}"}


Ask = Callable[..., "Deferred[tuple[int, dict[str, str], bytes]]"]


@asynccontextmanager
async def asking(operator_app: OperatorApp) -> AsyncIterator[Ask]:
    """Yields ``ask(method, path, body=None, **headers)``, which returns status, headers in lower
    case, body.
    """
    async with serving_site(
        make_site(operator_app, reactor, clients=ForwardedClients(None))
    ) as url:
        port = int(url.rpartition(":")[2])

        def blocking(
            method: str, path: str, body: bytes | None, headers: dict[str, str]
        ) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.request(
                    method, path, body, {name.replace("_", "-"): headers[name] for name in headers}
                )
                answer = connection.getresponse()
                return (
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    answer.read(),
                )
            finally:
                connection.close()

        def ask(
            method: str, path: str, body: bytes | None = None, **headers: str
        ) -> Deferred[tuple[int, dict[str, str], bytes]]:
            return deferToThread(blocking, method, path, body, headers)

        yield ask


class Reader:
    """A client of an endpoint, without a socket: it keeps its bytes, and pauses when the test says
    so.
    """

    def __init__(
        self, operator_app: OperatorApp, clock: Clock, request: str, host: str = "192.0.2.1"
    ) -> None:
        self.transport = StringTransport(peerAddress=IPv4Address("TCP", host, 54321))
        self.channel: Protocol = make_site(  # type: ignore[no-untyped-call] # Twisted's
            operator_app, clock, clients=ForwardedClients(None)
        ).buildProtocol(None)
        self.channel.makeConnection(self.transport)
        login = f"Authorization: {LOGIN['authorization']}"
        self.channel.dataReceived(
            f"{request} HTTP/1.1\r\nHost: localhost\r\n{login}\r\n\r\n".encode()
        )

    def got(self) -> str:
        value: bytes = self.transport.value()
        self.transport.clear()
        return value.decode()

    def cut(self) -> bool:
        return bool(self.transport.disconnecting)

    def producer(self) -> IPushProducer:
        return cast(IPushProducer, self.transport.producer)

    def leave(self) -> None:
        self.channel.connectionLost()
