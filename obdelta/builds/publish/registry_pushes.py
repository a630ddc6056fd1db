"""Pushes of finished deltas to the registry, and look-ups of what it has: once per pair for all
waiters.

The contents of the registry are not recorded here, so a restart, or a deletion in the registry,
does no harm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from twisted.internet.defer import CancelledError, DeferredSemaphore, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.types import Pair, Published, Ready
from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.concurrency.limits import in_time
from obdelta.concurrency.tasks import SingleFlight, Task
from obdelta.errors import Missing, ObdeltaError, StillBuilding
from obdelta.oci import Reference
from obdelta.registry import Credentials, Upstream
from obdelta.registry.upload import Pusher, PushResult
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow

log = Logger()

FOUND_SECONDS = 60.0
"""Seconds for which a delta that the registry had is not looked up again."""
FAILURE_SECONDS = 60.0
"""Seconds after a failed push in which the delta is served from here, and no new push begins."""
MAX_PUSHES = 4
"""Pushes under way at a time: a registry that lost everything is not flooded when all devices
retry.
"""
_KEPT = 4096

_Key = tuple[DeltaKey, str, str]
FoundT = TypeVar("FoundT", Published, Ready)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushParts:
    """The parts for look-ups and pushes of deltas of every kind. ``credentials`` may push
    everywhere.
    """

    upstream: Upstream
    pusher: Pusher
    credentials: Credentials
    blobs: BlobStore
    catalogue: Catalogue
    clock: IReactorTime


class RegistryPushes(ABC, Generic[FoundT]):
    """Finds deltas in the registry, and pushes them there. ``host`` is the registry's name for
    devices.
    """

    def __init__(self, parts: PushParts, *, host: str, others: bool) -> None:
        """``others``: other servers push, too; a delta that they pushed is not pushed again."""
        clock = parts.clock
        self._upstream, self._pusher = parts.upstream, parts.pusher
        self._credentials, self._blobs = parts.credentials, parts.blobs
        self._catalogue, self._clock = parts.catalogue, clock
        self._host, self._others = host, others
        self._found: ExpiringMap[_Key, FoundT] = ExpiringMap(_KEPT, clock.seconds)
        self._failed: ExpiringMap[_Key, str] = ExpiringMap(_KEPT, clock.seconds)
        self._pushes: dict[_Key, Task[FoundT | None]] = {}
        self._slots = DeferredSemaphore(MAX_PUSHES)
        self._finding: SingleFlight[_Key, FoundT | None] = SingleFlight()
        self._closed = False

    @abstractmethod
    def _tag(self, pair: Pair) -> str:
        """Returns the tag of a pair's delta."""

    @abstractmethod
    async def _found_there(self, pair: Pair, name: Reference) -> FoundT | str:
        """Returns the delta behind ``name``, or the reason why it is not the pair's. Raises the
        registry's errors.
        """

    @abstractmethod
    def _published(self, pair: Pair, name: Reference, row: DeltaRow) -> FoundT:
        """Returns a delta that was pushed."""

    @abstractmethod
    async def _send(self, pair: Pair, row: DeltaRow, tag: str) -> PushResult:
        """Pushes a delta. Raises the errors of :class:`obdelta.registry.upload.Pusher`."""

    async def find(self, pair: Pair) -> FoundT | None:
        """Returns the pair's delta if the registry has it, with all of its blobs.

        Errors count as not found: a delta that is built then can be served from here.
        """
        key = _key(pair)
        published = self._found.get(key)
        if published is not None:
            return published
        return await self._finding.do(key, lambda: self._find(key, pair))

    async def _find(self, key: _Key, pair: Pair) -> FoundT | None:
        name = self._name(pair)
        try:
            found = await self._found_there(pair, name)
        except Missing:
            return None
        except ObdeltaError as error:
            log.warn(
                "the registry could not be searched for {name}: {reason}",
                name=str(name),
                reason=str(error),
            )
            return None
        if isinstance(found, str):
            log.info(
                "{name} in the registry is not the pair's delta: {why}: it is built again",
                name=str(name),
                why=found,
            )
            return None
        await self._catalogue.counters.count("publish.found")
        return self._keep(key, found)

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        """Starts to push a delta, unless a push is under way or has failed a moment ago. Waits for
        nothing.
        """
        key = _key(pair)
        recent = key in self._found or key in self._failed or key in self._pushes
        if not recent and not self._closed:
            push = Task(self._push(key, pair, row))
            if not push.ended:
                self._pushes[key] = push

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> FoundT | None:
        """Returns the delta in the registry, once it is there; None if the push failed (it is
        served from here then).

        Raises StillBuilding at ``deadline``. Cancelling ends the wait only.
        """
        self.begin(pair, row)
        push = self._pushes.get(_key(pair))
        if push is None:
            return self._found.get(_key(pair))
        left = deadline - self._clock.seconds()
        return await in_time(ensureDeferred(push.result()), left, self._clock, StillBuilding)

    def forget_failure(self, pair: Pair) -> None:
        """Forgets that a push failed a moment ago: the next one begins at once."""
        self._failed.pop(_key(pair))

    def problem(self, pair: Pair) -> str:
        """Returns why the last push of a delta failed; "" if that is long ago."""
        return self._failed.get(_key(pair)) or ""

    async def _push(self, key: _Key, pair: Pair, row: DeltaRow) -> FoundT | None:
        name = self._name(pair)
        started = self._clock.seconds()
        published: FoundT | None = None
        done: PushResult | None = None
        problem = "an unexpected error; the log has it"
        try:
            published = await self.find(pair) if self._others else None
            if published is None:
                done = await self._slots.run(
                    lambda: ensureDeferred(self._send(pair, row, str(name.tag)))
                )
        except ObdeltaError as error:
            problem = str(error)
            log.warn(
                "{name} was not pushed: {reason}: it is served from here",
                name=str(name),
                reason=problem,
            )
        except CancelledError:
            problem = "the push was cancelled"
            log.info("the push of {name} was cancelled", name=str(name))
        except Exception:
            log.failure("the push of {name} met an unexpected error", name=str(name))
        if done is not None:
            published = self._keep(key, self._published(pair, name, row))
            log.info(
                "pushed {name}: sent={sent} bytes={bytes} mounted={mounted} present={present}"
                " seconds={seconds:.2f}",
                name=str(name),
                sent=done.sent,
                bytes=done.sent_bytes,
                mounted=done.mounted,
                present=done.present,
                seconds=self._clock.seconds() - started,
            )
        if published is None:
            self._failed.set(key, problem, FAILURE_SECONDS)
            await self._catalogue.counters.count("publish.failed")
        elif done is not None:
            await self._catalogue.counters.count("publish.pushed")
        self._pushes.pop(key, None)
        return published

    def _name(self, pair: Pair) -> Reference:
        return Reference(self._host, pair.target.repository, self._tag(pair))

    def _keep(self, key: _Key, published: FoundT) -> FoundT:
        self._found.set(key, published, FOUND_SECONDS)
        return published

    async def close(self) -> None:
        """Cancels every push and waits until all have ended."""
        self._closed = True
        for push in list(self._pushes.values()):
            await push.end()


def _key(pair: Pair) -> _Key:
    return pair.key, pair.base.repository, pair.target.repository
