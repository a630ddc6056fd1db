"""How long devices take to download and apply layers of deltas, measured while the server sends.

Engines apply a layer while they download it, so a device takes bytes as fast as its link and its
processor allow. The first bytes only fill buffers of sockets and proxies. Therefore only the second
half of a body counts: buffers are full by then, and take a byte only after the device took one.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.errors import ObdeltaError
from obdelta.oci import Digest
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.tables.device_downloads import Download
from obdelta.web.user_agents import engine_form, user_agents

log = Logger()

MIN_BYTES = 1 << 20
"""Smaller bodies fit into buffers, and are not measured."""
MAX_UNEVEN = 3.0
"""The third and the fourth quarter of a body may differ in time by this factor. Beyond it, buffers
were still being filled, or the device or its link stood still.
"""
MAX_OWN = 0.1
"""The part of the time that the server may have waited for its own disk."""


class DownloadPace:
    """Times the second half of a body of ``size`` bytes. ``done`` gets the seconds that the whole
    body would take at this pace; it is not called for a download that says nothing.
    """

    def __init__(self, size: int, clock: IReactorTime, done: Callable[[float], None]) -> None:
        self._size, self._clock, self._done = size, clock, done
        self._begin = self._middle = self._last = (0, 0.0)
        self._own = 0.0

    def wanted(self, sent: int) -> None:
        """Records that the connection wants more than the ``sent`` bytes that it has."""
        self._last = (sent, self._clock.seconds())
        if 2 * sent < self._size:
            self._begin, self._own = self._last, 0.0
        if 4 * sent < 3 * self._size:
            self._middle = self._last

    def read(self) -> None:
        """Counts the time since the last call of :meth:`wanted` as the server's own, not the
        device's.
        """
        self._own += self._clock.seconds() - self._last[1]

    def finished(self) -> None:
        """Reports the download, unless it says nothing."""
        (begin, began), (middle, halved), (end, ended) = self._begin, self._middle, self._last
        if not begin < middle < end:
            return
        third, fourth = (halved - began) / (middle - begin), (ended - halved) / (end - middle)
        seconds = ended - began
        if not 0 < third <= MAX_UNEVEN * fourth or not 0 < fourth <= MAX_UNEVEN * third:
            return
        if self._own <= MAX_OWN * seconds:
            self._done(seconds * self._size / (end - begin))


class DownloadTimes:
    """Measures downloads of deltas' layers, and records them in the catalogue."""

    def __init__(self, catalogue: Catalogue, clock: IReactorTime, now: Callable[[], float]) -> None:
        """``clock`` is monotonic; ``now`` gives the time of day."""
        self._catalogue, self._clock, self._now = catalogue, clock, now

    def pace(
        self, request: Request, repository: str, digest: Digest, size: int, device: str
    ) -> DownloadPace | None:
        """Returns what follows the download of a delta's blob of ``size`` bytes, None if it would
        tell nothing of the device.

        ``device`` tells devices apart: each has one vote.
        """
        if request.method != b"GET" or size < MIN_BYTES:
            return None
        engine = engine_form(user_agents(request))
        if engine is None:
            return None

        def done(seconds: float) -> None:
            download = Download(repository, digest, device, engine, seconds)
            ensureDeferred(self._record(download))

        return DownloadPace(size, self._clock, done)

    async def _record(self, download: Download) -> None:
        try:
            await self._catalogue.counters.downloaded(download, int(self._now()))
        except ObdeltaError as error:
            log.info("a download's time was not recorded: {reason}", reason=str(error))
        except Exception:
            # No one waits for this, and the device has what it came for.
            log.failure("a download's time was not recorded")
