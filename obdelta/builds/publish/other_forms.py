"""Builds the other forms of a delta after the first one, at lower priority, if devices may read
them.

A client waits for one form only. The build of another form begins when the first build ends, or
when a client gets a form that is not the best one that it reads. The layers are searched again:
their tars and indexes are in the cache, and what a search has found would take too much memory to
be kept while the build is queued.
"""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.failures import Failures
from obdelta.builds.queue import Priority
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.types import Builder, Pair
from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.errors import ObdeltaError, Unavailable
from obdelta.oci import Form
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind

log = Logger()

MIN_DEVICES = 20
"""Number of devices that must be seen before the server assumes that no device of an update reads
another form.
"""
AGAIN_SECONDS = 600.0
"""Seconds after which a form that was not built is considered again."""
_KEPT = 4096


class OtherForms:
    """Begins builds of v3 deltas in the form that is missing. A watcher of builds."""

    def __init__(
        self,
        clock: IReactorTime,
        catalogue: Catalogue,
        scheduler: Scheduler,
        failures: Failures,
        builder: Builder,
    ) -> None:
        self._catalogue, self._scheduler, self._failures = catalogue, scheduler, failures
        self._builder = builder
        self._considered: ExpiringMap[DeltaKey, bool] = ExpiringMap(_KEPT, clock.seconds)
        self._tasks: set[Deferred[None]] = set()
        scheduler.watchers.append(self)

    async def usual(self, base: str, target: str) -> Form:
        """Returns the form that most devices of an update between two repositories read best; the
        universal one if no device was seen.
        """
        try:
            seen = await self._catalogue.device_downloads.engines(base, target)
        except Unavailable as error:
            log.warn("devices' engines cannot be read: {reason}", reason=str(error))
            return Form.UNIVERSAL
        return max(Form, key=lambda form: seen.get(form, 0))

    def begin(self, pair: Pair, credentials: Credentials, priority: Priority) -> None:
        """Queues a build of ``pair`` if it is worth it; the other form exists. Waits for nothing.
        ``priority``: that of the client that has the other form.
        """
        if pair.form not in self._builder.forms or pair.key in self._considered:
            return
        self._considered.set(pair.key, True, AGAIN_SECONDS)
        task = ensureDeferred(self._begin(pair, credentials, max(priority, Priority.PREPARED)))
        self._tasks.add(task)
        task.addBoth(lambda _: self._tasks.discard(task))

    async def _begin(self, pair: Pair, credentials: Credentials, priority: Priority) -> None:
        try:
            if await self._is_worth(pair) and self._scheduler.find(pair.key) is None:
                self._scheduler.start(pair, self._builder, credentials, None, priority=priority)
        except (ObdeltaError, CancelledError) as error:
            log.info(
                "{pair} is not built as {form} now: {reason}",
                pair=str(pair),
                form=pair.form.value,
                reason=str(error),
            )
        except Exception:
            log.failure("the other form of {pair} met an unexpected error", pair=str(pair))

    async def _is_worth(self, pair: Pair) -> bool:
        if await self._catalogue.delta(pair.key) is not None:
            return False
        if await self._failures.find(pair) is not None:
            return False
        universal = await self._catalogue.delta(pair.in_form(Form.UNIVERSAL).key)
        if universal is not None and "builder" in universal.details:
            return False  # A balena-engine has built it, because the native builder could not.
        seen = await self._catalogue.device_downloads.engines(*pair.repositories)
        return seen.get(pair.form, 0) > 0 or sum(seen.values()) < MIN_DEVICES

    # -- as a watcher of builds

    def requested(self, kind: Kind, found: str) -> None:
        """Does nothing."""

    def changed(self, build: RunningBuild) -> None:
        """Does nothing."""

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Begins the other form of a delta that this server has built."""
        pair = build.pair
        built = isinstance(outcome, DeltaRow) and build.turn is not None
        if pair.kind != self._builder.kind or not built or build.rebuild is not None:
            return
        for form in Form:
            if form is not pair.form:
                self.begin(pair.in_form(form), build.credentials, build.entry.owner.priority)

    async def close(self) -> None:
        """Ends what is under way."""
        for task in list(self._tasks):
            task.cancel()
