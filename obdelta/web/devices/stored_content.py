"""What is finished, served from the store: manifests and blobs of delta images, and batches.

All that it takes is the catalogue and the files, so that every process of a server can do it.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """Answers requests that were admitted. What gives back False has sent nothing: there is no such
    thing here.
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
        """A delta image's manifest by digest or tag. Raises Denied: the token does not reach any of
        its bases.
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
        # An engine asks for it by digest next, and fails at once where it is gone.
        await self.note_served(digest, times=0)
        row = await self._catalogue.manifest(repository, digest)
        return row is not None and self._send_manifest(request, repository, row)

    async def built_manifest(self, request: Request, repository: str, digest: Digest) -> bool:
        """The same by digest, noted as served: from here on its blobs are not removed for a while."""
        row = await self._catalogue.manifest(repository, digest)
        if row is None:
            return False
        self._authorize_base(request, repository, row)
        await self.note_served(digest, self._admission.started_pull(request, repository))
        row = await self._catalogue.manifest(
            repository, digest
        )  # it may have been removed until it was noted
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
        """Who may pull any of the bases that a delta was made from for this repository may have it."""
        for base in sorted(row.base_repositories):
            try:
                self._admission.also(request, [repository, base])
            except Denied:
                continue  # it would name a base that this client did not ask for
            return
        raise Denied(f"the token does not allow pull on {repository} and a base of this delta")

    async def blob(self, request: Request, repository: str, digest: Digest) -> bool:
        """A config or layer of a delta image, ranges too; False too where it was given up, and can
        be made again.

        Raises BlobUnknown: it should be here, and is gone.
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
        """A v2 batch, by a ticket that has been checked. Raises BlobUnknown: it should be here, and
        is gone.
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
        """The delta of this very making."""
        row = await self._catalogue.delta(ticket.key)
        # What is behind a URL never changes: a download that is resumed must not mix two makings.
        if row is None or ticket.made not in (made_of(row), row.details.get("name")):
            return None
        return row

    async def filled(self, request: Request, file: ExternalFile, ticket: Ticket) -> None:
        """A batch, finished or growing, as a body of the length that the ticket says. Raises
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
        """A file that is not a delta image's, with an ``insertion``. Raises BlobUnknown."""
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
        """Sends a small file that is always kept; writes it again if it was removed. Raises
        StoreFull.
        """
        digest = Digest.of(content)
        if self._blobs.size(digest) != len(content):
            await self._blobs.put(content)
        self.send(request, digest)

    async def note_served(
        self, content: Digest, pull: StartedPull | None = None, *, times: int = 1
    ) -> None:
        """Keeps a delta from being removed for a while. ``pull``: begins so, and may outlive its
        token.
        """
        try:
            await self._catalogue.served(content, int(self._now()), pull, times=times)
        except Unavailable as error:
            # A full disk does not keep what is there from being served.
            log.warn(
                "serving {digest} was not noted: {reason}", digest=str(content), reason=str(error)
            )


def delay_at(row: DeltaRow) -> int | None:
    """Returns where in a batch a delay may stand; None where it has no file that was sent, or that
    is not known.
    """
    if row.details.get("sent_index") is None:
        return None
    return row.delta_bytes - int(row.details["tail"]) - BEFORE_DONES


def say_blob(request: Request, digest: Digest) -> None:
    """The headers of a delta image's blob."""
    request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
    request.setHeader(b"docker-content-digest", str(digest).encode("ascii"))
    request.setHeader(b"content-type", b"application/octet-stream")
    request.setHeader(b"cache-control", b"max-age=31536000")
