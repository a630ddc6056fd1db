"""Deltas of any state for operators: the list, and the actions on one of them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from twisted.logger import Logger

from obdelta.builds.running_build import RunningBuild
from obdelta.builds.service import DeltaService
from obdelta.concurrency.limits import Limit
from obdelta.errors import ObdeltaError
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.listed_deltas import ListedDelta, ListFilter, id_of_key

log = Logger()

FAILURE_SECONDS = 7 * 86400
"""Age up to which failures are listed."""
LISTS = 4
"""Lists that are made at a time: each reads every row in the database's thread."""
CLIENT = "operators"
"""The subject of builds that operators start."""


class UnknownDelta(ObdeltaError):
    """No delta, build or failure has this ID."""

    def __init__(self) -> None:
        super().__init__("no delta, build or failure has this ID")


class ActionRefused(ObdeltaError):
    """The delta's state does not allow the action."""


class DeltaActions:
    """Lists deltas, and acts on them. ``now`` returns seconds UTC."""

    def __init__(
        self,
        service: DeltaService,
        catalogue: Catalogue,
        blobs: BlobStore,
        pinnable: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``pinnable``: the most bytes that pinned deltas may take."""
        self._service, self._catalogue, self._blobs, self._now = service, catalogue, blobs, now
        self._pinnable = pinnable
        self._lists = Limit(LISTS, "lists of deltas")
        self._actions: dict[str, Callable[[ListedDelta, Credentials], Awaitable[ListedDelta]]] = {
            "retry": self._retry,
            "cancel": self._cancel,
            "drop": self._drop,
            "forget": self._forget,
            "pin": self._pin,
            "unpin": self._unpin,
        }

    @property
    def names(self) -> Sequence[str]:
        """The names of all actions."""
        return tuple(self._actions)

    # -- the list

    async def page(
        self,
        wanted: ListFilter,
        sort: str,
        limit: int,
        before: tuple[int, str] | None = None,
    ) -> list[ListedDelta]:
        """Returns builds, kept deltas and failures in the order ``sort``, at most ``limit``. Raises
        TooManyRequests.

        ``before``: the value and the ID of the entry that the page follows.
        """
        builds = [build_as_entry(build) for build in self._service.running]
        with self._lists.hold(""):
            kept = await self._catalogue.listed(
                wanted,
                sort,
                limit,
                after=self._oldest_failure(),
                before=before,
                without=[build.id for build in builds],
            )
        named = [digest for one in builds for digest in (one.key.base, one.key.target)]
        names = await self._catalogue.named_images.of(named if wanted.words else [])
        found = [build for build in builds if build.matches(wanted, names)]
        if before is not None:
            found = [build for build in found if (build.value(sort), build.id) < before]
        merged = sorted(found + kept, key=lambda one: (one.value(sort), one.id), reverse=True)
        return merged[:limit]

    async def fleet_of(self, repository: str, name: str) -> frozenset[str]:
        """Returns the target repositories of the fleet that a repository belongs to, and of those
        of this name.
        """
        return await self._catalogue.fleet_of(repository, name)

    async def find(self, id_: str) -> ListedDelta:
        """Returns one entry. Raises UnknownDelta."""
        build = self._build_of(id_)
        if build is not None:
            return replace(build_as_entry(build), id=id_)
        found = await self._catalogue.listed_delta(id_, self._oldest_failure())
        if found is None:
            raise UnknownDelta
        return found

    def _oldest_failure(self) -> int:
        return int(self._now()) - FAILURE_SECONDS

    def _build_of(self, id_: str) -> RunningBuild | None:
        return next(
            (build for build in self._service.running if id_ == id_of_key(build.pair.key)),
            None,
        )

    # -- actions

    async def act(self, action: str, id_: str, credentials: Credentials, user: str) -> ListedDelta:
        """Does an action of :attr:`names`, and returns the new state. Raises UnknownDelta,
        ActionRefused, and errors of the upstream.

        ``user`` is for the log.
        """
        entry = await self.find(id_)
        done = await self._actions[action](entry, credentials)
        log.info(
            "operator action: user={user} action={action} delta={id} kind={kind} src={src}"
            " dest={dest} state={state}",
            user=user,
            action=action,
            id=id_,
            kind=entry.key.kind,
            src=entry.src,
            dest=entry.dest,
            state=done.state,
        )
        return done

    async def _retry(self, entry: ListedDelta, credentials: Credentials) -> ListedDelta:
        if entry.state == "kept":
            raise ActionRefused("the delta is kept: drop it first, then the next request builds it")
        if entry.state not in ("failed", "skipped"):
            raise ActionRefused(f"the delta is {entry.state} already")
        if not entry.target_repository:
            raise ActionRefused("its repositories were not recorded: a device's request builds it")
        build = await self._service.build_again(
            entry.key.kind,
            (entry.base_repository, entry.key.base),
            (entry.target_repository, entry.key.target),
            entry.key.form,
            credentials,
            CLIENT,
        )
        return replace(build_as_entry(build), id=entry.id)

    async def _cancel(self, entry: ListedDelta, _credentials: Credentials) -> ListedDelta:
        build = self._build_of(entry.id)
        if build is None:
            raise ActionRefused(f"no build of it is queued or running: it is {entry.state}")
        await build.cancel()
        try:
            return await self.find(entry.id)
        except UnknownDelta:
            return replace(entry, state="gone", since=int(self._now()))

    async def _drop(self, entry: ListedDelta, _credentials: Credentials) -> ListedDelta:
        if entry.state in ("building", "queued"):
            raise ActionRefused("it is being built: cancel the build first")
        if entry.state != "kept":
            raise ActionRefused(f"no delta is kept: it is {entry.state}")
        if entry.pinned:
            raise ActionRefused("it is pinned: unpin it first")
        await self._catalogue.remove([entry.key], self._blobs)
        return replace(entry, state="gone", since=int(self._now()))

    async def _pin(self, entry: ListedDelta, _credentials: Credentials) -> ListedDelta:
        if entry.state != "kept" or entry.pinned:
            raise ActionRefused(f"it is {'pinned already' if entry.pinned else entry.state}")
        if not await self._catalogue.pin(entry.key, True, self._pinnable):
            raise ActionRefused(
                f"pinned deltas may take {self._pinnable} bytes (half of store-quota), and this one"
                " would exceed that: unpin others, or raise store-quota"
            )
        return await self.find(entry.id)

    async def _unpin(self, entry: ListedDelta, _credentials: Credentials) -> ListedDelta:
        if not entry.pinned:
            raise ActionRefused("it is not pinned")
        await self._catalogue.pin(entry.key, False, self._pinnable)
        return await self.find(entry.id)

    async def _forget(self, entry: ListedDelta, _credentials: Credentials) -> ListedDelta:
        if entry.state not in ("failed", "skipped"):
            raise ActionRefused(f"there is no failure to forget: the delta is {entry.state}")
        key = entry.key
        await self._catalogue.failures.forget_with_work(key.kind, key.base, key.target)
        return replace(entry, state="gone", since=int(self._now()))


def build_as_entry(build: RunningBuild) -> ListedDelta:
    """Returns a queued or running build as an entry of the list."""
    pair = build.pair
    return ListedDelta(
        id=id_of_key(pair.key),
        key=pair.key,
        base_repository=pair.base.repository,
        target_repository=pair.target.repository,
        state="queued" if build.started is None else "building",
        full_bytes=pair.full_bytes,
        since=int(build.requested_at),
    )
