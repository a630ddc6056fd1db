"""Serves a twisted.web resource on a free loopback port for a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from twisted.internet import reactor as installed
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.web.resource import IResource
from twisted.web.server import Site

from obdelta.concurrency.reactor import IReactor

reactor = cast(IReactor, installed)
"""The reactor that pytest-twisted runs; its module is not typed as one."""


def port_number(port: IListeningPort) -> int:
    """Returns the number of a listening TCP port."""
    return cast(IPv4Address | IPv6Address, port.getHost()).port


@asynccontextmanager
async def serving(resource: IResource) -> AsyncIterator[str]:
    """Yields the URL, ``http://127.0.0.1:<port>``."""
    async with serving_site(Site(cast(Any, resource))) as url:
        yield url


@asynccontextmanager
async def serving_site(site: Site) -> AsyncIterator[str]:
    """Does the same for a whole site."""
    port = reactor.listenTCP(0, cast(Any, site), interface="127.0.0.1")
    try:
        yield f"http://127.0.0.1:{port_number(port)}"
    finally:
        await maybeDeferred(port.stopListening)
