"""Connections that end before their request is complete."""

from __future__ import annotations

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource

from obdelta.net.client_address import ForwardedClients
from obdelta.web.request import make_site
from tests.support.logs import logged

HEAD = b"GET /v2/ HTTP/1.1\r\nHost: delta.example.com\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"GET", HEAD[:19], HEAD, HEAD + b"Content-Length: 5\r\n\r\nabc"]
)
def test_an_incomplete_request_is_not_counted(sent: bytes) -> None:
    site = make_site(Resource(), Clock(), clients=ForwardedClients(None))
    peer = IPv4Address("TCP", "192.0.2.7", 1)
    channel = site.buildProtocol(peer)  # type: ignore[no-untyped-call] # Twisted's
    channel.makeConnection(StringTransport(peerAddress=peer))
    channel.dataReceived(sent)
    with logged("info", "warn", "error", "critical") as lines:
        channel.connectionLost(Failure(ConnectionError()))
    assert lines == []
