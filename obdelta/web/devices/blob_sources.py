"""Where a blob or batch comes from: the store, a file that is being written, or the upstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.inputs.blob_fetcher import Fetch, UpstreamBlobs
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.concurrency.tasks import SingleFlight
from obdelta.errors import ObdeltaError, StoreFull, Unavailable
from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials, Upstream
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.growing_file import GrowingFile
from obdelta.web.devices.access.signed_urls import Ticket, made_of
from obdelta.web.devices.rebuilt_layers import RebuiltLayers
from obdelta.web.devices.responses import BINARY, Growing, Stored
from obdelta.web.devices.stored_content import (
    EvictedBlob,
    StoredContent,
    etag_of,
    registry_headers,
)

log = Logger()

PERMISSION_SECONDS = 60.0
"""Seconds for which an upstream permission to pull a blob is cached, as a pull asks repeatedly."""
_MAX_PERMISSIONS = 8192
_LOOK_UPS = 3
_Key = tuple[Credentials, str, Digest]


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """An admitted request for a blob.

    ``client`` is the key that limits count by. ``allow`` raises Denied for a repository that the
    client's token does not grant.
    """

    request: Request
    repository: str
    digest: Digest
    credentials: Credentials
    client: str
    allow: Callable[[str], object]


class Proxied:
    """The upstream's own response is sent: the blob is not stored, and will not be."""


class PullThrough:
    """The upstream's blobs of up to ``most`` bytes: from the cache, from a fetch under way, or from
    a new fetch. Larger ones are better proxied than cached.

    The upstream must first admit the client for this repository and this blob, with the credentials
    that a proxied request would send. A blob cached for one repository is never available just
    because a client knows its digest.
    """

    def __init__(
        self,
        upstream: Upstream,
        blobs: UpstreamBlobs,
        catalogue: Catalogue,
        clock: IReactorTime,
        most: int,
    ) -> None:
        self._upstream, self._blobs, self._catalogue = upstream, blobs, catalogue
        self._most = most
        self._permissions: ExpiringMap[_Key, int] = ExpiringMap(_MAX_PERMISSIONS, clock.seconds)
        self._lookups: SingleFlight[_Key, int | None] = SingleFlight()

    async def find(
        self, repository: str, digest: Digest, credentials: Credentials, *, fetch: bool
    ) -> Stored | Growing | None:
        """Returns a cached blob, or with ``fetch`` one that is being fetched. Returns None if the
        upstream should answer itself (for refusals above all).
        """
        size = await self._permitted_size(repository, digest, credentials)
        if size is None or size > self._most:
            return None
        cached = self._blobs.kept(digest)
        if cached is not None:
            with cached:
                if cached.size != size:
                    return None
                self._count("hit")
                headers = registry_headers(digest)
                return Stored.open(cached.path, size, f'"{digest}"', headers)
        if not fetch or not self._blobs.takes:
            return None
        return self._join(repository, Descriptor("", digest, size), credentials)

    async def _permitted_size(
        self, repository: str, digest: Digest, credentials: Credentials
    ) -> int | None:
        """Returns the blob's size if the upstream lets the client pull it, else None."""
        key = (credentials, repository, digest)
        permitted = self._permissions.get(key)
        if permitted is not None:
            return permitted
        return await self._lookups.do(key, lambda: self._look_up(key))

    async def _look_up(self, key: _Key) -> int | None:
        credentials, repository, digest = key
        try:
            size = await self._upstream.blob_size(repository, digest, credentials, patient=False)
        except ObdeltaError:
            # The proxied request meets the error again and passes on the registry's own answer.
            return None
        if size is None:
            return None
        self._permissions.set(key, size, PERMISSION_SECONDS)
        return size

    def _join(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> Growing | None:
        fetches = self._blobs.fetches
        try:
            fetch = self._blobs.join(repository, descriptor, credentials)
        except (StoreFull, OSError) as error:
            # The blob cannot be cached (no free inode, for example), but the upstream still has it.
            log.warn("a blob is proxied and not cached: {reason}", reason=str(error))
            return None
        if fetch is None:
            return None
        self._count("fetched" if self._blobs.fetches > fetches else "joined")
        return self._growing(fetch)

    def _growing(self, fetch: Fetch) -> Growing:
        async def file() -> GrowingFile:
            return fetch.writer

        digest, size = fetch.descriptor.digest, fetch.descriptor.size
        return Growing(
            file,
            size,
            f'"{digest}"',
            registry_headers(digest),
            release=lambda: self._blobs.leave(fetch),
            proxy_instead=True,
        )

    def _count(self, how: str) -> None:
        counted: Deferred[None] = self._catalogue.counters.add(f"upstream_blob.{how}")
        counted.addErrback(
            lambda failure: log.warn(
                "a blob's use was not counted: {reason}", reason=failure.getErrorMessage()
            )
        )


class PublishedBatches:
    """v2 batches in the registry, where another replica has pushed them, or this one before it
    evicted them. ``credentials`` are this server's own: devices send none.
    """

    def __init__(
        self, publisher: BatchPublisher, source: PullThrough, credentials: Credentials
    ) -> None:
        self._publisher, self._source, self._credentials = publisher, source, credentials

    async def find(self, ticket: Ticket, stored: StoredContent) -> Stored | Growing | None:
        """Returns the batch of a verified ticket, fetched into the cache of upstream blobs. Returns
        None if the registry has none, or another one. Raises the registry's errors, and Unavailable
        if it cannot be cached.
        """
        repository = ticket.repository
        if not repository or ticket.length:
            return None
        row = await self._publisher.batch(
            ticket.key, repository, lambda row: made_of(row) == ticket.made
        )
        if row is None:
            return None
        insertion = await stored.delay(row, ticket)
        found = await self._source.find(repository, row.content, self._credentials, fetch=True)
        if found is None:
            raise Unavailable(
                "the batch cannot be cached here: its disk is full, or store-quota is too small"
            )
        if found.size != row.delta_bytes:
            raise Unavailable("the registry's batch does not have the size that its artifact names")
        size = found.size + len(insertion.content if insertion is not None else b"")
        return replace(
            found,
            size=size,
            etag=etag_of(row.content, insertion),
            headers=BINARY,
            insertion=insertion,
        )


class BlobSources:
    """Finds a blob: of a delta image in the store, else of the upstream."""

    def __init__(
        self, stored: StoredContent, rebuilt: RebuiltLayers, pull_through: PullThrough | None
    ) -> None:
        """``pull_through`` caches the upstream's blobs; with None they are proxied only."""
        self._stored, self._rebuilt, self._pull_through = stored, rebuilt, pull_through

    async def find(self, blob: BlobRequest) -> Stored | Growing | Proxied:
        """Returns the source of a blob, for :func:`obdelta.web.devices.responses.send`.

        Raises BlobUnknown for a delta's blob that is missing and cannot be rebuilt.
        """
        # A layer may be rebuilt, and evicted, between two look-ups.
        for _ in range(_LOOK_UPS):
            stored = await self._stored.blob(
                blob.request, blob.repository, blob.digest, blob.client
            )
            if not isinstance(stored, EvictedBlob):
                break
            rebuilt = await self._rebuilt.find(stored, blob.credentials, blob.client, blob.allow)
            if rebuilt is not None:
                return rebuilt
        else:
            raise Unavailable("the layer is evicted and rebuilt again and again: raise store-quota")
        if stored is not None:
            return stored
        source: Stored | Growing | None = None
        if self._pull_through is not None:
            fetch = blob.request.method != b"HEAD"
            source = await self._pull_through.find(
                blob.repository, blob.digest, blob.credentials, fetch=fetch
            )
        return source or Proxied()
