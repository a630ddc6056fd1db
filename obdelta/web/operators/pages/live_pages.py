"""Serves the operators' pages and keeps them live: changes are batched, rendered once and sent to
every reader.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import resources

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.template import Tag, tags

from obdelta.builds.running_build import RunningBuild
from obdelta.builds.service import DeltaService
from obdelta.errors import BadRequest, ObdeltaError
from obdelta.oci import Digest, Form, ImageNames
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.listed_deltas import id_of_key
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.web.operators.deltas_api import RELEASES
from obdelta.web.operators.pages import pair_page, status_page
from obdelta.web.operators.pages.list_page import state_of
from obdelta.web.operators.pages.markup import HEADERS, document, fragment, section
from obdelta.web.operators.pages.plot import STEPS
from obdelta.web.operators.pages.sections.action_forms import NO_FORMS, ActionForms
from obdelta.web.operators.pages.sections.attention import icon, problems, title
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, Whole
from obdelta.web.operators.sse import Events, EventStream, Readers

log = Logger()

GATHER_SECONDS = 0.25
"""Changes within this time are sent together."""
WATCH_SECONDS = 0.5
"""Seconds between two checks for problems, while there are readers. All readers share them."""
REFRESH_SECONDS = 5.0
"""Seconds between look-ups of figures that no watcher reports (deltas served, the store, devices),
while there are readers.
"""
MAX_READERS = 64
RECENT, FAILURES = 25, 500
_ASSETS = {
    "page.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "alert.svg": "image/svg+xml",
}


class StatusPages:
    """Serves ``/``, ``/events``, ``/pairs/…`` and their assets; watches the build service.

    ``gather`` gathers the figures of the first page, and ``watch`` returns what is wrong now, as
    any value that can be compared. Both may raise ObdeltaError.
    """

    def __init__(
        self,
        service: DeltaService,
        catalogue: Catalogue,
        gather: Callable[[], Awaitable[StatusData]],
        watch: Callable[[], Awaitable[object]],
        clock: IReactorTime,
        now: Callable[[], float] = time.time,
        forms: ActionForms = NO_FORMS,
    ) -> None:
        self._service, self._catalogue, self._gather, self._clock = (
            service,
            catalogue,
            gather,
            clock,
        )
        self._now, self._forms, self._watch = now, forms, watch
        self._streams: dict[EventStream, str] = {}
        """The readers, each with the step of its plot."""
        self._readers = Readers(MAX_READERS)
        self._sent: dict[str, str] = {}
        self._all = False
        self._timer: IDelayedCall | None = None
        self._refresh: IDelayedCall | None = None
        self._checks: LoopingCall | None = None
        self._wrong: object = None
        """The result of the last check."""
        self._sending: Deferred[None] | None = None
        service.watchers.append(self)

    def add_to(self, routes: Routes) -> None:
        routes.page("/", self.page)
        routes.page("/events", self.events)
        routes.page("/pairs/{kind}/{recipe}/{base}/{target}", self.pair)
        for name, content_type in _ASSETS.items():
            body = resources.files("obdelta.web.operators.pages").joinpath(name).read_bytes()
            routes.page(f"/pages/{name}", _asset(Whole(body, content_type, headers={**HEADERS})))

    async def page(self, call: Call) -> Answer:
        """Returns the first page."""
        unit = _unit_of(call)
        data, names = await self._gather(), await self._names()
        made = status_page.sections(data, self._service.running, self._forms, unit, names)
        found = problems(data)
        return await document(
            title(found),
            tags.h1("Status", class_="hidden"),
            *made.values(),
            live=f"/events?by={unit}" if unit else "/events",
            icon=icon(found),
            at="/",
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
        form = Form.named(call.argument("form")) or Form.UNIVERSAL
        row = await self._catalogue.delta(DeltaKey(kind, int(given["recipe"]), base, target, form))
        if row is None:
            raise NotFound("this delta is not stored")
        before = await self._catalogue.releases_before(row, RELEASES)
        keys = [each.key for each in (row, *before)]
        names = await self._catalogue.named_images.of(
            [digest for key in keys for digest in (key.base, key.target)]
        )
        return await document(
            f"{row.target_repository} · obdelta",
            *pair_page.content(row, self._now(), before, names),
            *await self._buttons(row),
        )

    async def _buttons(self, row: DeltaRow) -> list[Tag]:
        if not self._forms.enabled:
            return []  # the look-up reads every row
        entry = await self._catalogue.listed_delta(id_of_key(row.key), 0)
        if entry is None:
            return []
        buttons = self._forms.buttons(entry.id, state_of(entry), f"/deltas?search={entry.id}")
        return [section("act", "Act", buttons)]

    async def events(self, call: Call) -> Answer:
        """Streams sections of the first page as they change. An event's kind is the section's name,
        its data the HTML.
        """
        unit = _unit_of(call)
        attach = partial(self._attach, unit=unit)
        return Events(attach, self._clock, self._readers, call.client)

    # -- the watcher of builds

    def requested(self, kind: Kind, found: str) -> None:
        """Does nothing: the next refresh displays it."""

    def changed(self, build: RunningBuild) -> None:
        """Sends a build's progress to readers."""
        self._soon()

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Sends a build's result to readers."""
        self._all = True
        self._soon()

    # -- sending

    def _attach(self, stream: EventStream, unit: str) -> Callable[[], None]:
        self._streams[stream] = unit
        # The page may be older than this stream, so a new reader gets everything once.
        self._sent.clear()
        self._all = True
        self._soon()
        if self._refresh is None:
            self._refresh = self._clock.callLater(REFRESH_SECONDS, self._refreshed)
        if self._checks is None:
            self._checks = LoopingCall(self._check)
            self._checks.clock = self._clock
            self._checks.start(WATCH_SECONDS, now=False)
        return lambda: self._detach(stream)

    def _detach(self, stream: EventStream) -> None:
        del self._streams[stream]
        if not self._streams:
            for call in (self._timer, self._refresh):
                if call is not None and call.active():
                    call.cancel()
            self._timer = self._refresh = None
            if self._checks is not None:
                self._checks.stop()
                self._checks = None

    def _refreshed(self) -> None:
        self._refresh = self._clock.callLater(REFRESH_SECONDS, self._refreshed)
        self._all = True
        self._soon()

    def _check(self) -> Deferred[None]:
        return ensureDeferred(self._check_for_problems()).addErrback(self._failed)

    async def _check_for_problems(self) -> None:
        """Sends everything if what is wrong has changed since the last check."""
        wrong = await self._watch()
        if wrong != self._wrong:
            self._wrong, self._all = wrong, True
            self._soon(0)

    def _soon(self, seconds: float = GATHER_SECONDS) -> None:
        if self._streams and self._timer is None:
            self._timer = self._clock.callLater(seconds, self._send)

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
            log.warn("the status page was not updated: {reason}", reason=str(failure.value))
        elif not failure.check(CancelledError):
            log.failure("the status page was not updated", failure)

    async def _send_sections(self, everything: bool) -> None:
        names = await self._names()
        running = self._service.running
        if not everything:
            await self._send_section(
                "builds", status_page.builds(running, self._clock.seconds(), names)
            )
            return
        data = await self._gather()
        made = status_page.sections(data, self._service.running, self._forms, names=names)
        del made["saved"]
        for name, part in made.items():
            await self._send_section(name, part)
        for unit in {*self._streams.values()}:
            await self._send_section("saved", status_page.saved(data, unit), unit)

    async def _send_section(self, name: str, part: Tag, unit: str | None = None) -> None:
        """Sends a section to all readers, or to those of a step, unless they have it already."""
        html = await fragment(part)
        key = name if unit is None else f"{name} {unit}"
        if self._sent.get(key) != html:
            self._sent[key] = html
            for stream, wanted in [*self._streams.items()]:
                if unit in (None, wanted):
                    stream.send(name, html)

    async def _names(self) -> Mapping[Digest, ImageNames]:
        """Returns what the images of the displayed builds call themselves."""
        shown = status_page.shown_builds(self._service.running)
        return await self._catalogue.named_images.of(
            [
                image.manifest.digest
                for build in shown
                for image in (build.pair.base, build.pair.target)
            ]
        )


def _unit_of(call: Call) -> str:
    unit = call.argument("by") or ""
    if unit and unit not in STEPS:
        raise BadRequest(f"by is one of {', '.join(STEPS)}")
    return unit


def _asset(answer: Whole) -> Callable[[Call], Awaitable[Answer]]:
    async def asset(call: Call) -> Answer:
        return answer

    return asset
