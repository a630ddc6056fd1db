"""Serves finished content from the store: manifests and blobs of delta images, and v2 batches.

It needs only the catalogue and the files, so every server process can use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.errors import BlobUnknown, Denied, Unavailable
from obdelta.oci import Digest
from obdelta.rootfs.delay import delay_record
from obdelta.rsync.batch import BEFORE_DONES
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.queries import CONFIGS
from obdelta.store.catalogue.records import DeltaRow, ManifestRow
from obdelta.store.catalogue.tables.device_pulls import StartedPull
from obdelta.store.file_writer import ExternalFile
from obdelta.web.delta_form import require_readable, tags_for
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.access.signed_urls import Ticket, made_of
from obdelta.web.devices.file_body import DownloadTimes, Insertion
from obdelta.web.devices.growing_batches import LengthExceeded, Padded, send_padded
from obdelta.web.devices.responses import (
    BINARY,
    LARGEST_DOCUMENT,
    Stored,
    send_document,
    send_stored,
    vary_by,
)

log = Logger()


@dataclass(frozen=True, slots=True)
class EvictedBlob:
    """A layer of a delta image that was evicted, and can be rebuilt."""

    repository: str
    digest: Digest
    size: int


class StoredContent:
    """Finds content for admitted requests, and sends manifests. A method that returns False has
    sent nothing: there is no such content.
    """

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        blobs: BlobStore,
        admission: Admission,
        times: DownloadTimes,
        now: Callable[[], float],
    ) -> None:
        self._catalogue, self._blobs = catalogue, blobs
        self._admission, self._times, self._now = admission, times, now

    async def manifest(self, request: Request, repository: str, selector: str) -> bool:
        """Sends a delta image's manifest, by digest or tag. Raises Denied if the token grants none
        of its bases.
        """
        digest: Digest | None
        if selector.startswith("sha256:"):
            digest = Digest.parse(selector)
        else:
            digest = await self._catalogue.tagged(repository, *tags_for(request, selector))
            if digest is not None:
                vary_by_engine(request)
        if digest is None:
            return False
        if request.method == b"GET":
            return await self.built_manifest(request, repository, digest)
        # An engine requests it by digest next, and fails at once if it has been removed.
        await self.record_served(digest, times=0)
        row = await self._catalogue.manifest(repository, digest)
        return row is not None and self._send_manifest(request, repository, row)

    async def built_manifest(self, request: Request, repository: str, digest: Digest) -> bool:
        """Sends a manifest by digest and records it as served, so that its blobs stay for
        a while.
        """
        row = await self._catalogue.manifest(repository, digest)
        if row is None:
            return False
        self._authorize_base(request, repository, row)
        await self.record_served(digest, self._admission.started_pull(request, repository))
        # It may have been removed before it was recorded as served.
        row = await self._catalogue.manifest(repository, digest)
        return row is not None and self._send_manifest(request, repository, row)

    def _send_manifest(self, request: Request, repository: str, row: ManifestRow) -> bool:
        self._authorize_base(request, repository, row)
        request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
        request.setHeader(b"docker-content-digest", str(row.digest).encode("ascii"))
        request.setHeader(b"content-type", row.media_type.encode("ascii"))
        send_document(request, row.raw, f'"{row.digest}"')
        return True

    def _authorize_base(self, request: Request, repository: str, row: ManifestRow) -> None:
        """Raises Denied unless the token grants one of the bases that the delta was built from for
        this repository.
        """
        for base in sorted(row.base_repositories):
            try:
                self._admission.require_pull(request, [repository, base])
            except Denied:
                continue  # this error would name a base that the client did not request
            return
        raise Denied(f"the token does not allow pull on {repository} and a base of this delta")

    async def blob(
        self, request: Request, repository: str, digest: Digest, client: str
    ) -> Stored | EvictedBlob | None:
        """Returns a config or layer of a delta image, None if the repository has no delta with it.
        Raises BlobUnknown if the blob is recorded and missing.

        Raises FormUnreadable if the client's engine cannot read it.
        """
        descriptor = await self._catalogue.blob(repository, digest)
        if descriptor is None:
            return None
        require_readable(request, descriptor)
        # Twice: it may be rebuilt while the catalogue is asked whether it was evicted.
        for _ in range(2):
            path = self._blobs.path(digest)
            if path is not None:
                try:
                    return Stored.open(
                        path,
                        descriptor.size,
                        f'"{digest}"',
                        blob_headers(digest),
                        document=descriptor.media_type in CONFIGS
                        and descriptor.size <= LARGEST_DOCUMENT,
                        pace=self._times.pace(request, repository, digest, descriptor.size, client),
                    )
                except FileNotFoundError:
                    log.debug("blob {digest} was evicted meanwhile, or cut", digest=str(digest))
            if await self._catalogue.lost(digest):
                return EvictedBlob(repository, digest, descriptor.size)
        raise BlobUnknown(digest)

    async def batch(self, request: Request, ticket: Ticket) -> Stored | Padded | None:
        """Returns the v2 batch of a verified ticket, None if there is none. Raises BlobUnknown if
        the batch is recorded and missing.
        """
        row = await self._batch(ticket)
        if row is not None and request.method == b"GET":
            await self.record_served(row.content)
            row = await self._batch(ticket)
        if row is None:
            return None
        if not ticket.length:
            return self._file(row.content, await self.delay(row, ticket))
        path = self._blobs.path(row.content)
        if path is None:
            raise BlobUnknown(row.content)
        file = ExternalFile(path, self._blobs.threads, name=ticket.made)
        file.tail = int(row.details["tail"])
        file.finished()
        return padded(file, ticket)

    async def delay(self, row: DeltaRow, ticket: Ticket) -> Insertion | None:
        """Returns the delay for the rsync of a ticket's client, None if it needs none."""
        if not ticket.delay or (at := delay_at(row)) is None:
            return None
        await self._catalogue.counters.add("v2.delayed")
        return Insertion(at, delay_record(int(row.details["sent_index"]), ticket.delay))

    async def _batch(self, ticket: Ticket) -> DeltaRow | None:
        """Returns the delta of exactly the ticket's build, or None."""
        row = await self._catalogue.delta(ticket.key)
        # A URL's content never changes: a resumed download must not mix two builds.
        if row is None or ticket.made not in (made_of(row), row.details.get("name")):
            return None
        return row

    async def send_batch(self, request: Request, body: Stored | Padded) -> None:
        """Sends a batch, complete or growing, and ends the request. Raises LengthExceeded."""
        if isinstance(body, Stored):
            send_stored(request, body)
            return
        try:
            padding = await send_padded(request, body)
        except LengthExceeded as error:
            log.warn(
                "v2 batch {name} was not sent in full: {reason}",
                name=body.file.name,
                reason=str(error),
            )
            await self._catalogue.counters.add("v2.length_exceeded")
            raise
        if padding:
            await self._catalogue.counters.add("v2.filling_bytes", padding)

    async def permanent(self, content: bytes) -> Stored:
        """Returns a small file that is always available; writes it again if it was removed. Raises
        StoreFull.
        """
        digest = Digest.of(content)
        if self._blobs.size(digest) != len(content):
            await self._blobs.put(content)
        return self._file(digest)

    def _file(self, content: Digest, insertion: Insertion | None = None) -> Stored:
        """Returns a file that belongs to no delta image, to be sent with ``insertion`` in it.
        Raises BlobUnknown.
        """
        path, size = self._blobs.path(content), self._blobs.size(content)
        if path is None or size is None:
            raise BlobUnknown(content)
        try:
            return Stored.open(path, size, etag_of(content, insertion), BINARY, insertion)
        except FileNotFoundError as error:
            raise BlobUnknown(content) from error

    async def record_served(
        self, content: Digest, pull: StartedPull | None = None, *, times: int = 1
    ) -> None:
        """Records that a delta was served, which keeps it from being removed for a while. ``pull``
        is a pull that begins with it and may outlive its token.
        """
        try:
            await self._catalogue.counters.served(content, int(self._now()), pull, times=times)
        except CancelledError:
            raise  # the client has left
        except Unavailable as error:
            # A full disk must not stop stored content from being served.
            log.warn(
                "the use of {digest} was not recorded, and it may be evicted early: {reason}",
                digest=str(content),
                reason=str(error),
            )
        except Exception:
            # Nor does a fault of the note: what is served is already there.
            log.failure("the use of {digest} was not recorded", digest=str(content))


def etag_of(content: Digest, insertion: Insertion | None) -> str:
    """Returns the ETag of a file with an insertion: the same at every replica."""
    return f'"{content}"' if insertion is None else f'"{content}-{len(insertion.content)}"'


def delay_at(row: DeltaRow) -> int | None:
    """Returns the offset in a batch where a delay may be inserted. Returns None if the batch sends
    no file, or if that is unknown.
    """
    if row.details.get("sent_index") is None:
        return None
    return row.delta_bytes - int(row.details["tail"]) - BEFORE_DONES


def padded(file: ExternalFile, ticket: Ticket) -> Padded:
    """Returns a batch, complete or growing, as a body of its ticket's length."""
    return Padded(file, ticket.length, f'"{ticket.made}-{ticket.length}"')


def vary_by_engine(request: Request) -> None:
    """Declares that the response to this URL depends on the client's engine."""
    vary_by(request, b"User-Agent")


def registry_headers(digest: Digest) -> dict[bytes, bytes]:
    """Returns the headers of a registry's blob."""
    return {
        b"docker-distribution-api-version": b"registry/2.0",
        b"docker-content-digest": str(digest).encode("ascii"),
        **BINARY,
    }


def blob_headers(digest: Digest) -> dict[bytes, bytes]:
    """Returns the headers of a delta image's blob, which never changes."""
    return {**registry_headers(digest), b"cache-control": b"max-age=31536000"}
