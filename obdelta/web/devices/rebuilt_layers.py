"""Rebuilds evicted layers of delta images when a device asks, and streams them meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.rebuild import Rebuild
from obdelta.builds.service import DeltaService
from obdelta.concurrency.threads import Threads
from obdelta.errors import BlobUnknown, Denied, Missing, ObdeltaError, Unauthorized
from obdelta.oci import Digest
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.evictions import Evicted
from obdelta.web.bodies import send_range_head
from obdelta.web.devices.growing_responses import send_known
from obdelta.web.devices.stored_content import StoredContent, say_blob

log = Logger()

MOST_TRIED = 8
"""Maximum number of publications whose images one request looks up upstream."""


class RebuiltLayers:
    """Serves rebuilt layers. Size and digest are known, so a device sees the same response as for a
    file.
    """

    def __init__(
        self,
        coordinator: DeltaService,
        catalogue: Catalogue,
        finished: StoredContent,
        threads: Threads,
    ) -> None:
        self._coordinator, self._catalogue, self._finished = coordinator, catalogue, finished
        self._threads = threads

    async def serve(
        self,
        request: Request,
        repository: str,
        digest: Digest,
        credentials: Credentials,
        client: str,
        allow: Callable[[str], object],
    ) -> bool:
        """Serves an evicted layer. Returns False if this repository has no such layer.

        The client needs the same right as for a stored layer: to pull from the repository.
        ``allow`` raises Denied for a base that the client's token does not grant. Such publications
        are tried last, with the client's credentials.
        """
        evicted = await self._catalogue.evictions.of_blob(repository, digest)
        if not evicted:
            return False
        size = next(
            (layer.size for one in evicted for layer in one.layers if layer.digest == digest), None
        )
        if size is None:
            raise BlobUnknown(digest)
        if request.method == b"HEAD":
            say_blob(request, digest)
            send_range_head(request, size, f'"{digest}"')
            return True
        rebuild = await self._start(
            repository, digest, self._ordered(evicted, allow), credentials, client
        )
        file = rebuild.file(digest)
        if file is None:
            raise BlobUnknown(digest)
        say_blob(request, digest)
        await send_known(request, file, size, f'"{digest}"')
        return True

    def _ordered(self, evicted: Sequence[Evicted], allow: Callable[[str], object]) -> list[Evicted]:
        reached: dict[str, bool] = {}
        for one in evicted:
            base = one.row.base_repository
            if base not in reached:
                try:
                    allow(base)
                except Denied:
                    reached[base] = False
                else:
                    reached[base] = True
        return sorted(evicted, key=lambda one: not reached[one.row.base_repository])

    async def _start(
        self,
        repository: str,
        digest: Digest,
        evicted: Sequence[Evicted],
        credentials: Credentials,
        client: str,
    ) -> Rebuild:
        """Starts or joins the rebuild of the first publication whose images these credentials can
        pull.

        All publications are tried, because their order says nothing about this client's rights. The
        error names no repository but the requested one.
        """
        refusals: list[ObdeltaError] = []
        for one in evicted[:MOST_TRIED]:
            # This keeps the rebuilt layers from being evicted for a while.
            await self._finished.note_served(one.row.content)
            try:
                return await self._coordinator.rebuild(
                    Rebuild(one, self._threads), credentials, client
                )
            except (Missing, Unauthorized, Denied) as error:
                refusals.append(error)
                log.info(
                    "layer {digest} is not rebuilt from {base}: {reason}",
                    digest=str(digest),
                    base=one.row.base_repository,
                    reason=str(error),
                )
        if any(isinstance(error, Missing) for error in refusals):
            raise BlobUnknown(digest)
        raise Denied(f"these credentials do not reach the images of a layer in {repository}")
