"""Upstream blobs: fetches each once for all devices and builds, and caches it.

A blob can be read while it is fetched; its last bytes only once its digest has been verified. A
cached blob grants no access: the upstream admits each client to this repository
(:meth:`UpstreamBlobs.admit`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from obdelta.concurrency.expiring_map import LruMap
from obdelta.concurrency.tasks import Event, Threads
from obdelta.errors import (
    Cancelled,
    Denied,
    Missing,
    ObdeltaError,
    StoreFull,
    Unauthorized,
)
from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials, Upstream, WrongContent
from obdelta.registry.requests import Backoff, Retrier
from obdelta.store import files
from obdelta.store.caches.digest_caches import PinnedBlob, UpstreamBlobCache
from obdelta.store.file_writer import FileWriter

log = Logger()

UNVERIFIED_TAIL = 4096
"""Bytes at a blob's end that are withheld until its digest has been verified."""
IDLE_SECONDS = 60.0
"""Seconds that a fetch continues without clients: a device that was cut off requests the rest."""
FULL_DISK_SECONDS = 60.0
"""Seconds after a full disk in which devices' downloads are not cached."""
_PERSONAL = (Unauthorized, Denied, Missing)
_KEPT = 16_384
"""Number of (repository, blob) entries that are remembered as present."""


@dataclass(slots=True, eq=False)
class Fetch:
    """A blob that is being fetched. ``users`` wait for it or read it; call
    :meth:`UpstreamBlobs.leave` once for each.
    """

    descriptor: Descriptor
    writer: FileWriter
    users: int = 0
    task: Deferred[None] | None = None
    expiry: IDelayedCall | None = None
    ended: Event = field(default_factory=Event)

    async def end(self) -> None:
        """Waits until the blob is cached. Raises the fetch's error."""
        await self.ended.wait()
        await self.writer.done()


class UpstreamBlobs:
    """The blob cache, and the fetches into it."""

    def __init__(
        self,
        upstream: Upstream,
        cache: UpstreamBlobCache,
        threads: Threads,
        clock: IReactorTime,
        make_room: Callable[[], Awaitable[object]],
        *,
        backoff: Backoff = Backoff(),  # noqa: B008 - a frozen value
    ) -> None:
        """``make_room`` is called when the disk is full. ``backoff``: between fetches that brought
        wrong bytes.
        """
        self._backoff = backoff
        self._upstream, self._cache, self._threads = upstream, cache, threads
        self._clock, self._make_room = clock, make_room
        self._fetches: dict[Digest, Fetch] = {}
        self._present: LruMap[tuple[str, Digest], bool] = LruMap(_KEPT)
        self._closed = False
        self._full_until = 0.0

    @property
    def takes(self) -> bool:
        """Whether a download may be cached. It is proxied for a while after a full disk."""
        return not self._closed and self._clock.seconds() >= self._full_until

    @property
    def fetches(self) -> int:
        """The number of blobs that are being fetched."""
        return len(self._fetches)

    async def admit(self, repository: str, digest: Digest, credentials: Credentials) -> None:
        """Raises unless the upstream has the blob in this repository (BlobUnknown, Unauthorized,
        Denied, UpstreamUnavailable).

        A manifest that names a blob does not prove that: registries accept any digest with a URL
        beside it. A success is remembered for all clients that may have the repository's manifests.
        """
        if self._present.get((repository, digest)):
            return
        await self._upstream.blob_size(repository, digest, credentials)
        self._present.set((repository, digest), True)

    def kept(self, digest: Digest) -> PinnedBlob | None:
        """Returns the blob if it is cached; the caller releases it."""
        return self._cache.pin(digest)

    def join(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> Fetch | None:
        """Joins or begins the fetch of a blob. None if a fetch with another size is under way
        (one size is wrong).

        Raises StoreFull, Cancelled.
        """
        fetch = self._fetches.get(descriptor.digest)
        if fetch is None:
            fetch = self._begin(repository, descriptor, credentials)
        elif fetch.descriptor.size != descriptor.size:
            return None
        fetch.users += 1
        if fetch.expiry is not None:
            fetch.expiry.cancel()
            fetch.expiry = None
        return fetch

    def leave(self, fetch: Fetch) -> None:
        """Removes one user. A fetch without users continues for IDLE_SECONDS only."""
        fetch.users -= 1
        if not fetch.users and self._fetches.get(fetch.descriptor.digest) is fetch:
            fetch.expiry = self._clock.callLater(IDLE_SECONDS, self._cancel, fetch)
        elif not fetch.users and fetch.task is not None:
            fetch.task.cancel()  # one that no other client could join, or that has ended

    async def fetched(
        self,
        repository: str,
        descriptor: Descriptor,
        credentials: Credentials,
        begun: Callable[[Path], None] | None = None,
    ) -> PinnedBlob:
        """Returns the whole blob; the caller releases it. Raises what :meth:`Upstream.blob` raises,
        StoreFull, Cancelled.

        Its size may differ from the descriptor's: the digest decides. Wrong bytes are fetched
        again, a few times.

        Where the blob is not cached, ``begun`` receives the growing file that becomes the blob if
        all goes well. It is called once, or several times if another client's fetch fails. The
        file is moved when the blob is whole, and removed when the fetch fails.
        """
        retrier = Retrier(self._backoff, self._clock)
        while True:
            kept = self._cache.pin(descriptor.digest)
            others = descriptor.digest in self._fetches
            try:
                if kept is not None or others:
                    await self.admit(repository, descriptor.digest, credentials)
            except BaseException:
                if kept is not None:
                    kept.release()
                raise
            if kept is not None:
                return kept
            fetch = self.join(repository, descriptor, credentials)
            if fetch is None:
                # A manifest that lies about a size must not spoil the fetch of a correct one, nor
                # wait for it for ever.
                fetch = Fetch(descriptor, self._new_writer(descriptor), 1)
                fetch.task = ensureDeferred(self._run(fetch, repository, credentials))
            try:
                if begun is not None:
                    begun(fetch.writer.temporary)
                await fetch.end()
            except _PERSONAL:
                # The error concerns the client that began the fetch: retry with these credentials.
                if not others:
                    raise
            except WrongContent as error:
                await retrier.wait(error)
            finally:
                self.leave(fetch)

    async def drop_damaged(self, blob: PinnedBlob) -> bool:
        """Reads a cached blob again. If the disk has damaged it, removes it and returns True."""
        if await self._threads.run(files.digest_of, blob.path) == blob.digest:
            return False
        log.warn("the kept blob {digest} is damaged, and is fetched again", digest=str(blob.digest))
        await self._cache.remove(blob.digest)
        return True

    def _new_writer(self, descriptor: Descriptor) -> FileWriter:
        tmp = self._cache.temporary(".blob")
        # The declared length may be wrong. The download bounds the bytes that are accepted.
        return FileWriter(
            tmp,
            self._threads,
            self._cache.place,
            length=descriptor.size,
            exact=False,
            unverified_tail=UNVERIFIED_TAIL,
            hashed=True,
        )

    def _begin(self, repository: str, descriptor: Descriptor, credentials: Credentials) -> Fetch:
        if self._closed:
            raise Cancelled("the server is stopping")
        try:
            fetch = Fetch(descriptor, self._new_writer(descriptor))
        except StoreFull:
            self._full_until = self._clock.seconds() + FULL_DISK_SECONDS
            raise
        self._fetches[descriptor.digest] = fetch
        fetch.task = ensureDeferred(self._run(fetch, repository, credentials))
        return fetch

    async def _run(self, fetch: Fetch, repository: str, credentials: Credentials) -> None:
        digest = fetch.descriptor.digest
        try:
            # This compares the digest.
            await self._upstream.blob(repository, fetch.descriptor, credentials, fetch.writer)
            self._present.set((repository, digest), True)
            await fetch.writer.finish(digest)
            self._cache.keep(digest, fetch.writer.size)
        except ObdeltaError as error:
            await fetch.writer.abort(error)
            if isinstance(error, StoreFull):
                self._full_until = self._clock.seconds() + FULL_DISK_SECONDS
                await self._make_room()
        except OSError as error:
            log.warn(
                "{digest} was not fetched: the store failed: {reason}",
                digest=str(digest),
                reason=files.error_for_log(error),
            )
            await fetch.writer.abort(files.error_for_client(error))
        except CancelledError:
            await fetch.writer.abort(Cancelled("the fetch was cancelled"))
        except Exception as error:
            log.failure("{digest} was not fetched", digest=str(digest))
            await fetch.writer.abort(error)
        finally:
            if self._fetches.get(digest) is fetch:
                del self._fetches[digest]
            if fetch.expiry is not None and fetch.expiry.active():
                fetch.expiry.cancel()
            fetch.ended.fire()

    def _cancel(self, fetch: Fetch) -> None:
        fetch.expiry = None
        if fetch.task is not None:
            fetch.task.cancel()

    async def close(self) -> None:
        """Cancels every fetch, waits until all have ended, and makes the cached blobs durable."""
        self._closed = True
        for fetch in list(self._fetches.values()):
            if fetch.task is not None:
                task = fetch.task
                task.cancel()
                await task
        await self._cache.sync()
