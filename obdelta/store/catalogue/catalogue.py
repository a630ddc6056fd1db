"""The catalogue's interface: finished deltas, manifests, failures, inflated layers and counters in
SQLite.

Invariant: every blob of every manifest in the catalogue lies in the blob store or is recorded as
evicted. Publishing checks the files and writes the rows in one transaction. Removing deletes the
rows first and the files afterwards, each file under the lock that publishing takes. A kill in
between leaves unreferenced files, which :meth:`Catalogue.sweep` finds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

from obdelta.errors import StoreFull, Unavailable
from obdelta.oci import Descriptor, DiffID, Digest, Manifest
from obdelta.store import integrity, named_deltas
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import (
    failures,
    history,
    queries,
    requested_updates,
    slow_work,
    stored_times,
)
from obdelta.store.catalogue.counters import Tallies
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.engine_images import EngineNames
from obdelta.store.catalogue.evictions import Evictions, Protection, mend, outdated
from obdelta.store.catalogue.history import Served
from obdelta.store.catalogue.pending_builds import QueuedBuilds
from obdelta.store.catalogue.records import (
    DeltaKey,
    DeltaRow,
    FailureRow,
    Kind,
    LayerRow,
    ManifestRow,
    Outcome,
    Totals,
)
from obdelta.store.catalogue.requested_updates import UpdateHistory
from obdelta.store.catalogue.slow_work import SlowWork
from obdelta.store.catalogue.started_pulls import StartedPull, StartedPulls
from obdelta.store.named_deltas import NamedDeltas

log = Logger()

_LEADS_TO = (
    "SELECT publications.target_repository, target FROM deltas JOIN publications ON delta = id"
    " WHERE kind = 'v3' AND (content = ?1 OR content IN (SELECT manifest FROM manifest_blobs WHERE"
    " blob = ?1 AND media_type = 'application/vnd.docker.container.image.v1+json'))"
)


class Catalogue:
    """The open catalogue. All its work runs in one thread of its own. Raises StoreFull,
    Unavailable, CatalogueUnusable.

    Cancelling ends the wait; the requested work is done all the same.
    """

    def __init__(
        self, database: Database, blobs: BlobStore | None = None, recipe: int = -1
    ) -> None:
        self._database, self._blobs, self._recipe = database, blobs, recipe
        self._tallies = Tallies(database)
        self.queue = QueuedBuilds(database)
        self.slow_work = SlowWork(database)
        self.evictions = Evictions(database)
        self.asked = UpdateHistory(database)
        self.started_pulls = StartedPulls(database)
        self.engine_names = EngineNames(database)
        self.named = NamedDeltas(database)

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
        await self._tallies.settle()
        await self._database.close()

    # -- publishing

    async def publish_v3(self, row: DeltaRow, manifest: Manifest, blobs: BlobStore) -> DeltaRow:
        """Makes a delta image visible in ``row.target_repository``, in one transaction.

        Its config and layers must lie in ``blobs``, pinned by the caller until this returns.
        BlobUnknown or SizeMismatch names the one that does not. If the key is published already,
        that row stays and is returned, now visible for these repositories too. If its layers were
        evicted, they count as stored again; if they came out different, the row is replaced.
        """
        if row.key.kind != "v3" or row.content != manifest.digest:
            raise ValueError("the row is not this manifest's")

        def publish(connection: sqlite3.Connection) -> DeltaRow:
            found = queries.find(connection, row.key)
            again = found is not None and queries.has_evicted(connection, found.content)
            if found is not None and again and found.content != manifest.digest:
                queries.delete_delta(connection, found.key)
                queries.drop_if_bare(connection, found.content)
                found = None
            if again or found is None:
                for part in (manifest.config, *manifest.layers):
                    queries.need(blobs, part.digest, part.size)
                queries.insert_manifest(connection, manifest)
                found = found or queries.insert_delta(connection, row)
            queries.insert_publication(
                connection, row.key, row.base_repository, row.target_repository
            )
            return found

        return await self._database.write(publish)

    async def publish_v2(self, row: DeltaRow, blobs: BlobStore) -> DeltaRow:
        """Records a batch stored in ``blobs`` as ``row.content`` with ``row.delta_bytes``;
        otherwise like v3.
        """
        if row.key.kind != "v2":
            raise ValueError("the row is not of a batch")

        def publish(connection: sqlite3.Connection) -> DeltaRow:
            found = queries.find(connection, row.key)
            if found is None:
                queries.need(blobs, row.content, row.delta_bytes)
                queries.insert_blob(connection, row.content, row.delta_bytes)
                found = queries.insert_delta(connection, row)
            queries.insert_publication(
                connection, row.key, row.base_repository, row.target_repository
            )
            return found

        return await self._database.write(publish)

    async def publish_for(
        self, key: DeltaKey, base_repository: str, target_repository: str
    ) -> DeltaRow | None:
        """Makes a finished delta visible for another pair of repositories with the same contents;
        None if there is none.

        The caller has checked that the client may pull both. Writes nothing if the delta is visible
        already.
        """
        row = await self.delta(key)
        if row is None or (row.base_repository, row.target_repository) == (
            base_repository,
            target_repository,
        ):
            return row

        def publish(connection: sqlite3.Connection) -> DeltaRow | None:
            found = queries.find(connection, key)
            if found is not None:
                queries.insert_publication(connection, key, base_repository, target_repository)
            return found

        return await self._database.write(publish)

    # -- look-ups of published deltas

    async def delta(self, key: DeltaKey) -> DeltaRow | None:
        """Returns the finished delta of a pair, if its manifest and blobs exist at their sizes, or
        can be rebuilt.

        A delta that cannot be served is deleted, and this is logged.
        """

        def find(connection: sqlite3.Connection) -> tuple[DeltaRow | None, bool]:
            row = queries.find(connection, key)
            return row, row is None or self._blobs is None or integrity.is_whole(
                connection, self._blobs, row
            )

        row, whole = await self._database.read(find)
        return row if row is None or whole else await self._repaired(row)

    async def _repaired(self, row: DeltaRow) -> DeltaRow | None:
        """Returns a delta with missing or damaged files, if its layers can be rebuilt."""

        def repair(connection: sqlite3.Connection) -> DeltaRow | None:
            found = queries.find(connection, row.key)
            if found is None or self._blobs is None:
                return found
            return found if integrity.repair(connection, self._blobs, found, self._recipe) else None

        kept = await self._database.write(repair)
        log.warn(
            "the {kind} delta from {base} to {target} is not whole on the disk: {outcome}",
            kind=row.key.kind,
            base=str(row.key.base),
            target=str(row.key.target),
            outcome=(
                "it is built anew" if kept is None else "its layers are rebuilt when devices ask"
            ),
        )
        return kept

    async def lost(self, digest: Digest) -> bool:
        """Handles a blob whose file is missing or has another size. Returns whether it is evicted,
        and so can be rebuilt.
        """
        if await self.evictions.is_evicted(digest) or self._blobs is None:
            return await self.evictions.is_evicted(digest)
        for row in await self._database.read(
            lambda connection: queries.deltas_with_blob(connection, digest)
        ):
            await self._repaired(row)
        return await self.evictions.is_evicted(digest)

    async def delta_tagged(self, repository: str, tag: str) -> DeltaRow | None:
        """Returns the delta behind a tag in a repository."""

        rest = (
            "WHERE tag = ? AND EXISTS (SELECT 1 FROM publications WHERE delta = id AND"
            " target_repository = ?)"
        )
        return await self._database.read(
            lambda connection: queries.delta(connection, rest, tag, repository)
        )

    async def tagged(self, repository: str, tag: str) -> Digest | None:
        """Returns the manifest digest behind a delta tag in a repository."""
        row = await self.delta_tagged(repository, tag)
        return None if row is None else row.content

    async def leads_to(self, repository: str, digest: Digest) -> Digest | None:
        """Returns the target manifest of a delta image published in this repository, by the digest
        of the delta's manifest or config.
        """

        def find(connection: sqlite3.Connection) -> Digest | None:
            row = connection.execute(
                _LEADS_TO + " AND publications.target_repository = ?2", (digest.hex, repository)
            )
            found = row.fetchone()
            return None if found is None else Digest(found[1])

        return await self._database.read(find)

    async def leads_to_anywhere(self, config: Digest) -> list[tuple[str, Digest]]:
        """Returns the same for every repository, with its name; limited to a few."""

        def find(connection: sqlite3.Connection) -> list[tuple[str, Digest]]:
            rows = connection.execute(_LEADS_TO + " ORDER BY delta DESC LIMIT 16", (config.hex,))
            return [(repository, Digest(target)) for repository, target in rows]

        return await self._database.read(find)

    async def manifest(self, repository: str, digest: Digest) -> ManifestRow | None:
        """Returns a delta image's manifest, if it is published in this repository."""

        def find(connection: sqlite3.Connection) -> ManifestRow | None:
            bases = connection.execute(
                "SELECT DISTINCT publications.base_repository FROM deltas JOIN publications ON"
                " delta = id WHERE kind = 'v3' AND content = ? AND"
                " publications.target_repository = ?",
                (digest.hex, repository),
            ).fetchall()
            if not bases:
                return None
            found = integrity.raw_manifest_of(connection, digest)
            return (
                None
                if found is None
                else ManifestRow(digest, *found, frozenset(base for (base,) in bases))
            )

        return await self._database.read(find)

    async def blob(self, repository: str, digest: Digest) -> Descriptor | None:
        """Returns a config or layer, if it is part of a delta image published in this
        repository.
        """

        def find(connection: sqlite3.Connection) -> Descriptor | None:
            row = connection.execute(
                "SELECT media_type, size FROM manifest_blobs JOIN blobs ON blob = digest WHERE"
                " digest = ? AND EXISTS (SELECT 1 FROM deltas JOIN publications ON delta = id WHERE"
                " kind = 'v3' AND content = manifest AND publications.target_repository = ?)"
                " LIMIT 1",
                (digest.hex, repository),
            ).fetchone()
            return None if row is None else Descriptor(row[0], digest, row[1])

        return await self._database.read(find)

    async def between(
        self,
        kind: Kind,
        base_repository: str,
        target_repository: str,
        base: Digest | None = None,
        target: Digest | None = None,
    ) -> DeltaRow | None:
        """Returns the newest delta published for two repositories, limited to certain manifests if
        they are given.
        """
        rest = (
            "WHERE kind = ? AND base = coalesce(?, base) AND target = coalesce(?, target) AND"
            " EXISTS (SELECT 1 FROM publications WHERE delta = id AND target_repository = ? AND"
            " publications.base_repository = ?) ORDER BY created DESC, id DESC LIMIT 1"
        )
        digests = [digest.hex if digest is not None else None for digest in (base, target)]
        return await self._database.read(
            lambda connection: queries.delta(
                connection, rest, kind, *digests, target_repository, base_repository
            )
        )

    async def recent(self, limit: int) -> list[DeltaRow]:
        """Returns the newest deltas, newest first."""

        rest = "ORDER BY created DESC, id DESC LIMIT ?"
        return await self._database.read(lambda connection: queries.deltas(connection, rest, limit))

    async def totals(self) -> Totals:
        """Returns the totals of the catalogue."""

        def find(connection: sqlite3.Connection) -> Totals:
            (deltas,) = connection.execute("SELECT count(*) FROM deltas").fetchone()
            here = "SELECT count(*), coalesce(sum(size), 0) FROM blobs WHERE evicted = 0"
            blobs, size = connection.execute(here).fetchone()
            return Totals(deltas, blobs, size)

        return await self._database.read(find)

    async def served(
        self, content: Digest, now: int, pull: StartedPull | None = None, *, times: int = 1
    ) -> None:
        """Records that a device receives a delta's manifest or batch, and the pull that starts with
        it. Many at once cost one write.

        ``times`` 0: serving is about to start. Await it before reading the manifest: deltas served
        within the grace period are not removed.
        """
        await self._tallies.served(content, now, pull, times=times)

    # -- removal

    async def removable(self, before: int, limit: int = 100) -> list[DeltaRow]:
        """Returns deltas built and last served before a time, least recently served first."""

        rest = "WHERE last_served < ? ORDER BY last_served, id LIMIT ?"
        return await self._database.read(
            lambda connection: queries.deltas(connection, rest, before, limit)
        )

    async def remove(
        self, keys: Iterable[DeltaKey], blobs: BlobStore, *, unless: Protection | None = None
    ) -> int:
        """Removes deltas, then the blobs that nothing refers to any more. Returns the bytes freed.

        A delta that ``unless`` protects by now stays. Pinned blobs stay until the next
        :meth:`sweep`. On a full disk the reserve of ``blobs`` is used.
        """
        chosen = list(keys)
        await self._tallies.settle()

        def remove_rows(connection: sqlite3.Connection) -> list[Digest]:
            parts: list[Digest] = []
            for key in chosen:
                row = queries.find(connection, key)
                if row is None or (unless is not None and unless.covers(connection, key)):
                    continue
                parts += queries.blobs_of(connection, row)
                queries.delete_delta(connection, key)
                queries.drop_if_bare(connection, row.content)
            return parts

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
        files are removed too, except ``keep`` and pinned ones. With the ``recipe`` of v3 deltas,
        layers that it can rebuild are only recorded as missing. Deltas of other recipes with
        missing layers are removed.

        Failures of an older recipe are deleted, as are its deltas that were built and last served
        ``before`` a time. Devices may be pulling the newer ones.
        """

        def retire(connection: sqlite3.Connection) -> list[DeltaKey]:
            gone = (
                []
                if recipe is None
                else mend(connection, blobs, recipe) + outdated(connection, recipe, before)
            )
            here = connection.execute("SELECT digest, size FROM blobs WHERE evicted = 0")
            known = [(Digest(hex_), size) for hex_, size in here]
            broken = [digest for digest, size in known if blobs.size(digest) != size]
            rows = [
                row for digest in broken for row in queries.deltas_with_blob(connection, digest)
            ]
            keys = list(dict.fromkeys(row.key for row in rows))
            for key in keys:
                queries.delete_delta(connection, key)
            queries.drop_bare_manifests(connection)
            return gone + keys

        def tidy(connection: sqlite3.Connection) -> int:
            queries.discard_unreferenced(connection, blobs)
            known = {
                hex_ for (hex_,) in connection.execute("SELECT digest FROM blobs WHERE evicted = 0")
            }
            orphans = [
                digest
                for digest in blobs.digests()
                if digest.hex not in known and digest not in keep
            ]
            return sum(blobs.discard(digest) for digest in orphans)

        keys = await self._database.write(retire)
        for key in keys:
            log.warn(
                "retired the {kind} delta from {base} to {target}: its files are not whole, or its"
                " recipe is outdated",
                kind=key.kind,
                base=str(key.base),
                target=str(key.target),
            )
        orphans = await self._database.write(tidy)
        if orphans:
            log.info("start: {count} blobs that no delta refers to were removed", count=orphans)
        return keys, orphans

    # -- failures

    async def remember_failure(
        self,
        kind: Kind,
        base: Digest,
        target: Digest,
        outcome: Outcome,
        reason: str,
        now: int,
        memory_seconds: int,
        *,
        times: int = 1,
        repositories: tuple[str, str] = ("", ""),
        recipe: int = 0,
    ) -> FailureRow:
        """Adds ``times`` failures of a pair; the count restarts if the last failure has expired by
        now.

        ``repositories``: of base and target. Errors are remembered for these only, verdicts on the
        contents for all repositories that have them. ``recipe``: that of the build; see
        :meth:`sweep`.
        """
        row = FailureRow(kind, base, target, outcome, reason, times, now, *repositories, recipe)
        return await self._database.write(
            lambda connection: failures.remember(connection, row, now - memory_seconds)
        )

    async def failure(
        self,
        kind: Kind,
        base: Digest,
        target: Digest,
        now: int,
        memory_seconds: int,
        repositories: tuple[str, str] = ("", ""),
    ) -> FailureRow | None:
        """Returns how a pair of these repositories failed, if that is younger than
        ``memory_seconds``.
        """
        after = now - memory_seconds
        return await self._database.read(
            lambda connection: failures.find(connection, kind, base, target, repositories, after)
        )

    async def failures(self, now: int, memory_seconds: int) -> list[FailureRow]:
        """Returns all remembered failures, latest first."""
        return await self._database.read(
            lambda connection: failures.later_than(connection, now - memory_seconds)
        )

    async def forget(self, kind: Kind, base: Digest, target: Digest) -> None:
        """Deletes the failures of a pair, because it was built or a new attempt was requested."""
        await self._database.write(
            lambda connection: failures.forget(connection, kind, base, target)
        )

    # -- times

    async def correct_times(self, now: int) -> int:
        """Sets stored times that are far ahead of ``now`` to ``now``; returns and logs how many."""
        count = await self._database.write(lambda connection: stored_times.correct(connection, now))
        if count:
            log.warn(
                "{count} times in the catalogue were ahead of the clock: it was wrong, or is: they"
                " were set to now: check the system's clock",
                count=count,
            )
        return count

    async def expire(self, now: int, failure_memory: int) -> dict[str, int]:
        """Deletes a part of the rows that are too old; returns how many of each table."""
        before = {
            "asked": now - requested_updates.KEPT_SECONDS,
            "failures": now - failure_memory,
            "hours": now // history.HOUR - history.KEPT_HOURS,
            "named_deltas": now - named_deltas.KEPT_SECONDS,
            "repository_failures": now - failure_memory,
            "slow_work": now - slow_work.MEMORY_SECONDS,
            "started_pulls": now,
        }
        return await self._database.write(
            lambda connection: stored_times.expire(connection, before)
        )

    # -- layers and counters

    async def record_layer(self, row: LayerRow) -> None:
        """Records what a blob inflates to. Its bytes cannot change, so the first record stands."""

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO layers VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (row.blob.hex, row.blob_size, row.diff_id.hex, row.size, row.media_type),
            )

        await self._database.write(insert)

    async def layer(self, blob: Digest) -> LayerRow | None:
        """Returns what a blob inflates to, if it was ever inflated here."""

        def find(connection: sqlite3.Connection) -> LayerRow | None:
            row = connection.execute("SELECT * FROM layers WHERE blob = ?", (blob.hex,)).fetchone()
            return (
                None
                if row is None
                else LayerRow(Digest(row[0]), row[1], DiffID(row[2]), row[3], row[4])
            )

        return await self._database.read(find)

    async def add(self, name: str, amount: int = 1) -> None:
        """Raises a counter. Many at once cost one write."""
        await self._tallies.add(name, amount)

    async def count(self, name: str, amount: int = 1) -> None:
        """Raises a counter like :meth:`add`, but only logs a failed write."""
        try:
            await self.add(name, amount)
        except Unavailable as error:
            # A full disk is no reason to keep a device from its update.
            log.warn("{name} was not counted: {reason}", name=name, reason=str(error))

    async def counters(self) -> dict[str, int]:
        """Returns all counters by name."""
        return await self._database.read(
            lambda connection: dict(connection.execute("SELECT name, value FROM counters"))
        )

    async def served_since(self, since: int, step: int) -> list[Served]:
        """Returns what was served, in steps of ``step`` hours aligned to the epoch; empty steps are
        left out.
        """
        return await self._database.read(lambda connection: history.read(connection, since, step))
