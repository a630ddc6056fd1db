"""The socket by which the processes of one server talk: in a folder that nobody else can enter.

A path in a socket's address may have 107 bytes; state folders lie deeper. Both ends name it by an
open descriptor of its folder (``/proc/self/fd/N/…``), which also is what a child process inherits.
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

from obdelta.net.client_address import ProxiedFactory, TrustedProxies
from obdelta.net.listen import BACKLOG

_NAME = "coordinator"


def listen_privately(
    folder: Path, factory: IProtocolFactory, reactor: Any
) -> tuple[IListeningPort, int]:
    """Makes ``folder`` (mode 0700) with a socket (0600) that gives ``factory`` connections whose
    peer is who was introduced.

    Gives back the port and a descriptor of the folder, which the caller closes after the port.
    """
    folder.mkdir(0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.setblocking(False)
            listening.bind(_address(descriptor))
            # No networks: only Unix sockets are trusted.
            introduced = ProxiedFactory(factory, TrustedProxies(()), reactor)
            port: IListeningPort = reactor.adoptStreamPort(
                listening.fileno(), socket.AF_UNIX, introduced
            )
            # After Twisted, which opens sockets to everybody and lets 50 wait: a Unix socket
            # refuses the next one at once.
            (folder / _NAME).chmod(0o600)
            listening.listen(BACKLOG)
            return port, descriptor
    except BaseException:
        os.close(descriptor)
        raise


@implementer(IStreamClientEndpoint)
class PrivateEndpoint:
    """Connects through the descriptor of the folder, on behalf of a client's IP address (``""``: it
    has none).
    """

    def __init__(self, reactor: Any, descriptor: int, client: str) -> None:
        self._endpoint = UNIXClientEndpoint(reactor, _address(descriptor))
        self._introduction = _introduction(client)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """See IStreamClientEndpoint."""
        connecting: Deferred[IProtocol] = self._endpoint.connect(
            _Introducing(protocolFactory, self._introduction)
        )
        return connecting


@implementer(IProtocolFactory)
class _Introducing:
    """Sends a PROXY header before whatever the protocol sends."""

    def __init__(self, wrapped: IProtocolFactory, introduction: bytes) -> None:
        self._wrapped, self._introduction = wrapped, introduction

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

        def introduce(transport: Any) -> None:
            transport.write(self._introduction)
            make_connection(transport)

        protocol.makeConnection = introduce
        return protocol


def _address(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}/{_NAME}"


def _introduction(client: str) -> bytes:
    # PROXY protocol, version 1. The destination is not known here, and nobody asks for it.
    if not client:
        return b"PROXY UNKNOWN\r\n"
    family, nowhere = ("TCP6", "::") if ":" in client else ("TCP4", "0.0.0.0")  # noqa: S104 - nothing is bound
    return f"PROXY {family} {client} {nowhere} 1 1\r\n".encode("ascii")
