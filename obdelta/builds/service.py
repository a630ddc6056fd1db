"""The delta service: resolves a pair, answers from the store, and starts or joins its one build.

A client that leaves ends its own wait, never the shared build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.failures import Failures, NoDelta, concerns_others
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.inputs.pair_resolver import Named, PairResolver
from obdelta.builds.publish.other_forms import OtherForms
from obdelta.builds.queue import Priority
from obdelta.builds.rebuild import Rebuild, RebuildBuilder, Rebuilder
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.types import (
    AcceptsFile,
    Answer,
    Builder,
    FullPull,
    Growing,
    Pair,
    Published,
    Publisher,
    Ready,
    Watcher,
    pair_for,
)
from obdelta.builds.verdicts import CATEGORY
from obdelta.errors import (
    BlobUnknown,
    ObdeltaError,
    StillBuilding,
)
from obdelta.oci import Form, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from obdelta.store.file_writer import ExternalFile

log = Logger()

REBUILD_LOOKUP_SECONDS = 60.0
"""Seconds for the upstream to confirm that both images of a delta to rebuild exist."""


@dataclass(frozen=True, slots=True)
class _Request:
    """How a client waits for a delta. ``deadline`` is by the reactor's clock."""

    credentials: Credentials
    deadline: float
    client: str
    early: AcceptsFile | None
    priority: Priority


class DeltaService:
    """Answers requests for pairs: found, under way, started, or refused."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        catalogue: Catalogue,
        lookup: ImageLookup,
        builders: Mapping[Kind, Builder],
        scheduler: Scheduler,
        failures: Failures,
        publishers: Mapping[Kind, Publisher] | None = None,
        rebuilder: Rebuilder | None = None,
        other_forms: OtherForms | None = None,
    ) -> None:
        """``publishers``: where finished deltas go besides the store. ``rebuilder`` rebuilds v3
        deltas whose layers were evicted. ``other_forms``: None builds a form when it is requested.
        """
        self._clock, self._catalogue, self._pairs = clock, catalogue, PairResolver(lookup, clock)
        self._builders, self._scheduler, self._failures = builders, scheduler, failures
        self._publishers, self._rebuilder = publishers or {}, rebuilder
        self._other_forms = other_forms

    @property
    def running(self) -> list[RunningBuild]:
        """Queued builds and builds under way, oldest first."""
        return self._scheduler.running

    @property
    def watchers(self) -> list[Watcher]:
        """Those that receive events of builds. May be added to."""
        return self._scheduler.watchers

    async def delta(
        self,
        kind: Kind,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        wait: float,
        client: str = "",
        *,
        early: AcceptsFile | None = None,
        priority: Priority = Priority.DEVICE,
        form: Form | None = None,
    ) -> Answer:
        """Returns the answer for a pair within ``wait`` seconds. Raises StillBuilding if it takes
        longer (the build goes on).

        Raises permanent errors (an unknown target, refused credentials) and transient ones: those
        of the upstream, QueueFull. ``early``: the client accepts a delta that is still being
        written (Growing), if the builder offers one and this returns True for it. A new build is
        counted for ``client``. Over its limit this raises QueueFull, too, since another refusal
        would make a supervisor pull in full. Cancelling ends the wait only. ``priority``: the class
        of a new build; a queued build is raised to it. ``form``: the best one that the client
        reads, None if that is not known; the delta in the answer has it, or one before.
        """
        deadline = self._clock.seconds() + wait
        request = _Request(credentials, deadline, client, early, priority)
        if form is None and kind == "v3" and self._other_forms is not None:
            form = await self._other_forms.usual(base.repository, target.repository)
        try:
            pair = await self._pairs.resolve(
                self._builders[kind], base, target, credentials, deadline, form or Form.UNIVERSAL
            )
            known = await self._known_answer(pair, request)
            if known is not None:
                return known
            build = self._join(pair, request) or self._scheduler.start(
                pair, self._builders[kind], credentials, client, priority=priority
            )
            return await self._answer_of(build, pair, request)
        except NoDelta as no_delta:
            return await self._full_pull(kind, str(base), str(target), no_delta)

    # -- answers

    async def _known_answer(self, pair: Pair, request: _Request) -> Ready | Published | None:
        """Returns the pair's delta if there is one that the client reads, the best one first; a
        better one is built meanwhile. Raises NoDelta for a remembered failure.
        """
        building = [self._scheduler.find(each.key) for each in pair.readable]
        for each, build in zip(pair.readable, building, strict=True):
            known = None if build is not None else await self._first(each, request.deadline)
            if known is not None:
                self._report_request(pair.kind, "ready")
                if self._other_forms is not None and each.form is not pair.form:
                    self._other_forms.begin(pair, request.credentials, request.priority)
                return known
        if not any(building) and (failure := await self._failures.find(pair)) is not None:
            raise NoDelta(failure.reason, CATEGORY[failure.outcome], pair)
        return None

    async def _first(self, pair: Pair, deadline: float) -> Ready | Published | None:
        if (published := await self._find_published(pair)) is not None:
            return published
        row = await self._catalogue.publish_for(pair.key, *pair.repositories)
        return None if row is None else await self._deliver(pair, row, deadline)

    async def _find_published(self, pair: Pair) -> Ready | Published | None:
        publisher = self._publishers.get(pair.kind)
        return None if publisher is None else await publisher.find(pair)

    async def _deliver(self, pair: Pair, row: DeltaRow, deadline: float) -> Ready | Published:
        """Returns a delta in the store, or in the registry once it was pushed there."""
        publisher = self._publishers.get(pair.kind)
        if publisher is None:
            return Ready(pair, row)
        return await publisher.publish(pair, row, deadline) or Ready(pair, row)

    # -- builds

    def _join(self, pair: Pair, request: _Request) -> RunningBuild | None:
        """Joins the pair's build if there is one. Reports the request in either case."""
        found = [self._scheduler.find(each.key) for each in pair.readable]
        build = next(filter(None, found), None)
        self._report_request(pair.kind, "building" if build else "started")
        if build is not None:
            log.debug("waits for the build that request {first} began", first=build.request)
            self._scheduler.join(build, pair, request.client, request.priority)
        return build

    async def _answer_of(self, build: RunningBuild, pair: Pair, request: _Request) -> Answer:
        try:
            if request.early is not None:
                file = await self._scheduler.growing_file(build, request.early, request.deadline)
                if file is not None:
                    return Growing(pair, file)
            row = await self._row_of(build, pair, request)
        except ObdeltaError as error:
            no_delta = await self._failures.no_delta(pair, error)
            if no_delta is None:
                raise
            for other in pair.readable[1:]:
                if (found := await self._first(other, request.deadline)) is not None:
                    return found
            raise no_delta from error
        own = pair.in_form(row.key.form)
        known = await self._catalogue.publish_for(own.key, *pair.repositories)
        # Where there is none, another replica has it.
        return await self._deliver(own, known or row, request.deadline)

    async def _row_of(self, build: RunningBuild, pair: Pair, request: _Request) -> DeltaRow:
        try:
            row = await self._scheduler.wait(build, request.deadline)
            if not build.found_elsewhere or build.pair.repositories == pair.repositories:
                return row
        except ObdeltaError as error:
            if not concerns_others(error, build, pair, request.credentials):
                raise
        # The error concerns the repositories or the credentials of the build, or its repository has
        # the delta, and its owner may have put it there: retry with these.
        build = self._scheduler.find(pair.key) or self._scheduler.start(
            pair,
            self._builders[pair.kind],
            request.credentials,
            request.client,
            priority=request.priority,
        )
        row = await self._scheduler.wait(build, request.deadline)
        if build.found_elsewhere and build.pair.repositories != pair.repositories:
            raise StillBuilding
        return row

    def growing(self, key: DeltaKey) -> ExternalFile | None:
        """Returns the growing file of a build under way, if it has one."""
        build = self._scheduler.find(key)
        return None if build is None else build.growing

    async def rebuild(self, rebuild: Rebuild, credentials: Credentials, client: str) -> Rebuild:
        """Begins to rebuild a delta whose layers were evicted, or joins its rebuild; returns the
        one whose files grow.

        The client's credentials resolve both images first. Raises as :meth:`delta` does, and
        BlobUnknown for another recipe's delta.
        """
        row, recipe = rebuild.row, self._builders["v3"].recipe
        if row.key.recipe != recipe or self._rebuilder is None:
            raise BlobUnknown(row.content)
        deadline = self._clock.seconds() + REBUILD_LOOKUP_SECONDS
        base, target = await self._pairs.images(
            (row.base_repository, row.key.base),
            (row.target_repository, row.key.target),
            credentials,
            deadline,
        )
        build = self._scheduler.find(row.key)
        if build is not None:
            self._scheduler.join(build, build.pair, client, Priority.DEVICE)
        else:
            builder = RebuildBuilder(self._rebuilder, rebuild)
            pair = pair_for(builder, base, target, row.key.form)
            build = self._scheduler.start(pair, builder, credentials, client, rebuild)
        if build.rebuild is None:
            raise StillBuilding
        return build.rebuild

    async def build_again(
        self,
        kind: Kind,
        base: Named,
        target: Named,
        form: Form,
        credentials: Credentials,
        client: str,
    ) -> RunningBuild:
        """Forgets how a pair failed, and starts or joins its build. Raises as :meth:`delta`."""
        builder, deadline = self._builders[kind], self._clock.seconds() + REBUILD_LOOKUP_SECONDS
        images = await self._pairs.images(base, target, credentials, deadline)
        pair = pair_for(builder, *images, form)
        await self._scheduler.forget(pair)
        return self._scheduler.find(pair.key) or self._scheduler.start(
            pair, builder, credentials, client, priority=Priority.PREPARED
        )

    # -- full pulls

    async def refuse(self, kind: Kind, base: str, target: str, why: str, category: str) -> FullPull:
        """Returns a full pull that was decided elsewhere, logged and counted like the others."""
        return await self._full_pull(kind, base, target, NoDelta(why, category))

    async def _full_pull(self, kind: Kind, base: str, target: str, no_delta: NoDelta) -> FullPull:
        self._report_request(kind, "refused")
        log.info(
            "full pull: kind={kind} category={category} base={base} target={target}"
            " reason={reason}",
            kind=kind,
            category=no_delta.category,
            base=base,
            target=target,
            reason=no_delta.reason,
        )
        await self._catalogue.counters.count(f"full_pull.{no_delta.category}")
        return no_delta.answer()

    def _report_request(self, kind: Kind, found: str) -> None:
        for watcher in self.watchers:
            watcher.requested(kind, found)

    # -- start and end of the server

    async def resume(self, credentials: Credentials) -> int:
        """Resumes the builds that earlier runs had queued, with this server's own ``credentials``;
        returns their number.

        Call it at start. Where the upstream wants a device's own credentials, a build is dropped:
        the device retries anyway.
        """
        return await self._scheduler.resume(
            lambda queued: self._queued_pair(queued, credentials), credentials
        )

    async def _queued_pair(
        self, queued: PendingBuild, credentials: Credentials
    ) -> tuple[Pair, Builder]:
        base, target = await self._pairs.images(
            (queued.base_repository, queued.base),
            (queued.target_repository, queued.target),
            credentials,
        )
        builder = self._builders[queued.kind]
        return pair_for(builder, base, target, queued.form), builder

    async def drain(self, seconds: float) -> None:
        """See :meth:`Scheduler.drain`."""
        await self._scheduler.drain(seconds)

    async def close(self) -> None:
        """Cancels every build and waits until all have ended."""
        if self._other_forms is not None:
            await self._other_forms.close()
        await self._scheduler.close()
