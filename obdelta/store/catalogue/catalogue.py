"""The catalogue: finished deltas, manifests, inflated layers and counters in SQLite.

Invariant: every blob of every manifest in the catalogue is in the blob store or recorded as
evicted. Publishing checks the files and writes the rows in one transaction. Removing deletes the
rows first and the files afterwards, each file under the lock that publishing takes. A kill in
between leaves unreferenced files, which :meth:`Catalogue.sweep` finds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

from obdelta.errors import StoreFull
from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import (
    fleet_summaries,
    listed_deltas,
    queries,
    removal,
    stored_times,
)
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.evictions import Protection
from obdelta.store.catalogue.failure_records import RecordedFailures, SlowWork
from obdelta.store.catalogue.fleet_summaries import FleetSummary
from obdelta.store.catalogue.listed_deltas import ListedDelta, ListFilter
from obdelta.store.catalogue.published_deltas import PublishedDeltas
from obdelta.store.catalogue.records import DeltaKey, LayerRow
from obdelta.store.catalogue.tables.counters import Counters
from obdelta.store.catalogue.tables.device_pulls import DeviceDownloads, StartedPulls
from obdelta.store.catalogue.tables.engine_images import EngineImages
from obdelta.store.catalogue.tables.fleet_images import FleetImages
from obdelta.store.catalogue.tables.pending_builds import PendingBuilds
from obdelta.store.catalogue.tables.refreshed_rows import NamedDeltas, NamedImages, UpdateHistory

log = Logger()


class Catalogue(PublishedDeltas):
    """The open catalogue. All its work runs in one thread of its own. Raises StoreFull,
    Unavailable, CatalogueUnusable.

    Cancelling ends the wait; the requested work is done anyway.
    """

    def __init__(
        self, database: Database, blobs: BlobStore | None = None, recipe: int = -1
    ) -> None:
        super().__init__(database, blobs, recipe)
        self.counters = Counters(database)
        self.failures = RecordedFailures(database)
        self.pending_builds = PendingBuilds(database)
        self.slow_work = SlowWork(database)
        self.requested_updates = UpdateHistory(database)
        self.started_pulls = StartedPulls(database)
        self.engine_images = EngineImages(database)
        self.named_deltas = NamedDeltas(database)
        self.named_images = NamedImages(database)
        self.fleet_images = FleetImages(database)
        self.device_downloads = DeviceDownloads(database)

    @classmethod
    async def open(
        cls,
        path: Path,
        reactor: IReactorFromThreads,
        *,
        steps: Sequence[str] | None = None,
        blobs: BlobStore | None = None,
        recipe: int = -1,
        check: bool = True,
    ) -> Catalogue:
        """Opens ``catalogue.sqlite``, or creates it. ``steps``: another schema, for tests of
        upgrades. ``check``: whether to look for damage.

        With ``blobs``, a delta is found only if it can be served from there. ``recipe`` is the
        current one of v3 deltas, which can rebuild lost layers.
        """
        return cls(await Database.open(path, reactor, steps=steps, check=check), blobs, recipe)

    async def close(self) -> None:
        """Writes the pending counts, waits for queued work and ends the thread. Closing twice is
        harmless.
        """
        await self.counters.settle()
        await self._database.close()

    # -- removal

    async def remove(
        self, keys: Iterable[DeltaKey], blobs: BlobStore, *, unless: Protection | None = None
    ) -> int:
        """Removes deltas, then the blobs that nothing refers to any more. Returns the bytes freed.

        A delta that is protected by ``unless`` at the time of removal stays. Pinned blobs stay
        until the next :meth:`sweep`. On a full disk the reserve of ``blobs`` is used.
        """
        chosen = list(keys)
        await self.counters.settle()

        def remove_rows(connection: sqlite3.Connection) -> list[Digest]:
            return removal.remove_rows(connection, chosen, unless)

        try:
            parts = await self._database.write(remove_rows)
        except StoreFull:
            await blobs.drop_reserve()
            parts = await self._database.write(remove_rows)
        try:
            return await self._database.write(
                lambda connection: sum(
                    queries.discard_unreferenced(connection, blobs, part) for part in set(parts)
                )
            )
        finally:
            await blobs.set_reserve_aside()

    async def blob_digests(self) -> frozenset[Digest]:
        """Returns the digests of all blobs that the catalogue knows, stored or evicted."""

        def find(connection: sqlite3.Connection) -> frozenset[Digest]:
            return frozenset(
                Digest(hex_) for (hex_,) in connection.execute("SELECT digest FROM blobs")
            )

        return await self._database.read(find)

    async def sweep(
        self,
        blobs: BlobStore,
        keep: frozenset[Digest] = frozenset(),
        *,
        recipe: int | None = None,
        before: int = 0,
    ) -> tuple[list[DeltaKey], int]:
        """At start, before any build, makes files and rows agree again. Returns the removed keys
        and the number of files removed.

        Deltas with a blob that is missing or has another size are removed and logged. Unreferenced
        files are removed too, except ``keep`` and pinned ones. Those without a row must match their
        names, as a kill leaves them; others are not ours. With the ``recipe`` of v3 deltas,
        layers that it can rebuild are only recorded as missing. Deltas of other recipes with
        missing layers are removed.

        Failures of an older recipe are deleted, as are its deltas that were built and last served
        ``before`` a time. Devices may be pulling the newer ones.
        """
        keys = await self._database.write(
            lambda connection: removal.remove_broken(connection, blobs, recipe, before)
        )
        for key in keys:
            log.warn(
                "retired the {kind} delta from {base} to {target}: files are missing or damaged, or"
                " its recipe is outdated: it is built again on request",
                kind=key.kind,
                base=str(key.base),
                target=str(key.target),
            )
        verified = set(
            await blobs.verified_orphans(
                await self._database.read(
                    lambda connection: removal.files_without_row(connection, blobs, keep)
                )
            )
        )
        orphans = await self._database.write(
            lambda connection: removal.remove_orphans(connection, blobs, keep, verified)
        )
        if orphans:
            log.info("start: {count} blobs that no delta refers to were removed", count=orphans)
        return keys, orphans

    # -- the list for operators

    async def listed(
        self,
        wanted: ListFilter,
        sort: str,
        limit: int,
        *,
        after: int,
        before: tuple[int, str] | None = None,
        without: Collection[str] = (),
    ) -> list[ListedDelta]:
        """Returns what :func:`obdelta.store.catalogue.listed_deltas.page` returns."""
        return await self._database.read(
            lambda connection: listed_deltas.page(
                connection, wanted, sort, limit, after=after, before=before, without=without
            )
        )

    async def listed_delta(self, id_: str, after: int) -> ListedDelta | None:
        """Returns the entry of an ID; None for an unknown one, and a failure before ``after``."""
        return await self._database.read(
            lambda connection: listed_deltas.find(connection, id_, after)
        )

    async def pin(self, key: DeltaKey, pinned: bool, most: int) -> bool:
        """Pins a delta so that the quota does not evict it, or ends that. Returns False if pinned
        deltas would take more than ``most`` bytes.
        """
        return await self._database.write(
            lambda connection: queries.pin(connection, key, pinned, most)
        )

    async def fleet_summaries(self) -> list[FleetSummary]:
        """Returns all fleets, the one with the latest request first."""
        return await self._database.read(fleet_summaries.summaries)

    async def fleet_of(self, repository: str, name: str = "") -> frozenset[str]:
        """Returns what :func:`obdelta.store.catalogue.listed_deltas.fleet_of` returns."""
        return await self._database.read(
            lambda connection: listed_deltas.fleet_of(connection, repository, name)
        )

    # -- times

    async def correct_times(self, now: int) -> int:
        """Sets stored times that are far ahead of ``now`` to ``now``; returns and logs how many."""
        count = await self._database.write(lambda connection: stored_times.correct(connection, now))
        if count:
            log.warn(
                "{count} times in the catalogue were in the future: the clock was or is wrong: they"
                " were set to now: check the system's clock",
                count=count,
            )
        return count

    async def expire(self, now: int, failure_memory: int) -> dict[str, int]:
        """Deletes a part of the rows that are too old; returns how many of each table."""
        return await self._database.write(
            lambda connection: stored_times.expire(
                connection, stored_times.expired_before(now, failure_memory)
            )
        )

    # -- layers

    async def record_layer(self, row: LayerRow) -> None:
        """Records what a blob inflates to. Its bytes cannot change, so the first record stands."""
        await self._database.write(lambda connection: queries.insert_layer(connection, row))

    async def layer(self, blob: Digest) -> LayerRow | None:
        """Returns what a blob inflates to, if it was ever inflated here."""
        return await self._database.read(lambda connection: queries.layer(connection, blob))
