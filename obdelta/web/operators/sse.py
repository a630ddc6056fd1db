"""Server-sent events (WHATWG HTML, section 9.2): streams that do not queue events for slow readers.

For a slow reader only the newest event of each kind is kept until it reads again.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from twisted.web.server import Request
from zope.interface import implementer

from obdelta.concurrency.limits import RETRY_AFTER, Limit
from obdelta.errors import TooManyRequests
from obdelta.web.request import abort

_STUCK_SECONDS = 120.0
"""Seconds after which a reader that takes nothing is cut off: others want its place."""
_ALIVE_SECONDS = 15.0
"""Seconds between comments: proxies cut silent streams, and a vanished reader is noticed."""

READERS_OF_CLIENT = 16
"""Streams of one client at a time. A browser opens six at most, but several operators can share an
address: that of a proxy, or loopback.
"""

Attach = Callable[["EventStream"], Callable[[], None]]
"""Starts sending to a stream. Returns a function that stops it, called once after the reader left
or the stream ended.
"""


@implementer(IPushProducer)
class EventStream:
    """One reader's stream. A slow reader gets fewer events than ``send`` was called with."""

    def __init__(self, request: Request, clock: IReactorTime) -> None:
        self._request, self._paused, self._over = request, False, False
        self._newest: dict[str, str] = {}
        self._clock, self._paused_at = clock, 0.0
        self._alive = LoopingCall(self._comment)
        self._alive.clock = clock
        self._detach: Callable[[], None] | None = None
        request.setHeader(b"content-type", b"text/event-stream")
        request.setHeader(b"cache-control", b"no-store")
        # Otherwise an nginx in front would buffer events.
        request.setHeader(b"x-accel-buffering", b"no")
        request.notifyFinish().addBoth(self._left)
        request.registerProducer(self, True)
        self._alive.start(_ALIVE_SECONDS, now=True)

    def attach(self, attach: Attach) -> None:
        """Starts feeding the stream for as long as the reader stays."""
        detach = attach(self)
        if self._over:
            detach()
        else:
            self._detach = detach

    def send(self, kind: str, data: str) -> None:
        """Sends an event; ``data`` may have several lines. Does nothing after the end."""
        if self._over:
            return
        if self._paused:
            self._newest.pop(kind, None)  # moves it to the end of the queue
            self._newest[kind] = data
            return
        lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        body = "".join(f"data: {line}\n" for line in lines)
        self._request.write(f"event: {kind}\n{body}\n".encode("utf-8", "backslashreplace"))

    def end(self) -> None:
        """Ends the stream after writing the events that a slow reader has not received yet."""
        if self._over:
            return
        self.resumeProducing()
        self._request.unregisterProducer()
        self._request.finish()

    def pauseProducing(self) -> None:
        """Keeps only the newest event of each kind from now on, as the reader is slow."""
        self._paused, self._paused_at = True, self._clock.seconds()

    def resumeProducing(self) -> None:
        """Sends the newest event of each kind, in their order of arrival."""
        self._paused = False
        waiting, self._newest = self._newest, {}
        for kind, data in waiting.items():
            self.send(kind, data)

    def stopProducing(self) -> None:
        """Does nothing: the request itself reports the lost connection, once."""

    def _comment(self) -> None:
        if self._over:
            return
        if not self._paused:
            self._request.write(b":\n\n")
        elif self._clock.seconds() - self._paused_at >= _STUCK_SECONDS:
            abort(self._request)

    def _left(self, _: Failure | None) -> None:
        self._over = True
        self._newest.clear()
        if self._alive.running:
            self._alive.stop()
        if self._detach is not None:
            self._detach()


class Readers:
    """Bounds the streams that are open at a time: ``most`` in total, ``of_client`` for each client,
    so that no client takes all places.
    """

    def __init__(self, most: int, of_client: int = READERS_OF_CLIENT) -> None:
        self._all = Limit(most, "streams of events")
        self._clients = Limit(of_client, "streams of events for one client")

    def take(self, client: str) -> Callable[[], None]:
        """Counts a stream and returns the function that releases it. Raises TooManyRequests."""
        if self._clients.held(client) >= self._clients.most:
            raise TooManyRequests(
                f"{self._clients.refusal()}: close pages, or end commands, that are open at"
                " your address",
                RETRY_AFTER,
            )
        release_all = self._all.take("")
        release_client = self._clients.take(client)

        def release() -> None:
            release_all()
            release_client()

        return release


class Events:
    """A response that goes on until the reader leaves."""

    def __init__(
        self, attach: Attach, clock: IReactorTime, readers: Readers, client: str = ""
    ) -> None:
        """``readers`` bounds the number of streams at a time, also those of ``client``."""
        self._attach, self._clock, self._readers, self._client = attach, clock, readers, client

    def send(self, request: Request) -> None:
        """Begins the stream. Raises TooManyRequests before anything is written."""
        release = self._readers.take(self._client)
        request.notifyFinish().addBoth(lambda _: release())
        if request.method == b"HEAD":
            request.setHeader(b"content-type", b"text/event-stream")
            request.finish()
        else:
            EventStream(request, self._clock).attach(self._attach)
