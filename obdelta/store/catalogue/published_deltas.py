"""Finished deltas: publishing them, and look-ups of what is published in a repository."""

from __future__ import annotations

import sqlite3

from twisted.logger import Logger

from obdelta.oci import Descriptor, Digest, Form, Manifest
from obdelta.store import integrity
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import queries
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.evictions import Evictions
from obdelta.store.catalogue.records import (
    DeltaKey,
    DeltaRow,
    Kind,
    ManifestRow,
    Publication,
    Totals,
)

log = Logger()

_LEADS_TO = (
    "SELECT publications.target_repository, target FROM deltas JOIN publications ON delta = id"
    " WHERE kind = 'v3' AND (content = ?1 OR content IN (SELECT manifest FROM manifest_blobs WHERE"
    " blob = ?1 AND media_type IN ('application/vnd.docker.container.image.v1+json',"
    " 'application/vnd.oci.image.config.v1+json')))"
)


class PublishedDeltas:
    """The part of the catalogue that publishes and finds deltas.

    With ``blobs``, a delta is found only if it can be served from there. ``recipe`` is the current
    one of v3 deltas, which can rebuild lost layers.
    """

    def __init__(self, database: Database, blobs: BlobStore | None, recipe: int) -> None:
        self._database, self._blobs, self._recipe = database, blobs, recipe
        self.evictions = Evictions(database)

    # -- publishing

    async def publish_v3(self, row: DeltaRow, manifest: Manifest, blobs: BlobStore) -> DeltaRow:
        """Makes a delta image visible in ``row.target_repository``, in one transaction.

        Its config and layers must be in ``blobs``, pinned by the caller until this returns. If one
        is missing, raises BlobUnknown or SizeMismatch with its name. If the key is published
        already, that row stays and is returned, now visible for these repositories too. If its
        layers were evicted, they count as stored again; if they came out different, the row is
        replaced.
        """
        if row.key.kind != "v3" or row.content != manifest.digest:
            raise ValueError("the row is not this manifest's")

        def publish(connection: sqlite3.Connection) -> DeltaRow:
            found = queries.find(connection, row.key)
            evicted = found is not None and queries.has_evicted(connection, found.content)
            pinned = queries.is_pinned(connection, row.key)
            if found is not None and evicted and found.content != manifest.digest:
                queries.delete_delta(connection, found.key)
                queries.delete_if_unused(connection, found.content)
                found = None
            if evicted or found is None:
                for part in (manifest.config, *manifest.layers):
                    queries.require_blob(blobs, part.digest, part.size)
                queries.insert_manifest(connection, manifest)
                found = found or queries.insert_delta(connection, row)
                queries.pin(connection, row.key, pinned)
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
                queries.require_blob(blobs, row.content, row.delta_bytes)
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
            "the {kind} delta from {base} to {target} has missing or damaged files: {outcome}",
            kind=row.key.kind,
            base=str(row.key.base),
            target=str(row.key.target),
            outcome=(
                "it is built again on request"
                if kept is None
                else "its layers are rebuilt on request"
            ),
        )
        return kept

    async def lost(self, digest: Digest) -> bool:
        """Handles a blob whose file is missing or has another size. Returns whether it is evicted,
        and so can be rebuilt.
        """
        evicted = await self.evictions.is_evicted(digest)
        if evicted or self._blobs is None:
            return evicted
        for row in await self._database.read(
            lambda connection: queries.deltas_with_blob(connection, digest)
        ):
            await self._repaired(row)
        return await self.evictions.is_evicted(digest)

    async def delta_tagged(self, repository: str, *tags: str) -> DeltaRow | None:
        """Returns the delta behind the first of these tags that a repository has."""
        rest = (
            "WHERE tag = ? AND EXISTS (SELECT 1 FROM publications WHERE delta = id AND"
            " target_repository = ?)"
        )

        def find(connection: sqlite3.Connection) -> DeltaRow | None:
            rows = (queries.delta(connection, rest, tag, repository) for tag in tags)
            return next((row for row in rows if row is not None), None)

        return await self._database.read(find)

    async def tagged(self, repository: str, *tags: str) -> Digest | None:
        """Returns the digest of the manifest of :meth:`delta_tagged`."""
        row = await self.delta_tagged(repository, *tags)
        return None if row is None else row.content

    async def target_of(self, repository: str, digest: Digest) -> Digest | None:
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

    async def targets_anywhere(self, config: Digest) -> list[tuple[str, Digest]]:
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
        """Returns a config or layer, if it is part of a delta image published in this repository.

        If it is part of several forms, its media type is that of the universal form.
        """
        traits = Form.UNIVERSAL.traits
        types = traits.config_type, traits.layer_type, traits.copy_type

        def find(connection: sqlite3.Connection) -> Descriptor | None:
            row = connection.execute(
                "SELECT media_type, size FROM manifest_blobs JOIN blobs ON blob = digest WHERE"
                " digest = ? AND EXISTS (SELECT 1 FROM deltas JOIN publications ON delta = id WHERE"
                " kind = 'v3' AND content = manifest AND publications.target_repository = ?)"
                " ORDER BY media_type NOT IN (?, ?, ?) LIMIT 1",
                (digest.hex, repository, *types),
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
        form: Form | None = None,
    ) -> DeltaRow | None:
        """Returns the newest delta published for two repositories, limited to certain manifests and
        a form if they are given. The universal form comes before a pair's other forms, which are
        built later.
        """
        rest = (
            "WHERE kind = ? AND base = coalesce(?, base) AND target = coalesce(?, target) AND"
            " form = coalesce(?, form) AND EXISTS (SELECT 1 FROM publications WHERE delta = id AND"
            " target_repository = ? AND publications.base_repository = ?) ORDER BY"
            " (SELECT max(created) FROM deltas AS other"
            " WHERE (other.kind, other.base, other.target) ="
            " (deltas.kind, deltas.base, deltas.target)) DESC, recipe DESC, form <> ?, id DESC"
            " LIMIT 1"
        )
        digests = [digest.hex if digest is not None else None for digest in (base, target)]
        name = None if form is None else form.value
        rest_values = target_repository, base_repository, Form.UNIVERSAL.value
        return await self._database.read(
            lambda connection: queries.delta(connection, rest, kind, *digests, name, *rest_values)
        )

    async def releases_before(self, row: DeltaRow, most: int) -> list[DeltaRow]:
        """Returns the deltas of earlier releases, newest first: the newest delta to this delta's
        base, then the newest one to the base of that, and so on.
        """

        def read(connection: sqlite3.Connection) -> list[DeltaRow]:
            found, seen = list[DeltaRow](), {row.key.target}
            key = row.key
            while len(found) < most and key.base not in seen:
                seen.add(key.base)
                # The index of the unique key is enough: it begins with kind and recipe.
                before = queries.delta(
                    connection,
                    "WHERE kind = ? AND recipe = ? AND target = ? AND form = ?"
                    " ORDER BY created DESC, id DESC LIMIT 1",
                    key.kind,
                    key.recipe,
                    key.base.hex,
                    key.form.value,
                )
                if before is None:
                    break
                found.append(before)
                key = before.key
            return found

        return await self._database.read(read)

    async def publications(self) -> list[Publication]:
        """Returns all publications of all deltas, the oldest delta first."""

        def read(connection: sqlite3.Connection) -> list[Publication]:
            rows = connection.execute(
                "SELECT kind, recipe, base, target, form, publications.base_repository,"
                " publications.target_repository, delta_bytes, max(created, last_served), pinned"
                " FROM deltas JOIN publications ON delta = id ORDER BY id"
            )
            return [
                Publication(
                    DeltaKey(row[0], row[1], Digest(row[2]), Digest(row[3]), Form(row[4])),
                    row[5],
                    row[6],
                    row[7],
                    row[8],
                    bool(row[9]),
                )
                for row in rows
            ]

        return await self._database.read(read)

    async def recent(self, limit: int) -> list[DeltaRow]:
        """Returns the newest deltas, newest first."""
        rest = "ORDER BY created DESC, id DESC LIMIT ?"
        return await self._database.read(lambda connection: queries.deltas(connection, rest, limit))

    async def totals(self) -> Totals:
        """Returns the totals of the catalogue."""
        return await self._database.read(queries.totals)
