"""Serves upstream blobs to devices from the cache, from a fetch under way, or from a new fetch.

The upstream must first admit the client for this repository and this blob. It is asked with the
credentials that a plain relay would send. A blob cached for one repository is never available just
because a client knows its digest.
"""

from __future__ import annotations

from collections import OrderedDict

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.concurrency.single_flight import Shared
from obdelta.errors import ObdeltaError, StoreFull
from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials, Upstream
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.web.bodies import send_file
from obdelta.web.devices.growing_responses import send_known

log = Logger()

KEEP_LEAVE = 60.0
"""Seconds for which an upstream permission to pull a blob is cached, as a pull asks repeatedly."""
_KEPT = 8192
_Key = tuple[Credentials, str, Digest]


class PullThrough:
    """Serves blobs of up to ``most`` bytes; larger ones are better relayed than cached."""

    def __init__(
        self,
        upstream: Upstream,
        blobs: UpstreamBlobs,
        catalogue: Catalogue,
        clock: IReactorTime,
        most: int,
    ) -> None:
        self._upstream, self._blobs, self._catalogue = upstream, blobs, catalogue
        self._clock, self._most = clock, most
        self._permissions: OrderedDict[_Key, tuple[float, int]] = OrderedDict()
        self._lookups: Shared[_Key, int | None] = Shared()

    async def serve(
        self, request: Request, repository: str, digest: Digest, credentials: Credentials
    ) -> bool:
        """Sends a blob. Returns False, with nothing sent, if a plain relay should answer (for
        refusals above all).
        """
        size = await self._permitted_size(repository, digest, credentials)
        if size is None or size > self._most:
            return False
        kept = self._blobs.kept(digest)
        if kept is not None:
            with kept:
                if kept.size != size:
                    return False
                self._count("hit")
                self._set_headers(request, digest)
                send_file(request, kept.path, size, f'"{digest}"')
                return True
        if request.method == b"HEAD" or not self._blobs.takes:
            return False
        return await self._fetched(request, repository, Descriptor("", digest, size), credentials)

    async def _permitted_size(
        self, repository: str, digest: Digest, credentials: Credentials
    ) -> int | None:
        """Returns the blob's size if the upstream lets the client pull it, else None."""
        key = (credentials, repository, digest)
        kept = self._permissions.get(key)
        if kept is not None and kept[0] > self._clock.seconds():
            return kept[1]
        return await self._lookups.do(key, lambda: self._look_up(key))

    async def _look_up(self, key: _Key) -> int | None:
        credentials, repository, digest = key
        try:
            size = await self._upstream.blob_size(repository, digest, credentials, patient=False)
        except ObdeltaError:
            return None  # The relay meets the error again and passes on the registry's own answer.
        if size is None:
            return None
        self._permissions[key] = (self._clock.seconds() + KEEP_LEAVE, size)
        self._permissions.move_to_end(key)
        while len(self._permissions) > _KEPT:
            self._permissions.popitem(last=False)
        return size

    async def _fetched(
        self, request: Request, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> bool:
        fetches = self._blobs.fetches
        try:
            fetch = self._blobs.join(repository, descriptor, credentials)
        except (StoreFull, OSError) as error:
            # The blob cannot be cached (no free inode, say), but the upstream still has it.
            log.warn("a blob is relayed, and not kept: {reason}", reason=str(error))
            return False
        if fetch is None:
            return False
        self._count("fetched" if self._blobs.fetches > fetches else "joined")
        try:
            self._set_headers(request, descriptor.digest)
            await send_known(request, fetch.spool, descriptor.size, f'"{descriptor.digest}"')
        except ObdeltaError as error:
            if request.startedWriting or request.finished:
                raise
            log.info("a fetch failed before its first byte: {reason}", reason=str(error))
            for name in (b"docker-content-digest", b"content-type"):
                request.responseHeaders.removeHeader(name)
            return False
        finally:
            self._blobs.leave(fetch)
        return True

    def _set_headers(self, request: Request, digest: Digest) -> None:
        request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
        request.setHeader(b"docker-content-digest", str(digest).encode("ascii"))
        request.setHeader(b"content-type", b"application/octet-stream")

    def _count(self, what: str) -> None:
        counted: Deferred[None] = ensureDeferred(self._catalogue.add(f"upstream_blob.{what}"))
        counted.addErrback(
            lambda failure: log.warn("not counted: {reason}", reason=failure.getErrorMessage())
        )
