"""Serves the operators' pages and keeps them live: changes are batched, rendered once and sent to
every reader.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.template import tags

from obdelta.builds.service import DeltaService, RunningBuild
from obdelta.concurrency.limits import Limit
from obdelta.errors import BadRequest, ObdeltaError
from obdelta.oci import Digest
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.web.operators.pages import pair_page, status_page
from obdelta.web.operators.pages.markup import HEADERS, document, fragment
from obdelta.web.operators.pages.status_page import Known
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, Whole
from obdelta.web.operators.sse import Events, EventStream

log = Logger()

GATHER_SECONDS = 0.25
"""Changes within this time are sent together."""
REFRESH_SECONDS = 5.0
"""Seconds between look-ups of figures that no watcher reports (deltas served, the store, devices),
while there are readers.
"""
MOST_READERS = 64
RECENT, FAILURES = 25, 15
FAILURE_SECONDS = 7 * 86400
_ASSETS = {
    "page.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class StatusPages:
    """Serves ``/``, ``/events``, ``/pairs/…`` and their assets; watches the coordinator.

    ``know`` gathers the figures of the first page and may raise ObdeltaError.
    """

    def __init__(
        self,
        coordinator: DeltaService,
        catalogue: Catalogue,
        know: Callable[[], Awaitable[Known]],
        clock: Any,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._coordinator, self._catalogue, self._know, self._clock = (
            coordinator,
            catalogue,
            know,
            clock,
        )
        self._now = now
        self._streams: list[EventStream] = []
        self._readers = Limit(MOST_READERS, "readers of events")
        self._sent: dict[str, str] = {}
        self._all = False
        self._timer: IDelayedCall | None = None
        self._refresh: IDelayedCall | None = None
        self._sending: Deferred[None] | None = None
        coordinator.watchers.append(self)

    def add_to(self, routes: Routes) -> None:
        routes.page("/", self.page)
        routes.page("/events", self.events)
        routes.page("/pairs/{kind}/{recipe}/{base}/{target}", self.pair)
        for name, content_type in _ASSETS.items():
            body = resources.files("obdelta.web.operators.pages").joinpath(name).read_bytes()
            routes.page(f"/pages/{name}", _asset(Whole(body, content_type, headers={**HEADERS})))

    async def page(self, call: Call) -> Answer:
        """Returns the first page."""
        made = status_page.sections(await self._know(), self._coordinator.running)
        return await document(
            "obdelta", tags.h1("Status", class_="hidden"), *made.values(), live=True
        )

    async def pair(self, call: Call) -> Answer:
        """Returns the page of one delta."""
        given = call.parameters
        if (
            given["kind"] not in ("v2", "v3")
            or not given["recipe"].isdecimal()
            or len(given["recipe"]) > 9
        ):
            raise BadRequest("there is no such kind of delta")
        kind: Kind = "v2" if given["kind"] == "v2" else "v3"
        base, target = (Digest.parse(f"sha256:{given[side]}") for side in ("base", "target"))
        row = await self._catalogue.delta(DeltaKey(kind, int(given["recipe"]), base, target))
        if row is None:
            raise NotFound("this delta is not kept (any more)")
        return await document(
            f"{row.target_repository} · obdelta", *pair_page.content(row, self._now())
        )

    async def events(self, call: Call) -> Answer:
        """Streams sections of the first page as they change. An event's kind is the section's name,
        its data the HTML.
        """
        return Events(self._attach, self._clock, self._readers)

    # -- the coordinator's watcher

    def asked(self, kind: Kind, found: str) -> None:
        """Does nothing: the next refresh displays it."""

    def changed(self, build: RunningBuild) -> None:
        """Sends a build's progress to readers."""
        self._soon()

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Sends a build's result to readers."""
        self._all = True
        self._soon()

    # -- sending

    def _attach(self, stream: EventStream) -> Callable[[], None]:
        self._streams.append(stream)
        # The page may be older than this stream, so a new reader gets everything once.
        self._sent.clear()
        self._all = True
        self._soon()
        if self._refresh is None:
            self._refresh = self._clock.callLater(REFRESH_SECONDS, self._refreshed)
        return lambda: self._detach(stream)

    def _detach(self, stream: EventStream) -> None:
        self._streams.remove(stream)
        if not self._streams:
            for call in (self._timer, self._refresh):
                if call is not None and call.active():
                    call.cancel()
            self._timer = self._refresh = None

    def _refreshed(self) -> None:
        self._refresh = self._clock.callLater(REFRESH_SECONDS, self._refreshed)
        self._all = True
        self._soon()

    def _soon(self) -> None:
        if self._streams and self._timer is None:
            self._timer = self._clock.callLater(GATHER_SECONDS, self._send)

    def _send(self) -> None:
        self._timer = None
        if self._sending is not None:
            self._soon()  # the last one is still being rendered
            return
        everything, self._all = self._all, False
        self._sending = ensureDeferred(self._send_sections(everything))
        self._sending.addErrback(self._failed).addBoth(self._over)

    def _over(self, _result: None) -> None:
        self._sending = None

    def _failed(self, failure: Failure) -> None:
        if isinstance(failure.value, ObdeltaError):
            log.warn(
                "the status page was not brought up to date: {reason}", reason=str(failure.value)
            )
        elif not failure.check(CancelledError):
            log.failure("the status page was not brought up to date", failure)

    async def _send_sections(self, everything: bool) -> None:
        running = self._coordinator.running
        if everything:
            made = status_page.sections(await self._know(), self._coordinator.running)
        else:
            made = {"builds": status_page.builds(running, self._clock.seconds())}
        for name, section in made.items():
            html = await fragment(section)
            if self._sent.get(name) != html:
                self._sent[name] = html
                for stream in self._streams:
                    stream.send(name, html)


def _asset(answer: Whole) -> Callable[[Call], Awaitable[Answer]]:
    async def asset(call: Call) -> Answer:
        return answer

    return asset
