"""Layers of delta images that were given up for the quota: made again when a device asks, and streamed while that goes on."""

from __future__ import annotations

from collections.abc import Callable

from twisted.web.http import Request

from obdelta.builds.again import Again
from obdelta.builds.coordinator import Coordinator
from obdelta.errors import BlobUnknown
from obdelta.oci import Digest
from obdelta.registry import Credentials
from obdelta.store.catalogue import Catalogue
from obdelta.store.threads import Threads
from obdelta.web.bodies import send_range_head
from obdelta.web.finished import Finished, say_blob
from obdelta.web.growing import send_known


class MadeAgain:
    """Serves them; their size and digest are known, so that a device sees what it would see of a file."""

    def __init__(self, coordinator: Coordinator, catalogue: Catalogue, finished: Finished, threads: Threads) -> None:
        self._coordinator, self._catalogue, self._finished = coordinator, catalogue, finished
        self._threads = threads

    async def serve(
        self,
        request: Request,
        repository: str,
        digest: Digest,
        credentials: Credentials,
        asker: str,
        allow: Callable[[str], object],
    ) -> bool:
        """False: no such layer was given up here. ``allow`` raises for a base that the asker may not have."""
        evicted = await self._catalogue.evictions.of_blob(repository, digest)
        if evicted is None:
            return False
        allow(evicted.row.base_repository)
        size = next((layer.size for layer in evicted.layers if layer.digest == digest), None)
        if size is None:
            raise BlobUnknown(digest)
        if request.method == b"HEAD":
            say_blob(request, digest)
            send_range_head(request, size, f'"{digest}"')
            return True
        # From here on what is made again stays for a while.
        await self._finished.note_served(evicted.row.content)
        again = await self._coordinator.again(Again(evicted, self._threads), credentials, asker)
        file = again.file(digest)
        if file is None:
            raise BlobUnknown(digest)
        say_blob(request, digest)
        await send_known(request, file, size, f'"{digest}"')
        return True
