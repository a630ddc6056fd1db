"""Pushes an image into the registry: existing blobs are not sent again, and the manifest is sent
last.

Source: OCI distribution specification 1.1, "Push". A blob is sent by POST and one PUT with its
length (its body is not chunked), or mounted from another repository. A broken upload restarts:
distribution drops one whose connection was lost (it compares the offset that it signed with what
arrived), so it cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from twisted.logger import Logger
from twisted.web.http_headers import Headers

from obdelta.concurrency.tasks import Threads
from obdelta.errors import (
    BadRequest,
    BlobUnknown,
    Denied,
    DigestMismatch,
    Missing,
    NameUnknown,
    SizeMismatch,
    Unauthorized,
    UpstreamUnavailable,
)
from obdelta.oci import Descriptor, Digest, Manifest
from obdelta.registry.auth.credentials import Credentials
from obdelta.registry.auth.tokens import scope_of
from obdelta.registry.download import blob_size
from obdelta.registry.http.redirects import Answer
from obdelta.registry.http.request_bodies import BytesBody, FileBody
from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.http.transport_errors import TransientUpstreamError
from obdelta.registry.requests import Session, error_of

log = Logger()

_RESTART_STATUSES = frozenset((404, 416))
"""Responses to an upload that the registry no longer knows, or knows with another state."""


@dataclass(slots=True)
class PushResult:
    """The result of a push: how many blobs were present, mounted and sent, and the bytes sent."""

    present: int = 0
    mounted: int = 0
    sent: int = 0
    sent_bytes: int = 0


class Pusher:
    """Pushes over a session. Raises the errors of :class:`obdelta.registry.upstream.Upstream`."""

    def __init__(self, session: Session, threads: Threads) -> None:
        self._session, self._threads = session, threads

    async def push(
        self,
        repository: str,
        tag: str,
        manifest: Manifest,
        path: Callable[[Digest], Path | None],
        credentials: Credentials,
        *,
        mount_from: Sequence[str] = (),
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> PushResult:
        """Makes ``manifest`` the one behind ``tag``. Its blobs are at ``path(digest)``, protected
        by the caller.

        ``mount_from``: repositories that may hold some of the blobs. ``progress`` is called with
        the total of bytes sent. Raises BlobUnknown for a blob that exists neither there nor here,
        Denied, and DigestMismatch or SizeMismatch for a wrong local blob.
        """
        done = PushResult()
        for descriptor in dict.fromkeys((manifest.config, *manifest.layers)):
            if await self.has_blob(repository, descriptor, credentials):
                done.present += 1
            elif await self._mount(repository, descriptor, mount_from, credentials):
                done.mounted += 1
            else:
                await self._send_blob(repository, descriptor, path, credentials)
                done.sent += 1
                done.sent_bytes += descriptor.size
                progress(done.sent_bytes)
        await self._session.retrier().call(
            lambda: self._manifest(repository, tag, manifest, credentials)
        )
        return done

    async def has_blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> bool:
        """Returns whether the repository has the blob, with the right size."""
        scope = scope_of(repository, push=True)
        try:
            size = await blob_size(
                self._session,
                repository,
                descriptor.digest,
                credentials,
                self._session.retrier(),
                scope=scope,
            )
        except BlobUnknown:
            return False
        return size in (None, descriptor.size)

    async def _mount(
        self,
        repository: str,
        descriptor: Descriptor,
        mount_from: Sequence[str],
        credentials: Credentials,
    ) -> bool:
        """Returns whether another repository had the blob and it was mounted; otherwise no upload
        stays open.
        """
        for other in mount_from:
            if other == repository:
                continue
            query = f"mount={quote(str(descriptor.digest))}&from={quote(other, safe='')}"
            try:
                answer = await self._session.retrier().call(
                    lambda query=query, other=other: self._post(
                        repository, query, credentials, other
                    )  # type: ignore[misc]
                )
            except (Unauthorized, Denied, Missing, BadRequest) as error:
                # The credentials may allow a push here but no read there: then the blob is sent.
                log.debug(
                    "nothing is mounted from {repository}: {reason}",
                    repository=other,
                    reason=str(error),
                )
                continue
            await answer.response.discard()
            if answer.response.status == 201:
                return True
            await self._drop(repository, answer.response, credentials)
        return False

    async def _post(
        self, repository: str, query: str, credentials: Credentials, mount: str | None = None
    ) -> Answer:
        answer = await self._session.send(
            b"POST",
            f"/v2/{repository}/blobs/uploads/" + (f"?{query}" if query else ""),
            Headers(),
            credentials,
            repository,
            scope=scope_of(repository, push=True, mount=mount),
            body=lambda: BytesBody(b""),
        )
        if answer.response.status not in (201, 202):
            raise await error_of(answer, repository, NameUnknown(repository))
        return answer

    async def _drop(
        self, repository: str, response: HttpResponse, credentials: Credentials
    ) -> None:
        # Registries purge them by themselves after days, so a failure here does not matter.
        try:
            answer = await self._session.send(
                b"DELETE",
                _upload(repository, response),
                Headers(),
                credentials,
                repository,
                scope=scope_of(repository, push=True),
            )
            await answer.response.discard()
        except UpstreamUnavailable as error:
            log.debug(
                "an upload to {repository} stays open: {reason}",
                repository=repository,
                reason=str(error),
            )

    async def _send_blob(
        self,
        repository: str,
        descriptor: Descriptor,
        path: Callable[[Digest], Path | None],
        credentials: Credentials,
    ) -> None:
        place = path(descriptor.digest)
        if place is None:
            raise BlobUnknown(descriptor.digest)
        # Checked here: a body of another length than announced would look like a dropped
        # connection.
        size = (await self._threads.run(place.stat)).st_size
        if size != descriptor.size:
            raise SizeMismatch(descriptor.size, size, f"blob {descriptor.digest}")

        async def send() -> None:
            begun = await self._post(repository, "", credentials)
            await begun.response.discard()
            upload = _upload(repository, begun.response)
            answer = await self._session.send(
                b"PUT",
                f"{upload}{'&' if '?' in upload else '?'}digest={quote(str(descriptor.digest))}",
                Headers({b"content-type": [b"application/octet-stream"]}),
                credentials,
                repository,
                scope=scope_of(repository, push=True),
                body=lambda: FileBody(place, descriptor.size, self._threads),
            )
            if answer.response.status == 201:
                await answer.response.discard()
                return
            if answer.response.status in _RESTART_STATUSES:
                await answer.response.discard()
                raise TransientUpstreamError(f"{answer.response.host} lost the upload")
            raise await error_of(answer, repository, BlobUnknown(descriptor.digest))

        await self._session.retrier().call(send)

    async def _manifest(
        self, repository: str, tag: str, manifest: Manifest, credentials: Credentials
    ) -> None:
        answer = await self._session.send(
            b"PUT",
            f"/v2/{repository}/manifests/{tag}",
            Headers({b"content-type": [manifest.media_type.encode("ascii")]}),
            credentials,
            repository,
            scope=scope_of(repository, push=True),
            body=lambda: BytesBody(manifest.raw),
        )
        if answer.response.status not in (200, 201):
            raise await error_of(answer, repository, NameUnknown(repository))
        await answer.response.discard()
        stored = answer.response.header(b"docker-content-digest")
        if stored is not None and stored.startswith("sha256:") and stored != str(manifest.digest):
            raise DigestMismatch(
                manifest.digest, stored[:80], f"manifest of {repository}:{tag} in the registry"
            )


def _upload(repository: str, response: HttpResponse) -> str:
    """Returns path and query of an upload, for use at our own base URL.

    Registries behind a proxy often name a scheme or host that only the proxy knows; only our own
    base is ever connected to.
    """
    try:
        parts = urlsplit(response.header(b"location") or "")
    except ValueError:
        parts = urlsplit("")
    location = parts.path + (f"?{parts.query}" if parts.query else "")
    fit = location.isascii() and location.isprintable() and " " not in location
    if not fit or not parts.path.startswith(f"/v2/{repository}/blobs/uploads/"):
        raise UpstreamUnavailable("it redirects uploads to another host")
    return location
