"""Server-sent events (WHATWG HTML, section 9.2): a stream that costs a slow reader's server
nothing.

What a reader does not take is not queued: of each kind of event the newest is kept until it reads
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from twisted.web.server import Request
from zope.interface import implementer

from obdelta.concurrency.limits import Limit

_ALIVE_SECONDS = 15.0
"""A comment so often: proxies cut what is silent, and a reader that vanished is noticed."""

Attach = Callable[["EventStream"], Callable[[], None]]
"""Makes somebody send to a stream; what is returned ends that (called once, when the reader has
left or the end was sent).
"""


@implementer(IPushProducer)
class EventStream:
    """One reader. ``send`` as often as there is news; the reader's pace decides what it sees of it."""

    def __init__(self, request: Request, clock: Any) -> None:
        self._request, self._paused, self._over = request, False, False
        self._newest: dict[str, str] = {}
        self._alive = LoopingCall(self._comment)
        self._alive.clock = clock
        self._detach: Callable[[], None] | None = None
        request.setHeader(b"content-type", b"text/event-stream")
        request.setHeader(b"cache-control", b"no-store")
        # nginx in front would hold events back otherwise.
        request.setHeader(b"x-accel-buffering", b"no")
        request.notifyFinish().addBoth(self._left)
        request.registerProducer(self, True)
        self._alive.start(_ALIVE_SECONDS, now=True)

    def attach(self, attach: Attach) -> None:
        """Let it be fed for as long as the reader stays."""
        detach = attach(self)
        if self._over:
            detach()
        else:
            self._detach = detach

    def send(self, kind: str, data: str) -> None:
        """An event; ``data`` may have several lines. After the end nothing happens."""
        if self._over:
            return
        if self._paused:
            self._newest.pop(kind, None)  # to the end of the queue with it
            self._newest[kind] = data
            return
        lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        body = "".join(f"data: {line}\n" for line in lines)
        self._request.write(f"event: {kind}\n{body}\n".encode("utf-8", "backslashreplace"))

    def end(self) -> None:
        """The last event was sent; what a slow reader has not got yet is written all the same."""
        if self._over:
            return
        self.resumeProducing()
        self._request.unregisterProducer()
        self._request.finish()

    def pauseProducing(self) -> None:
        """The reader is slow."""
        self._paused = True

    def resumeProducing(self) -> None:
        """It reads again: the newest of each kind, in the order in which they came."""
        self._paused = False
        waiting, self._newest = self._newest, {}
        for kind, data in waiting.items():
            self.send(kind, data)

    def stopProducing(self) -> None:
        """The connection is gone; the request tells us so itself, once."""

    def _comment(self) -> None:
        if not self._paused and not self._over:
            self._request.write(b":\n\n")

    def _left(self, _: Failure | None) -> None:
        self._over = True
        self._newest.clear()
        if self._alive.running:
            self._alive.stop()
        if self._detach is not None:
            self._detach()


class Events:
    """An answer that goes on until the reader leaves."""

    def __init__(self, attach: Attach, clock: Any, readers: Limit) -> None:
        """``readers`` bounds how many there are at a time."""
        self._attach, self._clock, self._readers = attach, clock, readers

    def send(self, request: Request) -> None:
        """Begin. Raises TooManyRequests, before anything was written."""
        give_back = self._readers.take("")
        request.notifyFinish().addBoth(lambda _: give_back())
        if request.method == b"HEAD":
            request.setHeader(b"content-type", b"text/event-stream")
            request.finish()
        else:
            EventStream(request, self._clock).attach(self._attach)
