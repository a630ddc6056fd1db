"""The Unix socket between the processes of one server, in a directory that no other user can enter.

A path in a socket's address may have 107 bytes, and state directories are deeper. Both ends name it
by an open descriptor of its directory (``/proc/self/fd/N/…``), which a child process can inherit.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor
from obdelta.net.client_address import ProxiedFactory, TrustedProxies
from obdelta.net.listen import BACKLOG

_NAME = "coordinator"


def listen_on_private_socket(
    folder: Path, factory: IProtocolFactory, reactor: IReactor
) -> tuple[IListeningPort, int]:
    """Makes ``folder`` (mode 0700) with a socket (0600). Connections of ``factory`` have the client
    that the sender named as their peer.

    Returns the port and a descriptor of the directory. The caller closes the descriptor after the
    port.
    """
    folder.mkdir(0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.setblocking(False)
            listening.bind(_address(descriptor))
            # No networks: only Unix sockets are trusted.
            proxied_factory: Any = ProxiedFactory(factory, TrustedProxies(()), reactor)
            port: IListeningPort = reactor.adoptStreamPort(
                listening.fileno(), socket.AF_UNIX, proxied_factory
            )
            # Set after Twisted, which opens sockets to all users and lets 50 connections wait. A
            # full backlog of a Unix socket refuses the next one at once.
            (folder / _NAME).chmod(0o600)
            listening.listen(BACKLOG)
            return port, descriptor
    except BaseException:
        os.close(descriptor)
        raise


@implementer(IStreamClientEndpoint)
class PrivateEndpoint:
    """Connects through the descriptor of the directory, on behalf of a client's IP address (``""``:
    none).
    """

    def __init__(self, reactor: IReactor, descriptor: int, client: str) -> None:
        self._endpoint = UNIXClientEndpoint(reactor, _address(descriptor))
        self._proxy_header = _proxy_header(client)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """See IStreamClientEndpoint."""
        connecting: Deferred[IProtocol] = self._endpoint.connect(
            _WithProxyHeader(protocolFactory, self._proxy_header)
        )
        return connecting


@implementer(IProtocolFactory)
class _WithProxyHeader:
    """Sends a PROXY header before the bytes of the wrapped protocol."""

    def __init__(self, wrapped: IProtocolFactory, proxy_header: bytes) -> None:
        self._wrapped, self._proxy_header = wrapped, proxy_header

    def doStart(self) -> None:
        """See IProtocolFactory."""
        self._wrapped.doStart()

    def doStop(self) -> None:
        """See IProtocolFactory."""
        self._wrapped.doStop()

    def buildProtocol(self, addr: Any) -> Any:
        """See IProtocolFactory."""
        protocol: Any = self._wrapped.buildProtocol(addr)
        make_connection = protocol.makeConnection

        def send_header(transport: Any) -> None:
            transport.write(self._proxy_header)
            make_connection(transport)

        protocol.makeConnection = send_header
        return protocol


def _address(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}/{_NAME}"


def _proxy_header(client: str) -> bytes:
    # PROXY protocol, version 1. The destination is not known here, and not used.
    if not client:
        return b"PROXY UNKNOWN\r\n"
    family, placeholder = ("TCP6", "::") if ":" in client else ("TCP4", "0.0.0.0")  # noqa: S104 - nothing is bound
    return f"PROXY {family} {client} {placeholder} 1 1\r\n".encode("ascii")
