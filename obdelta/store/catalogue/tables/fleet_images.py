"""Images of releases as openBalena's API named them: their fleets, for pruning, and their names."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.database import Database

KEPT_SECONDS = 86400 * 400
MAX_ROWS = 100_000
"""The oldest rows above it are deleted. Deltas of images without a row are never pruned."""


@dataclass(frozen=True, slots=True)
class KnownImage:
    """One image of a release. ``location`` is its name in the API; ``application`` the API's ID of
    its fleet. ``manifest`` is None if the API knows no digest.
    """

    location: str
    repository: str
    manifest: Digest | None
    application: int
    names: ImageNames


class FleetImages:
    """The table in the catalogue's database, at most ``most`` rows."""

    def __init__(self, database: Database, most: int = MAX_ROWS) -> None:
        self._database, self._most = database, most

    async def record(self, images: Sequence[KnownImage], now: float) -> None:
        """Records images at ``now`` (seconds UTC), in one transaction. Raises Unavailable."""
        rows = [
            (
                image.location,
                image.repository,
                "" if image.manifest is None else image.manifest.hex,
                image.application,
                image.names.fleet,
                image.names.service,
                image.names.release,
                image.names.commit,
                int(now),
            )
            for image in images
        ]

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT OR REPLACE INTO fleet_images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            connection.execute(
                "DELETE FROM fleet_images WHERE last < (SELECT last FROM fleet_images"
                " ORDER BY last DESC LIMIT 1 OFFSET ?)",
                (self._most - 1,),
            )

        if rows:
            await self._database.write(write)

    async def of(self, repositories: Collection[str]) -> dict[str, KnownImage]:
        """Returns the images of those repositories that have one. Raises Unavailable."""
        return {
            image.repository: image
            for image in await self._read(
                " WHERE repository IN (SELECT value FROM json_each(?))",
                json.dumps(sorted(repositories)),
            )
        }

    async def all(self) -> list[KnownImage]:
        """Returns all images, in the order of their locations. Raises Unavailable."""
        return await self._read(" ORDER BY location")

    async def _read(self, rest: str, *values: str) -> list[KnownImage]:
        def read(connection: sqlite3.Connection) -> list[KnownImage]:
            found = connection.execute(
                'SELECT location, repository, manifest, application, fleet, service, "release",'  # noqa: S608
                ' "commit" FROM fleet_images' + rest,
                values,
            )
            return [
                KnownImage(
                    row[0],
                    row[1],
                    Digest(row[2]) if row[2] else None,
                    row[3],
                    ImageNames(*row[4:]),
                )
                for row in found
            ]

        return await self._database.read(read)
