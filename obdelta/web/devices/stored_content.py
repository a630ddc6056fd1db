"""Serves finished content from the store: manifests and blobs of delta images, and v2 batches.

It needs only the catalogue and the files, so every server process can use it.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.errors import BlobUnknown, Denied, Unavailable
from obdelta.oci import Digest
from obdelta.rootfs.delay import delay_record
from obdelta.rsync.batch import BEFORE_DONES
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, ManifestRow
from obdelta.store.catalogue.started_pulls import StartedPull
from obdelta.store.file_writer import ExternalFile
from obdelta.web.bodies import Insertion, not_modified, send_file
from obdelta.web.devices.admission import Admission
from obdelta.web.devices.growing_responses import LengthExceeded, send_filled
from obdelta.web.devices.signed_urls import Ticket, made_of

log = Logger()


class StoredContent:
    """Answers admitted requests. A method that returns False has sent nothing: there is no such
    content.
    """

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        blobs: BlobStore,
        admission: Admission,
        now: Callable[[], float],
    ) -> None:
        self._catalogue, self._blobs = catalogue, blobs
        self._admission, self._now = admission, now

    async def manifest(self, request: Request, repository: str, selector: str) -> bool:
        """Sends a delta image's manifest, by digest or tag. Raises Denied if the token grants none
        of its bases.
        """
        digest: Digest | None
        if selector.startswith("sha256:"):
            digest = Digest.parse(selector)
        else:
            digest = await self._catalogue.tagged(repository, selector)
        if digest is None:
            return False
        if request.method == b"GET":
            return await self.built_manifest(request, repository, digest)
        # An engine requests it by digest next, and fails at once if it has been removed.
        await self.note_served(digest, times=0)
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
        await self.note_served(digest, self._admission.started_pull(request, repository))
        # It may have been removed before it was recorded as served.
        row = await self._catalogue.manifest(repository, digest)
        return row is not None and self._send_manifest(request, repository, row)

    def _send_manifest(self, request: Request, repository: str, row: ManifestRow) -> bool:
        self._authorize_base(request, repository, row)
        request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
        request.setHeader(b"docker-content-digest", str(row.digest).encode("ascii"))
        if not_modified(request, f'"{row.digest}"'):
            return True
        request.setHeader(b"content-type", row.media_type.encode("ascii"))
        request.setHeader(b"content-length", str(len(row.raw)).encode("ascii"))
        request.write(row.raw)
        request.finish()
        return True

    def _authorize_base(self, request: Request, repository: str, row: ManifestRow) -> None:
        """Raises Denied unless the token grants one of the bases that the delta was built from for
        this repository.
        """
        for base in sorted(row.base_repositories):
            try:
                self._admission.also(request, [repository, base])
            except Denied:
                continue  # this error would name a base that the client did not request
            return
        raise Denied(f"the token does not allow pull on {repository} and a base of this delta")

    async def blob(self, request: Request, repository: str, digest: Digest) -> bool:
        """Sends a config or layer of a delta image (ranges too). Also returns False if it was
        evicted and can be rebuilt.

        Raises BlobUnknown if the blob is recorded and missing.
        """
        descriptor = await self._catalogue.blob(repository, digest)
        if descriptor is None:
            return False
        path = self._blobs.path(digest)
        if path is None or self._blobs.size(digest) != descriptor.size:
            if await self._catalogue.lost(digest):
                return False
            raise BlobUnknown(digest)
        say_blob(request, digest)
        try:
            send_file(request, path, descriptor.size, f'"{digest}"')
        except FileNotFoundError as error:
            raise BlobUnknown(digest) from error
        return True

    async def batch(self, request: Request, ticket: Ticket) -> bool:
        """Sends the v2 batch of a verified ticket. Raises BlobUnknown if the batch is recorded and
        missing.
        """
        row = await self._batch(ticket)
        if row is not None and request.method == b"GET":
            await self.note_served(row.content)
            row = await self._batch(ticket)
        if row is None:
            return False
        if not ticket.length:
            insertion = None
            if ticket.delay and (at := delay_at(row)) is not None:
                insertion = Insertion(
                    at, delay_record(int(row.details["sent_index"]), ticket.delay)
                )
                await self._catalogue.add("v2.delayed")
            self.send(request, row.content, insertion)
            return True
        path = self._blobs.path(row.content)
        if path is None:
            raise BlobUnknown(row.content)
        file = ExternalFile(path, self._blobs.threads, name=ticket.made)
        file.tail = int(row.details["tail"])
        file.finished()
        await self.filled(request, file, ticket)
        return True

    async def _batch(self, ticket: Ticket) -> DeltaRow | None:
        """Returns the delta of exactly the ticket's build, or None."""
        row = await self._catalogue.delta(ticket.key)
        # A URL's content never changes: a resumed download must not mix two builds.
        if row is None or ticket.made not in (made_of(row), row.details.get("name")):
            return None
        return row

    async def filled(self, request: Request, file: ExternalFile, ticket: Ticket) -> None:
        """Sends a batch, finished or growing, as a body of the ticket's length. Raises
        LengthExceeded.
        """
        try:
            sent = await send_filled(
                request, file, ticket.length, f'"{ticket.made}-{ticket.length}"'
            )
        except LengthExceeded as error:
            log.warn("v2 stream {name}: {reason}", name=ticket.made, reason=str(error))
            await self._catalogue.add("v2.length_exceeded")
            raise
        if sent:
            await self._catalogue.add("v2.filling_bytes", sent)

    def send(self, request: Request, content: Digest, insertion: Insertion | None = None) -> None:
        """Sends a file that belongs to no delta image, with an ``insertion``. Raises
        BlobUnknown.
        """
        path, size = self._blobs.path(content), self._blobs.size(content)
        if path is None or size is None:
            raise BlobUnknown(content)
        request.setHeader(b"content-type", b"application/octet-stream")
        try:
            etag = f'"{content}"' if insertion is None else f'"{content}-{len(insertion.content)}"'
            send_file(request, path, size, etag, insertion)
        except FileNotFoundError as error:
            raise BlobUnknown(content) from error

    async def send_kept(self, request: Request, content: bytes) -> None:
        """Sends a small file that is always available; writes it again if it was removed. Raises
        StoreFull.
        """
        digest = Digest.of(content)
        if self._blobs.size(digest) != len(content):
            await self._blobs.put(content)
        self.send(request, digest)

    async def note_served(
        self, content: Digest, pull: StartedPull | None = None, *, times: int = 1
    ) -> None:
        """Records that a delta was served, which keeps it from being removed for a while. ``pull``
        is a pull that begins with it and may outlive its token.
        """
        try:
            await self._catalogue.served(content, int(self._now()), pull, times=times)
        except CancelledError:
            raise  # the client has left
        except Unavailable as error:
            # A full disk must not stop stored content from being served.
            log.warn(
                "serving {digest} was not noted: {reason}", digest=str(content), reason=str(error)
            )
        except Exception:
            # Nor does a fault of the note: what is served is already there.
            log.failure("serving {digest} was not noted", digest=str(content))


def delay_at(row: DeltaRow) -> int | None:
    """Returns the offset in a batch where a delay may be inserted. Returns None if the batch sends
    no file, or if that is unknown.
    """
    if row.details.get("sent_index") is None:
        return None
    return row.delta_bytes - int(row.details["tail"]) - BEFORE_DONES


def say_blob(request: Request, digest: Digest) -> None:
    """Sets the headers of a delta image's blob."""
    request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
    request.setHeader(b"docker-content-digest", str(digest).encode("ascii"))
    request.setHeader(b"content-type", b"application/octet-stream")
    request.setHeader(b"cache-control", b"max-age=31536000")
