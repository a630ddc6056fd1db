"""Evicted layers of delta images: rebuilt when a device asks, and sent while they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.logger import Logger

from obdelta.builds.rebuild import Rebuild
from obdelta.builds.service import DeltaService
from obdelta.concurrency.tasks import Threads
from obdelta.errors import BlobUnknown, Denied, Missing, ObdeltaError, Unauthorized
from obdelta.oci import Digest
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.evictions import Evicted
from obdelta.store.growing_file import GrowingFile
from obdelta.web.devices.responses import Growing
from obdelta.web.devices.stored_content import EvictedBlob, StoredContent, blob_headers

log = Logger()

MAX_PUBLICATIONS = 8
"""Maximum number of publications whose images one request looks up upstream."""


class RebuiltLayers:
    """Finds rebuilt layers. Size and digest are known, so a device sees the same response as for a
    file.
    """

    def __init__(
        self,
        service: DeltaService,
        catalogue: Catalogue,
        stored: StoredContent,
        threads: Threads,
    ) -> None:
        self._service, self._catalogue, self._stored = service, catalogue, stored
        self._threads = threads

    async def find(
        self,
        blob: EvictedBlob,
        credentials: Credentials,
        client: str,
        allow: Callable[[str], object],
    ) -> Growing | None:
        """Returns an evicted layer, which is rebuilt once it is sent. Returns None if it is stored
        again.

        The client needs the same right as for a stored layer: to pull from the repository.
        ``allow`` raises Denied for a base that the client's token does not grant. Such publications
        are tried last, with the client's credentials.
        """
        evicted = await self._catalogue.evictions.of_blob(blob.repository, blob.digest)
        if not evicted:
            return None
        if not any(layer.digest == blob.digest for one in evicted for layer in one.layers):
            raise BlobUnknown(blob.digest)

        async def rebuild() -> GrowingFile:
            return await self._start(blob, _ordered(evicted, allow), credentials, client)

        return Growing(rebuild, blob.size, f'"{blob.digest}"', blob_headers(blob.digest))

    async def _start(
        self,
        blob: EvictedBlob,
        evicted: Sequence[Evicted],
        credentials: Credentials,
        client: str,
    ) -> GrowingFile:
        """Starts or joins the rebuild of the first publication whose images these credentials can
        pull.

        All publications are tried, because their order says nothing about this client's rights. The
        error names no repository but the requested one.
        """
        refusals: list[ObdeltaError] = []
        for one in evicted[:MAX_PUBLICATIONS]:
            # This keeps the rebuilt layers from being evicted for a while.
            await self._stored.record_served(one.row.content)
            try:
                rebuild = await self._service.rebuild(
                    Rebuild(one, self._threads), credentials, client
                )
            except (Missing, Unauthorized, Denied) as error:
                refusals.append(error)
                log.info(
                    "layer {digest} is not rebuilt from {base}: {reason}",
                    digest=str(blob.digest),
                    base=one.row.base_repository,
                    reason=str(error),
                )
            else:
                return _file_of(rebuild, blob.digest)
        if any(isinstance(error, Missing) for error in refusals):
            raise BlobUnknown(blob.digest)
        raise Denied(
            "the credentials do not allow pull on the images of an evicted layer in"
            f" {blob.repository}"
        )


def _file_of(rebuild: Rebuild, digest: Digest) -> GrowingFile:
    file = rebuild.file(digest)
    if file is None:
        raise BlobUnknown(digest)
    return file


def _ordered(evicted: Sequence[Evicted], allow: Callable[[str], object]) -> list[Evicted]:
    """Returns the publications, those first whose base the client's token grants."""
    granted: dict[str, bool] = {}
    for one in evicted:
        base = one.row.base_repository
        if base not in granted:
            try:
                allow(base)
            except Denied:
                granted[base] = False
            else:
                granted[base] = True
    return sorted(evicted, key=lambda one: not granted[one.row.base_repository])
