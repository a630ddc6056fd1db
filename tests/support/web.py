"""Serve a twisted.web resource on a free loopback port for the length of a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from twisted.internet import reactor as installed
from twisted.internet.defer import maybeDeferred
from twisted.web.resource import IResource
from twisted.web.server import Site

reactor: Any = installed
"""The reactor that pytest-twisted runs; its module is not typed as one."""


@asynccontextmanager
async def serving(resource: IResource) -> AsyncIterator[str]:
    """Gives the URL, ``http://127.0.0.1:<port>``."""
    async with serving_site(Site(cast(Any, resource))) as url:
        yield url


@asynccontextmanager
async def serving_site(site: Site) -> AsyncIterator[str]:
    """The same for a whole site."""
    port = reactor.listenTCP(0, site, interface="127.0.0.1")
    try:
        yield f"http://127.0.0.1:{port.getHost().port}"
    finally:
        await maybeDeferred(port.stopListening)
