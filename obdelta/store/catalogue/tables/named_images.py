"""Human names of images by the digest of their manifests, for operators."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.refreshed_rows import RefreshedRows

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 86400
"""Seconds for which a recorded image is not written again."""
MAX_ROWS = 100_000
"""The oldest rows above it are deleted."""


class NamedImages:
    """The table of image names in the catalogue's database, at most ``most`` rows."""

    def __init__(self, database: Database, most: int = MAX_ROWS) -> None:
        self._database = database
        self._rows = RefreshedRows(database, "image_names", most, REFRESH_SECONDS)

    async def record(self, manifest: Digest, names: ImageNames, now: float) -> None:
        """Records the names of an image at ``now`` (seconds UTC); without names nothing. Raises
        Unavailable.
        """
        if names:
            row = (manifest.hex, names.fleet, names.service, names.release, names.commit)
            await self._rows.write(row, now)

    async def of(self, manifests: Collection[Digest]) -> dict[Digest, ImageNames]:
        """Returns the names of those images that have any. The API's come before those that an
        image states itself: images inherit labels. Raises Unavailable.
        """
        wanted = json.dumps([digest.hex for digest in dict.fromkeys(manifests)])

        def read(connection: sqlite3.Connection) -> dict[Digest, ImageNames]:
            rows = [
                row
                for table in ("image_names", "fleet_images")
                for row in connection.execute(
                    f'SELECT manifest, fleet, service, "release", "commit" FROM {table}'  # noqa: S608
                    " WHERE manifest IN (SELECT value FROM json_each(?)) ORDER BY last",
                    (wanted,),
                )
            ]
            return {Digest(row[0]): ImageNames(*row[1:]) for row in rows}

        return await self._database.read(read) if manifests else {}
